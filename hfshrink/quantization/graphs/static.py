"""Static int8: activations quantized with ranges that are known before the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfshrink.calibration import batches
from hfshrink.errors import SettingError
from hfshrink.histograms import Histogram
from hfshrink.quantization.graphs.calibrating import check_methods, collect_histograms, method_of
from hfshrink.quantization.graphs.correction import correct_biases
from hfshrink.quantization.graphs.dynamic import supports_vnni
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.fusing import fuse_graph
from hfshrink.quantization.graphs.nodes import module_of, weight_nodes
from hfshrink.quantization.graphs.pairs import PairInserter
from hfshrink.quantization.graphs.smoothing import smooth_model
from hfshrink.quantization.graphs.targets import (
    Target,
    count_pixels,
    find_outputs,
    find_targets,
    keep_sums_apart,
    pool_means,
    quantize_target,
    split_gemms,
)
from hfshrink.quantization.ranges import affine_scale, choose_range, symmetric_scale

BATCH_SIZE = 8

Bounds = tuple[float, float]


def make_static(  # noqa: PLR0913
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    samples: int = 128,
    ranges: str | Mapping[str, str] = "percentile",
    per_channel: bool = True,
    smooth: float | None = None,
    bias_correction: bool = False,
    learned_ranges: Mapping[str, Bounds] | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-int8-static`: int8 weights, and uint8 activations in ranges from calibration data.

    Linear layers and convolutions compute in 8 bits; attention scores, normalization and GELU in float. In
    convolutional networks what lies between convolutions stays in 8 bits too. Embeddings are int8 tables.

    Args:
        model: The float32 model; left as it was.
        processor: Its tokenizer or image processor, for raw rows.
        kept_float: Modules that stay float.
        calibration: Rows to take the ranges from, as `hfshrink.calibration.batches` reads them.
        samples: How many rows.
        ranges: "percentile" (99.99 %), "min-max", "entropy" or "mse" (see `choose_range`), or a mapping of wildcards
            on module names to methods, of which the first that matches counts.
        per_channel: One scale per output channel of a weight, else one per weight.
        smooth: SmoothQuant's α in [0, 1]: how much of the activations' spread goes into the weights; None leaves it.
        bias_correction: Whether to take the mean error of each output channel off the bias.
        learned_ranges: Module -> (low, high) of its input, from training; they come before calibrated ones, and
            calibration data is not needed where they cover every module.

    Returns:
        The export, the modules that became int8, and what there is to say: `reduce_range`, `samples`, `ranges`
        (module -> [low, high] of its input), `smoothing` and `bias_correction` where asked for.

    Raises:
        SettingError: No calibration data, a bad option, nothing to quantize, NaN or infinite values.
    """
    if smooth is not None and not 0 <= smooth <= 1:
        raise SettingError(f"smooth must be in [0, 1] or None, got {smooth}.")
    check_methods(ranges)
    learned, bits = dict(learned_ranges or {}), 8 if supports_vnni() else 7
    feed = _Feed(calibration, model, processor, samples)
    if not learned or smooth is not None or bias_correction:
        feed.check()
    results: dict[str, Any] = {"reduce_range": bits == 7}
    if smooth is not None:
        model, results["smoothing"] = smooth_model(model, feed, smooth, kept_float)
    exported = export_float(model, processor)
    results["fused"] = fuse_graph(exported.components["model"].program)
    program, targets = _prepare(exported.components["model"].program, kept_float)
    _check_known(learned, targets, kept_float)
    outputs = find_outputs(program, targets)
    readers = _readers(targets, outputs, learned)
    modules = [target.module for target in targets if target.module not in learned]
    check_methods(ranges, [*modules, *readers.values()])
    histograms = collect_histograms(exported, program, readers, feed) if readers else {}
    inputs, between = _choose_bounds(histograms, targets, outputs, readers, learned, ranges)
    scales = [_weight_scale(target, bits, per_channel) for target in targets]
    if bias_correction:
        grids = [_grid(target, bound) for target, bound in zip(targets, inputs, strict=True)]
        results["bias_correction"] = correct_biases(exported, program, targets, grids, scales, feed)
    changed = _insert(program, targets, inputs, scales, between)
    changed += _insert_tables(program, kept_float, bits)
    results |= {"samples": feed.rows, "ranges": _widest(targets, inputs)}
    return _rebuild(exported, program), sorted(set(changed)), results


