"""Masks with exact counts, against sorting and against one-by-one dropping."""

from __future__ import annotations

from math import inf

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria.thresholds import (
    count_dropped,
    drop_smallest,
    global_masks,
    global_thresholds,
    histogram_threshold,
    keep_largest,
    keep_largest_per_row,
    n_of_m_mask,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dropped(mask: torch.Tensor) -> int:
    return int((~mask).sum())


def greedy(scores: dict[str, torch.Tensor], sparsity: float, max_sparsity: float) -> dict[str, torch.Tensor]:
    """Drop the smallest score of all that its module still allows, one at a time."""
    masks = {name: torch.ones(len(given), dtype=torch.bool) for name, given in scores.items()}
    order = sorted((float(value), name, i) for name, given in scores.items() for i, value in enumerate(given))
    left = round(sparsity * len(order))
    for _, name, i in order:
        if left and dropped(masks[name]) < round(max_sparsity * len(masks[name])):
            masks[name][i] = False
            left -= 1
    return masks


class TestKeepLargest:
    @pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.999])
    def test_count_is_exact_and_the_largest_stay(self, sparsity: float) -> None:
        scores = randn(10, 10)
        mask = keep_largest(scores, sparsity)
        assert dropped(mask) == round(sparsity * 100)
        assert sparsity in (0.0, 0.999) or scores[mask].min() > scores[~mask].max()

    def test_of_equal_scores_the_last_go(self) -> None:
        assert keep_largest(torch.tensor([1.0, 1, 0, 1, 1]), 0.6).tolist() == [True, True, False, False, False]
        assert dropped(keep_largest(torch.zeros(9), 1 / 3)) == 3

    def test_infinite_scores_go_last(self) -> None:
        assert keep_largest(torch.tensor([inf, 2.0, -inf, 1.0]), 0.5).tolist() == [True, True, False, False]

    @pytest.mark.parametrize("ties", [False, True])
    def test_rows_are_what_a_sort_of_each_says(self, ties: bool) -> None:
        scores = randn(5, 12).round() if ties else randn(5, 12)
        mask = keep_largest_per_row(scores, 0.4)
        for row, found in zip(scores.tolist(), mask, strict=True):
            order = sorted(range(12), key=lambda i, row=row: (row[i], -i))
            assert sorted(order[:5]) == (~found).nonzero().flatten().tolist()

    def test_halves(self) -> None:
        assert dropped(keep_largest(randn(4, 5).half(), 0.25)) == 5

    def test_errors(self) -> None:
        broken = torch.tensor([[1.0, float("nan")]])
        for call, match in (
            (lambda: count_dropped(1.0, 3), r"sparsity must lie in \[0, 1\).* got 1.0"),
            (lambda: keep_largest(randn(3), -0.1), r"got -0.1"),
            (lambda: keep_largest(randn(3), float("nan")), "got nan"),
            (lambda: keep_largest(broken, 0.5), "1 of 2 scores are NaN"),
            (lambda: drop_smallest(randn(2, 3), 4), r"Of 3 scores per row 0..3 can go, got 4"),
            (lambda: keep_largest_per_row(randn(3), 0.5), r"shape \(out, in\), got \(3,\)"),
        ):
            with pytest.raises(SettingError, match=match):
                call()


