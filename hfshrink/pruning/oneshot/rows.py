"""What `prune` asks about its calibration data: whether it gives a loss, how long its rows are, what it looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.modules import layer_stack


def has_loss(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model computes a loss on such a batch."""
    with torch.no_grad(), eval_mode(model):
        return getattr(model(**batch), "loss", None) is not None


def mean_length(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Tokens of a row without padding, on average; of images what the first layer reads."""
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    if masks:
        return max(1, round(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks)))
    lengths: list[int] = []
    first = layer_stack(model)[1][0]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
    )
    try:
        with torch.no_grad(), eval_mode(model):
            model(**{name: value[:1] for name, value in batches[0].items() if value.ndim})
    finally:
        handle.remove()
    return lengths[0]


def is_plain(model: Any) -> bool:
    """Whether it is a module that is no model of transformers."""
    return isinstance(model, nn.Module) and not isinstance(getattr(model, "config", None), PreTrainedConfig)


def example_of(model: Any, calibration: Any) -> dict[str, Any]:
    """One batch for a plain module, which does not say how its inputs look."""
    if not is_plain(model):
        return {}
    if calibration is None:
        raise SettingError(
            f"{type(model).__name__} is no model of transformers and does not say what it reads: give calibration=, "
            "one batch such as torch.randn(1, 3, 224, 224)."
        )
    if isinstance(calibration, Tensor | Mapping):
        return {"inputs": calibration}
    return {"inputs": next(iter(calibration))}