def apply_ranges(
    exported: Any,
    ranges: Mapping[str, Bounds],
    weight_scales: Mapping[str, Tensor] | None = None,
    kept_float: Sequence[str] = (),
) -> tuple[Any, list[str]]:
    """Quantize an exported float graph with given activation ranges, as quantization-aware training learned them.

    Each module's input gets a quantize/dequantize pair with exactly the scale and zero point that `affine_scale` makes
    of its range, also where modules read one tensor with ranges of their own. Embeddings become int8 too.

    Args:
        exported: A float export of the folded model; it is left as it was.
        ranges: Name of a Linear, Conv1D or Conv2d -> (low, high) of its input. Modules without a range stay float.
        weight_scales: Name -> scale of the int8 weight, shape () or (out,), of a table (columns,); None, and modules
            that are missing, get max|w| / 127 per output channel.
        kept_float: Modules, embeddings among them, that stay float.

    Returns:
        The quantized export and the names of the modules that became int8.

    Raises:
        SettingError: No node was quantized, a range for a module that the graph does not have, one that is not finite,
            or a scale that does not fit the weight.
    """
    program, targets = _prepare(exported.components["model"].program.clone(), kept_float, lone_convolution=True)
    _check_known(ranges, targets, kept_float)
    targets = [target for target in targets if target.module in ranges]
    if not targets:
        raise SettingError("No node was quantized: ranges names no module of the graph outside kept_float.")
    given = weight_scales or {}
    scales = [
        _check_scale(target, given[target.module]) if target.module in given else _weight_scale(target)
        for target in targets
    ]
    changed = _insert(program, targets, [ranges[target.module] for target in targets], scales, {})
    changed += _insert_tables(program, kept_float, 8, given)
    return _rebuild(exported, program), sorted(set(changed))


class _Feed:
    """Calibration batches, as often as they are needed; `rows` counts those of the last pass."""

    def __init__(self, calibration: Any, model: Any, processor: Any, samples: int) -> None:
        # an iterator would be empty at the second pass
        self.calibration = list(calibration) if isinstance(calibration, Iterator) else calibration
        self.model, self.processor, self.samples = model, processor, samples
        self.rows = 0

    def check(self) -> None:
        """Read the first batch, so that data that does not serve is refused before any work."""
        self._check_given()
        next(iter(self))

    def _check_given(self) -> None:
        if self.calibration is None:
            raise SettingError(
                "onnx-int8-static takes its ranges from data: give calibration=, a datasets.Dataset, a Hub id, a "
                "folder or batches of about 128 rows like those the model will see. onnx-int8 needs no data."
            )

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._check_given()
        self.rows = 0
        how = {"batch_size": BATCH_SIZE, "samples": self.samples}
        for batch in batches(self.calibration, self.model, self.processor, **how):
            self.rows += len(next(iter(batch.values())))
            yield batch


def _prepare(program: Any, kept_float: Sequence[str], lone_convolution: bool = False) -> tuple[Any, list[Target]]:
    """The graph in a form that quantizes well, and its targets."""
    split_gemms(program, kept_float)
    targets = find_targets(program, kept_float, lone_convolution)
    if not targets:
        raise SettingError(
            f"There is nothing to quantize: no MatMul, Gemm or Conv with constant weights outside {list(kept_float)}."
        )
    keep_sums_apart(targets)
    if any(target.node.op_type == "Conv" for target in targets):
        pool_means(program)
        count_pixels(program)
    return program, targets


def _readers(targets: Sequence[Target], outputs: Sequence[Any], learned: Mapping[str, Bounds]) -> dict[str, str]:
    """Name of a tensor whose range is needed -> the module that reads it first, else the one that makes it."""
    readers = {value.name: module_of(value.producer()) for value in outputs}
    for target in reversed(targets):
        if target.module not in learned:
            readers[target.node.inputs[0].name] = target.module
    return readers


