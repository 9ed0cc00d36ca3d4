"""Factored kernels against the dense convolution, with the stages run one after the other."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.errors import SettingError
from hfshrink.factorization.convolutions import (
    channel_kernels,
    separable_kernels,
    tucker_factors,
    tucker_parameters,
    tucker_ranks,
)
from hfshrink.factorization.factors import decompose, low_rank_factors
from hfshrink.factorization.sites import matrix

SHAPE = (6, 4, 3, 5)
"""Of all four sizes none twice, so that a wrong reshape shows."""

GEOMETRIES = [
    {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)},
    {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)},
    {"stride": (1, 3), "padding": (2, 1), "dilation": (2, 1)},
]


def kernel(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, SHAPE[1], 11, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_way(geometry: dict[str, tuple[int, int]], axis: int) -> dict[str, tuple[int, int]]:
    """The geometry along one axis; 1, 0 and 1 along the other."""
    neutral = {"stride": 1, "padding": 0, "dilation": 1}
    return {
        name: tuple(value if place == axis else neutral[name] for place, value in enumerate(pair))
        for name, pair in geometry.items()
    }


def matrix_of(weight: Tensor, form: str) -> Tensor:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], bias=False)
    return matrix(conv, weight, form)


def channel_factors(weight: Tensor, rank: int, **how: Tensor) -> tuple[Tensor, Tensor]:
    return channel_kernels(*low_rank_factors(matrix_of(weight, "channel"), rank, **how), weight.shape)


def separable_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return separable_kernels(*low_rank_factors(matrix_of(weight, "separable"), rank), weight.shape)


def channel_weight(up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("or,riyx->oiyx", up, down)


def separable_weight(vertical: Tensor, horizontal: Tensor) -> Tensor:
    return torch.einsum("riy,orx->oiyx", vertical[..., 0], horizontal[:, :, 0])


def tucker_weight(first: Tensor, core: Tensor, last: Tensor) -> Tensor:
    return torch.einsum("qi,pqyx,op->oiyx", first[..., 0, 0], core, last[..., 0, 0])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_full_rank_stages_are_the_convolution(geometry: dict[str, tuple[int, int]]) -> None:
    """Channel: geometry with down. Separable: each direction with its stage. Tucker: with the core. Bias last."""
    weight, x, bias = kernel(), images(), torch.arange(6.0, dtype=torch.float64)
    dense = F.conv2d(x, weight, bias, **geometry)

    up, down = channel_factors(weight, 6)
    torch.testing.assert_close(F.conv2d(F.conv2d(x, down, **geometry), up[:, :, None, None], bias), dense)

    vertical, horizontal = separable_factors(weight, 12)
    assert (vertical.shape, horizontal.shape) == ((12, 4, 3, 1), (6, 12, 1, 5))
    columns = F.conv2d(x, vertical, **one_way(geometry, 0))
    torch.testing.assert_close(F.conv2d(columns, horizontal, bias, **one_way(geometry, 1)), dense)

    first, core, last = tucker_factors(weight, (6, 4))
    assert (first.shape, core.shape, last.shape) == ((4, 4, 1, 1), (6, 4, 3, 5), (6, 6, 1, 1))
    torch.testing.assert_close(F.conv2d(F.conv2d(F.conv2d(x, first), core, **geometry), last, bias), dense)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_stages_of_lower_rank_are_the_convolution_of_their_product(geometry: dict[str, tuple[int, int]]) -> None:
    weight, x = kernel(), images()
    up, down = channel_factors(weight, 2)
    staged = F.conv2d(F.conv2d(x, down, **geometry), up[:, :, None, None])
    torch.testing.assert_close(staged, F.conv2d(x, channel_weight(up, down), **geometry))

    vertical, horizontal = separable_factors(weight, 2)
    staged = F.conv2d(F.conv2d(x, vertical, **one_way(geometry, 0)), horizontal, **one_way(geometry, 1))
    torch.testing.assert_close(staged, F.conv2d(x, separable_weight(vertical, horizontal), **geometry))

    first, core, last = tucker_factors(weight, (2, 3))
    staged = F.conv2d(F.conv2d(F.conv2d(x, first), core, **geometry), last)
    torch.testing.assert_close(staged, F.conv2d(x, tucker_weight(first, core, last), **geometry))


def test_hand_cases() -> None:
    """Sobel's kernel is (1, 2, 1)ᵀ (1, 0, −1): rank 1 in space, √6 · √2 in size, split evenly."""
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    vertical, horizontal = separable_factors(sobel[None, None], 1)
    split = 12**0.25
    sign = torch.sign(vertical[0, 0, 0, 0])
    torch.testing.assert_close(sign * vertical[0, 0, :, 0], torch.tensor([1.0, 2.0, 1.0]) * split / 6**0.5)
    torch.testing.assert_close(sign * horizontal[0, 0, 0], torch.tensor([1.0, 0.0, -1.0]) * split / 2**0.5)
    # out channels 1 : 2 of one kernel: one channel and a mix
    twins = torch.stack([sobel, 2 * sobel])[:, None]
    up, down = channel_factors(twins, 1)
    torch.testing.assert_close(up[1] / up[0], torch.tensor([2.0]))
    torch.testing.assert_close(channel_weight(up, down), twins)
    # one out and one in direction suffice
    first, core, last = tucker_factors(torch.cat([twins, 3 * twins], dim=1), (1, 1))
    torch.testing.assert_close(first.flatten().abs(), torch.tensor([1.0, 3.0]) / 10**0.5)
    torch.testing.assert_close(last.flatten().abs(), torch.tensor([1.0, 2.0]) / 5**0.5)
    torch.testing.assert_close(core[0, 0].abs(), sobel.abs() * 50**0.5)


