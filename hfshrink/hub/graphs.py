"""ONNX graphs without the places of this machine: the exporter notes in each node which source file made it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError
from hfshrink.hub.leaks import chunks

TRACES = ("pkg.torch.onnx.stack_trace", "pkg.onnxscript.stack_trace", "stack_trace")

logger = logging.getLogger(__name__)


def without_traces(file: Path, folder: Path) -> Path:
    """A graph without source files' names in it; external weights are not touched.

    Args:
        file: The `.onnx` file.
        folder: Where a cleaned copy may be written.

    Returns:
        The file itself where nothing was to clean, else the copy: the same nodes, the same weights.

    Raises:
        CheckpointError: It is no ONNX graph.
    """
    if not any(trace.encode() in piece for piece in chunks(file) for trace in TRACES):
        return file
    try:
        import onnx
    except ImportError:
        logger.warning(
            "%s names source files of this machine; with onnx installed they would be taken out.", file.name
        )
        return file
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common parent
        raise CheckpointError(f"{file.name} can't be read; it is half-written or corrupt: {error}") from None
    _clean(model.graph)
    for function in model.functions:
        _clean(function)
    folder.mkdir(parents=True, exist_ok=True)
    cleaned = folder / file.name
    cleaned.write_bytes(model.SerializeToString(deterministic=True))
    return cleaned


def _clean(graph: Any) -> None:
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if entry.key not in TRACES]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _clean(inner)
