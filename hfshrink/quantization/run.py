"""`quantize`: one door for every scheme."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import EXPORT_MANIFEST, infer_task, load
from hfshrink.measurement import Measurement
from hfshrink.modules import count_parameters, head_names, select_modules
from hfshrink.quantization.graphs.parity import check_parity
from hfshrink.quantization.schemes import check_options, check_scheme
from hfshrink.record import StepRecord, append_step, model_name
from hfshrink.saving import save_aside


def quantize(
    model: Any,
    scheme: str,
    *,
    output_dir: str | Path | None = None,
    calibration: Any = None,
    processor: Any = None,
    task: str | None = None,
    exclude: str | Sequence[str] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Quantize a model, from a Hub id to a folder that loads, and check the result against the float model.

    `onnx-int8` keeps 8-bit weights per output channel and quantizes activations at run time (U8S8), embeddings
    included; additions, normalization and softmax stay float. The task head stays float by default: it is small, and
    its error reaches the answer directly. The model itself is left as it was.

    Args:
        model: A model, a folder or a Hub id.
        scheme: One of `hfshrink.quantization.SCHEMES`.
        output_dir: Where to save the export with tokenizer, config and record; None keeps it in memory.
        calibration: Rows to compare both models on (a `datasets.Dataset`, a Hub id, or an iterable of batches); None
            takes seeded random inputs of several lengths. The record says which.
        processor: The tokenizer or image processor; None takes the one beside the model.
        task: One of `hfshrink.loading.TASKS`, for a config that names no architecture.
        exclude: `fnmatch` wildcards of Linears and Embeddings to leave in float; None means the task head, `()`
            nothing.
        overwrite: Whether a folder with files in it may be replaced.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        **options: Of the scheme; a wrong name is told with those that there are.

    Returns:
        transformers' `ExportedModel`, called like the model; `ExportedModel.from_pretrained(output_dir)` loads it
        again.

    Raises:
        SettingError: Unknown scheme, a wildcard that matches nothing, nothing left to quantize, outputs that are not
            finite.
        MissingDependencyError: The extra `onnx` is not installed.
        CheckpointError: `model` can't be loaded, or `output_dir` can't be written or holds other files.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> exported = quantize(BertForSequenceClassification(config), "onnx-int8")
        >>> exported.config.hfshrink["history"][-1]["method"]
        'onnx-int8'
    """
    check_options(scheme, check_scheme(scheme).load_maker(), options)
    settings = _settings(calibration=calibration, task=task, exclude=exclude, **options)
    output_dir = None if output_dir is None else Path(output_dir).expanduser()
    _check_not_inside(model, output_dir)
    with nullcontext() if output_dir is None else save_aside(output_dir, overwrite=overwrite) as folder:
        loaded, found = load(model, task, trust_remote_code=trust_remote_code, **_float32_if_named(model))
        if not isinstance(loaded, nn.Module):
            raise UnsupportedModelError(
                f"{model} is an export already; quantize the PyTorch model that it was made from."
            )
        processor = processor or found
        if loaded.dtype != torch.float32:
            raise SettingError(f"The model is in {loaded.dtype}; quantize from its float32 weights: model.float().")
        step, exported = _export(loaded, scheme, processor, infer_task(loaded, task), exclude, calibration, options)
        before = dataclasses.replace(step.before, size_bytes=_file_bytes(model, ".safetensors"))
        step = dataclasses.replace(step, settings=settings, before=before)
        if folder is None:
            append_step(exported, step, base_model=model_name(loaded), task=infer_task(loaded, task))
            return exported
        exported.save_pretrained(folder)
        after = dataclasses.replace(step.after, size_bytes=_file_bytes(folder, ".onnx", ".onnx.data"))
        step = dataclasses.replace(step, after=after)
        append_step(exported, step, base_model=model_name(loaded), task=infer_task(loaded, task))
        exported.config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    return load(output_dir, task, trust_remote_code=trust_remote_code)[0]


def _export(
    model: Any,
    scheme: str,
    processor: Any,
    task: str,
    exclude: str | Sequence[str] | None,
    calibration: Any,
    options: dict[str, Any],
) -> tuple[StepRecord, Any]:
    """The export and what there is to say about it, sizes on disk apart."""
    start, row = time.perf_counter(), check_scheme(scheme)
    kept_float = [] if scheme == "onnx-fp32" else _kept_float(model, exclude)
    exported, changed, results = row.load_maker()(model, processor, kept_float, calibration=calibration, **options)
    results["parity"] = check_parity(model, exported, processor, task, calibration)
    parameters, nonzero = count_parameters(model)
    step = StepRecord(
        technique="quantize",
        method=scheme,
        before=Measurement(parameters=parameters, nonzero_parameters=nonzero),
        after=Measurement(parameters=parameters),
        modules=changed,
        skipped=dict.fromkeys(kept_float, "task head" if exclude is None else "excluded"),
        results=results,
        seconds=time.perf_counter() - start,
        source=row.source,
    )
    return step, exported


def _check_not_inside(model: Any, output_dir: Path | None) -> None:
    """Refuse an output folder that is, or holds, the model that is read: replacing it would delete the source."""
    if output_dir is None or not isinstance(model, str | Path) or not Path(model).is_dir():
        return
    if Path(model).resolve().is_relative_to(output_dir.resolve()):
        raise SettingError(f"output_dir {output_dir} holds the model that is read. Choose another folder.")


def _float32_if_named(model: Any) -> dict[str, Any]:
    """Checkpoints are read in float32, which ONNX Runtime quantizes from; exports and models come as they are."""
    named = isinstance(model, str | Path) and not (Path(model) / EXPORT_MANIFEST).is_file()
    return {"dtype": torch.float32} if named else {}


def _kept_float(model: Any, exclude: str | Sequence[str] | None) -> list[str]:
    if exclude is None:
        return head_names(model)
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    return list(select_modules(model, (nn.Linear, nn.Embedding), include=patterns)) if patterns else []


def _file_bytes(folder: Any, *endings: str) -> int | None:
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        return None
    return sum(file.stat().st_size for file in Path(folder).iterdir() if file.name.endswith(endings))


def _settings(**given: Any) -> dict[str, Any]:
    """The keywords that were given, as JSON holds them; data sets by their type's name."""
    plain = (str, int, float, bool, list, tuple)
    shown: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, str | Path) and Path(value).exists():
            shown[name] = Path(value).name  # paths of a machine stay out of records
        elif value is not None:
            shown[name] = value if isinstance(value, plain) else type(value).__name__
    return shown