def _choose_bounds(
    histograms: Mapping[str, Histogram],
    targets: Sequence[Target],
    outputs: Sequence[Any],
    readers: Mapping[str, str],
    learned: Mapping[str, Bounds],
    ranges: str | Mapping[str, str],
) -> tuple[list[Bounds], dict[Any, Bounds]]:
    """The ranges of the targets' inputs, and of the values between convolutions, which are one for all readers."""
    chosen: dict[tuple[str, str], Bounds] = {}

    def choose(name: str, module: str) -> Bounds:
        key = (name, method_of(ranges, module))
        if key not in chosen:
            chosen[key] = choose_range(histograms[name], key[1])
        return chosen[key]

    between = {value: choose(value.name, readers[value.name]) for value in outputs}
    shared, inputs = {value.name for value in outputs}, []
    for target in targets:
        name = target.node.inputs[0].name
        known = learned.get(target.module)
        inputs.append(known or choose(name, readers[name] if name in shared else target.module))
    return inputs, between


def _insert(
    program: Any,
    targets: Sequence[Target],
    inputs: Sequence[Bounds],
    scales: Sequence[np.ndarray],
    outputs: Mapping[Any, Bounds],
) -> list[str]:
    """Put in all pairs; the names of the modules."""
    pairs = PairInserter(program)
    for target, bounds, scale in zip(targets, inputs, scales, strict=True):
        quantize_target(pairs, target, target.node, _grid(target, bounds), scale)
    for value, bounds in outputs.items():
        pairs.quantize_output(value, *affine_scale(*bounds, name=f"tensor {value.name!r}"))
    pairs.drop_unused()
    return [target.module for target in targets]


def _insert_tables(
    program: Any, kept_float: Sequence[str], bits: int, scales: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Make embedding tables int8 with one scale per column, as given or max|w| / 127; rows looked up are float."""
    pairs, changed = PairInserter(program), []
    for node in weight_nodes(program, ("Gather",)):
        module, axis = module_of(node), node.attributes.get("axis")
        if module in kept_float or (axis is not None and axis.value != 0):
            continue
        table = node.inputs[0].const_value.numpy()
        scale = (scales or {}).get(module)
        if scale is None:
            scale = symmetric_scale(torch.tensor(table), axis=1, bits=bits, name=module)
        pairs.quantize_table(node, table, scale.cpu().numpy())
        changed.append(module)
    pairs.drop_unused()
    return changed


def _grid(target: Target, bounds: Bounds) -> tuple[float, int]:
    return affine_scale(*bounds, name=f"the input of {target.module}")


def _weight_scale(target: Target, bits: int = 8, per_channel: bool = True) -> np.ndarray:
    axis = target.axis if per_channel else None
    return symmetric_scale(torch.tensor(target.weight), axis, bits=bits, name=f"{target.module}.weight").numpy()


def _check_scale(target: Target, scale: Tensor) -> np.ndarray:
    channels = target.weight.shape[target.axis]
    values = scale.detach().cpu().float().numpy()
    values = values.reshape(()) if values.size == 1 else values.reshape(-1)
    if values.shape not in ((), (channels,)):
        raise SettingError(
            f"The weight scale of {target.module} must have shape () or ({channels},), got {tuple(scale.shape)}."
        )
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise SettingError(f"The weight scales of {target.module} must be above 0 and finite.")
    return values


def _check_known(ranges: Mapping[str, Bounds], targets: Sequence[Target], kept_float: Sequence[str]) -> None:
    known = {target.module for target in targets} | set(kept_float)
    unknown = [name for name in ranges if name not in known]
    if unknown:
        raise SettingError(
            f"The graph has no node with a weight of {', '.join(unknown[:5])}; "
            f"it has {', '.join(sorted(known)[:6])}, …"
        )


def _widest(targets: Sequence[Target], inputs: Sequence[Bounds]) -> dict[str, list[float]]:
    """Module -> [low, high] of its input, over all calls of a module that is called more than once."""
    found: dict[str, list[float]] = {}
    for target, (low, high) in zip(targets, inputs, strict=True):
        before = found.get(target.module, [low, high])
        found[target.module] = [min(low, before[0]), max(high, before[1])]
    return found


def _rebuild(exported: Any, program: Any) -> Any:
    from transformers.exporters import ExportedComponent, ExportedModel

    components = {"model": ExportedComponent(program, exported.components["model"].metadata)}
    return ExportedModel(components, exported.export_format, config=exported.config)
