"""Nodes that compute in 8 bits: found, rewritten without changing what they compute, and named after their modules."""

import numpy as np
import pytest

from hfshrink.errors import UnsupportedModelError
from hfshrink.quantization.graphs.calibrating import open_session
from hfshrink.quantization.graphs.nodes import module_of
from hfshrink.quantization.graphs.pairs import PairInserter
from hfshrink.quantization.graphs.targets import (
    count_pixels,
    find_outputs,
    find_targets,
    keep_sums_apart,
    pool_means,
    quantize_target,
    split_gemms,
    widen_for_bias,
)

pytest.importorskip("onnxruntime")
import onnx
import onnx_ir as ir

RNG = np.random.default_rng(0)


def build(text, inputs, output, **constants):
    """A graph from ONNX's text form; a node's name is that of its output."""
    header = f'<ir_version: 9, opset_import: ["": 20]> graph ({inputs}) => ({output})'
    proto = onnx.parser.parse_model(f"{header} {{ {text} }}")
    for name, value in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def run(program, x):
    return open_session(program).run(None, {"x": x})[0]


def names(found):
    return [target.node.name for target in found]


def optimized(program, tmp_path):
    """The operators that ONNX Runtime makes of a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    proto = ir.to_proto(program).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


class TestGemms:
    def test_split_ones_compute_the_same(self):
        text = "a = Gemm<transB=1>(x, w, b) c = Gemm(a, v) y = Gemm<alpha=2.0>(c, v, b)"
        program = build(text, "float[n, 4] x", "float[n, 3] y", w=floats(3, 4), v=floats(3, 3), b=floats(3))
        x = floats(5, 4)
        before = run(program, x)
        split_gemms(program)
        assert [node.op_type for node in program.graph] == ["MatMul", "Add", "MatMul", "Gemm"]
        np.testing.assert_allclose(run(program, x), before, rtol=1e-5)
        assert "w" not in program.graph.initializers

    def test_kept_ones_stay(self):
        program = build("y = Gemm(x, w)", "float[n, 4] x", "float[n, 3] y", w=floats(4, 3))
        split_gemms(program, ["y"])
        assert [node.op_type for node in program.graph] == ["Gemm"]

    @pytest.mark.parametrize("apart", [True, False])
    def test_a_matrix_and_its_bias_stay_in_8_bits(self, tmp_path, apart):
        """Without `keep_sums_apart` ONNX Runtime computes them in float: the reason that it is there."""
        text = "y = Gemm(x, w, b)"
        program = build(text, "float[n, 4] x", "float[n, 3] y", w=floats(4, 3), b=floats(3))
        x = floats(6, 4)
        before = run(program, x)
        split_gemms(program)
        [target] = find_targets(program)
        if apart:
            keep_sums_apart([target])
        scale = np.abs(target.weight).max(axis=0) / 127
        quantize_target(PairInserter(program), target, target.node, (0.03, 128), scale)
        np.testing.assert_allclose(run(program, x), before, atol=0.2)
        assert ("MatMulIntegerToFloat" in optimized(program, tmp_path)) == apart


class TestFinding:
    def test_constant_weights_in_order_without_kept_ones(self):
        text = "a = MatMul(x, w) b = MatMul(x, x) c = MatMul(a, v) y = Add(b, c)"
        program = build(text, "float[3, 3] x", "float[3, 3] y", w=floats(3, 3), v=floats(3, 3))
        assert names(find_targets(program)) == ["a", "c"]
        assert names(find_targets(program, ["a"])) == ["c"]

    def test_a_lone_convolution_among_others_is_left(self):
        text = "a = Conv(x, k) y = MatMul(a, w)"
        program = build(text, "float[n, 2, 4, 4] x", "float[n, 3, 4, 5] y", k=floats(3, 2, 1, 1), w=floats(4, 5))
        assert names(find_targets(program)) == ["y"]
        assert names(find_targets(program, lone_convolution=True)) == ["a", "y"]
        assert names(find_targets(program, ["y"])) == ["a"]

    def test_outputs_that_become_codes(self):
        """A residual block: ReLU behind a Conv or Add takes the pair; the last value of the graph stays float."""
        text = "a = Conv(x, k) b = Relu(a) c = Conv(b, k) d = Add(b, c) e = Relu(d) f = Conv(e, k) y = Sigmoid(f)"
        program = build(text, "float[n, 2, 4, 4] x", "float[n, 2, 4, 4] y", k=floats(2, 2, 1, 1))
        found = find_outputs(program, find_targets(program))
        assert [value.name for value in found] == ["b", "c", "e", "f"]


def test_names_of_convolutions_before_and_after():
    """A batch norm that was merged into a Conv brings its own scopes."""
    program = build("y = Conv(x, w)", "float[n, 2, 4, 4] x", "float[n, 3, 4, 4] y", w=floats(3, 2, 1, 1))
    node = program.graph[0]
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'stem', 'stem.norm', 'batch_norm']"
    assert module_of(node) == "stem.norm"
    node.inputs[1].name = "stem.conv.weight"
    assert module_of(node) == "stem.conv"
    [target] = find_targets(program)
    quantize_target(PairInserter(program), target, node, (0.1, 128), np.float32([0.1, 0.1, 0.1]))
    assert module_of(node) == "stem.conv"


@pytest.mark.parametrize(("axes", "keepdims", "pooled"), [([2, 3], 1, True), ([-1, -2], 1, True), ([2, 3], 0, False)])
def test_means_over_both_sides_become_pools(axes, keepdims, pooled):
    output = "float[n, 3, 1, 1] y" if keepdims else "float[n, 3] y"
    text = f"y = ReduceMean<keepdims={keepdims}>(x, axes)"
    program = build(text, "float[n, 3, 4, 5] x", output, axes=np.array(axes, np.int64))
    x = floats(2, 3, 4, 5)
    before = run(program, x)
    pool_means(program)
    assert (program.graph[0].op_type == "GlobalAveragePool") == pooled
    np.testing.assert_allclose(run(program, x), before, atol=1e-6)


POOLS = {
    "kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, count_include_pad=1": 4,
    "kernel_shape=[64, 64], strides=[64, 64], ceil_mode=1, count_include_pad=1": 1,
    "kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1": 8,
}


@pytest.mark.parametrize(("flags", "size"), POOLS.items())
def test_pools_that_hang_over_the_image(flags, size):
    """EfficientNet's last window is far larger than the image: ONNX Runtime's 8 bits made 0 of it."""
    text = f"a = Conv(x, k) b = AveragePool<{flags}>(a) y = Conv(b, k)"
    program = build(text, "float[n, 8, 8, 8] x", f"float[n, 8, {size}, {size}] y", k=floats(8, 8, 1, 1) / 3)
    x = floats(2, 8, 8, 8) + 1
    before = run(program, x)
    count_pixels(program)
    np.testing.assert_allclose(run(program, x), before, atol=1e-5)
    targets, pairs = find_targets(program), PairInserter(program)
    outputs = find_outputs(program, targets)
    for target in targets:
        scale = np.abs(target.weight).max(axis=(1, 2, 3)) / np.float32(127)
        quantize_target(pairs, target, target.node, (0.04, 120), scale)
    for value in outputs:
        pairs.quantize_output(value, 0.04, 128)
    assert np.abs(run(program, x) - before).max() < 0.12 * max(np.abs(before).max(), 1)


def test_pools_that_hang_over_and_pad_are_refused():
    flags = "kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1"
    program = build(f"y = AveragePool<{flags}>(x)", "float[n, 8, 8, 8] x", "float[n, 8, 5, 5] y")
    with pytest.raises(UnsupportedModelError, match="y pools with padding, ceil_mode=True"):
        count_pixels(program)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_far_larger_than_the_weights_is_not_clipped(per_channel):
    weight, bias = floats(2, 2, 1, 1), np.float32([0.5, -3000.0])
    weight[1 if per_channel else slice(None)] *= 1e-7
    program = build("y = Conv(x, w, b)", "float[n, 2, 4, 4] x", "float[n, 2, 4, 4] y", w=weight, b=bias)
    x = floats(1, 2, 4, 4)
    before = run(program, x)
    [target] = find_targets(program)
    scale = np.abs(weight).max(axis=(1, 2, 3) if per_channel else None) / np.float32(127)
    quantize_target(PairInserter(program), target, target.node, (0.03, 128), np.asarray(scale))
    after = run(program, x)
    np.testing.assert_allclose(after[:, 1], before[:, 1], rtol=1e-6)
    np.testing.assert_allclose(after[:, 0], before[:, 0], atol=0.1 if per_channel else 1e-4)


def test_scales_that_hold_their_bias_stay():
    scale = np.float32([0.1, 0.2])
    assert np.array_equal(widen_for_bias(scale, np.float32([5.0, -5.0]), 0.01), scale)
