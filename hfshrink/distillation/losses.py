"""What the student is asked to match: the formulas as pure functions, and the small objects that the Trainer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED

TOKEN_HEADS = ("tokens", "causal_tokens")


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² · KL(softmax(z_T / T) ‖ softmax(z_S / T)), the mean over rows (Hinton et al. 2015, arXiv:1503.02531).

    T² keeps the gradient's size independent of T, so that weights mean the same at every temperature.

    Args:
        student: Logits z_S of shape (…, classes).
        teacher: Logits z_T of the same shape.
        temperature: T > 0; larger is softer.
        mask: Rows that count, of shape (…); None counts all.

    Returns:
        A scalar; 0 where both are equal, or where no row counts.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> kl_divergence(logits, logits, temperature=2.0).item()
        0.0
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=-1)
    log_q = F.log_softmax(student.float() / temperature, dim=-1)
    rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # (…)
    return _mean(rows, mask) * temperature**2


def binary_cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · BCE(sigmoid(z_S / T), sigmoid(z_T / T)), the mean over examples and labels (one question per label).

    Args:
        student: Logits z_S of shape (batch, labels).
        teacher: Logits z_T of the same shape.
        temperature: T > 0.

    Returns:
        A scalar. At equal logits it is the teacher's own entropy, not 0; its gradient is 0 there.

    Example:
        >>> zero = torch.zeros(1, 3)
        >>> round(binary_cross_entropy(zero, zero).item(), 4)
        0.6931
    """
    target = torch.sigmoid(teacher.float() / temperature)
    return F.binary_cross_entropy_with_logits(student.float() / temperature, target) * temperature**2


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (z_S − z_T)² for regression, where a softmax over one output would be constant.

    Args:
        student: Outputs of shape (batch, outputs).
        teacher: Outputs of the same shape.

    Example:
        >>> mean_squared_error(torch.tensor([[1.0]]), torch.tensor([[3.0]])).item()
        4.0
    """
    return F.mse_loss(student.float(), teacher.float())


@dataclass(frozen=True)
class LogitLoss:
    """Hinton's loss on the logits, in the form that the head demands.

    Softmax heads get `kl_divergence` (token heads over the positions that count, QA over start and end), multi-label
    heads `binary_cross_entropy`, regression `mean_squared_error`.

    Attributes:
        temperature: Softness T of both distributions; without effect in regression.
        weight: Factor of this part in the training loss.

    Example:
        >>> from types import SimpleNamespace
        >>> same = SimpleNamespace(logits=torch.tensor([[1.0, 2.0]]))
        >>> LogitLoss()(same, same, head="single_label", mask=None).item()
        0.0
    """

    temperature: float = 2.0
    weight: float = 1.0
    name = "logits"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingError(f"temperature must be above 0, got {self.temperature}.")
        if self.weight < 0:
            raise SettingError(f"weight must not be negative, got {self.weight}.")

    def __call__(self, student: Any, teacher: Any, *, head: str, mask: Tensor | None) -> Tensor:
        """The unweighted loss of one batch.

        `student` and `teacher` are model outputs, `mask` the positions that count.
        """
        if head == "span":
            parts = [
                kl_divergence(student[name], teacher[name], self.temperature)
                for name in ("start_logits", "end_logits")
            ]
            return torch.stack(parts).mean()
        ours, theirs = student.logits, teacher.logits
        if ours.shape != theirs.shape:
            raise SettingError(
                f"The student's logits have shape {tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}; they "
                "must match. Do both read the same tokens and have the same labels?"
            )
        if head == "regression":
            return mean_squared_error(ours, theirs)
        if head == "multi_label":
            return binary_cross_entropy(ours, theirs, self.temperature)
        if head == "causal_tokens":  # position i predicts token i + 1
            ours, theirs = ours[:, :-1], theirs[:, :-1]
        return kl_divergence(ours, theirs, self.temperature, mask)


def loss_mask(inputs: dict[str, Any], head: str) -> Tensor | None:
    """Positions that count in the loss of a token head: those with a label, else those that are not padding.

    Args:
        inputs: A batch; `labels` or `attention_mask` of shape (batch, sequence).
        head: Kind of head; for causal language models the first position, which nothing predicts, is cut off.

    Returns:
        Booleans of shape (batch, sequence) or (batch, sequence − 1); None for heads with one output per example.
    """
    if head not in TOKEN_HEADS:
        return None
    if inputs.get("labels") is not None:
        mask = inputs["labels"] != IGNORED
    else:
        side = "decoder_" if "decoder_input_ids" in inputs else ""
        mask = inputs.get(f"{side}attention_mask")
        mask = torch.ones_like(inputs[f"{side}input_ids"]) if mask is None else mask
        mask = mask.bool()
    return mask[:, 1:] if head == "causal_tokens" else mask


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    return torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)
