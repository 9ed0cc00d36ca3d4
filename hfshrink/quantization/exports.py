"""Schemes that export: the maker runs, its result is compared with the model, saved and recorded."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from hfshrink.errors import SettingError
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.loading import infer_task, load
from hfshrink.measurement import Measurement
from hfshrink.modules import measure_parameters
from hfshrink.quantization.graphs.parity import check_parity
from hfshrink.quantization.request import Request
from hfshrink.quantization.schemes import check_scheme
from hfshrink.quantization.search.guard import guard
from hfshrink.quantization.training.exporting import make_learned
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges, trained_step
from hfshrink.record import StepRecord, append_step, model_name
from hfshrink.saving import save_aside

Made = tuple[Any, list[str], dict[str, Any]]
TRAINED_FOR = ("onnx-int8-static", "onnx-int4")
"""Schemes that take what `QAT` has learned."""


def export(request: Request) -> Any:
    """Export a model by a scheme, check it, record it, and save it where there is a folder.

    Raises:
        SettingError: The model is not in float32; and what the maker, the guard and the check raise.
    """
    aside = nullcontext() if request.output_dir is None else save_aside(request.output_dir, request.overwrite)
    with aside as folder:
        exported, step = _make(request)
        if folder is not None:
            exported.save_pretrained(folder)
            step = dataclasses.replace(step, after=dataclasses.replace(step.after, size_bytes=weight_bytes(folder)))
        task = infer_task(request.model, request.task)
        append_step(exported, step, base_model=model_name(request.model), task=task)
        if folder is None:
            return exported
        exported.config.save_pretrained(folder)
        if request.processor is not None:
            request.processor.save_pretrained(folder)
    return load(request.output_dir, request.task, trust_remote_code=request.trust_remote_code)[0]


def _as_trained(request: Request, model: Any) -> tuple[Callable[..., Made], dict[str, Any], bool]:
    """The maker, its options, and whether the model was trained with `QAT` for it and brings its own ranges."""
    maker, options = check_scheme(request.scheme).load_maker(), dict(request.options)
    step = trained_step(model) if request.calibration is None and not options else None
    learned = learned_ranges(model) if step is not None and request.scheme in TRAINED_FOR else None
    if step is None or learned is None:
        return maker, options, False
    if request.scheme == "onnx-int8-static":
        return (make_learned, options, True) if learned[0] else (maker, options, False)
    if learned[0] or step.settings.get("group_size") is None or step.settings["weight_bits"] > 4:
        return maker, options, False
    tables = {"embeddings": "int4"} if step.settings.get("embeddings") else {}
    return maker, {"rounding": "rtn", "group_size": step.settings["group_size"], **tables}, True


def _make(request: Request) -> tuple[Any, StepRecord]:
    """The export and what there is to say about it, sizes on disk apart."""
    start, row, model = time.perf_counter(), check_scheme(request.scheme), request.load()
    if model.dtype != torch.float32:
        raise SettingError(f"The model is in {model.dtype}; quantize from its float32 weights: model.float().")
    task, kept = infer_task(model, request.task), request.kept_float() if row.keeps else {}
    if request.exclude is None and task == "text-generation" and not row.keeps_vocabulary:
        kept = {}
    maker, options, as_trained = _as_trained(request, model)

    def make(model: Any, processor: Any, kept_float: Sequence[str]) -> Made:
        return maker(model, processor, kept_float, calibration=request.calibration, **options)

    if request.max_drop is None:
        exported, changed, results = make(model, request.processor, list(kept))
    else:
        bound = (task, request.calibration, request.metric, request.max_drop)
        exported, changed, results = guard(make, model, request.processor, list(kept), *bound, row.ranked_at)
    with fake_quantized(model) if as_trained else nullcontext():
        longest = results.get("max_length")
        results["parity"] = check_parity(
            model, exported, request.processor, task, request.calibration, longest=longest
        )
    before = dataclasses.replace(measure_parameters(model), size_bytes=request.source_bytes())
    step = StepRecord(
        technique="quantize",
        method=request.scheme,
        settings=request.settings,
        before=before,
        after=Measurement(parameters=before.parameters),
        modules=changed,
        skipped=kept | dict.fromkeys(results.get("restored", ()), "restored by max_drop"),
        results=results | request.notes(),
        seconds=time.perf_counter() - start,
        source=row.source,
    )
    return exported, step
