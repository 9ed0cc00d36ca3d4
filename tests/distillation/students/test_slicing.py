"""Slicing: an axis is cut only where it is known what it counts."""

import pytest
import torch
import transformers

import tiny
from hfshrink import make_student
from hfshrink.distillation.students.importance import measure_importance
from hfshrink.distillation.students.slicing import block_indices
from hfshrink.distillation.students.width import block_boxes
from hfshrink.errors import UnsupportedModelError

NORMED = {"olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "bitnet": "BitNetForCausalLM"}
"""Families with norms inside the blocks, of as many values as channels by chance."""


def normed(family, **sizes):
    config = transformers.AutoConfig.for_model(family, **{**tiny.CONFIGS["llama"], "num_key_value_heads": 4, **sizes})
    return getattr(transformers, NORMED[family])._from_config(config).eval()


def test_block_indices_keep_whole_blocks():
    assert block_indices(torch.tensor([1, 2]), units=3, size=6).tolist() == [2, 3, 4, 5]
    assert block_indices(torch.tensor([0]), units=2, size=12, parts=3).tolist() == [0, 1, 4, 5, 8, 9]


def channels_of(student, teacher):
    """Which channels stayed, by the rows of the embeddings."""
    old, new = teacher.get_input_embeddings().weight, student.get_input_embeddings().weight
    return [int((old == column[:, None]).all(dim=0).nonzero()) for column in new.T]


def test_fused_query_key_value_weights_are_cut_in_all_three_parts():
    teacher = tiny.model("gpt2")
    for block in teacher.transformer.h:
        block.attn.c_proj.weight.data[4:12] = 0  # heads 1 and 2 do not count
        block.attn.c_attn.weight.data.view(16, 3, 4, 4)[:, :, 1:3] = 0
    student = make_student(teacher, n_embd=8)
    kept = [0, 1, 2, 3, 12, 13, 14, 15]
    for part in range(3):
        old, new = teacher.transformer.h[1].attn.c_attn, student.transformer.h[1].attn.c_attn
        columns = old.weight[:, 16 * part : 16 * part + 16][:, kept]
        assert torch.equal(new.bias[8 * part : 8 * part + 8], old.bias[16 * part : 16 * part + 16][kept])
        found = new.weight[:, 8 * part : 8 * part + 8]
        assert torch.equal(found, columns[channels_of(student, teacher)])


@pytest.mark.parametrize(
    ("family", "given", "name"),
    [
        ("olmo2", {"hidden_size": 8}, "self_attn.q_norm.weight"),
        ("olmo3", {"hidden_size": 8}, "self_attn.q_norm.weight"),
        ("bitnet", {"hidden_size": 8}, "self_attn.attn_sub_norm.weight"),
        ("bitnet", {"intermediate_size": 16}, "mlp.ffn_sub_norm.weight"),
    ],
)
@pytest.mark.parametrize("calibrated", [False, True])
def test_norms_inside_the_blocks_are_no_channels(family, given, name, calibrated):
    teacher = normed(family)
    data = [tiny.inputs("llama")] if calibrated else None
    with pytest.raises(UnsupportedModelError, match=rf"{family}.* can't be cut: model\.layers\.0\.{name} lies inside"):
        make_student(teacher, calibration=data, **given)


def test_norm_of_a_block_as_long_as_the_neurons_is_no_channel():
    teacher = normed("bitnet", intermediate_size=16)
    with pytest.raises(UnsupportedModelError, match="lies inside a block"):
        make_student(teacher, intermediate_size=8)


def test_what_lies_outside_the_blocks_is_cut():
    teacher, batch = normed("olmo2"), tiny.inputs("llama")
    for layer in teacher.model.layers:
        layer.mlp.down_proj.weight.data[:, 8:] = 0
        layer.mlp.gate_proj.weight.data[8:] = 0
        layer.mlp.up_proj.weight.data[8:] = 0
    student = make_student(teacher, intermediate_size=8)
    assert torch.allclose(tiny.logits(student, batch), tiny.logits(teacher, batch), atol=1e-6)


def test_channels_are_scored_without_the_norms_inside_the_blocks():
    model, batch = normed("olmo2"), tiny.inputs("llama")
    assert {box.split(".")[-2] for box in block_boxes(model)} == {"self_attn", "mlp"}
    total, mask = torch.zeros(16, dtype=torch.float64), batch["attention_mask"] == 1
    outer = [m for n, m in model.named_modules() if n.endswith("norm") and "self_attn" not in n]

    def add(_, __, output):
        total.add_(output[mask].double().abs().mean(dim=0))

    hooks = [module.register_forward_hook(add) for module in outer]
    tiny.logits(model, batch)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(measure_importance(model, [batch]).units["hidden"], total)
