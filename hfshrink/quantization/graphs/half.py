"""The scheme `onnx-fp16`: float16 weights and arithmetic, float32 inputs and outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.decoder import export_graph
from hfshrink.quantization.graphs.exporting import quiet
from hfshrink.quantization.graphs.nodes import module_of

HALF_MAX = 65504.0
FLOAT_MIN = 1e38  # constants beyond it stand for minus infinity in masks, and float16's largest number does too
NOTE = (
    "float16 halves the file. It need not be faster on a CPU: ONNX Runtime casts to float32 around operators that "
    "have no float16 kernel there."
)


def make_half(
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    generation: bool | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-fp16`.

    Args:
        model: A float32 model; it is left as it was.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of modules that stay float32.
        calibration: Not needed.
        generation: Whether the export generates; None means wherever the model is a causal language model.

    Returns:
        The export, the names of the modules in float16, and what there is to report.

    Raises:
        SettingError: A weight is too large for float16, or there is nothing to convert.
    """
    exported = export_graph(model, processor, generation)
    component = next(iter(exported.components.values()))
    component.program, changed = to_half(component.program, kept_float)
    return exported, changed, {"note": NOTE}


def to_half(program: Any, kept_float: Collection[str] = ()) -> tuple[Any, list[str]]:
    """Convert a float graph to float16 inside; its inputs and outputs stay as they are.

    Args:
        program: An `onnx_ir.Model` with float32 weights.
        kept_float: Names of PyTorch modules whose nodes stay float32.

    Returns:
        The new graph, and the names of the modules whose weights are float16.

    Raises:
        SettingError: A weight is too large for float16; no weight was converted.
    """
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    owners = _owners(program)
    kept = {name for name, modules in owners.items() if modules & set(kept_float)}
    changed = {module for name, modules in owners.items() if name not in kept for module in modules}
    if not changed:
        raise SettingError(f"There is nothing to convert: no float32 weights outside {list(kept_float)}.")
    _check_range(program, owners, kept)
    blocked = [node.name for node in program.graph if module_of(node) in kept_float]
    proto = onnx_ir.to_proto(program)
    del proto.graph.value_info[:]  # the tracer's shapes can be stale, and their types no longer fit
    with quiet():
        converted = convert_float_to_float16(
            proto, keep_io_types=True, node_block_list=blocked, max_finite_val=HALF_MAX, disable_shape_infer=False
        )
    return onnx_ir.from_proto(converted), sorted(changed)


def _owners(program: Any) -> dict[str, set[str]]:
    """Float32 weights by name -> the modules whose nodes read them; scalars and tiny constants left out."""
    import onnx_ir

    found = {}
    for name, value in program.graph.initializers.items():
        constant = value.const_value
        if constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and len(constant.shape) > 1:
            found[name] = {module_of(node) for node, _ in value.uses()}
    return found


def _check_range(program: Any, owners: dict[str, set[str]], kept: set[str]) -> None:
    for name, modules in owners.items():
        values = program.graph.initializers[name].const_value.numpy()
        largest = float(np.abs(values).max()) if values.size else 0.0
        if name not in kept and HALF_MAX < largest < FLOAT_MIN:
            raise SettingError(
                f"The weight {name} of {', '.join(sorted(modules))} holds {largest:.3g}; float16 ends at "
                f"{HALF_MAX:.0f}. Keep it in float32: exclude={sorted(modules)!r}."
            )