@pytest.mark.parametrize("shape", [SHAPE, (3, 4, 3, 5), (40, 2, 3, 3), (5, 4, 1, 1), (2, 30, 3, 1)])
def test_error_is_the_tail_at_every_rank(shape: tuple[int, int, int, int]) -> None:
    weight = kernel(shape)
    for found, kernels, product in (
        (decompose(matrix_of(weight, "channel")), channel_kernels, channel_weight),
        (decompose(matrix_of(weight, "separable")), separable_kernels, separable_weight),
    ):
        assert float(found.tails[0]) == pytest.approx(float(weight.square().sum()))
        for rank in range(1, len(found.tails)):
            made = product(*kernels(*found.factors(rank), shape))
            error = sum(float(e) ** 2 for e in (weight - made).flatten())
            assert error == pytest.approx(float(found.tails[rank]), rel=1e-9, abs=1e-12 * float(found.tails[0]))


def test_channel_form_with_patches_and_row_weights_has_the_least_weighted_output_error() -> None:
    """The error is that of the convolution's outputs, position by position."""
    weight, rows = kernel(), torch.rand(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = images(8)
    x = x.cumsum(2).cumsum(3) + 0.3 * x  # neighbours look alike
    patches = F.unfold(x, (3, 5), stride=2, padding=1).transpose(1, 2).flatten(end_dim=1)
    gram = patches.T @ patches

    def error(up: Tensor, down: Tensor) -> float:
        outputs = F.conv2d(x, weight - channel_weight(up, down), stride=2, padding=1)
        return float((outputs * rows[:, None, None]).square().sum())

    tails = decompose(weight.flatten(1), row_weight=rows, input_gram=gram).tails
    best = error(*channel_factors(weight, 2, row_weight=rows, input_gram=gram))
    assert best == pytest.approx(float(tails[2]), rel=1e-8)
    for other in ({}, {"row_weight": rows}, {"input_gram": gram}):
        assert best < 0.99 * error(*channel_factors(weight, 2, **other))


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 2), (6, 1), (3, 4)])
def test_tucker_error_lies_between_the_unfoldings_tails_and_their_sum(ranks: tuple[int, int]) -> None:
    weight = kernel()
    total = float(weight.square().sum())
    tails = [
        float(torch.linalg.svdvals(view.flatten(1))[rank:].square().sum())
        for view, rank in zip((weight, weight.transpose(0, 1)), ranks, strict=True)
    ]
    errors = []
    for sweeps in (0, 1, 2, 4, 20):
        first, core, last = tucker_factors(weight, ranks, sweeps)
        error = float((weight - tucker_weight(first, core, last)).square().sum())
        assert error == pytest.approx(total - float(core.square().sum()))
        torch.testing.assert_close(first[..., 0, 0] @ first[..., 0, 0].T, torch.eye(ranks[1], dtype=torch.float64))
        torch.testing.assert_close(last[..., 0, 0].T @ last[..., 0, 0], torch.eye(ranks[0], dtype=torch.float64))
        errors.append(error)
    assert max(tails) * (1 - 1e-9) <= errors[-1]
    assert errors[0] <= sum(tails) * (1 + 1e-9)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    assert ranks[0] == 6 or ranks[1] == 4 or errors[-1] < errors[0]  # with one side whole, HOSVD is the optimum


