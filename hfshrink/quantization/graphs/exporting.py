"""Export through transformers' exporters: one float graph with free batch size and sequence length."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
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
        with fewer_rewrites():
            exported = exporter.export(model, {**inputs, **flags}, OnnxConfig(dynamic=True, dynamic_shapes=axes))
    exported.config = copy.deepcopy(model.config)  # the exporter hands out the model's own object
    if hasattr(exported.config, "quantization_config"):  # a layer map describes PyTorch modules, not this graph
        del exported.config.quantization_config
    own_weights(exported)
    drop_traces(exported)
    return exported


def drop_traces(exported: Any) -> None:
    """Take out what a fresh export notes in each node: the source files that made it, with this machine's paths."""
    import onnx_ir

    for component in exported.components.values():
        program = component.program
        for graph in (program.graph, *program.functions.values()):
            for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
                for name in [name for name in node.metadata_props if name.endswith("stack_trace")]:
                    del node.metadata_props[name]


def own_weights(exported: Any) -> None:
    """Copy the weights of a fresh export, which the exporter shares with the model: its training would change both."""
    import onnx_ir

    for component in exported.components.values():
        for value in component.program.graph.initializers.values():
            if value.const_value is not None:
                array = value.const_value.numpy().copy()
                value.const_value = onnx_ir.tensor(array, dtype=value.const_value.dtype, name=value.name)


@contextlib.contextmanager
def fewer_rewrites() -> Iterator[None]:
    """Keep onnxscript's optimizer from its rule `SlicesSplit`, whose time grows with the square of the graph.

    For each node it lists all nodes of the graph anew, and it tries every pair of Slices: minutes for 30 layers, to
    merge two Slices into a Split.
    """
    import onnxscript.rewriter

    rules = getattr(onnxscript.rewriter, "_DEFAULT_REWRITE_RULES", None)
    if rules is None:  # a newer version, with other names
        yield
        return
    try:
        onnxscript.rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name != "SlicesSplit")
        yield
    finally:
        onnxscript.rewriter._DEFAULT_REWRITE_RULES = rules


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
