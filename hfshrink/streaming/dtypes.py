"""The dtype in which `from_pretrained` would hold each tensor of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from hfshrink.streaming.sources import Place

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of safetensors files that a load casts to the model's dtype; all others stay."""


def own_dtype(config: Any, places: Mapping[str, Place]) -> torch.dtype:
    """The dtype that a model is loaded in: the config's, or that of the first float tensor."""
    named = config.dtype
    if named is None:
        named = next((FLOATS[place.dtype] for place in places.values() if place.dtype in FLOATS), torch.float32)
    return getattr(torch, named) if isinstance(named, str) else named


def float_dtypes(model: Any, places: Mapping[str, Place], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each float tensor of a model that is loaded in `dtype`, by name; of the others nothing is said."""
    return {
        name: torch.float32 if is_kept_float32(model, name, dtype) else dtype
        for name, place in places.items()
        if place.dtype in FLOATS
    }


def is_kept_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether `from_pretrained` keeps a weight in float32 although `dtype` is asked for: its family says so."""
    from transformers.core_model_loading import build_glob_alternation

    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or ()
    if dtype not in (torch.bfloat16, torch.float16) or not kept:
        return False
    pattern: re.Pattern[str] = build_glob_alternation(kept)[0]
    return pattern.search(name) is not None
