"""4-bit layers of bitsandbytes that stay exact: saved or turned back after a forward pass, they are what they were.

On processors with AVX512-BF16 the first forward pass in eval mode packs a layer's weight for a faster kernel
(`bitsandbytes.functional._convert_weight_packed_for_cpu`). The 4-bit codes survive it; the scales are rounded to
bfloat16 and transposed, and packing back before a save rounds them once more, or, without double quantization, leaves
them transposed: that checkpoint is corrupt. `keep_exact` holds each layer's scales (an eighth to half a bit per
weight) and gives them back.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from hfshrink.errors import UnsupportedModelError

NOTICE = "MatMul8bitLt: inputs will be cast"  # bitsandbytes says it at every layer of every forward pass


def keep_exact(model: nn.Module) -> None:
    """Make the 4-bit layers of a model save what was quantized, whatever ran before.

    Call it before the first forward pass; layers that are packed already are refused.

    Raises:
        UnsupportedModelError: A layer was packed before, so that its exact scales are lost.
    """
    for name, layer in four_bit_layers(model).items():
        if hasattr(layer, "exact_state"):
            continue
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise UnsupportedModelError(
                f"{name} was packed for this processor by a forward pass in eval mode, which rounds its scales. Load "
                "the model again and go on before the first forward pass."
            )
        layer.exact_state = copy.copy(layer.weight.quant_state)
        layer.register_state_dict_pre_hook(_restore_before_saving)


def restore_exact(layer: Any) -> None:
    """Undo the packing of one 4-bit layer: its codes and scales as they were quantized. The next pass packs again.

    Raises:
        UnsupportedModelError: It was packed before `keep_exact` saw it.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    if not hasattr(layer, "exact_state"):
        raise UnsupportedModelError(
            "A 4-bit layer was packed for this processor by a forward pass in eval mode, which rounds its scales: "
            "what it held before is lost. Load the model again and do this before the first forward pass."
        )
    layer.weight.data, _ = _convert_weight_packed_for_cpu_inverse(layer.weight.data, copy.copy(state))
    layer.weight.quant_state = layer.quant_state = copy.copy(layer.exact_state)


def dequantize(model: Any, dtype: torch.dtype | None = None) -> Any:
    """Turn bitsandbytes' layers of a model back into plain ones, also after forward passes; what was rounded stays so.

    `model.dequantize()` itself reads packed weights as if they were not, and fails where `config.dtype` is a string.

    Args:
        model: A model quantized with int8, nf4 or fp4.
        dtype: Of the new weights; None takes that of the model's float parameters.

    Returns:
        The same model, changed in place; it trains, casts and saves like any other.

    Raises:
        UnsupportedModelError: It has no layers of bitsandbytes, or exact scales are lost.
    """
    import bitsandbytes as bnb

    if not any(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules()):
        raise UnsupportedModelError(f"{type(model).__name__} has no layers of bitsandbytes; it is float already.")
    for layer in four_bit_layers(model).values():
        restore_exact(layer)
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    model.dequantize(dtype)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        vars(model).pop(flag, None)
    for module in model.modules():
        if hasattr(module, "config"):
            vars(module.config).pop("_is_quantized", None)
    return model


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    """The 4-bit layers of a model by name."""
    import bitsandbytes as bnb

    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def be_quiet() -> None:
    """Drop bitsandbytes' notice that int8 layers compute in float16, which comes once per layer and forward pass."""
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_notice)


def _is_no_notice(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(NOTICE)


def _restore_before_saving(layer: Any, *_: Any) -> None:
    restore_exact(layer)
