"""Narrower students: what is kept is the teacher's, and what is cut did not matter where the oracle says so."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from hfshrink import make_student, report
from hfshrink.distillation.students.width import widths_of
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import layer_stack

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "vit")
NEURONS = {"distilbert": "hidden_dim", "gpt2": "n_inner"}
HALF = {"distilbert": {"dim": 8}, "gpt2": {"n_embd": 8}, "llama": {"hidden_size": 8, "num_attention_heads": 2}}
DOWN = {"distilbert": "ffn.lin2", "llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "vit": "mlp.fc2"}
UPS = {"distilbert": ["ffn.lin1"], "llama": ["mlp.gate_proj", "mlp.up_proj"], "gpt2": ["mlp.c_fc"], "vit": ["mlp.fc1"]}


def down(layer, family):
    return layer.get_submodule(DOWN.get(family, "output.dense"))


def made(family, **config):
    """A tiny model; ELECTRA with embeddings of another width than any student's, else it has other weights."""
    return tiny.model(family, **config, **({"embedding_size": 4} if family == "electra" else {}))


def neurons(family, number):
    return {NEURONS.get(family, "intermediate_size"): number}


def same(a, b, tolerance=1e-5):
    assert torch.allclose(a, b, atol=tolerance, rtol=1e-4)


def masked_logits(teacher, batch, masks):
    """The teacher's logits with the inputs of some modules multiplied by 0 and 1."""
    hooks = [
        module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask, *args[1:]))
        for module, mask in masks
    ]
    try:
        return tiny.logits(teacher, batch)
    finally:
        for hook in hooks:
            hook.remove()


def one_hot(kept, size):
    mask = torch.zeros(size)
    mask[kept] = 1
    return mask


