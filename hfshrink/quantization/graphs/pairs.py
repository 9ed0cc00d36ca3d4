"""Pairs of QuantizeLinear and DequantizeLinear in a graph: what makes a runtime compute a node in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class PairInserter:
    """Puts quantize/dequantize pairs into one ONNX graph.

    ONNX Runtime's own QDQ tool has one range per tensor; here each reader of a tensor may have its own (query, key and
    value learn theirs apart), and readers with equal ones share a pair.
    """

    def __init__(self, program: Any) -> None:
        self.program = program
        self.graph = program.graph
        self._pairs: dict[tuple[int, float, int], Any] = {}
        self._names = {value.name for node in self.graph for value in node.outputs} | set(self.graph.initializers)

    def quantize_input(self, node: Any, index: int, scale: float, zero_point: int) -> None:
        """Let a node read an input as uint8 codes: x ≈ scale · (code − zero_point)."""
        value = node.inputs[index]
        key = (id(value), scale, zero_point)
        if key not in self._pairs:
            self._pairs[key] = self._pair(value, scale, zero_point)
        node.replace_input_with(index, self._pairs[key])

    def quantize_output(self, value: Any, scale: float, zero_point: int) -> None:
        """Let every reader of a value that reads it in float still read it as uint8 codes."""
        key = (id(value), scale, zero_point)
        readers = [(node, index) for node, index in value.uses() if node.op_type != "QuantizeLinear"]
        if key not in self._pairs:
            self._pairs[key] = self._pair(value, scale, zero_point)
        for node, index in readers:
            node.replace_input_with(index, self._pairs[key])

    def quantize_weight(self, node: Any, index: int, weight: np.ndarray, scale: np.ndarray, axis: int) -> None:
        """Replace a constant input by int8 codes and their scale, of shape () or (channels,) along `axis`."""
        name = self.free(f"{node.inputs[index].name}_int8")
        codes = self.constant(name, to_codes(weight, scale, axis, np.int8))
        node.replace_input_with(index, self._dequantize(codes, scale, np.int8, axis, node, node.inputs[index]))

    def quantize_bias(self, node: Any, index: int, bias: np.ndarray, scale: np.ndarray) -> None:
        """Replace a constant bias (channels,) by int32 codes of scale input scale · weight scale."""
        name = self.free(f"{node.inputs[index].name}_int32")
        codes = self.constant(name, to_codes(bias, scale, 0, np.int32))
        node.replace_input_with(index, self._dequantize(codes, scale, np.int32, 0, node, node.inputs[index]))

    def quantize_table(self, node: Any, table: np.ndarray, scale: np.ndarray) -> None:
        """Let a Gather read an int8 table (rows, width) of one scale per column; what it finds is dequantized."""
        import onnx_ir

        name = self.free(f"{node.inputs[0].name}_int8")
        node.replace_input_with(0, self.constant(name, to_codes(table, scale, 1, np.int8)))
        found = node.outputs[0]
        readers = list(found.uses())
        made = self._dequantize(found, scale, np.int8, -1, None, found)
        self.redirect(readers, found, made)
        found.type = onnx_ir.TensorType(onnx_ir.DataType.INT8)

    def constant(self, name: str, value: np.ndarray) -> Any:
        """A new constant of the graph."""
        import onnx_ir

        tensor = onnx_ir.Tensor(value, name=name)
        made = onnx_ir.Value(
            name=name, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(value.shape), const_value=tensor
        )
        self.graph.register_initializer(made)
        self._names.add(name)
        return made

    def node(self, op_type: str, inputs: list[Any], name: str, before: Any, like: Any, **attributes: Any) -> Any:
        """A new node before another one (None: behind the producer of its first input), and its output value."""
        import onnx_ir

        made = onnx_ir.node(op_type, inputs, attributes, name=self.free(name))
        output = made.outputs[0]
        output.name = self.free(f"{name}_output")
        output.type, output.shape = like.type, like.shape
        if before is not None:
            self.graph.insert_before(before, made)
        elif inputs[0].producer() is not None:
            self.graph.insert_after(inputs[0].producer(), made)
        else:
            self.graph.insert_before(self.graph[0], made)
        return output

    def take_place(self, old: Any, new: Any) -> None:
        """Let the readers of `old` read `new`, and drop `old`."""
        self.redirect(list(old.uses()), old, new)
        self.graph.remove(old.producer(), safe=True)

    def redirect(self, readers: Sequence[tuple[Any, int]], old: Any, new: Any) -> None:
        """Let (node, index) that read `old` read `new`, which becomes the graph's output, too, under the old name."""
        for node, index in readers:
            node.replace_input_with(index, new)
        name = old.name
        for position, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[position] = new
                old.name, new.name = self.free(f"{name}_before"), name

    def drop_unused(self) -> None:
        """Take out the constants that no node reads any more."""
        outputs = {id(value) for value in self.graph.outputs}
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and id(value) not in outputs:
                del self.graph.initializers[name]

    def _pair(self, value: Any, scale: float, zero_point: int) -> Any:
        import onnx_ir

        scales = self.constant(self.free(f"{value.name}_scale"), np.array(scale, np.float32))
        zero = self.constant(self.free(f"{value.name}_zero_point"), np.array(zero_point, np.uint8))
        codes = self.node("QuantizeLinear", [value, scales, zero], f"{value.name}_quantize", None, value)
        codes.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
        return self.node("DequantizeLinear", [codes, scales, zero], f"{value.name}_dequantize", None, value)

    def _dequantize(self, codes: Any, scale: np.ndarray, kind: Any, axis: int, before: Any, like: Any) -> Any:
        scales = self.constant(self.free(f"{codes.name}_scale"), scale.astype(np.float32))
        zero = self.constant(self.free(f"{codes.name}_zero_point"), np.zeros(scale.shape, kind))
        attributes = {"axis": axis} if scale.ndim else {}
        name = f"{codes.name}_dequantize"
        return self.node("DequantizeLinear", [codes, scales, zero], name, before, like, **attributes)

    def free(self, name: str) -> str:
        """`name`, or with a number behind where the graph has it already."""
        free, number = name, 1
        while free in self._names:
            free, number = f"{name}_{number}", number + 1
        self._names.add(free)
        return free


def to_codes(values: np.ndarray, scale: np.ndarray, axis: int, kind: Any) -> np.ndarray:
    """round(values / scale), clipped to the symmetric range of an integer type.

    Args:
        values: Float, any shape.
        scale: Shape () or (channels,), the channels along `axis`.
        axis: The axis of the channels.
        kind: The integer type, such as `np.int8`.

    Example:
        >>> to_codes(np.array([[1.0, -3.0]]), np.array([0.5, 1.0]), 1, np.int8).tolist()
        [[2, -3]]
    """
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    most = np.iinfo(kind).max
    return np.clip(np.round(values / scale.astype(np.float64).reshape(shape)), -most, most).astype(kind)
