"""The float graph, which is the baseline of its runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hfshrink.quantization.graphs.decoder import export_graph
from hfshrink.quantization.graphs.fusing import fuse_graph


def make_float(
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    fuse: bool = True,
    generation: bool | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-fp32`: nothing is quantized, so there is nothing to keep in float and nothing to calibrate.

    Args:
        model: A float32 model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Not read.
        calibration: Not read.
        fuse: Rewrite the graph into forms with faster kernels (`fuse_graph`), as every other ONNX scheme does, so that
            the baseline is no slower than it has to be.
        generation: Whether the export generates; None means wherever the model is a causal language model.
    """
    exported = export_graph(model, processor, generation)
    return exported, [], {"fused": fuse_graph(exported.components["model"].program) if fuse else {}}