@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_changes_nothing(family):
    teacher, batch = tiny.model(family), tiny.inputs(family)
    widths = widths_of(teacher)
    student = make_student(teacher, hidden_size=widths.hidden_size, **neurons(family, widths.intermediate_size))
    assert torch.equal(tiny.logits(student, batch), tiny.logits(teacher, batch))
    assert all(torch.equal(a, student.state_dict()[name]) for name, a in teacher.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_cut_by_activation_equal_the_teacher_with_the_quiet_ones_masked(family):
    """Slow loop: the mean absolute activation of every neuron, token by token, without padding."""
    teacher, batch = tiny.model(family), tiny.inputs(family)
    seen, masks = {}, []
    _, layers = layer_stack(teacher)
    hooks = [
        down(layer, family).register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
        for n, layer in enumerate(layers)
    ]
    tiny.logits(teacher, batch)
    for hook in hooks:
        hook.remove()
    mask = batch.get("attention_mask")
    for number, layer in enumerate(layers):
        total, count = 0, 0
        for row in range(len(seen[number])):
            for position in range(seen[number].shape[1]):
                if mask is None or mask[row, position]:
                    total, count = total + seen[number][row, position].abs(), count + 1
        kept = (total / count).topk(15).indices
        masks.append((down(layer, family), one_hot(kept, total.shape[0])))
    student = make_student(teacher, calibration=[batch], **neurons(family, 15))
    same(tiny.logits(student, batch), masked_logits(teacher, batch, masks))
    assert report(student).steps[0].method == "activation"


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_neurons_go_without_a_trace(family, calibrated):
    teacher, batch = tiny.model(family), tiny.inputs(family)
    dead = [0, 3, 5, 11, 17, 22, 23]
    for layer in layer_stack(teacher)[1]:
        for name in UPS.get(family, ["intermediate.dense"]):
            module = layer.get_submodule(name)
            columns = module.weight.T if isinstance(module, nn.Linear) else module.weight
            columns.data[:, dead] = 0
            if module.bias is not None:
                module.bias.data[dead] = 0
        module = down(layer, family)
        rows = module.weight.T if isinstance(module, nn.Linear) else module.weight
        rows.data[dead] = 0
    size = widths_of(teacher).intermediate_size - len(dead)
    student = make_student(teacher, calibration=[batch] if calibrated else None, **neurons(family, size))
    same(tiny.logits(student, batch), tiny.logits(teacher, batch))


def with_second_half_unread(teacher):
    """Channels 8..15 copy 0..7, so that the norms' statistics are those of one half, and nobody reads them.

    Heads 2 and 3 are not read either.
    """
    conv1d = {id(m.weight) for m in teacher.modules() if isinstance(m, Conv1D)}
    linear = {id(m.weight) for m in teacher.modules() if isinstance(m, nn.Linear)} - {
        id(getattr(teacher.get_input_embeddings(), "weight", None))
    }
    for weight in teacher.parameters():
        data = weight.data.T if id(weight) in conv1d else weight.data
        reads = id(weight) in linear | conv1d
        if reads and data.shape[1] in (16, 32):
            data.view(len(data), -1, 16)[:, :, 8:] = 0
            data *= 5  # the read half is the greater one
        for dim, size in enumerate(data.shape):
            if size == 16 and not (reads and dim == 1):
                data.narrow(dim, 8, 8).copy_(data.narrow(dim, 0, 8).clone())
    for name, norm in teacher.named_modules():
        if name.endswith(("ln_f", "decoder.final_layer_norm")):  # a tied head reads both halves
            norm.weight.data[8:] = 0
            norm.bias.data[8:] = 0
    return teacher


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_channels_that_nobody_reads_go_without_a_trace(family):
    teacher, batch = with_second_half_unread(made(family)), tiny.inputs(family)
    student = make_student(teacher, **HALF.get(family, {"hidden_size": 8}))
    assert student.config.hidden_size == 8
    assert student.config.num_attention_heads == 2
    same(tiny.logits(student, batch), tiny.logits(teacher, batch))
    old, new = report(student).steps[0].results["widths"]["hidden_size"]
    assert (old, new) == (16, 8)


def test_zero_channels_of_a_root_mean_square_norm_only_change_its_scale():
    """RMS over h of H channels, the rest 0, is √(H/h) times larger: the student with norms × √(H/h) is the teacher."""
    teacher, batch = tiny.model("llama", rms_norm_eps=1e-12), tiny.inputs("llama")
    zero = [1, 2, 7, 8, 12, 13, 14, 15]
    teacher.model.embed_tokens.weight.data[:, zero] = 0
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[zero] = 0
        layer.mlp.down_proj.weight.data[zero] = 0
    student = make_student(teacher, hidden_size=8, calibration=[batch])
    kept = [channel for channel in range(16) if channel not in zero]
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight[:, kept])
    for name, weight in student.named_parameters():
        if "norm" in name:
            weight.data *= 2**0.5
    same(tiny.logits(student, batch), tiny.logits(teacher, batch))


def test_every_weight_of_a_bert_is_sliced_to_the_same_channels():
    teacher = tiny.model("bert")
    kept = [0, 2, 5, 6, 9, 11, 12, 15]
    for norm in (m for m in teacher.modules() if isinstance(m, nn.LayerNorm)):
        norm.weight.data[kept] += 30
    student = make_student(teacher, hidden_size=8, calibration=[tiny.inputs("bert")])
    old, new = teacher.state_dict(), student.state_dict()
    same(new["bert.embeddings.word_embeddings.weight"], old["bert.embeddings.word_embeddings.weight"][:, kept], 0)
    same(new["bert.embeddings.LayerNorm.bias"], old["bert.embeddings.LayerNorm.bias"][kept], 0)
    same(new["bert.pooler.dense.weight"], old["bert.pooler.dense.weight"][kept][:, kept], 0)
    same(new["classifier.weight"], old["classifier.weight"][:, kept], 0)
    layer = "bert.encoder.layer.1."
    same(new[layer + "intermediate.dense.weight"], old[layer + "intermediate.dense.weight"][:, kept], 0)
    same(new[layer + "output.dense.weight"], old[layer + "output.dense.weight"][kept], 0)
    rows = [
        r
        for r in range(0, 16, 4)
        if (new[layer + "attention.self.key.bias"].view(-1, 4) == old[layer + "attention.self.key.bias"][r : r + 4])
        .all(dim=1)
        .any()
    ]
    assert len(rows) == 2
    heads = [r + i for r in rows for i in range(4)]
    query = "attention.self.query.weight"
    same(new[layer + query], old[layer + query][heads][:, kept], 0)
    out = "attention.output.dense.weight"
    same(new[layer + out], old[layer + out][kept][:, heads], 0)


