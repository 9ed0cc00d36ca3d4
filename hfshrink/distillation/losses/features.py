"""How far the insides of two models are apart: hidden states, attention scores, relations, feature maps.

Every function works in float32 (under autocast, matrix products take autocast's dtype) and returns a scalar: the mean
over what counts, and 0 where nothing counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from hfshrink.errors import SettingError

MOST_RELATION_HEADS = 48  # MiniLMv2's number, for widths of 768
LEAST_RELATION_WIDTH = 8  # 384 / 48, MiniLMv2's narrowest


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of (H_S − H_T)² over positions and width (TinyBERT, arXiv:1909.10351).

    Args:
        student: H_S of shape (…, width), projected to the teacher's width where needed.
        teacher: H_T of the same shape.
        mask: Positions that count, of shape (…); None counts all.

    Example:
        >>> hidden_mse(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0)).item()
        4.0
    """
    return masked_mean((student.float() - teacher.float()).square().mean(-1), mask)


def normalized_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of ‖h_S/‖h_S‖ − h_T/‖h_T‖‖², the sum over the width (PKD, arXiv:1908.09355).

    Args:
        student: h_S of shape (…, width).
        teacher: h_T of the same shape.
        mask: Positions that count, of shape (…); None counts all.

    Example:
        >>> normalized_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
        2.0
    """
    apart = F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)
    return masked_mean(apart.square().sum(-1), mask)


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over positions of 1 − cos(h_S, h_T) (DistilBERT, arXiv:1910.01108).

    It is half of `normalized_distance`, and computed so: exactly 0, with a gradient of 0, where both are equal.

    Args:
        student: h_S of shape (…, width).
        teacher: h_T of the same shape.
        mask: Positions that count, of shape (…); None counts all.

    Example:
        >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[-4.0, 0.0]])).item()
        2.0
    """
    return normalized_distance(student, teacher, mask) / 2


def first_tokens(states: Tensor, mask: Tensor | None = None) -> Tensor:
    """The state of each row's first position that is not padding, of shape (batch, 1, width).

    Args:
        states: (batch, sequence, width).
        mask: Positions that are not padding, of shape (batch, sequence); None where none is padding.

    Example:
        >>> first_tokens(torch.arange(3.0).reshape(1, 3, 1), torch.tensor([[False, True, True]])).item()
        1.0
    """
    if mask is None:
        return states[:, :1]
    first = mask.to(states.device).int().argmax(-1)  # rows may be padded on the left
    return states.gather(1, first[:, None, None].expand(-1, 1, states.shape[-1]))


def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, pairs: Tensor | None = None) -> Tensor:
    """Mean of (A_S − A_T)² over heads and pairs of positions, A = QKᵀ/√d before the softmax (arXiv:1909.10351).

    Args:
        student: A_S of shape (batch, heads, sequence, sequence).
        teacher: A_T of the same shape.
        mask: Positions that are not padding, of shape (batch, sequence): the others count neither as queries (rows)
            nor as keys (columns). None counts all.
        pairs: Booleans that broadcast to (batch, 1, sequence, sequence): pairs that count. A causal model leaves out
            the future. None counts all.

    Example:
        >>> attention_mse(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item()
        1.0
    """
    squares = (student.float() - teacher.float()).square()
    counted = pairs_that_count(squares, mask, pairs)
    return masked_mean(squares, None if counted is None else counted.expand_as(squares))


