"""OpenVINO through transformers' exporter and NNCF: a float graph, calibrated int8, 4-bit weights.

NNCF: arXiv 2002.08679. Left to itself, OpenVINO computes in bfloat16 where the processor can; the exports made here
run in float32, so that what was measured is what the record says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from hfshrink.calibration import batches
from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.dynamic import supports_vnni
from hfshrink.quantization.runtimes.openvino_graphs import (
    WEIGHT_PORTS,
    export_openvino,
    load_nncf,
    run_in_float32,
    silent,
    weight_types,
)
from hfshrink.terminal import progress

IMPROVEMENTS = ("scale_estimation", "gptq", "awq")
BITS = {"i4": 4, "u4": 4, "i8": 8, "u8": 8}

Made = tuple[Any, list[str], dict[str, Any]]


def make_openvino_fp32(model: Any, processor: Any, kept_float: Sequence[str], *, calibration: Any = None) -> Made:
    """The scheme `openvino-fp32`: the float graph, the baseline for the other schemes in the same runtime."""
    exported, _ = export_openvino(model, processor)
    return run_in_float32(exported), [], {"precision": "f32"}


def make_openvino_int8(
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    samples: int = 128,
    smoothing: bool = True,
) -> Made:
    """The scheme `openvino-int8`: weights, embeddings and the activations before them in 8 bits.

    With calibration data activations have fixed ranges, outlier channels are smoothed (SmoothQuant, arXiv 2211.10438)
    and biases corrected (arXiv 1906.04721): the fastest way on processors with VNNI. Without data only weights are
    stored in 8 bits, and OpenVINO quantizes the activations of matrix products as they come, where the processor gains
    by it: as fast as ONNX Runtime's dynamic int8; convolutions gain no speed.

    Args:
        model: A float32 model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of the modules that stay float.
        calibration: What `hfshrink.calibration.batches` reads; unlabelled rows will do.
        samples: Rows to calibrate on.
        smoothing: Whether outliers move from activations to weights before both are quantized.

    Returns:
        The export, the names of the quantized modules, and results for the record (`activations`: "static" or
        "dynamic").

    Raises:
        SettingError: Calibration data that the model can't read, or nothing to quantize.
    """
    nncf = load_nncf()
    feed = None if calibration is None else _Feed(calibration, model, processor, samples)
    exported, modules = export_openvino(model, processor)

    def change(program: Any, ignored: Any) -> Any:
        if feed is None:
            return nncf.compress_weights(program, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=ignored)
        return _calibrated(program, ignored, feed, smoothing)

    changed, bits = _quantize(exported, modules, kept_float, change)
    results = {"precision": "f32", "activations": "dynamic" if feed is None else "static", "modules_by_bits": bits}
    return run_in_float32(exported), changed, results if feed is None else {**results, "samples": feed.count}


def make_openvino_int4(  # noqa: PLR0913 - the keywords are the scheme's options
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    samples: int = 128,
    group_size: int = 64,
    ratio: float = 1.0,
    symmetric: bool = False,
    improve: Sequence[str] = (),
) -> Made:
    """The scheme `openvino-int4`: 4-bit weights by groups, 8-bit embeddings, float activations.

    Args:
        model: A float32 model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of the modules that stay float.
        calibration: Rows for the data-aware options and, with `ratio` below 1, to rank layers; None uses the weights
            alone.
        samples: Rows to read.
        group_size: Weights along the inputs that share a scale; -1 takes one scale per output channel.
        ratio: Share of the weights that get 4 bits; the most sensitive ones get 8.
        symmetric: No zero points: a little smaller, a little less exact.
        improve: What the data serves for: `"scale_estimation"` (scales that fit each layer's output), `"gptq"`
            (rounding that makes up for its own error, arXiv 2210.17323), `"awq"` (salient channels scaled first,
            arXiv 2306.00978).

    Returns:
        The export, the names of the quantized modules, and results for the record.

    Raises:
        SettingError: A group size that does not divide a layer's inputs, a ratio outside (0, 1], an unknown
            improvement or one without calibration, or nothing to quantize.
    """
    _check_int4(ratio, improve, calibration)
    _check_group_size(model, kept_float, group_size)
    nncf = load_nncf()
    feed = None if calibration is None else _Feed(calibration, model, processor, samples)
    exported, modules = export_openvino(model, processor)
    modes, by_weights = nncf.CompressWeightsMode, nncf.SensitivityMetric.WEIGHT_QUANTIZATION_ERROR

    def change(program: Any, ignored: Any) -> Any:
        return nncf.compress_weights(
            program,
            mode=modes.INT4_SYM if symmetric else modes.INT4_ASYM,
            ratio=ratio,
            group_size=group_size,
            ignored_scope=ignored,
            sensitivity_metric=by_weights if feed is None and ratio < 1 else None,
            dataset=None if feed is None else nncf.Dataset(feed),
            subset_size=128 if feed is None else len(feed),
            **dict.fromkeys(improve, True),
        )

    changed, bits = _quantize(exported, modules, kept_float, change)
    results = {"precision": "f32", "group_size": group_size, "modules_by_bits": bits}
    return run_in_float32(exported), changed, results if feed is None else {**results, "samples": feed.count}


class _Feed:
    """Calibration rows, one at a time and without padding, which NNCF reads several times over."""

    def __init__(self, calibration: Any, model: Any, processor: Any, samples: int) -> None:
        found = batches(calibration, model, processor, batch_size=1, samples=samples)
        self.rows = [{name: t.cpu().numpy() for name, t in row.items() if name != "labels"} for row in found]
        self.count = sum(len(next(iter(row.values()))) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(progress(self.rows, "calibrating"))


def _calibrated(program: Any, ignored: Any, feed: _Feed, smoothing: bool) -> Any:
    """NNCF's post-training quantization: weights symmetric per output channel, activations per tensor."""
    nncf = load_nncf()
    advanced = nncf.AdvancedQuantizationParameters(
        # x86 without VNNI sums 8-bit products in 16 bits, which can overflow; NNCF then uses half of the range
        overflow_fix=nncf.OverflowFix.DISABLE if supports_vnni() else nncf.OverflowFix.ENABLE
    )
    if not smoothing:
        advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    kinds = {node.get_type_name() for node in program.get_ordered_ops()}
    return nncf.quantize(
        program,
        nncf.Dataset(feed),
        preset=nncf.QuantizationPreset.MIXED,  # unsigned activations, which x86 is fast with
        subset_size=len(feed),
        # MVN is layer normalization
        model_type=None if "Convolution" in kinds and "MVN" not in kinds else nncf.ModelType.TRANSFORMER,
        ignored_scope=ignored,
        advanced_parameters=advanced,
    )


def _quantize(exported: Any, modules: dict[str, str], kept_float: Sequence[str], change: Any) -> tuple[list[str], Any]:
    """Change an export's program in place of the old one; the names of the modules with fewer bits, and their counts.

    Raises:
        SettingError: No node has weights, all are kept float, or none was changed.
    """
    nncf = load_nncf()
    ignored = [node for node, module in modules.items() if module in kept_float]
    if len(ignored) == len(modules):
        raise SettingError(
            f"There is nothing to quantize: no {', '.join(WEIGHT_PORTS)} with constant weights outside "
            f"{list(kept_float)}."
        )
    with silent():
        scope = nncf.IgnoredScope(names=ignored) if ignored else None
        program = change(exported.components["model"].program, scope)
    bits = {module: BITS[kind] for node, module, kind in weight_types(program, modules) if kind in BITS}
    if not bits:
        raise SettingError(f"NNCF quantized none of {len(modules)} nodes: {', '.join(sorted(modules.values())[:5])}.")
    exported.components["model"].program = program
    return sorted(bits), {str(width): count for width, count in sorted(Counter(bits.values()).items())}


def _check_int4(ratio: float, improve: Sequence[str], calibration: Any) -> None:
    if not 0 < ratio <= 1:
        raise SettingError(f"ratio must lie in (0, 1], got {ratio}: it is the share of the weights that get 4 bits.")
    if isinstance(improve, str) or not set(improve) <= set(IMPROVEMENTS):
        raise SettingError(f"improve must be a list with any of {', '.join(IMPROVEMENTS)}, got {improve!r}.")
    if improve and calibration is None:
        raise SettingError(f"{', '.join(improve)} of openvino-int4 needs calibration=: rows that the model will read.")


def _check_group_size(model: Any, kept_float: Sequence[str], group_size: int) -> None:
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name not in kept_float and group_size != -1:
            width = module.in_features if isinstance(module, nn.Linear) else module.nx
            if group_size < 1 or width % group_size:
                raise SettingError(
                    f"group_size must divide the inputs of every layer, {name} has {width}, got {group_size}. "
                    "Choose a divisor, or -1 for one scale per output channel."
                )
