"""Digests of content: whether a model or settings are still those that something was computed with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from hfshrink.errors import SettingError

DIGEST_BYTES = 16


def digest_of(content: Any) -> str:
    """BLAKE2b of JSON-safe content; the order of keys makes no difference.

    Example:
        >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
        True
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).hexdigest()


def weights_digest(model: nn.Module, prefix: str = "") -> str:
    """BLAKE2b of all weights and buffers of a model: names, dtypes, shapes and bytes.

    Args:
        model: Any module.
        prefix: What else the digest shall depend on; it goes before the weights.

    Raises:
        SettingError: A weight was offloaded to disk and can't be read here.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_digest(layer)
        >>> layer.weight.data[0, 0] += 1
        >>> weights_digest(layer) == before
        False
    """
    digest = hashlib.blake2b(prefix.encode(), digest_size=DIGEST_BYTES)
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):
            continue
        if value.is_meta:
            raise SettingError(
                f"The weight {name} is offloaded. Load the model into memory to cache what it says of rows."
            )
        digest.update(f"{name}:{value.dtype}{tuple(value.shape)};".encode())
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(data)
    return digest.hexdigest()
