"""The check of an export against the PyTorch model on the same inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hfshrink.calibration import batches
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode, model_inputs, random_inputs
from hfshrink.modules import max_positions

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
TOKEN_TASKS = ("token-classification", "question-answering", "fill-mask", "text-generation", "feature-extraction")
PARITY_ROWS = 64
KEPT_ROWS = 8  # of answers that are held in memory: a vocabulary's logits are large
RANDOM_LENGTHS = (4, 16, 64, 128)

Answer = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Inputs and outputs by name."""


def check_parity(
    model: Any, other: Any, processor: Any, task: str, calibration: Any = None, *, longest: int | None = None
) -> dict[str, Any]:
    """Compare an export with the PyTorch model on the same inputs.

    Args:
        model: The float model.
        other: The export.
        processor: Tokenizer or image processor for raw rows.
        task: The model's task.
        calibration: Rows to compare on; None takes seeded random inputs of several lengths and batch sizes.
        longest: Most tokens that the export reads; longer inputs are cut. None: as many as the model.

    Returns:
        As of `compare_answers`.

    Raises:
        SettingError: One of the two gives NaN or infinity.
    """
    source, feed = _feed(model, processor, calibration, PARITY_ROWS)
    short = ({name: value[:, :longest] if value.ndim == 2 else value for name, value in x.items()} for x in feed)
    inputs = (model_inputs(other, batch) for batch in short)
    return compare_answers(_answers(model, inputs, source), other, task, source)


def float_answers(model: Any, processor: Any, calibration: Any = None) -> tuple[str, list[Answer]]:
    """What a model answers before it is changed in place, on few rows: for `compare_answers` afterwards.

    Raises:
        SettingError: It gives NaN or infinity.
    """
    source, feed = _feed(model, processor, calibration, KEPT_ROWS)
    return source, list(_answers(model, (model_inputs(model, batch) for batch in feed), source))


def compare_answers(answers: Iterable[Answer], other: Any, task: str, source: str) -> dict[str, Any]:
    """Compare a float model's answers with those of a quantized model or export.

    Args:
        answers: (inputs, outputs by name) of the float model.
        other: The quantized model or export.
        task: The model's task.
        source: What the inputs are.

    Returns:
        `inputs` (which were used), `rows`, `max_difference` and `mean_difference` of the outputs, `agreement` (share
        of rows, or positions, with the same largest output; None for outputs without classes).

    Raises:
        SettingError: The quantized model gives NaN or infinity.
    """
    rows, differences, same = 0, [], []
    with torch.inference_mode(), eval_mode(other):
        for inputs, outputs in answers:
            got = other(**model_inputs(other, inputs))
            for name, expected in outputs.items():
                found = got[name].float().cpu()
                _check_finite("quantized model", found, source)
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


def _feed(model: Any, processor: Any, calibration: Any, rows: int) -> tuple[str, Iterable[dict[str, Tensor]]]:
    if calibration is None:
        return "seeded random inputs", _random_feed(model, processor)
    return "calibration rows", batches(calibration, model, processor, batch_size=8, samples=rows)


def _answers(model: Any, feed: Iterable[dict[str, Tensor]], source: str) -> Iterator[Answer]:
    for inputs in feed:
        with torch.inference_mode(), eval_mode(model):
            outputs = model(**inputs)
            found = {name: outputs[name].float().cpu() for name in OUTPUTS if name in outputs}
        if not found:
            raise UnsupportedModelError(
                f"{type(model).__name__} answers with {', '.join(outputs)}; compared are {', '.join(OUTPUTS)}."
            )
        for value in found.values():
            _check_finite("PyTorch model", value, source)
        yield inputs, found


def _random_feed(model: Any, processor: Any) -> Iterator[dict[str, Tensor]]:
    longest = max_positions(model) or max(RANDOM_LENGTHS)
    for seed, length in enumerate(sorted({min(length, longest) for length in RANDOM_LENGTHS})):
        yield random_inputs(model, seed + 1, length, processor, seed, pairs=True)


def _check_finite(who: str, value: Tensor, source: str) -> None:
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