@pytest.mark.parametrize("given", [{"num_attention_heads": 2}, {"num_key_value_heads": 1}])
def test_heads_of_a_llama_go_in_groups_and_equal_the_masked_teacher(given):
    """Slow loop over tokens: the L2 norm of what a group's heads give to o_proj."""
    teacher, batch = tiny.model("llama"), tiny.inputs("llama")
    seen, masks = {}, []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
        for n, layer in enumerate(teacher.model.layers)
    ]
    tiny.logits(teacher, batch)
    for hook in hooks:
        hook.remove()
    for number, layer in enumerate(teacher.model.layers):
        tokens = seen[number][batch["attention_mask"] == 1]
        norms = [sum(token[g * 8 : g * 8 + 8].norm() for token in tokens) for g in (0, 1)]
        kept = 8 * int(norms[1] > norms[0])
        masks.append((layer.self_attn.o_proj, one_hot(list(range(kept, kept + 8)), 16)))
    student = make_student(teacher, calibration=[batch], **given)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (2, 1)
    assert (student.config.hidden_size, student.config.head_dim) == (16, 4)
    same(tiny.logits(student, batch), masked_logits(teacher, batch, masks))


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_width_in_one_call_reload_in_plain_transformers(family, tmp_path):
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    teacher = made(family, **{depth: 3})
    batch = tiny.inputs(family)
    sizes = {**HALF.get(family, {"hidden_size": 8}), **neurons(family, 12)}
    student = make_student(teacher, layers=[0, 2], calibration=[batch], **sizes)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 2
    assert all(torch.equal(a, again.state_dict()[name]) for name, a in student.state_dict().items())
    assert torch.equal(tiny.logits(student, batch), tiny.logits(again, batch))
    step = report(again).steps[0]
    assert step.method == "layers+activation"
    assert step.results["copied_parameters"] == sum(p.numel() for p in student.parameters())
    assert step.results["fresh_parameters"] == 0
    assert step.settings["calibration"] == "list"


def test_one_call_equals_two():
    teacher = tiny.model("bert", num_hidden_layers=4)
    once = make_student(teacher, 2, intermediate_size=10)
    twice = make_student(make_student(teacher, 2), intermediate_size=10)
    assert all(torch.equal(a, twice.state_dict()[name]) for name, a in once.state_dict().items())
    assert report(once).steps[0].method == "layers+magnitude"


