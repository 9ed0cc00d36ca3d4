"""Influence and importance: recomputed token by token, and layers that do nothing come last."""

import pytest
import torch

import tiny
from hfshrink import make_student, report
from hfshrink.blocks import block_influence
from hfshrink.distillation.students.importance import head_norms, magnitude_scores, measure_importance
from hfshrink.distillation.students.slicing import Axis
from hfshrink.errors import SettingError, UnsupportedModelError


def test_influence_by_hand():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
    y = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [4.0, -3.0]])
    assert block_influence(x, y).tolist() == [0.0, 2.0, 1.0]
    assert torch.isfinite(block_influence(torch.zeros(1, 2), torch.ones(1, 2))).all()


def test_head_norms_by_hand():
    assert head_norms(torch.tensor([[3.0, 4.0, 5.0, 12.0]]), 2).tolist() == [[5.0, 13.0]]


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_influence_of_every_layer_equals_a_loop_over_tokens(family):
    """The hidden states that the model itself hands out; padding does not count."""
    model, batches = tiny.model(family, num_hidden_layers=3), [tiny.inputs(family, seed=seed) for seed in (0, 1)]
    cosines = [[] for _ in range(3)]
    for batch in batches:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        mask = batch.get("attention_mask", torch.ones(states[0].shape[:2]))
        for layer in range(3):
            for row, position in mask.nonzero().tolist():
                x, y = states[layer][row, position], states[layer + 1][row, position]
                cosines[layer].append(float(x @ y / (x.norm() * y.norm())))
    expected = [1 - sum(found) / len(found) for found in cosines]
    assert measure_importance(model, batches).influence == pytest.approx(expected, abs=1e-6)


def test_channels_are_the_absolute_outputs_of_the_norms_summed():
    model, batch = tiny.model("llama"), tiny.inputs("llama")
    total = torch.zeros(16, dtype=torch.float64)
    mask = batch["attention_mask"] == 1

    def add(_, __, output):
        total.add_(output[mask].double().abs().mean(dim=0))

    hooks = [m.register_forward_hook(add) for n, m in model.named_modules() if n.endswith("norm")]
    assert len(hooks) == 5
    tiny.logits(model, batch)
    for hook in hooks:
        hook.remove()
    assert torch.allclose(measure_importance(model, [batch]).units["hidden"], total)


def test_padding_changes_nothing():
    model = tiny.model("bert")
    ids = torch.tensor([[7, 8, 9]])
    bare = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in bare.items()}
    one, other = measure_importance(model, [bare]), measure_importance(model, [padded])
    assert one.influence == pytest.approx(other.influence, abs=1e-6)
    assert all(torch.allclose(value, other.units[name], atol=1e-6) for name, value in one.units.items())


def test_a_data_set_and_a_generator_say_the_same():
    from datasets import Dataset

    teacher, rows = tiny.model("bert"), [[7, 8, 9, 10], [11, 12, 13, 14]]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 4] * 2})
    one = make_student(teacher, 1, keep="influence", intermediate_size=9, calibration=dataset)
    other = make_student(
        teacher, 1, keep="influence", intermediate_size=9, calibration=({"input_ids": torch.tensor([r])} for r in rows)
    )
    assert all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())
    assert report(one).steps[0].method == "influence+activation"
    assert report(one).steps[0].settings["calibration"] == "Dataset"


def test_model_is_left_as_it_was():
    model = tiny.model("bert").train()
    batch = {**tiny.inputs("bert"), "labels": torch.zeros(3, dtype=torch.long)}
    measure_importance(model, [batch])
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_layers_that_do_nothing_go_first():
    teacher, batch = tiny.model("llama", num_hidden_layers=4), tiny.inputs("llama")
    for number in (0, 2):
        teacher.model.layers[number].self_attn.o_proj.weight.data.zero_()
        teacher.model.layers[number].mlp.down_proj.weight.data.zero_()
    student = make_student(teacher, 2, keep="influence", calibration=[batch])
    assert torch.allclose(tiny.logits(student, batch), tiny.logits(teacher, batch), atol=1e-6)
    step = report(student).steps[0]
    assert step.method == "influence"
    assert step.results["kept_layers"] == [1, 3]
    assert step.results["influence"][0] == step.results["influence"][2] == 0
    assert "2403.03853" in step.source
    assert step.settings["keep"] == "influence"


def test_magnitudes_by_hand():
    state = {"w": torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 1.0, 0.0, 0.0]]), "b": torch.tensor([12.0, 0.0])}
    axes = [Axis("w", 1, "heads"), Axis("w", 0, "neurons"), Axis("b", 0, "neurons")]
    scores = magnitude_scores(state, axes, {"heads": 2, "neurons": 2})
    assert scores["neurons"].tolist() == [13.0, 1.0]
    assert scores["heads"].tolist() == pytest.approx([10**0.5, 4.0])
    fused = magnitude_scores({"b": torch.tensor([1.0, 2, 3, 4, 5, 6])}, [Axis("b", 0, "heads", 3)], {"heads": 2})
    assert fused["heads"].tolist() == pytest.approx([35**0.5, 56**0.5])


def test_tied_weights_count_once():
    shared = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    axes = [Axis("a", 1, "hidden"), Axis("b", 1, "hidden"), Axis("a", 0, "hidden")]
    found = magnitude_scores({"a": shared, "b": shared}, axes, {"hidden": 2})["hidden"]
    assert found.tolist() == pytest.approx([35**0.5, 17**0.5])


def test_infinite_values_are_named():
    model = tiny.model("bert")
    model.bert.encoder.layer[0].output.LayerNorm.bias.data[0] = float("inf")
    with pytest.raises(SettingError, match="NaN or infinite values in layer:0"):
        measure_importance(model, [tiny.inputs("bert")])


def test_family_with_unknown_blocks_has_influence_only():
    from transformers import MobileBertConfig, MobileBertForSequenceClassification

    config = MobileBertConfig(**tiny.ENCODER, embedding_size=8, intra_bottleneck_size=8)
    found = measure_importance(MobileBertForSequenceClassification(config), [tiny.inputs("bert")])
    assert len(found.influence) == 2
    assert not found.units


def test_family_that_never_calls_its_layers_is_named():
    from transformers import SqueezeBertConfig, SqueezeBertForSequenceClassification

    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 1)
    model = SqueezeBertForSequenceClassification(SqueezeBertConfig(**tiny.ENCODER, embedding_size=16, **groups))
    with pytest.raises(UnsupportedModelError, match="family 'squeezebert' are not called with hidden states"):
        measure_importance(model, [tiny.inputs("bert")])
