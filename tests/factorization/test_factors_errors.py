"""What the factors refuse, and what the message says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.factorization.factors import decompose, low_rank_factors


def problem(out: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, features), row weights (out,) and inputs (60, features)."""
    generator = torch.Generator().manual_seed(0)
    draw = (torch.randn(*shape, generator=generator) for shape in ((out, features), (out,), (60, features)))
    weight, rows, x = (values.double() for values in draw)
    return weight, 0.1 + rows.abs(), x


def test_settings_that_do_not_fit_are_refused() -> None:
    weight, rows, x = problem(24, 16)
    gram = x.T @ x
    nan = weight.clone()
    nan[2, 3], nan[4, 5] = math.nan, math.inf
    indefinite = torch.diag(torch.tensor([-1.0] + [1.0] * 15))
    for call, match in (
        (lambda: low_rank_factors(weight, 17), r"rank must be in 1\.\.16 for a weight of shape \(24, 16\), got 17\."),
        (lambda: low_rank_factors(weight, 0), r"1\.\.16 .* got 0"),
        (lambda: low_rank_factors(weight, True), r"1\.\.16 .* got True"),
        (lambda: low_rank_factors(weight, 2.0), r"1\.\.16 .* got 2\.0"),
        (lambda: decompose(weight).factors(17), r"1\.\.16 .* got 17"),
        (lambda: decompose(weight, solver="fast"), '"auto", "full" or "randomized", got \'fast\''),
        (lambda: low_rank_factors(nan, 2), r"shape \(24, 16\) has 2 NaN or infinite values"),
        (lambda: low_rank_factors(weight[0], 1), r"2 dimensions, got torch.float64 \(16,\)"),
        (lambda: low_rank_factors(weight.long(), 1), "a floating weight .* got torch.int64"),
        (lambda: low_rank_factors(weight[:0], 1), r"got torch.float64 \(0, 16\)"),
        (
            lambda: low_rank_factors(weight, 2, row_weight=rows[:3]),
            r"row_weight must have shape \(24,\) .* got \(3,\)",
        ),
        (lambda: low_rank_factors(weight, 2, row_weight=-rows), "finite and not negative, got values from -"),
        (
            lambda: low_rank_factors(weight, 2, row_weight=rows * math.nan),
            "finite and not negative, got values .* nan",
        ),
        (lambda: low_rank_factors(weight, 2, input_gram=x), r"must have shape \(16, 16\) .* got \(60, 16\)"),
        (lambda: low_rank_factors(weight, 2, input_gram=gram * math.nan), "input_gram has NaN or infinite"),
        (lambda: low_rank_factors(weight, 2, input_gram=gram.triu()), "must be symmetric"),
        (lambda: low_rank_factors(weight, 2, input_gram=indefinite), "positive semi-definite.* -1 on its diagonal"),
    ):
        with pytest.raises(SettingError, match=match):
            call()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_a_gram_matrix_with_a_negative_eigenvalue_is_refused(shape: tuple[int, int]) -> None:
    """Ones on the diagonal and 2 beside it: symmetric, no negative entry, an eigenvalue of −1."""
    gram = torch.full((shape[1], shape[1]), 2.0).fill_diagonal_(1.0)
    with pytest.raises(SettingError, match="positive semi-definite.* the eigenvalue -"):
        low_rank_factors(problem(*shape)[0], 2, input_gram=gram)
