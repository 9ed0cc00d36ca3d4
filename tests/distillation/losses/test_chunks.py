"""Losses in chunks equal those of whole logits, gradients included, and never hold more than a chunk."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import distributed
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import tiny
from hfshrink.distillation.losses.chunks import chunked_losses, run_without_logits, supports_chunks
from hfshrink.distillation.losses.divergences import SparseTargets
from hfshrink.distillation.losses.logits import LogitLoss, loss_mask
from hfshrink.errors import SettingError, UnsupportedModelError

LOSSES = [LogitLoss(1.5, divergence="jsd", beta=0.3, standardize=True)]


def pair(family="llama", dtype=torch.float64):
    student, teacher = (tiny.model(family, seed=seed).to(dtype) for seed in (0, 1))
    return student.train(), teacher.requires_grad_(False)


def batch(labelled=True):
    inputs = tiny.inputs("llama", batch=3, length=9)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 2] = -100
    return {**inputs, "labels": labels} if labelled else inputs


def plain(student, teacher, inputs, losses=LOSSES):
    """The same parts from whole logits."""
    mask, labels = loss_mask(inputs, "causal_tokens"), inputs.get("labels")
    given = {name: value for name, value in inputs.items() if name != "labels"}
    outputs, theirs = student(**given), teacher(**given)
    parts = {}
    if labels is not None:
        parts["labels"] = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for loss in losses:
        parts[loss.name] = loss(outputs, theirs, head="causal_tokens", mask=mask, labels=labels)
    return parts


def chunked(student, teacher, inputs, chunk_size, losses=LOSSES, called=None):
    mask = loss_mask(inputs, "causal_tokens")
    lazy, theirs = run_without_logits(called or student, student, inputs), None
    if losses:
        theirs = run_without_logits(teacher, teacher, inputs)
    return chunked_losses(lazy, theirs, labels=inputs.get("labels"), mask=mask, losses=losses, chunk_size=chunk_size)


def gradients(model, parts):
    model.zero_grad()
    sum((number + 1) * part for number, part in enumerate(parts.values())).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # an untied head, and one that is the embedding table
@pytest.mark.parametrize("labelled", [True, False])
def test_values_and_gradients_are_those_of_whole_logits(family, labelled):
    student, teacher = pair(family)
    if family == "gpt2":
        student.eval()  # dropout draws other masks in every run
    inputs = batch(labelled)
    expected = plain(student, teacher, inputs)
    wanted = gradients(student, expected)
    for chunk_size in (3, 100):
        parts = chunked(student, teacher, inputs, chunk_size)
        assert parts.keys() == expected.keys()
        for name, value in parts.items():
            assert value.item() == pytest.approx(expected[name].item(), rel=1e-12), name
        for name, value in gradients(student, parts).items():
            assert torch.allclose(value, wanted[name], rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "reverse_kl"}, {"divergence": "skewed_kl"}, {"divergence": "mse"}]
)
def test_every_divergence_adds_up_over_chunks(settings):
    student, teacher = pair()
    losses, inputs = [LogitLoss(2.0, **settings)], batch()
    expected = plain(student, teacher, inputs, losses)["logits"].item()
    assert chunked(student, teacher, inputs, 5, losses)["logits"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tail", [True, False])
def test_a_sparse_teacher_is_taken_in_chunks(tail):
    student, teacher = pair()
    inputs = batch()
    values, ids = teacher(input_ids=inputs["input_ids"]).logits.softmax(-1).topk(4, dim=-1)
    kept = SparseTargets(ids, values if tail else values / values.sum(-1, keepdim=True), tail, temperature=3.0)
    mask, loss = loss_mask(inputs, "causal_tokens"), LogitLoss(3.0)
    outputs = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    expected = loss(outputs, SimpleNamespace(sparse=kept), head="causal_tokens", mask=mask)
    wanted = gradients(student, {"logits": expected})
    lazy = run_without_logits(student, student, inputs)
    parts = chunked_losses(lazy, kept, labels=None, mask=mask, losses=[loss], chunk_size=4)
    assert parts["logits"].item() == pytest.approx(expected.item(), rel=1e-12)
    for name, value in gradients(student, parts).items():
        assert torch.allclose(value, wanted[name], rtol=1e-9, atol=1e-13), name


def test_labels_alone_need_no_teacher():
    student, _ = pair()
    inputs = batch()
    expected = plain(student, student, inputs, [])["labels"].item()
    parts = chunked(student, None, inputs, 4, [])
    assert list(parts) == ["labels"]
    assert parts["labels"].item() == pytest.approx(expected, rel=1e-12)


def test_labels_and_mask_may_count_other_positions():
    student, teacher = pair()
    inputs = batch()
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True  # position 1 of row 0 predicts token 2, which has no label
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = student(**given), teacher(**given)
    lazy, other = run_without_logits(student, student, inputs), run_without_logits(teacher, teacher, inputs)
    parts = chunked_losses(lazy, other, labels=inputs["labels"], mask=mask, losses=LOSSES, chunk_size=3)
    divergence = LOSSES[0](ours, theirs, head="causal_tokens", mask=mask)
    assert parts["logits"].item() == pytest.approx(divergence.item(), rel=1e-12)
    entropy = plain(student, teacher, inputs)["labels"]
    assert parts["labels"].item() == pytest.approx(entropy.item(), rel=1e-12)


def test_no_position_that_counts_is_a_loss_of_zero_with_zero_gradients():
    student, teacher = pair()
    inputs = {**batch(), "labels": torch.full((3, 9), -100)}
    parts = chunked(student, teacher, inputs, 4)
    assert {name: value.item() for name, value in parts.items()} == {"labels": 0.0, "logits": 0.0}
    assert not any(value.any() for value in gradients(student, parts).values())


def test_no_more_than_a_chunk_of_logits_exists():
    """Recorded at both heads: how many rows each call answers, forward and again in backward."""
    student, teacher = pair()
    inputs, rows = batch(), []
    count = int(loss_mask(inputs, "causal_tokens").sum())
    lazy, theirs = run_without_logits(student, student, inputs), run_without_logits(teacher, teacher, inputs)
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _module, _inputs, output: rows.append(tuple(output.shape)))
    mask = loss_mask(inputs, "causal_tokens")
    parts = chunked_losses(lazy, theirs, labels=inputs["labels"], mask=mask, losses=LOSSES, chunk_size=4)
    forward = len(rows)
    gradients(student, parts)
    sizes = [min(4, count - start) for start in range(0, count, 4)]
    assert rows[:forward] == [(size, tiny.VOCABULARY) for size in sizes for _ in range(2)]
    assert sorted(rows[forward:]) == sorted(rows[:forward])


def test_the_teacher_gets_no_gradient():
    student, teacher = pair()
    teacher.requires_grad_(True)
    gradients(student, chunked(student, teacher, batch(), 4))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@contextmanager
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("settings", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_distributed_wrappers_see_every_gradient(tmp_path, settings):
    student, teacher = pair()
    inputs = batch()
    wanted = gradients(student, plain(student, teacher, inputs))
    nothing = {**inputs, "labels": torch.full((3, 9), -100)}
    with one_process(tmp_path):
        wrapped = DistributedDataParallel(student, **settings)
        ready = []
        for name, parameter in student.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _parameter, name=name: ready.append(name))
        for given in (inputs, nothing, inputs):  # an unfinished reduction raises in the next forward
            ready.clear()
            found = gradients(student, chunked(student, teacher, given, 4, called=wrapped))
            assert sorted(ready) == sorted(wanted)  # each once
        for name, value in found.items():
            assert torch.allclose(value, wanted[name], rtol=1e-9, atol=1e-13), name


def mixed(model):
    """Mixed precision as accelerate adds it: autocast around forward, outputs back in float32."""
    forward = model.forward

    def wrapped(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs

    model.forward = wrapped
    return model


def test_mixed_precision_of_the_forward_holds_for_the_chunks():
    student, teacher = map(mixed, pair(dtype=torch.float32))
    inputs = batch()
    expected = plain(student, teacher, inputs)
    parts = chunked(student, teacher, inputs, 4)
    lazy = run_without_logits(student, student, inputs)
    assert lazy.autocast == ("cpu", torch.bfloat16, True)
    assert lazy.logits(lazy.hidden).dtype == torch.bfloat16
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-3), name
    wanted = gradients(student, expected)
    for name, value in gradients(student, parts).items():
        assert (value - wanted[name]).norm() < 0.05 * wanted[name].norm() + 1e-4, name


BODIES = {
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 8},  # calls the decoder inside its base model directly
    "qwen3": {"head_dim": 4},
}


@pytest.mark.parametrize("family", BODIES)
def test_the_last_hidden_state_is_found_in_other_families(family):
    config = transformers.AutoConfig.for_model(family, **{**tiny.CONFIGS["llama"], **BODIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    inputs = batch(labelled=False)
    with torch.no_grad():
        lazy = run_without_logits(model, model, inputs)
        assert torch.allclose(lazy.logits(lazy.hidden), model(**inputs).logits, atol=1e-6)


CHANGED = {
    "gemma2": {"final_logit_softcapping": 30.0, "head_dim": 4},  # tanh
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0},
}


@pytest.mark.parametrize("family", CHANGED)
def test_families_that_change_their_logits_are_refused(family):
    config = transformers.AutoConfig.for_model(
        family, **{**tiny.CONFIGS["llama"], "tie_word_embeddings": True, **CHANGED[family]}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert supports_chunks(model)
    with pytest.raises(UnsupportedModelError, match=r"ForCausalLM: its logits are not .* chunk_size=None"):
        run_without_logits(model, model, batch(labelled=False))
    assert not model.base_model._forward_hooks
    assert not model.lm_head._forward_hooks


def test_which_models_are_supported():
    llama = tiny.model("llama")
    assert supports_chunks(llama)
    assert supports_chunks(tiny.model("gpt2"))
    assert not supports_chunks(tiny.model("bert"))
    assert not supports_chunks(tiny.model("bert", "fill-mask"))
    routed, own = copy.deepcopy(llama), copy.deepcopy(llama)
    routed.config.output_router_logits = True
    own.loss_function = lambda **_: 0.0
    assert not supports_chunks(routed)
    assert not supports_chunks(own)


def test_sides_that_do_not_fit_are_refused():
    student, teacher = pair()
    inputs = batch()
    lazy = run_without_logits(student, student, inputs)
    short = run_without_logits(teacher, teacher, {"input_ids": inputs["input_ids"][:, :5]})
    settings = {"labels": None, "mask": None, "losses": LOSSES, "chunk_size": 4}
    with pytest.raises(SettingError, match=r"student answered .*\(3, 9\), the teacher \(3, 5\)"):
        chunked_losses(lazy, short, **settings)
    with pytest.raises(SettingError, match="The losses logits need a teacher's answer, got None"):
        chunked_losses(lazy, None, **settings)
    wide = tiny.model("llama", seed=1, vocab_size=60).double()
    with pytest.raises(SettingError, match=r"student's logits have shape \(4, 52\), the teacher's \(4, 60\)"):
        chunked_losses(lazy, run_without_logits(wide, wide, inputs), **settings)
    assert chunked_losses(lazy, None, **{**settings, "losses": []}) == {}
