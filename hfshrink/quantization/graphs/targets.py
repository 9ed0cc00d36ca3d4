"""The nodes of a graph that compute in 8 bits: their weights, and the PyTorch modules that they came from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfshrink.errors import UnsupportedModelError
from hfshrink.quantization.graphs.nodes import module_of, weight_nodes
from hfshrink.quantization.graphs.pairs import PairInserter

LARGEST_BIAS = 2**30
"""Codes of a bias stay below half of int32, so that the sum of products still fits beside them."""
FOLLOWERS = ("Relu", "Clip", "Add", "Mul", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool")
"""Operators that ONNX Runtime computes in 8 bits behind a convolution."""


@dataclass(frozen=True)
class Target:
    """A MatMul or Conv with a constant weight.

    Attributes:
        node: The node; its input 0 is the activation, input 1 the weight, and a Conv's input 2 the bias.
        module: Name of the PyTorch module.
        axis: The weight's axis of output channels: 1 of a MatMul (in, out), 0 of a Conv (out, in, …).
    """

    node: Any
    module: str
    axis: int

    @property
    def weight(self) -> np.ndarray:
        """The float weight as the graph holds it."""
        return self.node.inputs[1].const_value.numpy()

    @property
    def bias(self) -> np.ndarray | None:
        """A Conv's constant bias (out,); None where there is none. A MatMul's lies in the Add behind it."""
        inputs = self.node.inputs
        return inputs[2].const_value.numpy() if len(inputs) > 2 and inputs[2] is not None else None


def split_gemms(program: Any, kept_float: Collection[str] = ()) -> None:
    """Turn Gemm with a constant weight into MatMul and Add, which keep the bias in float where 8 bits are computed."""
    pairs = PairInserter(program)
    for node in weight_nodes(program, ("Gemm",)):
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        plain = values.get("alpha", 1.0) == 1.0 and values.get("beta", 1.0) == 1.0 and not values.get("transA", 0)
        if not plain or module_of(node) in kept_float:
            continue
        weight = node.inputs[1].const_value.numpy()
        transposed = np.ascontiguousarray(weight.T) if values.get("transB", 0) else weight
        matrix = pairs.constant(pairs.free(f"{node.inputs[1].name}_matrix"), transposed)
        result = pairs.node("MatMul", [node.inputs[0], matrix], f"{node.name}_MatMul", node, node.outputs[0])
        result.producer().metadata_props.update(node.metadata_props)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = pairs.node("Add", [result, node.inputs[2]], f"{node.name}_Add", node, node.outputs[0])
        pairs.take_place(node.outputs[0], result)
    pairs.drop_unused()


def find_targets(program: Any, kept_float: Collection[str] = (), lone_convolution: bool = False) -> list[Target]:
    """MatMul and Conv nodes with constant float weights, in the graph's order.

    Args:
        program: The graph, its Gemms split.
        kept_float: Modules to leave out.
        lone_convolution: Whether to take a graph's only convolution among other targets: that of a transformer's
            patches is a small share of the time, and its error would reach every layer.
    """
    found = {id(node): Target(node, module_of(node), 1) for node in weight_nodes(program, ("MatMul",))}
    found |= {id(node): Target(node, module_of(node), 0) for node in program.graph if _is_conv(node)}
    ordered = [found[id(node)] for node in program.graph if id(node) in found]
    targets = [target for target in ordered if target.module not in kept_float]
    convolutions = [target for target in targets if target.node.op_type == "Conv"]
    if len(convolutions) == 1 and len(targets) > 1 and not lone_convolution:
        targets.remove(convolutions[0])
    return targets


def keep_sums_apart(targets: Sequence[Target]) -> None:
    """Make the Add of a bias behind a MatMul of matrices a Sum.

    ONNX Runtime would make Gemm of MatMul and Add before it looks for pairs, and compute that in float.
    """
    for target in targets:
        readers = [node for node, _ in target.node.outputs[0].uses()]
        shape = target.node.inputs[0].shape
        flat = target.node.op_type == "MatMul" and (shape is None or len(shape) == 2)
        if flat and len(readers) == 1 and readers[0].op_type == "Add":
            readers[0].op_type = "Sum"


def pool_means(program: Any) -> None:
    """Turn means over height and width into GlobalAveragePool, which ONNX Runtime computes in 8 bits."""
    pairs = PairInserter(program)
    for node in list(program.graph):
        if _is_mean(node):
            pooled = pairs.node("GlobalAveragePool", [node.inputs[0]], f"{node.name}_pool", node, node.outputs[0])
            pooled.producer().metadata_props.update(node.metadata_props)
            pairs.take_place(node.outputs[0], pooled)
    pairs.drop_unused()


def count_pixels(program: Any) -> None:
    """Let those AveragePools that hang over the image count what is there, which gives the same numbers.

    Where padding counts, ONNX Runtime's 8-bit form of them (1.31) divides by the whole window at the edges:
    EfficientNet's last pool, whose window is much larger than the image, came out as 0.

    Raises:
        UnsupportedModelError: The pool also pads; then there is no such form.
    """
    import onnx_ir

    for node in [node for node in program.graph if node.op_type == "AveragePool"]:
        if not (node.attributes.get_int("ceil_mode", 0) and node.attributes.get_int("count_include_pad", 0)):
            continue
        if any(node.attributes.get_ints("pads", [])):
            raise UnsupportedModelError(
                f"{module_of(node)} pools with padding, ceil_mode=True and count_include_pad=True, which ONNX Runtime "
                "computes wrongly in 8 bits. Use onnx-fp32 or openvino-int8."
            )
        node.attributes["count_include_pad"] = onnx_ir.AttrInt64("count_include_pad", 0)


def find_outputs(program: Any, targets: Sequence[Target]) -> list[Any]:
    """Values that 8-bit convolutions, and what follows them, give out as 8-bit codes.

    A Conv runs in 8 bits only where its output is quantized too. `FOLLOWERS` all of whose inputs are 8-bit stay so.
    ReLU and Clip need no pair before them: behind a Conv or Add they are the lower bound of the codes.
    """
    convolutions = {id(target.node) for target in targets if target.node.op_type == "Conv"}
    outputs = {id(value) for value in program.graph.outputs}
    integer: set[int] = set()
    found = []
    for node in program.graph:
        read = [value for value in node.inputs[: 1 if node.op_type == "Clip" else None] if value is not None]
        follows = node.op_type in FOLLOWERS and bool(read) and all(id(value) in integer for value in read)
        if id(node) not in convolutions and not follows:
            continue
        value = node.outputs[0]
        if id(value) in outputs:
            continue
        integer.add(id(value))
        readers = [reader for reader, _ in value.uses()]
        if not (node.op_type in ("Conv", "Add") and len(readers) == 1 and readers[0].op_type in ("Relu", "Clip")):
            found.append(value)
    return found


def quantize_target(
    pairs: PairInserter, target: Target, node: Any, activation: tuple[float, int], weight_scale: np.ndarray
) -> None:
    """Let `node`, the target's or a copy of it, compute in 8 bits.

    Args:
        pairs: Of the node's graph.
        target: Says where the weight lies.
        node: The node to change.
        activation: Scale and zero point of input 0.
        weight_scale: Scale of the weight, shape () or (channels,).
    """
    bias = target.bias
    if bias is not None:
        weight_scale = widen_for_bias(weight_scale, bias, activation[0])
        pairs.quantize_bias(node, 2, bias, weight_scale * np.float32(activation[0]))
    pairs.quantize_input(node, 0, *activation)
    pairs.quantize_weight(node, 1, target.weight, weight_scale, target.axis)


def widen_for_bias(weight_scale: np.ndarray, bias: np.ndarray, input_scale: float) -> np.ndarray:
    """Weight scales so large that the int32 codes of the bias, bias / (input scale · weight scale), hold it.

    Weights that are widened are tiny beside their bias: what they lose can't be seen in the output.

    Example:
        >>> widen_for_bias(np.array([0.5, 1e-9]), np.array([1.0, 2.0**20]), 2.0**-10).tolist()
        [0.5, 1.0]
    """
    least = np.abs(bias) / (input_scale * LARGEST_BIAS)
    return np.maximum(weight_scale, least.max() if weight_scale.ndim == 0 else least).astype(weight_scale.dtype)


def _is_mean(node: Any) -> bool:
    """A ReduceMean over the last two of four axes, which stay."""
    axes = node.inputs[1].const_value if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
    shape = node.inputs[0].shape if axes is not None else None
    if axes is None or not node.attributes.get_int("keepdims", 1) or shape is None or len(shape) != 4:
        return False
    return sorted(int(axis) % 4 for axis in np.atleast_1d(axes.numpy())) == [2, 3]


def _is_conv(node: Any) -> bool:
    import onnx_ir

    if node.op_type != "Conv":
        return False
    constants = [None if value is None else value.const_value for value in node.inputs[1:]]
    return all(constant is not None and constant.dtype == onnx_ir.DataType.FLOAT for constant in constants)
