"""Histograms of a graph's tensors: those of the PyTorch modules' inputs, without padding."""

import numpy as np
import pytest
import torch

import tiny
from hfshrink.calibration import collect
from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.calibrating import check_methods, collect_histograms, drop_padding, method_of
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.targets import find_targets

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert")


@pytest.fixture(scope="module")
def exported(bert):
    return export_float(bert, tiny.tokenizer())


def feed_of(*seeds):
    found = [tiny.inputs("bert", seed=seed) for seed in seeds]
    return [{**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])} for batch in found]


def test_histograms_are_those_of_the_modules_inputs(bert, exported):
    program, feed = exported.components["model"].program, feed_of(0, 1)
    targets = [target for target in find_targets(program) if ".layer." in target.module]
    tensors = {target.node.inputs[0].name: target.module for target in targets}
    outputs = list(program.graph.outputs)
    found = collect_histograms(exported, program, tensors, feed)
    with torch.no_grad(), collect(bert, "input_range", include="bert.encoder.*") as stats:
        for batch in feed:
            bert(**batch)
    for name, module in tensors.items():
        assert found[name].total == stats[module].tokens * bert.get_submodule(module).in_features
        np.testing.assert_allclose((found[name].low, found[name].high), stats[module].input_range, atol=1e-5)
    assert list(program.graph.outputs) == outputs


def test_padding_does_not_count(exported):
    program, [batch] = exported.components["model"].program, feed_of(0)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])}
    names = {target.node.inputs[0].name: target.module for target in find_targets(program)}
    first, second = (collect_histograms(exported, program, names, [given]) for given in (batch, other))
    for name in names:
        assert first[name].total == second[name].total
        np.testing.assert_allclose(first[name].high, second[name].high, atol=1e-5)


def test_masks_fit_by_shape():
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    values = np.arange(12.0).reshape(2, 3, 2)
    assert drop_padding(values, mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert drop_padding(values.reshape(6, 2), mask).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert drop_padding(values[:, 0], mask).shape == (2, 2)
    assert drop_padding(values, None) is values
    scores = np.zeros((2, 4, 3, 3))
    assert drop_padding(scores, mask) is scores


def test_infinite_values_name_the_module(exported):
    import onnx_ir

    program = exported.components["model"].program.clone()
    bias = program.graph.initializers["bert.encoder.layer.1.attention.output.LayerNorm.bias"]
    bias.const_value = onnx_ir.tensor(np.full(16, np.inf, np.float32), name=bias.name)
    tensors = {target.node.inputs[0].name: target.module for target in find_targets(program)}
    with pytest.raises(SettingError, match=r"The input of bert\.encoder\.layer\.1\.\S+ .* has NaN or infinite values"):
        collect_histograms(exported, program, tensors, feed_of(0))


def test_rows_that_do_not_fit(exported):
    program = exported.components["model"].program
    with pytest.raises(SettingError, match="traced with .*the data set lacks token_type_ids"):
        collect_histograms(exported, program, {}, [tiny.inputs("bert")])


def test_methods_per_module():
    ranges = {"*.output.dense": "mse", "*": "min-max"}
    assert method_of(ranges, "layer.0.output.dense") == "mse"
    assert method_of(ranges, "layer.0.query") == "min-max"
    assert method_of("entropy", "layer.0.query") == "entropy"
    check_methods(ranges, ["layer.0.output.dense"])
    for wrong, message in (
        ("max", "ranges must be one of min-max, percentile, entropy, mse, got 'max'"),
        ({"*.nothing": "mse", "*": "mse"}, r"wildcard '\*.nothing' in ranges matches none of layer.0"),
        ({"*.0": "mse"}, r"ranges names no method for layer.1. Add '\*'"),
    ):
        with pytest.raises(SettingError, match=message):
            check_methods(wrong, ["layer.0", "layer.1"])
