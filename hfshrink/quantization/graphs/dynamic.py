"""Dynamic int8 through ONNX Runtime: 8-bit weights, activations quantized as they come."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.generation import has_cache
from hfshrink.quantization.graphs.decoder import export_graph
from hfshrink.quantization.graphs.eight_bit import write_eight_bits
from hfshrink.quantization.graphs.exporting import quiet
from hfshrink.quantization.graphs.fusing import fuse_graph
from hfshrink.quantization.graphs.nodes import fold_transposes, module_of, weight_nodes
from hfshrink.quantization.hardware import processor_features

QUANTIZED_OPS = ("MatMul", "Gemm", "Gather")
"""Operators whose constant weights become int8. Gather is the embedding table.

Convolutions lose speed in dynamic mode.
"""

logger = logging.getLogger(__name__)


def make_dynamic(
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    fuse: bool = True,
    reduce_range: bool | None = None,
    generation: bool | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-int8`: weights int8 per output channel, activations uint8 with the range of each call.

    A language model that generates gets 8-bit weights and activations in groups of 64 instead, which outliers need.

    Args:
        model: A float32 model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of modules that stay float.
        calibration: Not read; nothing is calibrated.
        fuse: Rewrite the float parts between the weights into forms with faster kernels (`fuse_graph`). What they
            compute stays the same.
        reduce_range: 7-bit weights; None asks the processor (`supports_vnni`).
        generation: Whether the export generates; None means wherever the model is a causal language model.

    Returns:
        The export, the names of the modules that became int8, and `reduce_range` and `fused` for the record.

    Raises:
        SettingError: There is nothing to quantize.
    """
    reduce_range = not supports_vnni() if reduce_range is None else reduce_range
    exported = export_graph(model, processor, generation)
    fused = fuse_graph(exported.components["model"].program) if fuse else {}
    if has_cache(exported):
        changed = write_eight_bits(exported, model, kept_float)
        return exported, changed, {"fused": fused, "activations": "8 bits in groups of 64"}
    exported, changed = quantize_dynamic(exported, kept_float, reduce_range=reduce_range)
    return exported, changed, {"reduce_range": reduce_range, "fused": fused}


def quantize_dynamic(
    exported: Any, kept_float: Sequence[str] = (), *, reduce_range: bool = False
) -> tuple[Any, list[str]]:
    """Make the constant weights of an exported graph int8: symmetric per output channel, activations uint8 when run.

    Args:
        exported: A float export.
        kept_float: Names of PyTorch modules whose nodes stay float.
        reduce_range: 7-bit weights, for processors whose 8-bit products can overflow 16 bits (x86 without VNNI).

    Returns:
        The quantized export and the names of the modules that became int8.

    Raises:
        SettingError: No node was left to quantize, or none was quantized.
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters import ExportedComponent, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    component = exported.components["model"]
    fold_transposes(component.program)
    nodes = {node.name: module_of(node) for node in weight_nodes(component.program, QUANTIZED_OPS)}
    excluded = [name for name, module in nodes.items() if module in kept_float]
    changed = [module for name, module in nodes.items() if name not in excluded]
    if not changed:
        raise SettingError(
            f"There is nothing to quantize: no {', '.join(QUANTIZED_OPS)} with constant weights outside "
            f"{list(kept_float)}. Dynamic int8 is for transformers; convolutional networks need a static scheme."
        )
    config = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=list(QUANTIZED_OPS),
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        # ONNX Runtime turns each Gemm into a MatMul under this name before it looks at the list
        nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
    )
    with quiet():
        program = OnnxRuntimeQuantizer(config).quantize(component.program, {}, exported.export_format)
    done = sum(node.op_type in ("MatMulInteger", "DequantizeLinear") for node in program.graph)
    if done == 0:
        raise SettingError(f"ONNX Runtime quantized none of {len(changed)} nodes: {', '.join(changed[:5])}.")
    if done < len(changed):
        logger.warning("ONNX Runtime quantized %d of %d nodes; the others stay float.", done, len(changed))
    components = {"model": ExportedComponent(program, component.metadata)}
    parts = (components, exported.export_format, exported.config, exported.generation_config)
    return type(exported)(*parts), sorted(set(changed))


def supports_vnni() -> bool:
    """Whether 8-bit products are summed in 32 bits here: x86 with VNNI, or a processor that is not x86."""
    return platform.machine().lower() not in ("x86_64", "amd64", "i686") or "vnni" in processor_features()
