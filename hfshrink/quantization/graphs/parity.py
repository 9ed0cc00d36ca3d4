"""The check of an export against the PyTorch model on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hfshrink.calibration import batches
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode, model_inputs, random_inputs
from hfshrink.modules import max_positions

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
TOKEN_TASKS = ("token-classification", "question-answering", "fill-mask", "text-generation", "feature-extraction")
PARITY_ROWS = 64
RANDOM_LENGTHS = (4, 16, 64, 128)


def check_parity(model: Any, exported: Any, processor: Any, task: str, calibration: Any = None) -> dict[str, Any]:
    """Compare an export with the PyTorch model on the same inputs.

    Args:
        model: The float model.
        exported: The export.
        processor: Tokenizer or image processor for raw rows.
        task: The model's task.
        calibration: Rows to compare on; None takes seeded random inputs of several lengths and batch sizes.

    Returns:
        `inputs` (which were used), `rows`, `max_difference` and `mean_difference` of the outputs, `agreement` (share
        of rows, or positions, with the same largest output; None for outputs without classes).

    Raises:
        SettingError: One of the two gives NaN or infinity.
    """
    source, rows, differences, same = "seeded random inputs", 0, [], []
    if calibration is None:
        feed: Iterable[dict[str, Tensor]] = _random_feed(model, processor)
    else:
        source = "calibration rows"
        feed = batches(calibration, model, processor, batch_size=8, samples=PARITY_ROWS)
    with torch.inference_mode(), eval_mode(model):
        for batch in feed:
            inputs = model_inputs(exported, batch)
            outputs, got = model(**inputs), exported(**inputs)
            for name in (name for name in OUTPUTS if name in outputs):
                expected, found = (side[name].float().cpu() for side in (outputs, got))
                _check_finite(expected, found, source)
                difference, equal = _compare(expected, found, inputs.get("attention_mask"), task)
                differences.append(difference)
                same.append(equal)
            rows += len(next(iter(inputs.values())))
    difference = torch.cat(differences)
    return {
        "inputs": source,
        "rows": rows,
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(torch.cat(same).mean()) if sum(map(len, same)) else None,
    }


def _random_feed(model: Any, processor: Any) -> Iterator[dict[str, Tensor]]:
    longest = max_positions(model) or max(RANDOM_LENGTHS)
    for seed, length in enumerate(sorted({min(length, longest) for length in RANDOM_LENGTHS})):
        yield random_inputs(model, seed + 1, length, processor, seed, pairs=True)


def _check_finite(expected: Tensor, got: Tensor, source: str) -> None:
    for who, value in (("PyTorch model", expected), ("export", got)):
        if not torch.isfinite(value).all():
            raise SettingError(f"The {who}'s outputs hold NaN or infinity on {source}. Check the model's weights.")


def _compare(expected: Tensor, got: Tensor, mask: Any, task: str) -> tuple[Tensor, Tensor]:
    """Differences of the outputs that mean something, and which answers are the same (none without classes)."""
    per_token = task in TOKEN_TASKS and mask is not None and mask.shape == expected.shape[:2]
    real = mask.bool().cpu() if per_token else torch.ones(expected.shape[: 2 if per_token else 1], dtype=torch.bool)
    if task == "question-answering" and per_token:  # one answer per row: the position with the largest score
        lowest = torch.finfo(expected.dtype).min
        answers = [side.masked_fill(~real, lowest).argmax(-1) for side in (expected, got)]
        return (expected - got)[real].abs(), (answers[0] == answers[1]).float()
    if task == "feature-extraction" or expected.shape[-1] == 1:
        return (expected - got)[real].abs().flatten(), torch.empty(0)
    return (expected - got)[real].abs().flatten(), (expected.argmax(-1) == got.argmax(-1))[real].float()
