"""What a teacher's answers depend on, as hashes and names that two runs can compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hfshrink.distillation.teachers.answers import TeacherRun
from hfshrink.errors import SettingError
from hfshrink.record import model_name, versions

NAMES_ONLY = ("_name_or_path", "transformers_version", "architectures", "hfshrink", "dtype", "id2label", "label2id")
"""Entries of a config that change no logit."""

Scalar = str | int | float | bool | None


def cache_settings(run: TeacherRun) -> dict[str, Any]:
    """Everything that the answers of a run depend on, JSON-safe, for the store's `cache.json`.

    Args:
        run: The teacher and what is kept of it.
    """
    config: Any = run.model.config
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    return {
        "hfshrink": versions().get("hfshrink"),
        "teacher": {
            "name": model_name(run.model),
            "revision": getattr(config, "_commit_hash", None),
            "class": type(run.model).__name__,
            "config": _digest({k: v for k, v in config.to_dict().items() if k not in NAMES_ONLY}),
            "weights": weights_digest(run.model),
        },
        "tokenizer": None if tokenizer is None else _tokenizer_settings(tokenizer),
        "collator": _collator_settings(run.collator, config, tokenizer),
        "answers": {
            "signal": run.signal,
            "entries": None if run.signal == "full" else run.entries,
            "seed": run.seed if run.signal == "sampled" else None,
            "classes": run.classes,
            "parts": dict(run.parts),
        },
    }


def weights_digest(model: nn.Module) -> str:
    """BLAKE2b of all weights and buffers of a model: names, dtypes, shapes and bytes.

    Raises:
        SettingError: A weight was offloaded to disk and can't be read here.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_digest(layer)
        >>> layer.weight.data[0, 0] += 1
        >>> weights_digest(layer) == before
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            raise SettingError(f"The teacher's weight {name} is offloaded. Load the teacher into memory to cache it.")
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name}:{value.dtype}{tuple(value.shape)};".encode())
        data: Any = flat.view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    if not hasattr(tokenizer, "get_vocab"):
        settings = tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else {}
        return {"class": type(tokenizer).__name__, "settings": _digest(settings)}
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": _digest(tokenizer.get_vocab()),
        "special_ids": [int(number) for number in tokenizer.all_special_ids],
        "truncation_side": tokenizer.truncation_side,
        "max_length": min(int(tokenizer.model_max_length), 2**31 - 1),
    }


def _collator_settings(collator: Any, config: Any, tokenizer: Any) -> dict[str, Any]:
    pad = getattr(config, "pad_token_id", None)
    padding = {
        "padding_side": getattr(tokenizer, "padding_side", "right"),
        "pad_id": getattr(tokenizer, "pad_token_id", None) if pad is None else pad,
    }
    if collator is None:
        return {"class": "default", **padding}
    known = getattr(collator, "__dict__", {})
    simple = {name: value for name, value in known.items() if isinstance(value, Scalar)}
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"class": name, **padding, "settings": simple}


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
