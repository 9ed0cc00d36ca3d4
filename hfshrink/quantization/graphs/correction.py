"""Bias correction (Nagel et al., arXiv:1906.04721, section 4.2): a layer's mean error goes off its bias.

Rounding W and x to W̃ and x̃ shifts the mean of a layer's output by E[W̃x̃] − E[Wx], per output channel. It is measured on
the float graph, with a quantized copy beside each layer, so that every layer answers for its own error only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hfshrink.quantization.graphs.calibrating import run_batches
from hfshrink.quantization.graphs.pairs import PairInserter
from hfshrink.quantization.graphs.targets import Target, find_targets, quantize_target


def correct_biases(
    exported: Any,
    program: Any,
    targets: Sequence[Target],
    grids: Sequence[tuple[float, int]],
    scales: Sequence[np.ndarray],
    feed: Iterable[Mapping[str, Tensor]],
) -> dict[str, float]:
    """Subtract each target's mean output error from its bias, before it is quantized; without a bias it gets one.

    Args:
        exported: The export that the graph belongs to.
        program: The float graph; changed in place.
        targets: Its nodes that will be quantized.
        grids: Scale and zero point of each target's input.
        scales: Scale of each target's weight, shape () or (channels,).
        feed: Calibration batches.

    Returns:
        Module -> mean of the absolute mean errors of its output channels that were taken off.
    """
    errors = mean_errors(exported, program, targets, grids, scales, feed)
    pairs = PairInserter(program)
    for target, error in zip(targets, errors, strict=True):
        _add_to_bias(pairs, target, -error.astype(np.float32))
    pairs.drop_unused()
    return {target.module: float(np.abs(error).mean()) for target, error in zip(targets, errors, strict=True)}


def mean_errors(
    exported: Any,
    program: Any,
    targets: Sequence[Target],
    grids: Sequence[tuple[float, int]],
    scales: Sequence[np.ndarray],
    feed: Iterable[Mapping[str, Tensor]],
) -> list[np.ndarray]:
    """E[W̃x̃] − E[Wx] of each target; shape (out,), float64. Arguments as in `correct_biases`."""
    shadow = program.clone()
    copies = {target.node.name: target for target in find_targets(shadow, (), lone_convolution=True)}
    pairs, names = PairInserter(shadow), []
    for target, grid, scale in zip(targets, grids, scales, strict=True):
        copy = copies[target.node.name]
        attributes = {name: attribute.value for name, attribute in copy.node.attributes.items()}
        output = copy.node.outputs[0]
        twin = pairs.node(
            copy.node.op_type, list(copy.node.inputs), f"{copy.node.name}_twin", copy.node, output, **attributes
        )
        quantize_target(pairs, copy, twin.producer(), grid, scale)
        error = pairs.node("Sub", [twin, output], f"{copy.node.name}_error", None, output)
        names.append(error.name)
    sums: dict[str, Any] = {}
    for found in run_batches(exported, shadow, names, feed):
        for target, name in zip(targets, names, strict=True):
            axis = found[name].ndim - 1 if target.node.op_type == "MatMul" else 1
            others = tuple(other for other in range(found[name].ndim) if other != axis)
            total, count = sums.get(name, (0.0, 0))
            errors = found[name].sum(axis=others, dtype=np.float64)
            sums[name] = (total + errors, count + found[name].size // len(errors))
    return [sums[name][0] / max(sums[name][1], 1) for name in names]


def _add_to_bias(pairs: PairInserter, target: Target, change: np.ndarray) -> None:
    node = target.node
    if node.op_type == "Conv":
        before = target.bias
        bias = pairs.constant(pairs.free(f"{node.name}_bias"), change if before is None else before + change)
        node.resize_inputs(3)
        node.replace_input_with(2, bias)
        return
    output = node.outputs[0]
    place = _bias_behind(output)
    if place is not None:
        add, index = place
        bias = pairs.constant(pairs.free(f"{node.name}_bias"), add.inputs[index].const_value.numpy() + change)
        add.replace_input_with(index, bias)
        return
    readers = list(output.uses())
    bias = pairs.constant(pairs.free(f"{node.name}_bias"), change)
    shifted = pairs.node("Add", [output, bias], f"{node.name}_corrected", None, output)
    pairs.redirect(readers, output, shifted)


def _bias_behind(output: Any) -> tuple[Any, int] | None:
    """The Add or Sum that alone reads a MatMul's output and brings a constant (out,), and where it does."""
    readers = [node for node, _ in output.uses()]
    if len(readers) != 1 or readers[0].op_type not in ("Add", "Sum"):
        return None
    for index, value in enumerate(readers[0].inputs):
        constant = value.const_value
        if value is not output and constant is not None and len(constant.shape) == 1:
            return readers[0], index
    return None
