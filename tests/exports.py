"""Float exports of tiny models, traced once per process, as tracing takes seconds."""

from __future__ import annotations

import copy
import functools
from typing import Any

import tiny
from hfshrink.quantization.graphs.decoder import export_graph

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 64, "num_labels": 3},
    "llama": {"hidden_size": 32, "tie_word_embeddings": True},
    "gpt2": {},
    "resnet": {"num_labels": 3, "image_size": 8},  # the size is no entry of its config; tracing asks for one
}
"""family -> how its model differs from that of `tiny.model`."""


@functools.cache
def _traced(family: str) -> tuple[Any, Any]:
    model = tiny.model(family, **SIZES[family])
    return model, export_graph(model, None, None)


def of(family: str) -> tuple[Any, Any]:
    """A model, and a copy of its export to change: with a cache where it is a causal language model."""
    import onnx_ir
    from transformers.exporters import ExportedComponent

    model, traced = _traced(family)
    component = traced.components["model"]
    program = onnx_ir.from_proto(onnx_ir.to_proto(component.program))
    parts = {"model": ExportedComponent(program, component.metadata)}
    config = copy.deepcopy(traced.config)
    return model, type(traced)(parts, traced.export_format, config, traced.generation_config)


def make(
    maker: Any, family: str, monkeypatch: Any, kept_float: Any = (), **options: Any
) -> tuple[Any, tuple[Any, ...]]:
    """A model, and what a scheme's maker makes of its export, without tracing it again."""
    model, exported = of(family)
    monkeypatch.setitem(maker.__globals__, "export_graph", lambda *_: exported)
    return model, maker(model, None, list(kept_float), **options)
