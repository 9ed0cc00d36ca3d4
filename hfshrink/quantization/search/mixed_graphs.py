"""Mixed precision in an ONNX graph: 4-bit weights, dynamic int8 and float, module by module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.evaluation import measure_latencies
from hfshrink.quantization.graphs.dynamic import QUANTIZED_OPS, quantize_dynamic, supports_vnni
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.four_bit import FourBitWriter, Grid
from hfshrink.quantization.graphs.fusing import fuse_graph
from hfshrink.quantization.graphs.nodes import module_of, weight_nodes
from hfshrink.quantization.graphs.rounding import round_clipped
from hfshrink.quantization.perturbations import perturbation, rows_of
from hfshrink.quantization.search.latency import find_products, measure_costs, tokens_of
from hfshrink.quantization.search.mixed import check_budget, check_least, check_precisions
from hfshrink.quantization.search.plan import (
    check_plot_path,
    make_plan,
    measure_of,
    measure_plan,
    measure_rises,
    trial_of,
)
from hfshrink.quantization.search.precisions import PRECISIONS, weight_bytes
from hfshrink.sensitivity import Perturbation

GRAPH_PRECISIONS = ("int4", "int8", "fp32")
GROUP_SIZES = (16, 32, 64, 128, 256)
SMALL_CONSTANTS = 64
"""Bytes of the scalars and shapes that a quantized weight brings along, at most."""

Trial = tuple[Perturbation, float] | None
Costs = Mapping[str, Mapping[str, int]]
"""module -> precision -> bytes or microseconds."""


def make_onnx_mixed(  # noqa: PLR0913
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    budget_bytes: int | None = None,
    size_ratio: float | None = None,
    budget_ms: float | None = None,
    precisions: Sequence[str] = GRAPH_PRECISIONS,
    group_size: int = 32,
    samples: int = 256,
    plot: str | Path | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-mixed`: each matrix of the graph in 4 bits, dynamic int8 or float, as a budget allows it.

    The damage of each (module, precision) is measured in PyTorch on calibration rows (KL from the float model of
    classifiers, the loss rise of all others): weights rounded as they will
    be in the graph, inputs of int8 modules too. Embeddings are int8, as in `onnx-int8`.

    Args:
        model: A float32 model; it is left as it was.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of modules that stay float.
        calibration: Rows, in any form that calibration data may have; with labels where the model is no classifier.
        budget_bytes: Bytes of the graph's constants afterwards; the file is larger by the nodes themselves.
        size_ratio: The same as a share of the bytes in float.
        budget_ms: Milliseconds of processor time for one example of 128 tokens or one image, on one thread of this
            processor, instead of bytes: each matrix is timed alone at each precision, and all else is taken to last
            as long as in float. Exactly one of the three is needed.
        precisions: Two or three of int4, int8 and fp32.
        group_size: Weights in a row that share a 4-bit scale: 16, 32, 64, 128 or 256.
        samples: Calibration rows to measure on.
        plot: Where to write a heat-map of the plan, .png or .svg; None writes none.

    Returns:
        The export, the names of the quantized modules, and the plan with predicted and measured rise.

    Raises:
        SettingError: No budget or several, one too small (the message says the least that is possible), unknown
            precisions, no rows or labels, or no matrix to quantize.
    """
    _check(precisions, group_size, calibration, plot)
    _check_one(budget_bytes, size_ratio, budget_ms)
    exported = export_float(model, processor)
    program = exported.components["model"].program
    fuse_graph(program)
    shapes = _matrices(model, program, kept_float)
    sizes = {name: {p: _bytes(shape, p, group_size) for p in precisions} for name, shape in shapes.items()}
    limits: tuple[Any, ...]
    if budget_ms is None:
        limits = _byte_limits(program, shapes, sizes, kept_float, budget_bytes, size_ratio)
    else:
        limits = _time_limits(exported, model, processor, sizes, budget_ms, group_size)
    left, costs, facts = limits
    trials = {name: _trial(name, group_size) for name in precisions}
    how = {"samples": samples, "processor": processor}
    plan = make_plan(measure_rises(model, calibration, list(shapes), trials, **how), sizes, left, costs)
    picked = {name: trials[option] for name, option in plan.precisions.items()}
    dense_loss, rise = measure_plan(model, calibration, picked, **how)
    plan = dataclasses.replace(plan, measured_rise=rise)
    exported, changed, reduce_range = _write(exported, plan.precisions, kept_float, group_size)
    if plot is not None:
        plan.plot(plot)
    facts |= {"graph_bytes": graph_bytes(exported.components["model"].program), "reduce_range": reduce_range}
    if budget_ms is not None:
        facts["measured_ms"] = _milliseconds(exported, model, processor)
    facts |= {"measure": measure_of(model), "dense_loss": dense_loss, "samples": samples}
    return exported, changed, {"plan": plan.to_dict(), **facts}


