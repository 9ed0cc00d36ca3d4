"""Export through transformers' exporters: one float graph with free batch size and sequence length."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hfshrink.errors import MissingDependencyError
from hfshrink.inputs import eval_mode, random_inputs


def export_float(model: Any, processor: Any = None) -> Any:
    """Export a model as one float ONNX graph with free batch size and sequence length.

    Every input that the tokenizer makes and the model takes is traced (an untraced one would be dropped at run time,
    and sentence pairs come out wrong); without a tokenizer, all of the family's.

    Args:
        model: The model; its own config object stays apart from the export's.
        processor: Its tokenizer or image processor, or None.

    Returns:
        transformers' `ExportedModel` with one component, `model`.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = random_inputs(model, 2, 8, processor, pairs=True)
    axes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    if "pixel_values" in inputs:
        axes["pixel_values"] = {0: torch.export.Dim.AUTO}
    flags: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with quiet(), eval_mode(model):
        try:
            exporter = OnnxExporter()
        except ImportError as error:  # it names the package and the version that it needs
            raise MissingDependencyError(f"{error} Or install: pip install 'hfshrink[onnx]'") from error
        exported = exporter.export(model, {**inputs, **flags}, OnnxConfig(dynamic=True, dynamic_shapes=axes))
    exported.config = copy.deepcopy(model.config)  # the exporter hands out the model's own object
    if hasattr(exported.config, "quantization_config"):  # a layer map describes PyTorch modules, not this graph
        del exported.config.quantization_config
    return exported


def make_float(
    model: Any, processor: Any, kept_float: Sequence[str], *, calibration: Any = None
) -> tuple[Any, list[str], dict[str, Any]]:
    """The float graph, as a scheme; there is nothing to keep in float and nothing to calibrate."""
    return export_float(model, processor), [], {}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter (prints, version drift, fake operators) off the user's screen.

    Errors still raise.
    """
    loggers = [
        logging.getLogger(name) for name in ("transformers", "torch.onnx", "torch.export", "onnxscript", "root", "")
    ]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