EXTRA = {
    "qwen2": ("Qwen2ForCausalLM", {**tiny.CONFIGS["llama"]}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {**tiny.ENCODER, "relative_attention": True}),
    "opt": ("OPTForCausalLM", {**tiny.ENCODER, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "dinov2": ("Dinov2ForImageClassification", {**tiny.CONFIGS["vit"]}),
}


@pytest.mark.parametrize("family", EXTRA)
def test_other_families_of_the_table(family, tmp_path):
    name, entries = EXTRA[family]
    config = transformers.AutoConfig.for_model(family, **entries)
    teacher = with_second_half_unread(getattr(transformers, name)._from_config(config).eval())
    batch = tiny.inputs("vit" if "Image" in name else "bert")
    if family == "dinov2":  # its neurons are a multiple of its channels
        for layer in teacher.dinov2.encoder.layer:
            layer.mlp.fc1.weight.data[32:] = 0
            layer.mlp.fc2.weight.data[:, 32:] = 0
    student = make_student(teacher, hidden_size=8, num_attention_heads=2)
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(student, batch), tiny.logits(again, batch))
    same(tiny.logits(student, batch), tiny.logits(teacher, batch))


@pytest.mark.parametrize("family", EXTRA)
def test_other_families_reload_with_fewer_layers(family, tmp_path):
    """DINOv2's config names one stage per layer."""
    name, entries = EXTRA[family]
    config = transformers.AutoConfig.for_model(family, **{**entries, "num_hidden_layers": 4})
    teacher = getattr(transformers, name)._from_config(config).eval()
    batch = tiny.inputs("vit" if "Image" in name else "bert")
    for sizes in ({}, {"hidden_size": 8, "num_attention_heads": 2}):
        student = make_student(teacher, num_layers=2, **sizes)
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path)
        assert again.config.num_hidden_layers == 2
        assert torch.equal(tiny.logits(student, batch), tiny.logits(again, batch))


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("bert", {"hidden_size": 6}, r"hidden_size=6 does not fit: .* heads have 4 channels.*: 4, 8, 12, 16\."),
        ("bert", {"num_attention_heads": 2}, r"num_attention_heads=2 with hidden_size=16 does not fit"),
        ("bert", {"hidden_size": 8, "num_attention_heads": 4}, "num_attention_heads=4 with hidden_size=8 does not"),
        ("bert", {"hidden_size": 32}, r"hidden_size must be a whole number in 1\.\.16 for this teacher, got 32"),
        ("bert", {"intermediate_size": 2.0}, r"intermediate_size must be .* got 2\.0"),
        ("bert", {"intermediate_size": True}, "intermediate_size must be .* got True"),
        ("bert", {"intermediat_size": 2}, "no width of the family 'bert'; .* Did you mean intermediate_size"),
        ("bert", {"num_labels": 3}, "num_labels=3 is no width of the family 'bert'"),
        ("distilbert", {"dim": 8, "hidden_size": 8}, "hidden_size is given twice, as hidden_size and as dim"),
        ("llama", {"num_attention_heads": 3}, "2 query heads share a key-value head.* got 3 and 1.5"),
        ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2}, "must be 2 times .* got 2 and 2"),
        ("llama", {"hidden_size": 10}, r"family 'llama' refuses these sizes: .*hidden size \(10\) is not a multiple"),
        ("electra", {"hidden_size": 8}, None),
    ],
)
def test_widths_that_do_not_fit(family, given, message):
    if message is None:
        teacher = tiny.model(family)
        teacher.config.embedding_size = 16  # says what the weights do not
        with pytest.raises(UnsupportedModelError, match="has other weights than its teacher .*embeddings_project"):
            make_student(teacher, **given)
        return
    with pytest.raises(SettingError, match=message):
        make_student(tiny.model(family), **given)


def test_family_without_a_row_is_named():
    config = transformers.MobileBertConfig(
        vocab_size=44,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        intra_bottleneck_size=8,
    )
    teacher = transformers.MobileBertForSequenceClassification(config)
    with pytest.raises(UnsupportedModelError, match=r"family 'mobilebert' can't be cut: .*layers can be dropped"):
        make_student(teacher, intermediate_size=8)


@pytest.mark.parametrize("sparse", [[0], [1]])
def test_family_of_unequal_layers_is_named(sparse):
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    config = transformers.Qwen2MoeConfig(
        **tiny.CONFIGS["llama"], **sizes, num_experts_per_tok=1, mlp_only_layers=sparse
    )
    teacher = transformers.Qwen2MoeForCausalLM(config)
    with pytest.raises(UnsupportedModelError, match=r"family 'qwen2_moe' can't be cut: .*mlp\.experts.* in each"):
        make_student(teacher, hidden_size=8)