def graph_bytes(program: Any) -> int:
    """Bytes of the constants of a graph."""
    values = (value.const_value for value in program.graph.initializers.values())
    return sum(int(value.nbytes) for value in values if value is not None)


def _byte_limits(
    program: Any,
    shapes: Mapping[str, tuple[int, int]],
    sizes: Costs,
    kept_float: Sequence[str],
    budget_bytes: int | None,
    size_ratio: float | None,
) -> tuple[int, Costs, dict[str, Any]]:
    """Bytes that are left for the chosen matrices, their costs, and the budget for the record."""
    total = graph_bytes(program)
    budget = check_budget(budget_bytes, size_ratio, total)
    rest = total - sum(4 * rows * width for rows, width in shapes.values())
    rest -= _saved_elsewhere(program, {*shapes, *kept_float})
    check_least(budget, rest, sizes)
    return budget - rest, sizes, {"budget_bytes": budget}


def _time_limits(
    exported: Any, model: Any, processor: Any, sizes: Costs, budget_ms: float, group_size: int
) -> tuple[int, Costs, dict[str, Any]]:
    """Microseconds that are left for the chosen matrices, their costs, and what was measured for the record."""

    def write(product: Any, name: str) -> Any:
        return product if name == "fp32" else _write(product, {"matrix": name}, (), group_size)[0]

    precisions = dict.fromkeys([*next(iter(sizes.values())), "fp32"])
    costs = measure_costs(find_products(model, processor, list(sizes)), list(precisions), write)
    float_ms = _milliseconds(exported, model, processor)
    rest = max(0, round(1000 * float_ms) - sum(row["fp32"] for row in costs.values()))
    costs = {name: {precision: row[precision] for precision in sizes[name]} for name, row in costs.items()}
    left, least = int(1000 * budget_ms) - rest, sum(min(row.values()) for row in costs.values())
    if left < least:
        raise SettingError(
            f"A budget of {budget_ms:g} ms is too small: with the fastest precision everywhere the graph takes "
            f"{(rest + least) / 1000:.3f} ms here, {rest / 1000:.3f} of them outside of the matrices; in float it "
            f"takes {float_ms:.3f}."
        )
    return left, costs, {"budget_ms": budget_ms, "float_ms": float_ms, "microseconds": costs}


def _milliseconds(exported: Any, model: Any, processor: Any) -> float:
    """Median processor time of one example on one thread."""
    how = {"sequence_length": tokens_of(model), "batch_sizes": (1,), "threads": 1, "processor": processor}
    return measure_latencies({"graph": exported}, **how)["graph"][0].cpu_ms


def _check_one(budget_bytes: Any, size_ratio: Any, budget_ms: Any) -> None:
    """Before the export, which takes seconds."""
    if sum(budget is not None for budget in (budget_bytes, size_ratio, budget_ms)) != 1:
        raise SettingError(
            f"Give one of budget_bytes, size_ratio and budget_ms, got {budget_bytes!r}, {size_ratio!r}, {budget_ms!r}."
        )
    is_time = budget_ms is not None
    if is_time and (
        isinstance(budget_ms, bool) or not isinstance(budget_ms, int | float) or not 0 < budget_ms < math.inf
    ):
        raise SettingError(f"budget_ms must be a number above 0, got {budget_ms!r}.")


