"""bf16 and fp16: every float tensor of a model in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hfshrink.errors import SettingError
from hfshrink.quantization.weights.choice import check_finite, check_unquantized, held_method
from hfshrink.streaming.dtypes import is_kept_float32

SCHEMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def cast_bf16(model: Any, kept_float: Sequence[str] = ()) -> tuple[Any, list[str], dict[str, Any]]:
    """bfloat16: the range of float32 with 8 bits of precision; as `cast_weights`."""
    return cast_weights(model, kept_float, dtype=torch.bfloat16)


def cast_fp16(model: Any, kept_float: Sequence[str] = ()) -> tuple[Any, list[str], dict[str, Any]]:
    """float16: 11 bits of precision, values up to 65504; as `cast_weights`."""
    return cast_weights(model, kept_float, dtype=torch.float16)


def cast_weights(
    model: Any, kept_float: Sequence[str] = (), *, dtype: torch.dtype
) -> tuple[Any, list[str], dict[str, Any]]:
    """Cast the weights of a model to 16 bits, in place, exactly as a plain reload of the saved model will have them.

    A config names one dtype, and `from_pretrained` casts all weights to it, so nothing can be kept in float32 but
    what the family itself keeps (T5's output projections in float16). Tensors that are not saved, such as the
    frequencies of rotary positions, stay as they are; `model.half()` would round them too.

    Args:
        model: A float model. Compressed layers keep their integer codes.
        kept_float: Must be empty.
        dtype: `torch.bfloat16` or `torch.float16`.

    Returns:
        The same model, the names of the modules that hold a cast tensor, and results: `skipped`, name -> reason.

    Raises:
        SettingError: `kept_float` names modules, all weights have the dtype already, or a weight is not finite or
            exceeds float16's 65504. Nothing is changed then.
        UnsupportedModelError: The model is quantized.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model, modules, _ = cast_weights(BertModel(config), dtype=torch.bfloat16)
        >>> model.dtype, modules[0]
        (torch.bfloat16, 'embeddings.word_embeddings')
    """
    if dtype not in SCHEMES:
        raise SettingError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}.")
    if kept_float:
        raise SettingError(
            f"{SCHEMES[dtype]} can't leave {', '.join(kept_float)} in float32: a config names one dtype, and a plain "
            "reload casts every weight to it. Leave exclude out, or take int8 or nf4, which keep modules in float."
        )
    if held_method(model.config) != "hfshrink":
        check_unquantized(model.config, type(model).__name__)
    to_cast, skipped = [], {}
    for name, tensor in _saved_floats(model):
        if tensor.dtype == dtype:
            continue
        if is_kept_float32(model, name, dtype):
            skipped[name.rpartition(".")[0]] = "its family keeps it in float32"
            continue
        check_finite(name, tensor, SCHEMES[dtype], dtype == torch.float16)
        to_cast.append((name, tensor))
    if not to_cast:
        raise SettingError(f"{type(model).__name__} has no weights to cast: all are in {dtype} already.")
    for _, tensor in to_cast:
        tensor.data = tensor.data.to(dtype)
    _set_dtype(model.config, dtype)
    return model, list(dict.fromkeys(name.rpartition(".")[0] for name, _ in to_cast)), {"skipped": skipped}


def _saved_floats(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The float tensors that a checkpoint holds, tied ones once."""
    saved = model.state_dict(keep_vars=True)
    seen = set()
    for name, tensor in saved.items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype
