"""SparseGPT against Optimal Brain Surgeon with a Hessian that is inverted anew after each column."""

from __future__ import annotations

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.scores import magnitude, wanda
from hfshrink.pruning.criteria.thresholds import keep_largest, keep_largest_per_row, n_of_m_mask
from hfshrink.pruning.oneshot.obs import inverse_factor, sparsegpt


def layer(out: int = 6, features: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, features) and correlated inputs (tokens, features) of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scale = torch.rand(features, generator=generator, dtype=torch.float64) * 3
    x = torch.randn(5 * features, features, generator=generator, dtype=torch.float64) @ mixing * scale
    return torch.randn(out, features, generator=generator, dtype=torch.float64), x


def damped(x: torch.Tensor) -> torch.Tensor:
    hessian = 2 * x.T @ x
    return hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def slow_obs(weight: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row: zero w_j, and add −w_j / [H⁻¹]₀₀ · H⁻¹₀ to what is left, H without the settled columns."""
    weight = weight.clone()
    for row, kept in zip(weight, mask, strict=True):
        for j in range(len(row)):
            if not kept[j]:
                inverse = torch.linalg.inv(hessian[j:, j:])
                row[j:] -= row[j] / inverse[0, 0] * inverse[0]
                row[j] = 0
    return weight


def test_the_factor_holds_every_smaller_inverse() -> None:
    _, x = layer()
    factor, hessian = inverse_factor(x.T @ x), damped(x)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))
    for j in range(12):
        first = torch.linalg.inv(hessian[j:, j:])[0]
        torch.testing.assert_close(factor[j, j].square(), first[0])
        torch.testing.assert_close(factor[j, j:] / factor[j, j], first / first[0])


@pytest.mark.parametrize("block_size", [12, 5, 1])
@pytest.mark.parametrize("sparsity", [0.5, 0.83])
def test_weights_are_those_of_the_slow_loop(sparsity: float, block_size: int) -> None:
    weight, x = layer()
    found, mask = sparsegpt(weight, x.T @ x, sparsity, block_size=block_size)
    assert int((~mask).sum()) == round(sparsity * 72)
    assert bool((found[~mask] == 0).all())
    torch.testing.assert_close(found, slow_obs(weight, damped(x), mask))


def test_one_block_drops_the_cheapest() -> None:
    weight, x = layer()
    _, mask = sparsegpt(weight, x.T @ x, 0.4, block_size=12)
    costs = torch.empty_like(weight)
    for j in range(12):
        costs[:, j] = weight[:, j].square() / torch.linalg.inv(damped(x)[j:, j:])[0, 0]
    assert torch.equal(mask, keep_largest(costs, 0.4))


@pytest.mark.parametrize(
    ("pattern", "block_size"), [((2, 4), 128), ((2, 4), 6), ((1, 3), 4), ((3, 4), 1), ((4, 4), 8)]
)
def test_patterns(pattern: tuple[int, int], block_size: int) -> None:
    weight, x = layer()
    found, mask = sparsegpt(weight, x.T @ x, pattern, block_size=block_size)
    assert bool((mask.view(6, -1, pattern[1]).sum(dim=2) == pattern[0]).all())
    torch.testing.assert_close(found, slow_obs(weight, damped(x), mask))
    assert pattern[0] < pattern[1] or torch.equal(found, weight)


def test_masks_of_later_groups_see_the_updates() -> None:
    """The second column's weight is small until the first, its twin, is dropped and moves into it."""
    weight = torch.tensor([[1.0, 1.1, 0.1, 0.9]])
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    x[:, 2] = x[:, 0]
    _, mask = sparsegpt(weight, x.T @ x, (1, 2))
    assert mask.tolist() == [[False, True, True, False]]


def test_sparsity_0_changes_nothing() -> None:
    weight, x = layer()
    found, mask = sparsegpt(weight, x.T @ x, 0.0)
    assert torch.equal(found, weight)
    assert bool(mask.all())


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_output_errors_have_the_order_of_the_paper(sparsity: float | tuple[int, int]) -> None:
    for seed in range(3):
        weight, x = layer(32, 64, seed=seed)
        found, _ = sparsegpt(weight, x.T @ x, sparsity, block_size=16)
        by_size, by_input = magnitude(weight), wanda(weight, x.square().sum(dim=0).sqrt())
        if isinstance(sparsity, tuple):
            masks = [n_of_m_mask(scores, *sparsity) for scores in (by_input, by_size)]
        else:
            masks = [keep_largest_per_row(by_input, sparsity), keep_largest(by_size, sparsity)]
        errors = [float((x @ (other - weight).T).norm()) for other in (found, *(weight * mask for mask in masks))]
        assert errors[0] < 0.9 * errors[1]
        assert errors[1] < errors[2]


def test_features_that_never_fire_go_first() -> None:
    weight, x = layer()
    x[:, [2, 7]] = 0
    found, mask = sparsegpt(weight, x.T @ x, 2 / 12, block_size=12)
    assert not bool(mask[:, [2, 7]].any())
    torch.testing.assert_close(found[:, mask[0]], weight[:, mask[0]])
    _, mask = sparsegpt(weight, x.T @ x, (2, 3))
    assert not bool(mask[:, [2, 7]].any())
    nothing, mask = sparsegpt(weight, torch.zeros(12, 12), 0.5)
    assert torch.equal(nothing, weight * mask)


def test_errors() -> None:
    weight, x = layer()
    gram = x.T @ x
    for call, match in (
        (lambda: sparsegpt(weight, gram[:3, :3], 0.5), r"needs a Gram matrix \(12, 12\) .* got \(3, 3\)"),
        (lambda: sparsegpt(weight, gram, 0.5, block_size=0), "and 0"),
        (lambda: sparsegpt(weight, gram, 1.0), "sparsity must lie in"),
        (lambda: sparsegpt(weight, gram, (2, 5)), "that 5 divides, got 12"),
        (lambda: sparsegpt(weight, gram * float("nan"), 0.5), "a finite Gram matrix"),
        (lambda: inverse_factor(gram, 0.0), "damping must be above 0.* got 0.0"),
    ):
        with pytest.raises(SettingError, match=match):
            call()
