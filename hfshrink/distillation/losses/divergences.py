"""How far a student's answer lies from its teacher's: pure functions on logits, each with its formula and paper.

All take logits of shape (…, classes), compute in float32 or wider, and return a scalar: the mean over the rows that
count. p is the teacher's distribution, q the student's, both softened by the temperature T. Where a softened
divergence has a gradient of size 1/T², it is multiplied by T², so that a weight means the same at every temperature.
In the KL family logits may be −inf (forbidden classes): p log p is 0 where p is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hfshrink.labels import IGNORED


@dataclass(frozen=True)
class SparseTargets:
    """A teacher's distribution per position, of which only k entries were kept.

    Attributes:
        ids: The kept tokens, int64 of shape (batch, sequence, k), different within a position.
        probabilities: Their probabilities, float32 of the same shape; 0 where a slot is unused.
        tail: True: what the probabilities of a position leave over to 1 belongs to all other tokens together (top-k).
            False: the probabilities of a position sum to 1 (sampled).
        temperature: At which the teacher's probabilities were taken.
    """

    ids: Tensor
    probabilities: Tensor
    tail: bool
    temperature: float = 1.0


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² · KL(p ‖ q) = T² · Σ p log(p / q), the mean over rows (Hinton et al. 2015, arXiv:1503.02531).

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
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    return _mean(_kl(log_p, log_q), mask) * temperature**2


def reverse_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T² · KL(q ‖ p) = T² · Σ q log(q / p), the mean over rows (MiniLLM, Gu et al. 2023, arXiv:2306.08543).

    It punishes the student for mass where the teacher has none, so a small student settles on the teacher's main
    answers. The paper has no temperature.

    Args:
        student: Logits of shape (…, classes).
        teacher: Logits of the same shape.
        temperature: T > 0.
        mask: Rows that count, of shape (…); None counts all.

    Example:
        >>> one, two = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 1.0]])
        >>> bool(reverse_kl_divergence(one, two) == kl_divergence(two, one))
        True
    """
    return kl_divergence(teacher, student, temperature, mask)


def jensen_shannon_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None, *, beta: float = 0.5
) -> Tensor:
    """T² · (β KL(p ‖ m) + (1 − β) KL(q ‖ m)), m = β p + (1 − β) q (GKD, Agarwal et al. 2023, arXiv:2306.13649).

    β = 0 is taken as KL(p ‖ q) and β = 1 as KL(q ‖ p), the usual convention. The formula itself goes to 0 at both
    ends, so the loss jumps there. The paper has no T².

    Args:
        student: Logits of shape (…, classes).
        teacher: Logits of the same shape.
        temperature: T > 0.
        mask: Rows that count, of shape (…); None counts all.
        beta: β in [0, 1]; ½ is symmetric and at most T² ln 2.

    Example:
        >>> far = torch.tensor([[50.0, -50.0]])
        >>> round(jensen_shannon_divergence(far, -far).item(), 4)
        0.6931
    """
    if beta == 0:
        return kl_divergence(student, teacher, temperature, mask)
    if beta == 1:
        return reverse_kl_divergence(student, teacher, temperature, mask)
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    log_m = _log_mix(log_p, log_q, beta)
    return _mean(beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m), mask) * temperature**2


def skewed_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None, *, skew: float = 0.1
) -> Tensor:
    """T² · KL(p ‖ λp + (1 − λ)q), the mean over rows (DistiLLM, Ko et al. 2024, arXiv:2402.03898).

    A little of the teacher in the second place bounds the loss by T² log(1/λ) where the student has no mass. The paper
    has no temperature.

    Args:
        student: Logits of shape (…, classes).
        teacher: Logits of the same shape.
        temperature: T > 0.
        mask: Rows that count, of shape (…); None counts all.
        skew: λ in [0, 1); 0 is `kl_divergence`.

    Example:
        >>> far = torch.tensor([[50.0, -50.0]])
        >>> round(skewed_kl_divergence(far, -far, skew=0.1).item(), 4)  # log 10
        2.3026
    """
    if skew == 0:
        return kl_divergence(student, teacher, temperature, mask)
    log_p, log_q = _log_softmax(teacher, temperature), _log_softmax(student, temperature)
    return _mean(_kl(log_p, _log_mix(log_p, log_q, skew)), mask) * temperature**2


