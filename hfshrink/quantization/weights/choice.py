"""Which layers bitsandbytes may take, and why not the others; what may not be quantized at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import head_names, select_modules

BITS = ("int8", "nf4", "fp4")
"""The schemes of bitsandbytes."""
BLOCK = 64  # weights that share one scale in 4 bits: bitsandbytes' default, and the one its CPU kernel is used with
ROWS = 32  # its CPU kernel (AVX512-BF16) packs the rows of 4-bit weights in blocks of so many
MAX_FLOAT16 = 65504.0  # LLM.int8 goes through float16


@dataclass(frozen=True)
class Choice:
    """What a scheme of bitsandbytes does to a model.

    Attributes:
        layers: Names of the layers that are quantized.
        skipped: Names of the Linears and Conv1Ds that are not -> the reason.
        patterns: What stands in `llm_int8_skip_modules`, so that plain transformers leaves the same layers alone.
    """

    layers: list[str]
    skipped: dict[str, str]
    patterns: list[str]


def choose_layers(model: Any, scheme: str, kept_float: Sequence[str] | Mapping[str, str] = ()) -> Choice:
    """The layers of a model that a scheme takes. The model may lie on meta: shapes and names are enough.

    Args:
        model: A transformers model.
        scheme: One of `BITS`.
        kept_float: Names of modules to leave in float, or name -> reason.

    Raises:
        SettingError: No layer is left; the message counts the reasons.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=80)
        >>> choice = choose_layers(BertForSequenceClassification(config), "nf4", ["classifier"])
        >>> choice.skipped["bert.encoder.layer.0.intermediate.dense"]
        '4 bits need a multiple of 32 outputs and of 64 inputs, this has 80 and 64'
        >>> len(choice.layers)
        5
    """
    if not isinstance(kept_float, Mapping):
        kept_float = dict.fromkeys(kept_float, "kept in float")
    linears, tied = linear_layers(model), _tied(model)
    skipped = {
        name: reason
        for name, module in linears.items()
        if (reason := kept_float.get(name) or _obstacle(module, scheme, f"{name}.weight" in tied))
    }
    patterns = _patterns(model, skipped)
    for name in linears:
        if name not in skipped and not _converts(model, name, patterns):
            skipped[name] = "transformers would skip it: its name ends like one that is skipped, or it stays float32"
    layers = [name for name in linears if name not in skipped]
    if not layers:
        reasons = {reason.partition(", this")[0] for reason in skipped.values()} or {"the model has no Linear"}
        raise SettingError(
            f"{scheme} finds nothing to quantize among {len(linears)} linear layers of {type(model).__name__}: "
            f"{'; '.join(sorted(reasons))}." + (" Try int8." if scheme != "int8" and linears else "")
        )
    return Choice(layers, skipped, patterns)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linears and GPT-2's Conv1Ds (a Linear with a transposed weight) by name, each once."""
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)
    return {name: module for name, module in model.named_modules() if name and isinstance(module, kinds)}


def layer_shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs) of a Linear or Conv1D."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def kept_names(model: Any, exclude: str | Sequence[str] | None) -> dict[str, str]:
    """What `exclude` says about a model: name -> reason; None means the task head.

    Raises:
        SettingError: A wildcard matches nothing.
    """
    if exclude is None:
        return dict.fromkeys(head_names(model), "task head")
    from transformers.pytorch_utils import Conv1D

    from hfshrink.layers import LAYER_KINDS

    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d, *LAYER_KINDS.values())
    return dict.fromkeys(select_modules(model, kinds, include=patterns), "excluded") if patterns else {}


def held_method(config: Any) -> str | None:
    """Who holds the one place for a quantization in a config or its JSON form; None where it is free.

    Example:
        >>> held_method({"quantization_config": {"quant_method": "gptq"}})
        'gptq'
    """
    held = config.get("quantization_config") if isinstance(config, dict) else getattr(config, "quantization_config", 0)
    if not held:
        return None
    method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
    return str(getattr(method, "value", method))


def check_unquantized(config: Any, what: str) -> None:
    """Raise where the config's one place for a quantization is taken.

    Args:
        config: A config object, or the JSON object of a `config.json`.
        what: What the config belongs to, for the message.

    Raises:
        SettingError: It holds hfshrink's layer map, which could not be saved beside another quantization.
        UnsupportedModelError: The weights are quantized already.
    """
    method = held_method(config)
    if method is None:
        return
    if method == "hfshrink":
        raise SettingError(
            f"{what} holds compressed layers, and a config has one place for a quantization: bitsandbytes' could not "
            "be saved beside their map. Quantize the model that hfshrink.to_dense makes of it, or go to ONNX from it."
        )
    raise UnsupportedModelError(
        f"{what} is quantized by {method} already; a second rounding would only lose accuracy. Quantize the float "
        "model that it was made from, or turn it back first: model.dequantize(), right after loading."
    )


def check_finite(name: str, weight: torch.Tensor, scheme: str, through_float16: bool = False) -> None:
    """Raise `SettingError` where a weight is NaN or infinite, or too large for a float16 that it goes through."""
    low, high = (float(bound) for bound in torch.aminmax(weight.detach()))
    if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN fails every comparison
        raise SettingError(f"{name} has NaN or infinite values; {scheme} can't store them. Is the checkpoint corrupt?")
    if through_float16 and max(-low, high) > MAX_FLOAT16:
        raise SettingError(
            f"{name} has values up to {max(-low, high):.6g}; {scheme} goes through float16, which ends at "
            f"{MAX_FLOAT16:.0f}. Use bf16" + (", or leave the layer out with exclude=." if scheme == "int8" else ".")
        )


def _tied(model: Any) -> set[str]:
    """Names of all parameters that are tied to another one, by declaration or in fact."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {*declared, *declared.values()}.union(*(same for same in names.values() if len(same) > 1))


def _obstacle(module: Any, scheme: str, is_tied: bool) -> str:
    """Why bitsandbytes can't take a layer; empty where it can."""
    from transformers.pytorch_utils import Conv1D

    if type(module) not in (nn.Linear, Conv1D):  # transformers replaces these classes only
        return f"a {type(module).__name__}, which transformers does not replace"
    if is_tied:
        return "its weight is tied to another one"
    rows, columns = layer_shape(module)
    if scheme != "int8" and (rows % ROWS or columns % BLOCK):
        return f"4 bits need a multiple of {ROWS} outputs and of {BLOCK} inputs, this has {rows} and {columns}"
    return ""


def _patterns(model: Any, skipped: Mapping[str, str]) -> list[str]:
    """Names for `llm_int8_skip_modules`; those inside the base model also as the bare base model calls them."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    bare = [name.removeprefix(prefix) for name in skipped if prefix != "." and name.startswith(prefix)]
    return [*skipped, *bare]


def _converts(model: Any, name: str, patterns: list[str]) -> bool:
    """Whether transformers, given these patterns, would replace the layer."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return should_convert_module(name, [*patterns, *(getattr(model, "_keep_in_fp32_modules", None) or ())])
