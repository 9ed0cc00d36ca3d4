"""Several teachers: one target out of their logits, and how far to trust each of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED

logger = logging.getLogger(__name__)

TEMPERATURE_BOUNDS = (1e-2, 1e2)
BISECTIONS = 60  # halvings of log T; more than float64 can tell apart


def combine_logits(logits: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """The weighted mean of the teachers' logits, z = Σ_k w_k · z_k.

    A mean of logits is a geometric mean of the distributions. It gives a teacher with large logits a large say, so
    divide each teacher's logits by its temperature first (`calibrate_temperature`).

    Args:
        logits: One tensor of shape (…, classes) per teacher, all in the student's label order.
        weights: w_k, one number per teacher, or a tensor of shape (teachers, …) with a weight per example or position.
            They should sum to 1 over the teachers.

    Returns:
        Logits of shape (…, classes), in float32 or wider.

    Raises:
        SettingError: Shapes that differ, or not one weight per teacher.

    Example:
        >>> combine_logits([torch.tensor([4.0, 0.0]), torch.tensor([0.0, 8.0])], [0.75, 0.25])
        tensor([3., 2.])
    """
    _check_logits(logits)
    weights = torch.as_tensor(weights, device=logits[0].device)
    if len(weights) != len(logits) or weights.shape[1:] not in ((), logits[0].shape[:-1]):
        raise SettingError(
            f"Expected one weight for each of {len(logits)} teachers, of shape ({len(logits)},) or "
            f"{(len(logits), *logits[0].shape[:-1])}, got {tuple(weights.shape)}."
        )
    total = torch.zeros_like(logits[0], dtype=torch.promote_types(logits[0].dtype, torch.float32))
    for one, weight in zip(logits, weights, strict=True):
        total = total + weight.to(total.dtype).unsqueeze(-1) * one.to(total.device)
    return total


def confidence_weights(
    logits: Sequence[Tensor], temperatures: Sequence[float], sharpness: float = 1.0, multi_label: bool = False
) -> Tensor:
    """Surer teachers count more: w_k ∝ exp(−H(softmax(z_k / T_k)) / sharpness), with sum 1 over the teachers.

    The entropy H is in nats, so no labels are needed. DE-MKD weights teachers by their entropies too; CA-MKD
    (arXiv:2201.00007) by their cross entropies with the labels, which this is not. An entropy can't tell a sure
    teacher from a boastful one, so each T_k must come from held-out rows.

    Args:
        logits: One tensor of shape (…, classes) per teacher.
        temperatures: T_k of each teacher (`calibrate_temperature`).
        sharpness: Above 0; near 0 the surest teacher takes all, large values give equal weights.
        multi_label: Whether each label is a question of its own; H is then the mean entropy of the answers.

    Returns:
        Weights of shape (teachers, …) in float32, with sum 1 over the teachers.

    Raises:
        SettingError: Shapes that differ, not one temperature above 0 per teacher, sharpness not above 0, or one class.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> confidence_weights([sure, unsure], [1.0, 1.0])[:, 0]  # about 1 : exp(-log 2)
        tensor([0.6664, 0.3336])
    """
    _check_logits(logits)
    if len(temperatures) != len(logits) or not all(0 < t < math.inf for t in temperatures):
        raise SettingError(
            f"Expected a temperature above 0 for each of {len(logits)} teachers, got {list(temperatures)}."
        )
    if not sharpness > 0:
        raise SettingError(f"sharpness must be above 0, got {sharpness}.")
    if logits[0].shape[-1] < 2 and not multi_label:
        raise SettingError(
            "One output has no distribution, and so no confidence (regression). Weight the teachers by numbers."
        )
    entropy = _label_entropy if multi_label else _entropy
    entropies = [entropy(one.float() / t).to(logits[0].device) for one, t in zip(logits, temperatures, strict=True)]
    return torch.softmax(-torch.stack(entropies) / sharpness, dim=0)


def calibrate_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the mean of −log softmax(z / T)[label] (Guo et al. 2017, arXiv:1706.04599).

    The loss is convex in 1 / T; its slope E[E_p[z] − z_label] is bisected over log T in [log 0.01, log 100]. The rows
    must be held out: on its own training rows a teacher looks surer than it may be.

    Args:
        logits: Of shape (…, classes).
        labels: Class numbers of shape (…), where -100 counts for nothing; or, for multi-label heads, numbers in 0..1
            of the logits' shape: the loss is then the binary cross entropy.

    Returns:
        T; above 1 for an over-confident teacher. At a bound (all rows right, or none) a warning is logged.

    Raises:
        SettingError: Shapes or labels that do not fit, logits that are not finite, or no labelled row.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]]).repeat(4, 1)  # 98 % sure, right in 3 of 4 rows
        >>> round(calibrate_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 4 / T = log 3
        3.641
    """
    scores, target = _calibration_rows(logits, labels)

    def slope(log_temperature: float) -> float:
        scaled = scores * math.exp(-log_temperature)
        chance = torch.sigmoid(scaled) if labels.shape == logits.shape else torch.softmax(scaled, dim=-1)
        return float(((chance - target) * scores).sum(-1).mean())  # of the loss, with respect to 1 / T

    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    if slope(low) <= 0:  # the loss still falls towards a smaller T
        return _at_bound(TEMPERATURE_BOUNDS[0], len(scores))
    if slope(high) >= 0:
        return _at_bound(TEMPERATURE_BOUNDS[1], len(scores))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def check_teacher_weights(
    weights: str | Sequence[float] | None, num_teachers: int
) -> list[float] | Literal["confidence"]:
    """What the keyword `teacher_weights` means: numbers with sum 1, or "confidence".

    Args:
        weights: "uniform" or None, "confidence", or one number per teacher, not negative; only their ratios matter.
        num_teachers: How many teachers there are.

    Raises:
        SettingError: Another word, a wrong number of weights, a negative or infinite one, or only zeros.

    Example:
        >>> check_teacher_weights([1, 3], 2)
        [0.25, 0.75]
        >>> check_teacher_weights("uniform", 2)
        [0.5, 0.5]
    """
    if weights is None or (isinstance(weights, str) and weights == "uniform"):
        return [1 / num_teachers] * num_teachers
    if isinstance(weights, str):
        if weights != "confidence":
            raise SettingError(f'teacher_weights must be "uniform", "confidence" or numbers, got {weights!r}.')
        return "confidence"
    values = [float(weight) for weight in weights]
    if len(values) != num_teachers:
        raise SettingError(f"There are {num_teachers} teachers, but {len(values)} weights: {values}.")
    if not all(0 <= value < math.inf for value in values) or not sum(values):
        raise SettingError(f"Weights of teachers must be 0 or more, and one of them above 0, got {values}.")
    return [value / sum(values) for value in values]