def skewed_reverse_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None, *, skew: float = 0.1
) -> Tensor:
    """T² · KL(q ‖ (1 − λ)p + λq), the mean over rows (DistiLLM, Ko et al. 2024, arXiv:2402.03898).

    Args:
        student: Logits of shape (…, classes).
        teacher: Logits of the same shape.
        temperature: T > 0.
        mask: Rows that count, of shape (…); None counts all.
        skew: λ in [0, 1); 0 is `reverse_kl_divergence`.

    Example:
        >>> one, two = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.0, 1.0]])
        >>> bool(skewed_reverse_kl_divergence(one, two) == skewed_kl_divergence(two, one))
        True
    """
    return skewed_kl_divergence(teacher, student, temperature, mask, skew=skew)


def mean_squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over rows and outputs of (z_S − z_T)² (on logits: Kim et al. 2021, arXiv:2105.08919).

    For regression, where a softmax over one output would be constant, and as a loss on logits. A temperature would not
    change it: T² · (z_S/T − z_T/T)² = (z_S − z_T)².

    Args:
        student: Outputs of shape (…, outputs).
        teacher: Outputs of the same shape.
        mask: Rows that count, of shape (…); None counts all.

    Example:
        >>> mean_squared_error(torch.tensor([[1.0]]), torch.tensor([[3.0]])).item()
        4.0
    """
    rows = F.mse_loss(_wide(student), _wide(teacher), reduction="none")
    return rows.mean() if mask is None else _mean(rows.mean(-1), mask)


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
    target = torch.sigmoid(_wide(teacher) / temperature)
    return F.binary_cross_entropy_with_logits(_wide(student) / temperature, target) * temperature**2


def decoupled_divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    *,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """T² · (α KL(b_T ‖ b_S) + β KL(p̂ ‖ q̂)) (DKD, Zhao et al. 2022, arXiv:2203.08679).

    b = (p_t, 1 − p_t) is the probability of the labelled class against all others, p̂ and q̂ are the distributions
    among the others. KL(p ‖ q) is the same sum with β = 1 − p_t of the teacher, which fades where the teacher is sure:
    here what it knows about the other classes keeps its weight.

    Args:
        student: Logits of shape (…, classes), at least 3 classes (of 2, the second part is 0).
        teacher: Logits of the same shape.
        labels: The labelled class t, int64 of shape (…); rows with −100 are left out.
        temperature: T > 0.
        mask: Rows that count, of shape (…); None counts all that have a label.
        target_weight: α.
        other_weight: β.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0]])
        >>> decoupled_divergence(logits, logits, torch.tensor([2])).item()
        0.0
    """
    counted = labels != IGNORED if mask is None else mask & (labels != IGNORED)
    index = labels.clamp(min=0)[..., None]
    pairs_p, others_p = _split_target(teacher, index, temperature)
    pairs_q, others_q = _split_target(student, index, temperature)
    rows = target_weight * _kl(pairs_p, pairs_q) + other_weight * _kl(others_p, others_q)
    return _mean(rows, counted) * temperature**2


def standardize_logits(logits: Tensor, epsilon: float = 1e-7) -> Tensor:
    """(z − mean z) / (std z + ε) of each row (Sun et al. 2024, arXiv:2403.01427).

    Done to both sides, it lets the student match the teacher's shape at a scale of its own. Of two classes only the
    sign remains. σ² = Σ(z − mean z)² / classes. Gradients of rows of equal logits are near 1/ε: no heads of zeros.

    Args:
        logits: Of shape (…, classes).
        epsilon: Added to the standard deviation.

    Example:
        >>> standardize_logits(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.2247,  0.0000,  1.2247]])
    """
    wide = _wide(logits)
    centred = wide - wide.mean(-1, keepdim=True)
    return centred / (wide.std(-1, keepdim=True, correction=0) + epsilon)


def sparse_kl_divergence(
    student: Tensor, targets: SparseTargets, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """T² · KL(p ‖ q) where only k entries of p were kept, the mean over rows.

    Without a tail, Σ p_i log(p_i / q_i) over the kept entries; with p drawn from the teacher, its gradient is the full
    divergence's in expectation (Anshumann et al. 2025, arXiv:2503.16870). With a tail, the divergence of k + 1
    buckets: the kept entries and all others together, so the student isn't taught that the others are impossible.

    Args:
        student: Logits of shape (…, classes).
        targets: The teacher's kept entries, of shape (…, k), taken at the same temperature.
        temperature: T > 0 of the student's side.
        mask: Rows that count, of shape (…); None counts all.

    Returns:
        A scalar; 0 where the student's buckets have the teacher's probabilities.

    Example:
        >>> targets = SparseTargets(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]), tail=True)
        >>> sparse_kl_divergence(torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log(), targets).item()
        0.0
    """
    logits, p = _wide(student) / temperature, _wide(targets.probabilities)
    total = logits.logsumexp(-1, keepdim=True)
    log_q = _finite(logits.gather(-1, targets.ids) - total)  # (…, k)
    rows = (torch.xlogy(p, p) - p * log_q).sum(-1)
    if targets.tail and p.shape[-1] < logits.shape[-1]:
        left = (1 - p.sum(-1)).clamp(min=0)
        rows = rows + torch.xlogy(left, left) - left * (_log_other_mass(logits, targets) - total).squeeze(-1)
    return _mean(rows, mask) * temperature**2


def sorted_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Σ |p₍ᵢ₎ − q₍ᵢ₎| over the i-th largest entries, the mean over rows (ULD, Boizard et al. 2024, arXiv:2402.12030).

    It compares how sure both are, not of what, so the vocabularies may differ; the smaller one is filled up with
    zeros. No T² in the paper, and none here.

    Args:
        student: Logits of shape (…, classes).
        teacher: Logits of shape (…, other number of classes).
        mask: Rows that count, of shape (…); None counts all.

    Example:
        >>> student = torch.tensor([[0.25, 0.75]]).log()
        >>> round(sorted_distance(student, torch.tensor([[0.5, 0.25, 0.25]]).log()).item(), 4)
        0.5
    """
    classes = max(student.shape[-1], teacher.shape[-1])
    ranked = [_wide(z).softmax(-1).sort(-1, descending=True).values for z in (student, teacher)]
    q, p = (F.pad(side, (0, classes - side.shape[-1])) for side in ranked)
    return _mean((p - q).abs().sum(-1), mask)


