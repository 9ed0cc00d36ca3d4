"""`quantize`: one door for every scheme."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfshrink.quantization.checkpoints import ELSEWHERE, check_weight_options, load_with_config, quantize_weights
from hfshrink.quantization.exports import export
from hfshrink.quantization.request import Request
from hfshrink.quantization.schemes import check_options, check_scheme, options_of
from hfshrink.quantization.weights.foreign import is_foreign_config

logger = logging.getLogger(__name__)


def quantize(
    model: Any,
    scheme: Any = "auto",
    *,
    output_dir: str | Path | None = None,
    calibration: Any = None,
    metric: Any = None,
    max_drop: float | None = None,
    processor: Any = None,
    task: str | None = None,
    exclude: str | Sequence[str] | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Quantize a model, from a Hub id to a folder that loads, and check the result against the float model.

    `print(hfshrink.quantization.SCHEMES)` lists the schemes. Those of PyTorch (`bf16`, `fp16`, `int8`, `nf4`, `fp4`,
    `mixed`) change the model itself, which then saves and loads as any other; a checkpoint that is named is quantized
    as it is read, and with an `output_dir` file to file, so that no more than one output shard is in memory. The
    others (`onnx-*`, `openvino-*`, `executorch-*`) export it and leave it as it was. The task head stays float by
    default: it is small, and its error reaches the answer directly.

    Args:
        model: A model, a folder or a Hub id.
        scheme: One of `hfshrink.quantization.SCHEMES`; "auto" looks at the model and the processor, and the record
            says why; or a quantization config of transformers (torchao, HQQ, GPTQ, …), for a folder or Hub id.
        output_dir: Where to save the result with tokenizer, config and record; None keeps it in memory.
        calibration: Rows that ranges are taken from, where a scheme needs them, and that the result is compared on (a
            `datasets.Dataset`, a Hub id, or an iterable of batches); None compares on seeded random inputs. Use
            training or validation rows, never test rows. A named checkpoint is read into memory for it.
        metric: With `max_drop`: what may fall, as `evaluate` names it.
        max_drop: How far the metric may fall on the calibration rows, 0.01 for a point: the modules that hurt most go
            back to float until it holds. None restores nothing.
        processor: The tokenizer or image processor; None takes the one beside the model.
        task: One of `hfshrink.loading.TASKS`, for a config that names no architecture.
        exclude: `fnmatch` wildcards of modules to leave in float; None means the task head, `()` nothing.
        overwrite: Whether a folder with files in it may be replaced.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        **options: Of the scheme; a wrong name is told with those that there are. Besides, `max_shard_size` ("5GB")
            where a scheme of PyTorch writes a folder, and `device_map`, `max_memory` and `offload_folder` where int8,
            nf4 or fp4 load a named checkpoint.

    Returns:
        In PyTorch the model; the folder, where a checkpoint was quantized file to file. Otherwise transformers'
        `ExportedModel`, called like the model; `hfshrink.load(output_dir)` loads it again.

    Raises:
        SettingError: Unknown scheme or option, a wildcard that matches nothing, nothing to quantize, outputs that are
            not finite, or a bound that can't be kept.
        UnsupportedModelError: The model is quantized already, or is an export. These are told before work starts.
        MissingDependencyError: An extra is not installed.
        CheckpointError: `model` can't be loaded, or `output_dir` can't be written or holds other files.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> exported = quantize(BertForSequenceClassification(config), "onnx-int8")
        >>> exported.config.hfshrink["history"][-1]["method"]
        'onnx-int8'
    """
    request = Request(
        model,
        scheme,
        None if output_dir is None else Path(output_dir).expanduser(),
        calibration,
        metric,
        max_drop,
        processor,
        task,
        exclude,
        overwrite,
        trust_remote_code,
        options,
    )
    if is_foreign_config(scheme):
        return load_with_config(request)
    if scheme == "auto":
        from hfshrink.quantization.hardware import choose_scheme

        request.scheme, request.reason = choose_scheme(request.skeleton(), calibration is not None)
        request.settings["reason"] = request.reason
    row = check_scheme(request.scheme)
    request.check_keeps(row.keeps)
    maker = row.load_maker()
    if row.runtime == "torch":
        check_weight_options(request, maker)
    else:
        check_options(request.scheme, options_of(maker), options, ELSEWHERE)
    _warn_of_speed(request)
    return export(request) if row.runtime != "torch" else quantize_weights(request)


def _warn_of_speed(request: Request) -> None:
    """Say, and record, where a scheme brings no speed on this processor."""
    from hfshrink.quantization.hardware import warn_if_slower

    request.warning = warn_if_slower(request.scheme)
    if request.warning is not None:
        logger.warning("%s", request.warning)