def test_hooi_finds_a_planted_core_from_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((2, 4), (3, 2, 3, 5), (6, 3))]
    weight = torch.einsum("qi,pqyx,op->oiyx", *parts)
    first, core, last = tucker_factors(weight, (3, 2))
    torch.testing.assert_close(tucker_weight(first, core, last), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stages_keep_the_dtype_and_carry_no_gradient(dtype: torch.dtype) -> None:
    weight = kernel().to(dtype).requires_grad_()
    stages = (*channel_factors(weight, 3), *separable_factors(weight, 3), *tucker_factors(weight, (3, 3)))
    assert {stage.dtype for stage in stages} == {dtype}
    assert all(stage.is_contiguous() and not stage.requires_grad for stage in stages)


def test_parameters_are_those_of_the_stages() -> None:
    assert tucker_parameters(SHAPE, (5, 2)) == sum(stage.numel() for stage in tucker_factors(kernel(), (5, 2)))


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_tucker_ranks_have_the_least_bound_of_all_pairs(ratio: float, multiple: int) -> None:
    weight = kernel((16, 10, 3, 3)) * torch.logspace(0, -2, 10)[:, None, None]
    out_squares, in_squares = (
        torch.linalg.svdvals(view.flatten(1)).square() for view in (weight, weight.transpose(0, 1))
    )
    choices = {
        (p, q): float(out_squares[p:].sum() + in_squares[q:].sum())
        for p in range(1, 17)
        for q in range(1, 11)
        if tucker_parameters(weight.shape, (p, q)) <= ratio * weight.numel()
        and (p % multiple == 0 or p == 16)
        and (q % multiple == 0 or q == 10)
    }
    found = tucker_ranks(weight, ratio, multiple)
    assert choices[found] == pytest.approx(min(choices.values()))


def test_tucker_ranks_follow_the_energy() -> None:
    """Few input directions matter: they get few ranks, and the outputs the rest; the other way round as well."""
    weight = kernel((16, 16, 3, 3)) * torch.logspace(0, -4, 16)[:, None, None]
    assert tucker_ranks(weight, 0.5) == tucker_ranks(weight.transpose(0, 1), 0.5)[::-1]
    out_rank, in_rank = tucker_ranks(weight, 0.5)
    assert out_rank > 1.5 * in_rank


def test_errors() -> None:
    weight = kernel()
    for call, match in (
        (lambda: tucker_factors(weight, (7, 1)), r"out_rank must be in 1\.\.6 .* got 7 .* \(7, 1\)"),
        (lambda: tucker_factors(weight, (1, 0)), r"in_rank must be in 1\.\.4 for .* \(6, 4, 3, 5\), got 0"),
        (lambda: tucker_factors(weight, (1, 1), -1), "sweeps must be at least 0, got -1"),
        (lambda: tucker_factors(weight * math.inf, (1, 1)), "has 360 NaN or infinite values"),
        (lambda: tucker_ranks(weight, 0.05), r"keeps 0.05 of .* \(6, 4, 3, 5\): ranks \(1, 1\) already keep 0.0694"),
        (lambda: tucker_ranks(weight, 0.0), "above 0 and at most 1, got 0.0"),
        (lambda: tucker_ranks(weight, 0.5, 0), "multiple must be at least 1, got 0"),
        (lambda: tucker_ranks(weight, 1.5), "above 0 and at most 1, got 1.5"),
        (lambda: tucker_ranks(weight[0], 0.5), r"4 dimensions, got torch.float64 \(4, 3, 5\)"),
    ):
        with pytest.raises(SettingError, match=match):
            call()