def _wide(values: Tensor) -> Tensor:
    """float32, or float64 where it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return _finite(F.log_softmax(_wide(logits) if temperature == 1 else _wide(logits) / temperature, dim=-1))


def _finite(logs: Tensor) -> Tensor:
    return logs.clamp(min=torch.finfo(logs.dtype).min)  # exp is 0 as of −inf; 0 times it is no NaN


def _log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Log of (share · a + (1 − share) · b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of each row, (…, classes) -> (…)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _split_target(logits: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others), (…, 2), and among the others, (…, classes) with 0 at the target."""
    logits = _wide(logits) / temperature
    others = logits.scatter(-1, index, -math.inf)
    total, mass = logits.logsumexp(-1, keepdim=True), others.logsumexp(-1, keepdim=True)
    pair = torch.cat([logits.gather(-1, index), mass], dim=-1) - total
    return _finite(pair), _finite(others - mass).scatter(-1, index, 0.0)  # 0 at the target adds 1 · (0 − 0)


def _log_other_mass(logits: Tensor, targets: SparseTargets) -> Tensor:
    """Log of Σ exp z over the tokens that were not kept, (…, 1)."""
    best = targets.probabilities.argmax(-1, keepdim=True)
    kept = torch.where(targets.probabilities > 0, targets.ids, targets.ids.gather(-1, best))  # unused slots hold no id
    return logits.scatter(-1, kept, -math.inf).logsumexp(-1, keepdim=True)


def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return rows.mean()
    return torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)