class TestPatterns:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 3), (1, 2)])
    def test_each_group_keeps_its_n_largest(self, n: int, m: int) -> None:
        scores = randn(6, 24).round(decimals=1)
        mask = n_of_m_mask(scores, n, m)
        for row, found in zip(scores, mask, strict=True):
            for start in range(0, 24, m):
                group, kept = row[start : start + m], found[start : start + m]
                assert kept.sum() == n
                assert n == m or group[kept].min() >= group[~kept].max()

    def test_equal_scores_keep_the_first(self) -> None:
        assert n_of_m_mask(torch.zeros(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]

    def test_errors(self) -> None:
        for (n, m), match in (((2, 4), "that 4 divides, got 6"), ((0, 2), "got 0:2"), ((3, 2), "got 3:2")):
            with pytest.raises(SettingError, match=match):
                n_of_m_mask(randn(2, 6), n, m)
        with pytest.raises(SettingError, match="NaN"):
            n_of_m_mask(torch.full((2, 4), float("nan")), 2, 4)


class TestGlobal:
    @pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 0.8])
    def test_masks_are_those_of_dropping_one_by_one(self, sparsity: float) -> None:
        scores = {"a": randn(40).abs() / 10, "b": randn(30, seed=1).abs(), "c": randn(25, seed=2).abs() + 1}
        masks, slow = global_masks(scores, sparsity, 0.85), greedy(scores, sparsity, 0.85)
        assert sum(dropped(mask) for mask in masks.values()) == round(sparsity * 95)
        assert all(torch.equal(masks[name], slow[name]) for name in scores)
        limits = global_thresholds(scores, sparsity, 0.85)
        assert all(torch.equal(scores[name] >= limits[name], slow[name]) for name in scores)

    def test_two_modules_can_be_capped_one_after_the_other(self) -> None:
        scores = {"a": randn(50).abs() / 100, "b": randn(50, seed=1).abs() / 10, "c": randn(50, seed=2).abs() + 9}
        masks = global_masks(scores, 0.7, 0.9)
        assert [dropped(mask) for mask in masks.values()] == [45, 45, 15]
        limits = global_thresholds(scores, 0.7, 0.9)
        assert [dropped(scores[name] >= limits[name]) for name in scores] == [45, 45, 15]

    def test_shapes_and_signs(self) -> None:
        scores = {"a": randn(4, 5), "b": randn(3, 3, seed=1)}
        masks, limits = global_masks(scores, 0.4), global_thresholds(scores, 0.4, signed=True)
        assert {name: mask.shape for name, mask in masks.items()} == {"a": (4, 5), "b": (3, 3)}
        assert all(torch.equal(scores[name] >= limits[name], masks[name]) for name in scores)

    def test_errors(self) -> None:
        for function in (global_masks, global_thresholds):
            for scores, sparsity, match in (
                ({}, 0.5, "no module was selected"),
                ({"a": randn(10)}, 0.99, "sparsity 0.99 can't be reached .* max_sparsity 0.9"),
                ({"a": randn(9), "b": torch.tensor([float("nan")])}, 0.5, "1 of 1 scores of b are NaN"),
            ):
                with pytest.raises(SettingError, match=match):
                    function(scores, sparsity, 0.9)


class TestHistogram:
    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.9, 0.9995])
    def test_is_exactly_the_sorted_value(self, sparsity: float, signed: bool) -> None:
        tensors = [randn(50, 70) * 1e-3, randn(900, seed=1) * 30, torch.tensor([1e30, -1e-38, 0.0, -0.0])]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        values = (flat if signed else flat.abs()).sort().values
        found = histogram_threshold(tensors, sparsity, signed=signed)
        assert found == float(values[round(sparsity * len(values))])
        assert dropped(values >= found) == round(sparsity * len(values))

    def test_equal_values_stay_together(self) -> None:
        weight = torch.tensor([0.0, 0, 0, 1, 1, 2])
        assert histogram_threshold([weight], 0.5) == 1
        assert histogram_threshold([weight], 4 / 6) == 1
        assert histogram_threshold([-weight], 0.5, signed=True) == 0
        assert histogram_threshold([torch.tensor([-0.0, -0.0])], 0.5, signed=True) == 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_exact(self, dtype: torch.dtype) -> None:
        weight = randn(999).to(dtype)
        assert histogram_threshold([weight], 0.3) == float(weight.abs().float().sort().values[300])

    def test_nothing_stays_when_the_count_rounds_to_all(self) -> None:
        assert histogram_threshold([torch.ones(2)], 0.9) == inf

    def test_errors(self) -> None:
        for tensors, sparsity, match in (
            ([], 0.5, "at least one value, got none"),
            ([torch.ones(2), torch.tensor([float("nan")])], 0.5, "1 of 1 scores of tensor 1 are NaN"),
            ([torch.ones(2)], 1.5, "got 1.5"),
        ):
            with pytest.raises(SettingError, match=match):
                histogram_threshold(tensors, sparsity)


def test_small_modules_keep_their_last_score() -> None:
    """98 % of four are four: without a word about the last one they would all go."""
    scores = {"small": randn(4).abs() * 0.01, "one": torch.tensor([0.0]), "large": randn(100, seed=1).abs()}
    masks = global_masks(scores, 0.5)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 51]  # 52 of 105 go
    limits = global_thresholds(scores, 0.5)
    assert all(torch.equal(values >= limits[name], masks[name]) for name, values in scores.items())
    with pytest.raises(SettingError, match="nor its last score: that leaves 102 of 105"):
        global_masks(scores, 0.98, 0.99)
