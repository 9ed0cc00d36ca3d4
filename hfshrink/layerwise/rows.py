"""Calibration data of techniques that read it more than once: read once, with labels where they can be made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hfshrink.calibration import batches as read_batches
from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import SettingError
from hfshrink.labels import next_token_labels
from hfshrink.loading import infer_task

ROWS = 2048
"""Rows of the calibration data that are read at most, as many as Kwon et al. take."""
TOKENS = 128 * 2048
"""Tokens that are read at most where all wait before a layer at once, as many as Wanda and SparseGPT take."""
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