def _check(precisions: Any, group_size: Any, calibration: Any, plot: Any) -> None:
    for name in check_precisions(precisions):
        if name not in GRAPH_PRECISIONS:
            raise SettingError(f"precisions of a graph are {', '.join(GRAPH_PRECISIONS)}, got {name!r}.")
    if isinstance(group_size, bool) or group_size not in GROUP_SIZES:
        raise SettingError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}.")
    if calibration is None:
        raise SettingError("Mixed precision is chosen by measured damage: give rows, calibration=….")
    if plot is not None:
        check_plot_path(plot)


def _trial(name: str, group_size: int) -> Trial:
    if name == "fp32":
        return None
    is_int8 = name == "int8"
    return trial_of(PRECISIONS[name], None if is_int8 else group_size, quantize_inputs=is_int8)


def _matrices(model: Any, program: Any, kept_float: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Module -> shape (out, in) of the untied matrices of a graph that have a weight in PyTorch, in its order."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    places = set(perturbation().places(model))
    found = {}
    for node in weight_nodes(program, ("MatMul", "Gemm")):
        name = module_of(node)
        if name in places and name not in kept_float and f"{name}.weight" not in tied_names:
            out_features, width = rows_of(model.get_submodule(name)).shape
            found[name] = (out_features, width)
    if not found:
        raise SettingError(
            f"There is nothing to quantize: no MatMul or Gemm with constant weights outside {list(kept_float)}. "
            "Mixed precision is for transformers; convolutional networks need a static scheme."
        )
    return found


def _bytes(shape: tuple[int, int], name: str, group_size: int) -> int:
    """Bytes of a weight in the graph; groups are filled up, and int8 has a zero point of a byte per row."""
    rows, width = shape
    if name == "int8":
        return weight_bytes(shape, PRECISIONS[name]) + rows + SMALL_CONSTANTS
    if name == "int4":
        filled = -(-width // group_size) * group_size
        return weight_bytes((rows, filled), PRECISIONS[name], group_size) + SMALL_CONSTANTS
    return weight_bytes(shape, PRECISIONS[name])


def _saved_elsewhere(program: Any, left_out: set[str]) -> int:
    """Bytes that dynamic int8 saves outside of the plan: embeddings, and matrices without a module in PyTorch."""
    weights = {}
    for node in weight_nodes(program, QUANTIZED_OPS):
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        if module_of(node) not in left_out:
            weights[weight.name] = weight.const_value
    numbers = [(int(value.shape[0]), int(value.shape[1])) for value in weights.values()]
    return sum(3 * rows * columns - 5 * max(rows, columns) - SMALL_CONSTANTS for rows, columns in numbers)


def _write(
    exported: Any, precisions: Mapping[str, str], kept_float: Sequence[str], group_size: int
) -> tuple[Any, list[str], bool]:
    """Write the plan into the graph: first four bits, then int8 for what is left; the names that changed."""
    program, reduce_range = exported.components["model"].program, not supports_vnni()
    four_bit = [name for name, option in precisions.items() if option == "int4"]
    if four_bit:
        others = {module_of(node) for node in weight_nodes(program, QUANTIZED_OPS)} - set(four_bit)
        writer = FourBitWriter(program, others)
        writer.write_matrices(Grid(4, group_size, True, 4), round_clipped, {}, {})
        writer.finish()
    left_float = {*kept_float, *(name for name, option in precisions.items() if option == "fp32")}
    if any(module_of(node) not in left_float for node in weight_nodes(program, QUANTIZED_OPS)):
        exported, eight_bit = quantize_dynamic(exported, sorted(left_float), reduce_range=reduce_range)
        return exported, sorted({*four_bit, *eight_bit}), reduce_range
    if not four_bit:
        raise SettingError("The budget leaves all modules in float; there is nothing to quantize. Take a smaller one.")
    return exported, four_bit, reduce_range
