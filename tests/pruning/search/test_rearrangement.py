"""Swaps: never worse, and often the optimum of a brute force."""

from itertools import combinations

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.search.rearrangement import lost_energy, rearrange_units


def case(seed, units=8, samples=5):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, units, generator=generator)
    kept = torch.zeros(units, dtype=torch.bool)
    kept[gradients.square().sum(dim=0).argsort(descending=True)[: units // 2]] = True
    return gradients, kept


def optimum(gradients, count):
    units = gradients.shape[1]
    masks = [torch.tensor([unit in chosen for unit in range(units)]) for chosen in combinations(range(units), count)]
    return min(lost_energy(gradients, mask) for mask in masks)


def test_lost_energy_is_a_loop_over_samples():
    gradients, kept = case(0)
    expected = sum(float(row[~kept].sum()) ** 2 for row in gradients)
    assert lost_energy(gradients, kept) == pytest.approx(expected, rel=1e-5)
    assert lost_energy(gradients, torch.ones(8, dtype=torch.bool)) == 0


def test_swaps_lower_the_loss_and_often_find_the_optimum():
    hits = 0
    for seed in range(20):
        gradients, kept = case(seed)
        found = rearrange_units(gradients, kept)
        assert int(found.sum()) == 4
        after = lost_energy(gradients, found)
        assert after <= lost_energy(gradients, kept) + 1e-9
        hits += after == pytest.approx(optimum(gradients, 4), rel=1e-6)
    assert hits >= 10


def test_no_single_swap_is_left_that_helps():
    gradients, kept = case(1, units=30, samples=12)
    found = rearrange_units(gradients, kept, passes=100)
    least = lost_energy(gradients, found)
    for dropped in (~found).nonzero().flatten().tolist():
        for other in found.nonzero().flatten().tolist():
            swapped = found.clone()
            swapped[dropped], swapped[other] = True, False
            assert lost_energy(gradients, swapped) >= least * (1 - 1e-9)


def test_opposite_units_go_together():
    gradients = torch.tensor([[3.0, -3.0, 2.0, 2.0], [-2.0, 2.0, 2.0, 2.0]])
    found = rearrange_units(gradients, torch.tensor([False, True, True, False]))
    assert found.tolist() == [False, False, True, True]
    assert lost_energy(gradients, found) == 0


def test_nothing_to_swap_changes_nothing():
    gradients, kept = case(2)
    before = kept.clone()
    assert rearrange_units(gradients, torch.ones(8, dtype=torch.bool)).all()
    assert not rearrange_units(gradients, torch.zeros(8, dtype=torch.bool)).any()
    assert torch.equal(rearrange_units(torch.zeros(3, 8), kept), kept)
    rearrange_units(gradients, kept)
    assert torch.equal(kept, before)  # the caller's mask stays


def test_what_does_not_fit_is_refused():
    with pytest.raises(SettingError, match="got \\(3, 2\\) and \\(4,\\)"):
        rearrange_units(torch.ones(3, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(SettingError, match="2 units hold NaN"):
        rearrange_units(torch.full((3, 2), torch.nan), torch.tensor([True, False]))
