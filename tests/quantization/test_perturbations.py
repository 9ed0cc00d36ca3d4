"""Trials of quantization: what they round, against slow loops, and that nothing of it stays."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers.quantized import NORMAL_FLOAT
from hfshrink.quantization.perturbations import perturbation, round_dynamically, rows_of
from hfshrink.quantization.search.precisions import PRECISIONS
from hfshrink.sensitivity import measure_sensitivity

CASES = [("bert", "int"), ("gpt2", "nf4"), ("resnet", "int"), ("llama", "bf16"), ("vit", "fp16")]


def batch_of(family: str) -> dict[str, torch.Tensor]:
    batch = tiny.inputs(family)
    return batch if tiny.TASK[family] == "text-generation" else {**batch, "labels": torch.tensor([0, 1, 1])}


@pytest.mark.parametrize(("family", "scheme"), CASES)
@pytest.mark.parametrize("quantize_inputs", [False, True])
def test_every_place_changes_the_loss_and_comes_back(family, scheme, quantize_inputs):
    model = tiny.model(family)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    trial = perturbation(scheme, quantize_inputs=quantize_inputs)
    level = trial.levels[-1]
    found = measure_sensitivity(model, [batch_of(family)], trial, levels=(level,))
    unread = {"bert.embeddings.token_type_embeddings"}
    assert {place for place in found.places if found.rise(place, level) == 0} <= unread
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("quantize_inputs", [False, True])
def test_restored_after_an_exception(quantize_inputs):
    model, trial = tiny.model("bert"), perturbation(quantize_inputs=quantize_inputs)
    state, place = copy.deepcopy(model.state_dict()), trial.places(model)[-1]
    with pytest.raises(ZeroDivisionError), trial.apply(model, place, 2):
        raise ZeroDivisionError
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integers_against_a_slow_loop(family, bits):
    """Every number is on the grid of its group, at the code nearest to it, and clipping never raises the error."""
    model, trial = tiny.model(family), perturbation("int", group_size=6)
    place = trial.places(model)[2]
    dense = rows_of(model.get_submodule(place)).clone()
    with trial.apply(model, place, bits):
        found = rows_of(model.get_submodule(place)).clone()
    half = 2 ** (bits - 1)
    for row in range(0, len(dense), 3):
        for start in range(0, dense.shape[1], 6):
            group, got = dense[row, start : start + 6].tolist(), found[row, start : start + 6].tolist()
            best = None
            for shrink in [1.0] if bits == 8 else [1 - step / 40 for step in range(21)]:
                scale = shrink * max(group, key=abs) / -half
                grid = [min(max(round(value / scale), -half), half - 1) * scale for value in group]
                error = sum((a - b) ** 2 for a, b in zip(group, grid, strict=True))
                best = (error, grid) if best is None or error < best[0] else best
            assert sum((a - b) ** 2 for a, b in zip(group, got, strict=True)) == pytest.approx(best[0], rel=1e-3)
            assert got == pytest.approx(best[1], abs=1e-5)


def test_convolutions_that_lie_channels_last():
    """Their rows can't be a view; a trial that writes into a copy would change nothing."""
    conv = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    dense, trial = conv[0].weight.detach().clone(), perturbation()
    with trial.apply(conv, "0", 2):
        found = conv[0].weight.detach().clone()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    plain[0].weight.data.copy_(dense)
    with trial.apply(plain, "0", 2):
        assert torch.equal(found, plain[0].weight)
    assert not torch.equal(found, dense)
    assert torch.equal(conv[0].weight, dense)
    assert conv[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_nf4_takes_the_nearest_of_sixteen_values():
    model, trial = tiny.model("bert"), perturbation("nf4", group_size=5)
    place = "bert.pooler.dense"
    dense = model.get_submodule(place).weight.detach().clone()
    with trial.apply(model, place, 4):
        found = model.get_submodule(place).weight.detach().clone()
    for row in range(16):
        for start in range(0, 16, 5):
            group = dense[row, start : start + 5]
            scale = float(group.abs().max())
            nearest = [min(NORMAL_FLOAT, key=lambda v, w=w: abs(scale * v - w)) * scale for w in group.tolist()]
            assert found[row, start : start + 5].tolist() == pytest.approx(nearest, abs=1e-6)


def test_weights_of_zeros_stay():
    model = tiny.model("bert")
    model.bert.pooler.dense.weight.data.zero_()
    for scheme in ("int", "nf4"):
        trial = perturbation(scheme)
        with trial.apply(model, "bert.pooler.dense", 4):
            assert not model.bert.pooler.dense.weight.any()


def test_fewer_bits_do_more_harm_to_the_weight():
    model, trial = tiny.model("bert"), perturbation()
    dense, errors = model.bert.pooler.dense.weight.detach().clone(), []
    for bits in (8, 4, 3, 2):
        with trial.apply(model, "bert.pooler.dense", bits):
            errors.append(float((model.bert.pooler.dense.weight - dense).square().sum()))
    assert errors == sorted(errors)
    assert errors[0] > 0


def test_only_the_named_module_rounds_its_inputs():
    model, trial = tiny.model("bert"), perturbation("bf16", quantize_inputs=True)
    seen = {}
    for name in ("bert.pooler.dense", "classifier"):
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(**tiny.inputs("bert"))
        plain = dict(seen)
        with trial.apply(model, "bert.pooler.dense", 16):
            model(**tiny.inputs("bert"))
    assert torch.equal(seen["bert.pooler.dense"], round_dynamically(plain["bert.pooler.dense"]))
    assert not torch.equal(seen["bert.pooler.dense"], plain["bert.pooler.dense"])


def test_inputs_against_onnx():
    """The same as ONNX's DynamicQuantizeLinear."""
    runtime = pytest.importorskip("onnx.reference", reason="needs the extra onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 9]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    evaluator = runtime.ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    for seed, shift in ((0, 0.0), (1, 3.0), (2, -5.0)):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed)) + shift
        expected = torch.from_numpy(evaluator.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(round_dynamically(x), expected, atol=1e-6, rtol=0)
    assert not round_dynamically(torch.zeros(2, 2)).any()


def test_rows_of_all_kinds_are_views():
    assert rows_of(nn.Linear(3, 5)).shape == (5, 3)
    assert rows_of(Conv1D(5, 3)).shape == (5, 3)
    assert rows_of(nn.Conv2d(2, 5, 3)).shape == (5, 18)
    conv = Conv1D(5, 3)
    rows_of(conv)[0, 2] = 7
    assert conv.weight[2, 0] == 7


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scheme": "int5"}, "scheme must be one of int, nf4, bf16, fp16, got 'int5'"),
        ({"levels": (5,)}, r"'int' has the levels 8, 4, 3, 2 \(bits\), got 5"),
        ({"levels": (True,)}, "got True"),
        ({"levels": 8}, "levels must be a list of bits, got 8"),
        ({"scheme": "nf4", "levels": (8,)}, r"'nf4' has the levels 4 \(bits\), got 8"),
        ({"group_size": 0}, "group_size must be at least 1, .* got 0"),
    ],
)
def test_bad_settings(arguments, match):
    with pytest.raises(SettingError, match=match):
        perturbation(**arguments)


def test_bad_models():
    with pytest.raises(UnsupportedModelError, match="ReLU has no Linear, Conv or Embedding"):
        perturbation().places(nn.ReLU())
    model = tiny.model("bert")
    model.bert.pooler.dense.weight.data[0, 0] = float("nan")
    for scheme in ("int", "nf4"):
        trial = perturbation(scheme)
        with pytest.raises(SettingError, match=r"NaN or infinite values\. \(bert.pooler.dense\)"):
            trial.apply(model, "bert.pooler.dense", 4).__enter__()


def test_table_and_heat_map(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plots")
    found = measure_sensitivity(tiny.model("bert"), [batch_of("bert")], perturbation("int"), include="*.layer.0.*")
    lines = str(found).splitlines()
    assert lines[0].endswith("quantize weights to int, 3 examples")
    assert [cell.strip() for cell in lines[1].split("|")[1:-1]] == ["place", "8", "4", "3", "2"]
    assert len(lines) == 3 + 6
    found.plot(tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 1000


def test_names_of_precisions_are_their_own():
    assert all(precision.name == name for name, precision in PRECISIONS.items())