def _check_logits(logits: Sequence[Tensor]) -> None:
    if not logits:
        raise SettingError("There are no teachers' logits to combine.")
    shapes = [tuple(one.shape) for one in logits]
    if len(set(shapes)) != 1:
        raise SettingError(
            f"The teachers' logits have the shapes {', '.join(map(str, shapes))}; they must be the same. "
            "Do all teachers read the same tokens and have the same labels?"
        )


def _entropy(scores: Tensor) -> Tensor:
    log_chance = F.log_softmax(scores, dim=-1)
    return -(log_chance.exp() * log_chance).sum(-1)


def _label_entropy(scores: Tensor) -> Tensor:
    chance = torch.sigmoid(scores)
    return -(chance * F.logsigmoid(scores) + (1 - chance) * F.logsigmoid(-scores)).mean(-1)


def _calibration_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and targets as (rows, classes) in float64; rows without label are left out."""
    classes = logits.shape[-1]
    if labels.shape == logits.shape:
        scores, target = logits.double().reshape(-1, classes), labels.double().reshape(-1, classes)
        if not bool(((target >= 0) & (target <= 1)).all()):
            raise SettingError("Labels of a multi-label head must lie in 0..1.")
    elif labels.shape == logits.shape[:-1]:
        kept = labels != IGNORED
        scores, numbers = logits[kept].double(), labels[kept].long()
        if not bool(((numbers >= 0) & (numbers < classes)).all()):
            raise SettingError(
                f"Labels must lie in 0..{classes - 1} or be {IGNORED}, got {numbers.unique().tolist()[:8]}."
            )
        target = F.one_hot(numbers, classes).to(scores)
    else:
        raise SettingError(
            f"Logits of shape {tuple(logits.shape)} need labels of shape {tuple(logits.shape[:-1])}, or of their own "
            f"shape for a multi-label head, got {tuple(labels.shape)}."
        )
    if not len(scores):
        raise SettingError("There is no labelled row to calibrate a teacher on.")
    if not bool(torch.isfinite(scores).all()):
        raise SettingError("The teacher's logits hold NaN or infinity: it can't be calibrated.")
    return scores, target.to(scores.device)


def _at_bound(temperature: float, rows: int) -> float:
    logger.warning(
        "The best temperature on %d held-out rows lies at the bound %g: they are all right, or carry no signal, or "
        "are not held out. Take more rows.",
        rows,
        temperature,
    )
    return temperature
