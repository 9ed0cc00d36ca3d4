"""Which single weights can be pruned, and how they look as a matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import head_names, select_modules


def prunable(
    model: nn.Module, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The modules whose single weights are pruned: Linear, Conv1D and Conv2d inside the base model.

    Task heads, embeddings, norms, biases and tied weights are left alone; a wildcard in `include` other than "*" that
    names a head takes it all the same.

    Raises:
        SettingError: A wildcard without match, NaN weights, or nothing that can be pruned.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> modules = prunable(BertForSequenceClassification(BertConfig(**sizes)))
        >>> len(modules), "classifier" in modules
        (7, False)
    """
    found = select_modules(model, (nn.Linear, nn.Conv2d, Conv1D), include, exclude)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    heads = head_names(model) if list(include) == ["*"] else []  # "*" alone or in a list
    chosen = {n: m for n, m in found.items() if n not in heads and f"{n}.weight" not in tied_names}
    if not chosen:
        raise SettingError(
            f"{type(model).__name__} has no weights to prune: {len(found)} modules match, all are heads or tied."
        )
    check_weights(chosen)
    return chosen


def check_is_model(model: Any) -> None:
    """Raise `UnsupportedModelError` for an export, whose weights can't be reached."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"A {type(model).__name__} can't be pruned: its weights lie in a graph. Prune the model that it was made "
            "from, then export that."
        )


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """Raise `SettingError` for NaN or infinite weights, `UnsupportedModelError` for quantized ones."""
    for name, module in modules.items():
        weight: Any = module.weight
        if not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name}.weight is of type {weight.dtype}: quantized weights can't be pruned. Prune the float model, "
                "then quantize it."
            )
        if not bool(torch.isfinite(weight).all()):
            raise SettingError(f"{name}.weight has NaN or infinite values. Load another checkpoint, or in float32.")


def matrix(module: nn.Module, values: Tensor) -> Tensor:
    """Values of a weight's shape as (out, inputs): convolutions flattened, Conv1D transposed; a view."""
    return values.T if isinstance(module, Conv1D) else values.flatten(1)
