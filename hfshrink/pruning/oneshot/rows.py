"""The calibration data of `prune`: read once, with labels where a language model needs them, and up to a size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfshrink.calibration import batches as read_batches
from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.labels import next_token_labels
from hfshrink.loading import infer_task
from hfshrink.modules import layer_stack

ROWS = 2048
"""Rows of the calibration data that are read at most, as many as Kwon et al. take."""
TOKENS = 128 * 2048
"""Tokens that Wanda and SparseGPT read at most, as many as in their papers: all wait before a layer at once."""
BATCH_SIZE = 16


class CalibrationData:
    """The calibration data, read once, when a method asks for it."""

    def __init__(self, model: Any, calibration: Any, processor: Any) -> None:
        self.model, self.calibration, self.processor = model, calibration, processor
        self._read: list[dict[str, Tensor]] = []

    def batches(self, *, with_labels: bool = False, tokens: int | None = None) -> list[dict[str, Tensor]]:
        """The batches on the model's device.

        Args:
            with_labels: Whether a language model's own inputs become labels where there are none.
            tokens: The first batches that hold so many tokens; None takes all.
        """
        if not self._read:
            how = {"batch_size": BATCH_SIZE, "samples": ROWS}
            self._read = list(read_batches(self.calibration, self.model, self.processor, **how))
            self._check_targets()
        found = self._read if tokens is None else first_tokens(self._read, tokens)
        if with_labels and "labels" not in found[0] and infer_task(self.model) in LANGUAGE_TASKS:
            return [next_token_labels(batch) for batch in found]
        return found

    def _check_targets(self) -> None:
        is_pair = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if is_pair and not {"labels", "decoder_input_ids"} & set(self._read[0]):
            raise SettingError(
                f"{type(self.model).__name__} is an encoder-decoder: its calibration data needs the target texts, as "
                f"labels or decoder_input_ids. Got {', '.join(self._read[0])}."
            )


def first_tokens(batches: Sequence[dict[str, Tensor]], tokens: int) -> list[dict[str, Tensor]]:
    """Batches up to a number of tokens; images have none, and all of them are taken."""
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        if tokens <= 0:
            break
        found.append(batch)
        tokens -= batch["input_ids"].numel() if "input_ids" in batch else 0
    return found


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
