"""What the student is asked to match: small objects that the Trainer takes. The formulas are in `divergences`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.checks import check_choice, check_counts, check_flags, check_number, check_weights
from hfshrink.distillation.losses.divergences import (
    SparseTargets,
    binary_cross_entropy,
    decoupled_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    sorted_distance,
    sparse_kl_divergence,
    standardize_logits,
)
from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED

TOKEN_HEADS = ("tokens", "causal_tokens")
SOFTMAX_HEADS = ("single_label", *TOKEN_HEADS, "span")

DIVERGENCES: Mapping[str, Callable[[LogitLoss, Tensor, Tensor, Tensor | None], Tensor]] = {
    "forward_kl": lambda loss, ours, theirs, mask: kl_divergence(ours, theirs, loss.temperature, mask),
    "reverse_kl": lambda loss, ours, theirs, mask: reverse_kl_divergence(ours, theirs, loss.temperature, mask),
    "jsd": lambda loss, ours, theirs, mask: jensen_shannon_divergence(
        ours, theirs, loss.temperature, mask, beta=loss.beta
    ),
    "skewed_kl": lambda loss, ours, theirs, mask: skewed_kl_divergence(
        ours, theirs, loss.temperature, mask, skew=loss.skew
    ),
    "skewed_reverse_kl": lambda loss, ours, theirs, mask: skewed_reverse_kl_divergence(
        ours, theirs, loss.temperature, mask, skew=loss.skew
    ),
    "mse": lambda loss, ours, theirs, mask: mean_squared_error(ours, theirs, mask),
}
"""name -> what `LogitLoss` computes on logits of a head with a softmax."""


@dataclass(frozen=True)
class LogitLoss:
    """The student's logits against the teacher's, in the form that the head demands.

    Heads with a softmax get the divergence that is asked for (token heads over the positions that count, QA over start
    and end), multi-label heads `binary_cross_entropy`, regression `mean_squared_error`.

    Attributes:
        temperature: Softness T of both distributions; without effect in regression and with "mse". 2 suits
            classifiers; for language models 1 is usual.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.
        divergence: "forward_kl" (Hinton), "reverse_kl", "jsd", "skewed_kl", "skewed_reverse_kl" or "mse".
        standardize: Bring both sides' logits to mean 0 and standard deviation 1 first; needs 3 classes.
        beta: Of "jsd": the teacher's share in the mixture, in [0, 1].
        skew: Of the skewed divergences: the mixed-in share λ, in [0, 1).
        chunk_size: Positions whose logits exist at the same time where a language model is trained without holding
            them all (`chunks`); None holds them all.

    Example:
        >>> from types import SimpleNamespace
        >>> same = SimpleNamespace(logits=torch.tensor([[1.0, 2.0]]))
        >>> LogitLoss()(same, same, head="single_label", mask=None, labels=None).item()
        0.0
        >>> LogitLoss(divergence="jsd", beta=0.1, temperature=1.0).divergence
        'jsd'
    """

    temperature: float = 2.0
    weight: float = 1.0
    final_weight: float | None = None
    divergence: str = "forward_kl"
    standardize: bool = False
    beta: float = 0.5
    skew: float = 0.1
    chunk_size: int | None = 256
    name = "logits"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        check_number("temperature", self.temperature, "above 0", lambda value: value > 0)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_flags(standardize=self.standardize)
        check_number("beta", self.beta, "from 0 to 1", lambda value: 0 <= value <= 1)
        check_number("skew", self.skew, "of at least 0 and below 1", lambda value: 0 <= value < 1)
        for name, family in (("beta", "jsd"), ("skew", "skewed")):
            if not self.divergence.startswith(family) and getattr(self, name) != getattr(LogitLoss, name):
                raise SettingError(f"divergence={self.divergence!r} does not read {name}: leave out {name}=.")
        if self.chunk_size is not None:
            check_counts(chunk_size=self.chunk_size)

    def __call__(
        self, student: Any, teacher: Any, *, head: str, mask: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        """The unweighted loss of one batch.

        `student` and `teacher` are model outputs (or the teacher has `.sparse`: `SparseTargets`), `mask` the positions
        that count; `labels`, which every loss is given, are not read.

        Raises:
            SettingError: Both sides' shapes differ, or the settings do not fit the head or a sparse teacher.
        """
        self._check_head(head)
        if head == "span":
            names = ("start_logits", "end_logits")
            return torch.stack([self.compare(getattr(student, name), getattr(teacher, name)) for name in names]).mean()
        if head not in SOFTMAX_HEADS:
            _check_shapes(student.logits, teacher.logits)
            if head == "multi_label" and self.divergence == "forward_kl":
                return binary_cross_entropy(student.logits, teacher.logits, self.temperature)
            return mean_squared_error(student.logits, teacher.logits)
        sparse = getattr(teacher, "sparse", None)
        ours, theirs = student.logits, teacher.logits if sparse is None else sparse
        if head == "causal_tokens":  # position i predicts token i + 1
            ours, theirs = ours[:, :-1], _without_last(theirs)
        return self.compare(ours, theirs, mask)

    def compare(self, student: Tensor, teacher: Tensor | SparseTargets, mask: Tensor | None = None) -> Tensor:
        """The divergence of logits (…, classes) of a head with a softmax: the mean over the rows that count."""
        if isinstance(teacher, SparseTargets):
            self.check_sparse(teacher, student)
            return sparse_kl_divergence(student, teacher, self.temperature, mask)
        _check_shapes(student, teacher)
        if self.standardize:
            _check_classes(student, "standardize=True", "the z-scores of two logits are only a sign")
            student, teacher = standardize_logits(student), standardize_logits(teacher)
        return DIVERGENCES[self.divergence](self, student, teacher, mask)

    def check_sparse(self, targets: SparseTargets, student: Tensor) -> None:
        """Raise `SettingError` where these settings need more of the teacher than the kept probabilities."""
        if self.divergence != "forward_kl" or self.standardize:
            raise SettingError(
                f"The teacher's answers hold {targets.ids.shape[-1]} tokens per position; LogitLoss with divergence="
                f"{self.divergence!r}, standardize={self.standardize} needs all. Use the defaults or run the teacher."
            )
        if self.temperature != targets.temperature:
            raise SettingError(
                f"The teacher's kept probabilities were taken at temperature {targets.temperature}, LogitLoss has "
                f"temperature={self.temperature}. Set temperature={targets.temperature}."
            )
        if targets.ids.shape[:-1] != student.shape[:-1]:
            raise SettingError(
                f"The student's logits have shape {tuple(student.shape)}, the teacher's kept probabilities "
                f"{tuple(targets.ids.shape)}; they must agree up to the last number. Do both read the same tokens?"
            )

    def _check_head(self, head: str) -> None:
        if head in SOFTMAX_HEADS:
            return
        if self.standardize:
            raise SettingError(
                f"standardize=True needs a head with a softmax, not {head!r}: there a logit's size is the answer."
            )
        if self.divergence not in ("forward_kl", "mse"):
            raise SettingError(
                f"divergence={self.divergence!r} needs a head with a softmax, not {head!r}. Use the default, or 'mse'."
            )


@dataclass(frozen=True)
class DecoupledLoss:
    """Decoupled distillation (DKD, arXiv:2203.08679): the other classes count also where the teacher is sure.

    Calls `decoupled_divergence`. For heads with a softmax, at least 3 classes, and labels. The paper's settings come
    from images of 100 classes.

    Attributes:
        temperature: Softness T of both distributions.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.
        target_weight: α of the labelled class against all others.
        other_weight: β of the distribution among the others. Small where the teacher is far ahead of the student.

    Example:
        >>> from types import SimpleNamespace
        >>> same = SimpleNamespace(logits=torch.tensor([[1.0, 2.0, 0.0]]))
        >>> DecoupledLoss()(same, same, head="single_label", mask=None, labels=torch.tensor([1])).item()
        0.0
    """

    temperature: float = 4.0
    weight: float = 1.0
    final_weight: float | None = None
    target_weight: float = 1.0
    other_weight: float = 8.0
    name = "decoupled"
    needs_labels = True

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        check_number("temperature", self.temperature, "above 0", lambda value: value > 0)
        check_number("target_weight", self.target_weight, "of at least 0", lambda value: value >= 0)
        check_number("other_weight", self.other_weight, "of at least 0", lambda value: value >= 0)

    def __call__(
        self, student: Any, teacher: Any, *, head: str, mask: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        """The unweighted loss of one batch: the sum over rows with a label, divided by all rows that count.

        `labels` (batch,) or (batch, sequence); −100 is no label.

        Raises:
            SettingError: No or wrong labels, another head, fewer than 3 classes, a sparse teacher, different shapes.
        """
        if head not in ("single_label", *TOKEN_HEADS):
            raise SettingError(f"DecoupledLoss needs one label and a softmax per row, which a head {head!r} has not.")
        if labels is None:
            raise SettingError(
                "DecoupledLoss needs labels, and the batch has none. Use LogitLoss for unlabelled data."
            )
        if getattr(teacher, "sparse", None) is not None:
            raise SettingError("DecoupledLoss needs all of the teacher's logits, not kept probabilities. Let it run.")
        ours, theirs = student.logits, teacher.logits
        _check_shapes(ours, theirs)
        _check_classes(ours, "DecoupledLoss", "there is only one other class")
        if head == "causal_tokens":
            ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
        _check_labels(labels, ours)
        weights = {"target_weight": self.target_weight, "other_weight": self.other_weight}
        loss = decoupled_divergence(ours, theirs, labels, self.temperature, mask, **weights)
        return loss if mask is not None else loss * (labels != IGNORED).float().mean()


@dataclass(frozen=True)
class CrossTokenizerLoss:
    """Distillation between different vocabularies (ULD, arXiv:2402.12030): how sure, not of which token.

    Calls `sorted_distance` on paired positions: row i of the student's logits (pairs, classes) answers the text that
    row i of the teacher's (pairs, other classes) answers.

    Attributes:
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.

    Example:
        >>> from types import SimpleNamespace
        >>> student = SimpleNamespace(logits=torch.tensor([[0.0, 0.0]]))
        >>> teacher = SimpleNamespace(logits=torch.tensor([[0.0, 0.0, -1000.0]]))
        >>> CrossTokenizerLoss()(student, teacher, head="causal_tokens").item()
        0.0
    """

    weight: float = 1.0
    final_weight: float | None = None
    name = "cross_tokenizer"

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)

    def __call__(
        self, student: Any, teacher: Any, *, head: str, mask: Tensor | None = None, labels: Any = None
    ) -> Tensor:
        """The unweighted loss of the paired positions; `mask` (pairs,) where not all of them count.

        Raises:
            SettingError: The head is not a language model's, or the positions are not paired.
        """
        if head not in TOKEN_HEADS:
            raise SettingError(f"CrossTokenizerLoss is for language models, not for a head of kind {head!r}.")
        shapes = student.logits.shape, teacher.logits.shape
        if len(shapes[0]) != 2 or shapes[0][:-1] != shapes[1][:-1]:
            raise SettingError(
                f"CrossTokenizerLoss needs paired positions, logits (pairs, classes) of both; the student's "
                f"have {tuple(shapes[0])}, the teacher's {tuple(shapes[1])}."
            )
        if not len(student.logits):
            return student.logits.sum() * 0.0  # a mean of nothing
        return sorted_distance(student.logits, teacher.logits, mask=mask)


def loss_mask(inputs: dict[str, Any], head: str) -> Tensor | None:
    """Positions that count in the loss of a token head: those with a label, else those that are not padding.

    Args:
        inputs: A batch; `labels`, `attention_mask` or `input_ids` of shape (batch, sequence), or `inputs_embeds`.
        head: Kind of head; for causal language models the first position, which nothing predicts, is cut off.

    Returns:
        Booleans of shape (batch, sequence) or (batch, sequence − 1); None for heads with one output per example.

    Raises:
        SettingError: The batch has none of these.
    """
    if head not in TOKEN_HEADS:
        return None
    mask = _not_padded(inputs) if inputs.get("labels") is None else inputs["labels"] != IGNORED
    if head != "causal_tokens":
        return mask
    read = inputs.get("attention_mask")
    if not isinstance(read, Tensor) or read.shape != mask.shape:
        return mask[:, 1:]
    return mask[:, 1:] & read[:, :-1].bool()  # padded on the left, the first token follows nothing


def _not_padded(inputs: dict[str, Any]) -> Tensor:
    side = "decoder_" if any(name.startswith("decoder_input") for name in inputs) else ""
    if inputs.get(f"{side}attention_mask") is not None:
        return inputs[f"{side}attention_mask"].bool()
    for name in (f"{side}input_ids", f"{side}inputs_embeds"):
        if inputs.get(name) is not None:
            return torch.ones(inputs[name].shape[:2], dtype=torch.bool, device=inputs[name].device)
    raise SettingError(
        f"Expected labels, attention_mask, input_ids or inputs_embeds in the batch, got {list(inputs)}."
    )


def _without_last(teacher: Tensor | SparseTargets) -> Tensor | SparseTargets:
    if isinstance(teacher, SparseTargets):
        return replace(teacher, ids=teacher.ids[:, :-1], probabilities=teacher.probabilities[:, :-1])
    return teacher[:, :-1]


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise SettingError(
            f"The student's logits have shape {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; they "
            "must match. Do both read the same tokens and have the same labels?"
        )


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        raise SettingError(
            f"Expected a label for each row of logits, of shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}."
        )
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(wrong):
        raise SettingError(f"Labels must be {IGNORED} or from 0 to {logits.shape[-1] - 1}, got {int(wrong[0])}.")


def _check_classes(logits: Tensor, what: str, why: str) -> None:
    if logits.shape[-1] < 3:
        raise SettingError(
            f"{what} needs at least 3 classes, the student has {logits.shape[-1]}: {why}. Use LogitLoss() as it is."
        )
