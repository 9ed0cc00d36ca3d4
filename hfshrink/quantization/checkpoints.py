"""Schemes that stay in PyTorch: while a checkpoint is read, file to file, or of a model in memory."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import SettingError
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.loading import HUB_KEYWORDS, infer_task, load_processor
from hfshrink.measurement import Measurement
from hfshrink.modules import measure_parameters, memory_bytes
from hfshrink.quantization.graphs.parity import compare_answers, float_answers
from hfshrink.quantization.request import Request
from hfshrink.quantization.schemes import check_options, check_scheme, options_of
from hfshrink.quantization.search.guard import guard
from hfshrink.quantization.weights.bits import load_bits
from hfshrink.quantization.weights.choice import BITS, held_method
from hfshrink.quantization.weights.foreign import method_of, quantize_with_config
from hfshrink.quantization.weights.streaming import CASTS, stream_weights
from hfshrink.record import StepRecord, append_step, model_name, report
from hfshrink.saving import read_config, save_aside
from hfshrink.streaming.shards import to_bytes
from hfshrink.streaming.skeleton import count_names
from hfshrink.streaming.sources import find_folder

STREAMED = (*BITS, *CASTS)
"""Schemes that need one tensor at a time."""

LOADING = ("device_map", "max_memory", "offload_folder")
"""Options of `from_pretrained` for a checkpoint that is quantized while it is loaded."""

ELSEWHERE = {
    "max_shard_size": "the schemes of PyTorch with an output_dir",
    **dict.fromkeys(
        LOADING,
        "a named checkpoint that int8, nf4 or fp4 quantize while it is loaded, without output_dir, calibration and "
        "max_drop; file to file no device is needed",
    ),
}


@dataclass
class Made:
    """A quantized model, and what there is to say about it.

    Attributes:
        modules: Names of those that were quantized.
        answers: What the float model answered, and on what; None where it never was in memory.
    """

    model: Any
    modules: list[str]
    results: dict[str, Any]
    before: Measurement
    answers: Any = None


def check_weight_options(request: Request, maker: Callable[..., Any]) -> None:
    """Refuse options that the way in which a request will be met does not have.

    Raises:
        SettingError: An unknown option, or one of another way.
    """
    known = options_of(maker)
    if request.output_dir is not None:
        known.append("max_shard_size")
    elif request.is_unread and request.scheme in BITS:
        known.extend(LOADING)
    check_options(request.scheme, known, request.options, ELSEWHERE)
    if "max_shard_size" in request.options:
        to_bytes(request.options["max_shard_size"])


def quantize_weights(request: Request) -> Any:
    """Quantize by a scheme of PyTorch, in the way that needs the least memory for what was asked.

    Returns:
        The model; the folder, where a named checkpoint went file to file.
    """
    if request.output_dir is not None and _streams(request):
        return _stream(request, request.output_dir)
    return _run(request, _while_loading if request.is_unread and request.scheme in BITS else _in_memory)


def load_with_config(request: Request) -> Any:
    """Load a checkpoint by a quantization config of transformers, record and save it.

    Raises:
        SettingError: A keyword that is not of a config, or what `quantize_with_config` raises.
    """
    kind = type(request.scheme).__name__
    for name in ("exclude", "max_drop", "calibration"):
        if getattr(request, name) is not None:
            raise SettingError(
                f"{name}= belongs to the schemes of hfshrink; a {kind} says in its own fields what is quantized, and "
                "on what data."
            )
    saving = ("max_shard_size",) if request.output_dir is not None else ()
    known = (*LOADING, *HUB_KEYWORDS, "dtype", "attn_implementation", *saving)
    check_options(kind, known, request.options, ELSEWHERE)
    return _run(request, _by_config)


def _streams(request: Request) -> bool:
    """Whether a checkpoint goes file to file: nothing asks for its weights in memory, and all of them are plain."""
    if not (request.is_unread and request.scheme in STREAMED):
        return False
    return request.scheme in BITS or held_method(read_config(request.source)) is None


def _stream(request: Request, folder: Path) -> Path:
    """File to file; the record is written before the folder is moved into place."""
    start, name = time.perf_counter(), str(request.source)
    source = find_folder(request.source, request.trust_remote_code)
    skeleton = request.skeleton()
    parameters = count_names(skeleton)
    base = Path(name).name if Path(name).exists() else name
    task = infer_task(skeleton, request.task)

    def record(aside: Path, found: dict[str, Any]) -> None:
        results = dict(found)
        step = StepRecord(
            technique="quantize",
            method=request.scheme,
            settings=request.settings,
            before=Measurement(parameters=parameters, size_bytes=weight_bytes(source)),
            after=Measurement(parameters=parameters, size_bytes=weight_bytes(aside)),
            modules=results.pop("modules"),
            skipped=results.pop("skipped"),
            results=results | request.notes(),
            seconds=time.perf_counter() - start,
            source=check_scheme(request.scheme).source,
        )
        old = report(aside)
        steps, details = (*old.steps, step), {"task": task, **old.details}
        new = dataclasses.replace(old, steps=steps, compressed=Measurement(), details=details)
        dataclasses.replace(new, base_model=old.base_model or base).save(aside)

    how: dict[str, Any] = {key: getattr(request, key) for key in ("task", "exclude", "overwrite", "trust_remote_code")}
    stream_weights(source, folder, request.scheme, **how, **request.options, record=record)
    return folder


def _while_loading(request: Request) -> Made:
    how: dict[str, Any] = {"exclude": request.exclude, "trust_remote_code": request.trust_remote_code}
    before = Measurement(parameters=count_names(request.skeleton()))
    made = load_bits(request.source, request.scheme, task=request.task, **how, **request.options)
    request.processor = request.processor or load_processor(request.source, request.trust_remote_code)
    return Made(*made, before)


def _by_config(request: Request) -> Made:
    how = {key: value for key, value in request.options.items() if key != "max_shard_size"}
    hub = {key: how[key] for key in HUB_KEYWORDS if key in how}
    trust = {"trust_remote_code": request.trust_remote_code}
    made = quantize_with_config(request.source, request.scheme, task=request.task, **trust, **how)
    request.processor = request.processor or load_processor(request.source, **trust, **hub)
    return Made(*made, Measurement(parameters=count_names(request.skeleton(**hub))))


def _in_memory(request: Request) -> Made:
    row = check_scheme(request.scheme)
    model, maker = request.load("auto" if request.scheme in STREAMED else torch.float32), row.load_maker()
    kept = request.kept_float() if row.keeps else {}
    how = {key: value for key, value in request.options.items() if key != "max_shard_size"}
    if row.reads_calibration:
        how |= {"calibration": request.calibration, "processor": request.processor}
    results: dict[str, Any] = {}
    before = dataclasses.replace(measure_parameters(model), memory_bytes=memory_bytes(model))
    if request.max_drop is not None:
        make = _on_copies(maker, how)
        bound = (infer_task(model, request.task), request.calibration, request.metric, request.max_drop)
        results = guard(make, model, request.processor, list(kept), *bound, row.ranked_at)[2]
        kept |= dict.fromkeys(results["restored"], "restored by max_drop")
    answers = float_answers(model, request.processor, request.calibration)
    model, modules, found = maker(model, list(kept), **how)
    skipped = found.pop("skipped", {}) | kept
    return Made(model, modules, {**results, **found, "skipped": skipped}, before, answers)


def _on_copies(maker: Callable[..., Any], how: dict[str, Any]) -> Callable[..., Any]:
    """The maker as the guard calls it: on a copy, so that it can be tried again."""

    def make(model: Any, _: Any, kept_float: Sequence[str]) -> tuple[Any, list[str], dict[str, Any]]:
        return maker(copy.deepcopy(model), list(kept_float), **how)

    return make


def _run(request: Request, way: Callable[[Request], Made]) -> Any:
    """Make the model, save it before it runs, compare, and record; the folder gets the same record as the model."""
    start = time.perf_counter()
    aside = nullcontext() if request.output_dir is None else save_aside(request.output_dir, request.overwrite)
    with aside as folder:  # opened before the work: a folder that can't be written is told at once
        made = way(request)
        model, results = made.model, made.results | request.notes()
        task = infer_task(model, request.task)
        if folder is not None:
            shards = {key: request.options[key] for key in ("max_shard_size",) if key in request.options}
            model.save_pretrained(folder, **shards)
            if request.processor is not None:
                request.processor.save_pretrained(folder)
        if made.answers is not None:
            results["parity"] = compare_answers(made.answers[1], model, task, made.answers[0])
        is_ours = isinstance(request.scheme, str)
        step = StepRecord(
            technique="quantize",
            method=request.scheme if is_ours else method_of(request.scheme),
            settings=request.settings,
            before=dataclasses.replace(made.before, size_bytes=request.source_bytes()),
            after=Measurement(
                parameters=made.before.parameters,
                memory_bytes=memory_bytes(model),
                size_bytes=None if folder is None else weight_bytes(folder),
            ),
            modules=made.modules,
            skipped=results.pop("skipped"),
            results=results,
            seconds=time.perf_counter() - start,
            source=check_scheme(request.scheme).source if is_ours else "transformers",
        )
        append_step(model, step, base_model=model_name(model), task=task)
        if folder is not None:
            report(model).save(folder)
    return model