def relation_loss(
    student: Tensor,
    teacher: Tensor,
    relation_heads: int,
    mask: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Tensor:
    """Mean over relation heads and positions of KL(R_T ‖ R_S), R = softmax(XXᵀ/√d_r) (MiniLMv2, arXiv:2012.15828).

    X are the states (queries, keys or values) of all heads side by side, split anew into `relation_heads` heads of
    width d_r. So neither widths nor head counts of student and teacher need to agree.

    Args:
        student: States of shape (batch, heads, sequence, head width).
        teacher: States of shape (batch, heads', sequence, head width').
        relation_heads: Heads of the relations; divides both models' heads × head width.
        mask: Positions that are not padding, of shape (batch, sequence): the others count neither as rows nor as
            columns. None counts all.
        pairs: Booleans that broadcast to (batch, 1, sequence, sequence): which position may be related to which. For
            causal models the past only, as in their attention: the paper treats encoders, and there every pair
            counts. None counts all.

    Raises:
        SettingError: `relation_heads` does not divide a width.

    Example:
        >>> states = torch.randn(1, 2, 5, 4)
        >>> relation_loss(states, states.clone(), relation_heads=4).item()
        0.0
    """
    student, teacher = split_heads(student, relation_heads), split_heads(teacher, relation_heads)
    ours = student @ student.transpose(-1, -2) / math.sqrt(student.shape[-1])
    theirs = teacher @ teacher.transpose(-1, -2) / math.sqrt(teacher.shape[-1])
    counted = pairs_that_count(ours, mask, pairs)
    if counted is None:
        return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean()
    least = torch.finfo(ours.dtype).min  # not −inf: a row of padding has no column at all, and would become NaN
    log_q = ours.masked_fill(~counted, least).log_softmax(-1)
    log_p = theirs.masked_fill(~counted, least).log_softmax(-1)
    terms = torch.where(counted, log_p.exp() * (log_p - log_q), 0.0)
    rows = counted.any(-1).expand(terms.shape[:-1])  # (batch, relation heads, sequence)
    return masked_mean(terms.sum(-1), rows)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """States of any number of heads -> the same numbers in `heads` heads, in float32.

    Args:
        states: (batch, old heads, sequence, old head width).
        heads: The new number.

    Returns:
        (batch, heads, sequence, old heads · old head width / heads).

    Raises:
        SettingError: `heads` does not divide the width.

    Example:
        >>> split_heads(torch.zeros(1, 2, 5, 6), 4).shape
        torch.Size([1, 4, 5, 3])
    """
    batch, old, sequence, width = states.shape
    if old * width % heads:
        raise SettingError(
            f"relation_heads must divide the states' width, got {heads} for {old} heads × {width} = {old * width}."
        )
    return states.float().transpose(1, 2).reshape(batch, sequence, heads, -1).transpose(1, 2)


def default_relation_heads(*widths: int) -> int:
    """The most heads that divide all widths, at most 48, each at least 8 wide where possible (768, 384 -> 48).

    Args:
        *widths: Heads × head width of every query, key and value state of both models.

    Example:
        >>> default_relation_heads(768, 384), default_relation_heads(768, 312)
        (48, 24)
    """
    common = math.gcd(*widths)
    most = max(1, min(MOST_RELATION_HEADS, min(widths) // LEAST_RELATION_WIDTH))
    return max(heads for heads in range(1, most + 1) if common % heads == 0)


def feature_map_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of (F_S − F_T)² over examples, channels and places (in the manner of FitNets, arXiv:1412.6550).

    Where the sizes differ, the larger map is averaged over the places of the smaller.

    Args:
        student: F_S of shape (batch, channels, height, width), projected to the teacher's channels where needed.
        teacher: F_T of shape (batch, channels, height', width').

    Example:
        >>> feature_map_mse(torch.zeros(1, 2, 4, 4), torch.full((1, 2, 2, 2), 3.0)).item()
        9.0
    """
    ours, theirs = student.float(), teacher.float()
    size = (min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3]))
    ours, theirs = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (ours, theirs))
    return F.mse_loss(ours, theirs)


def pairs_that_count(scores: Tensor, mask: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """Booleans that broadcast to `scores` (batch, heads, sequence, sequence): no padding, allowed; None counts all."""
    if mask is None:
        return pairs
    mask = mask.to(scores.device)
    both = mask[:, None, :, None] & mask[:, None, None, :]
    return both if pairs is None else both & pairs


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of the values that count; 0, with gradients of 0, where none does.

    Example:
        >>> masked_mean(torch.tensor([1.0, 5.0]), torch.tensor([True, False])).item()
        1.0
    """
    if mask is None:
        return values.mean()
    mask = mask.to(values.device)
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
