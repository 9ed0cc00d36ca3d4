"""Ranks by ratio, energy and budget: by hand, against trying all, against a slow dynamic program, and their laws."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random

import pytest
import torch

from hfshrink.errors import BudgetError, SettingError
from hfshrink.factorization.allocation import (
    Size,
    budget_ranks,
    energy_ranks,
    fixed_ranks,
    uniform_ranks,
)

SHAPES = [(768, 768), (3072, 768), (192, 576), (16, 24), (1000, 64), (5, 300)]


def tails_of(values):
    """Squared error left at rank 0.. for squared singular values."""
    squares = torch.tensor([*sorted(values, reverse=True), 0.0], dtype=torch.float64)
    return squares.flip(0).cumsum(0).flip(0)


def drawn(seed, modules, largest=12, decay=(0.3, 0.95)):
    """Random shapes, and spectra that fall by a random factor."""
    draw = random.Random(seed)
    sizes, tails = {}, {}
    for number in range(modules):
        shape = draw.randint(4, largest), draw.randint(4, largest)
        factor = draw.uniform(*decay)
        sizes[f"m{number}"] = Size.of_matrix(*shape)
        tails[f"m{number}"] = draw.uniform(1, 9) * tails_of([factor**k for k in range(min(shape))])
    return tails, sizes


def error_of(ranks, tails, weights=None):
    return sum(
        (weights or {}).get(name, 1) * float(tails[name][rank]) for name, rank in ranks.items() if rank is not None
    )


def options(size, multiple=1):
    return [*size.ranks(multiple), None]


def best_by_trying(tails, sizes, budget, multiple=1):
    best = math.inf
    for ranks in itertools.product(*(options(size, multiple) for size in sizes.values())):
        if sum(size.parameters(rank) for size, rank in zip(sizes.values(), ranks, strict=True)) <= budget:
            best = min(best, error_of(dict(zip(sizes, ranks, strict=True)), tails))
    return best


def best_by_dynamic_program(tails, sizes, budget, multiple=1):
    """f(c) = min over a module's options of f_before(c − cost) + error, parameter by parameter."""
    best = [0.0] * (budget + 1)
    for name, size in sizes.items():
        after = [math.inf] * (budget + 1)
        for rank in options(size, multiple):
            cost, error = size.parameters(rank), 0.0 if rank is None else float(tails[name][rank])
            for spent in range(cost, budget + 1):
                after[spent] = min(after[spent], best[spent - cost] + error)
        best = after
    return best[budget]


def test_break_even_by_hand():
    assert Size.of_matrix(768, 768) == Size(589_824, 1536, 768)
    assert Size.of_matrix(768, 768).break_even == 384
    assert Size.of_matrix(768, 768).largest_rank == 383  # at 384 nothing is saved
    assert Size.of_matrix(16, 24).largest_rank == 9
    assert Size.of_matrix(1, 24).largest_rank == 0
    assert Size(100, 1, 4).largest_rank == 4  # a spectrum ends
    assert list(Size.of_matrix(16, 24).ranks(4)) == [4, 8]
    assert list(Size.of_matrix(6, 6).ranks(8)) == [1, 2]  # too small for the multiple
    assert list(Size.of_matrix(1, 24).ranks(8)) == []


@pytest.mark.parametrize("ratio", [0.05, 0.29, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_a_uniform_ratio_is_met_within_one_multiple(ratio, multiple):
    sizes = {str(shape): Size.of_matrix(*shape) for shape in SHAPES}
    found = uniform_ranks(sizes, ratio, multiple)
    for name, size in sizes.items():
        rank = found[name]
        step = multiple if multiple <= size.largest_rank else 1
        assert rank % step == 0
        assert size.parameters(rank) < size.dense_parameters
        assert abs(rank - ratio * size.break_even) < step or rank == step
        assert size.parameters(rank) <= ratio * size.dense_parameters + 1e-6 or rank == step
    assert found.reasons == {}
    assert found.parameters == sum(size.parameters(found[name]) for name, size in sizes.items())


@pytest.mark.parametrize(("shape", "ratio", "rank"), [((12, 30), 0.7, 6), ((24, 30), 0.6, 8), ((12, 15), 0.15, 1)])
def test_a_ratio_that_is_a_whole_rank_loses_none_in_binary(shape, ratio, rank):
    assert math.floor(ratio * shape[0] * shape[1] / sum(shape)) == rank - 1
    assert uniform_ranks({"a": Size.of_matrix(*shape)}, ratio, multiple=1) == {"a": rank}


def test_what_no_rank_makes_smaller_stays_dense():
    sizes = {"head": Size.of_matrix(1, 24), "wide": Size.of_matrix(16, 24)}
    reason = "no rank saves parameters: break-even rank is 0.96"
    tails = {"head": tails_of([1.0]), "wide": tails_of([2.0**-k for k in range(16)])}
    for found in (
        uniform_ranks(sizes, 0.9),
        energy_ranks(tails, sizes, 0.5),
        budget_ranks(tails, sizes, 24 + 320),
    ):
        assert found == {"head": None, "wide": 8}
        assert found.reasons == {"head": reason}
        assert found.parameters == 24 + 8 * 40
    assert json.loads(json.dumps(found)) == {"head": None, "wide": 8}
    fixed = fixed_ranks(sizes, 9)
    assert fixed == {"head": None, "wide": 9}
    assert fixed.reasons == {"head": "rank 9 saves no parameters: break-even rank is 0.96"}


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("multiple", [1, 4])
def test_energy_is_kept_by_the_smallest_rank(energy, multiple):
    tails, sizes = drawn(0, 8, largest=40)
    found = energy_ranks(tails, sizes, energy, multiple)
    for name, size in sizes.items():
        enough = [rank for rank in size.ranks(multiple) if tails[name][rank] <= (1 - energy + 1e-12) * tails[name][0]]
        assert found[name] == (enough[0] if enough else None)
        assert (name in found.reasons) == (not enough)


def test_energy_that_needs_a_rank_beyond_break_even_keeps_a_module_dense():
    tails = {"flat": tails_of([1.0] * 16), "thin": tails_of([1.0, 1.0] + [0.0] * 14)}
    found = energy_ranks(tails, dict.fromkeys(tails, Size.of_matrix(16, 16)), 0.7, multiple=4)
    assert found == {"flat": None, "thin": 4}
    assert found.reasons == {"flat": "0.7 of the energy needs rank 12, at or above the break-even rank 8"}
    assert energy_ranks(tails, dict.fromkeys(tails, Size.of_matrix(16, 16)), 1.0, multiple=2)["thin"] == 2


@pytest.mark.parametrize("seed", range(12))
def test_a_budget_against_trying_all(seed):
    tails, sizes = drawn(seed, 3, largest=9)
    least = sum(size.parameters(options(size)[0]) for size in sizes.values())
    dense = sum(size.dense_parameters for size in sizes.values())
    largest_step = max(float(tails[name][1]) for name in tails)
    for budget in range(least, dense + 1, 3):
        found = budget_ranks(tails, sizes, budget, multiple=1, least_share=0)
        assert found.error == pytest.approx(error_of(found, tails))
        best = best_by_trying(tails, sizes, budget)
        assert found.error >= best - 1e-9
        assert found.error - best < largest_step


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_against_a_slow_dynamic_program(seed):
    tails, sizes = drawn(100 + seed, 7, largest=14)
    least = sum(size.parameters(options(size)[0]) for size in sizes.values())
    dense = sum(size.dense_parameters for size in sizes.values())
    gaps = []
    for share in (0.3, 0.45, 0.6, 0.75, 0.9):
        budget = max(least, int(share * dense))
        best = best_by_dynamic_program(tails, sizes, budget)
        gaps.append(budget_ranks(tails, sizes, budget, multiple=1, least_share=0).error / best - 1 if best else 0.0)
    assert min(gaps) > -1e-9
    assert sum(gaps) / len(gaps) < 0.05


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_the_budget_is_never_exceeded_and_more_is_never_worse(seed, multiple):
    tails, sizes = drawn(seed, 5)
    weights = {name: 1.0 + number for number, name in enumerate(sizes)}
    least = sum(size.parameters(options(size, multiple)[0]) for size in sizes.values())
    dense = sum(size.dense_parameters for size in sizes.values())
    before = math.inf
    for budget in range(least, dense + 1, 7):
        found = budget_ranks(tails, sizes, budget, multiple, weights, least_share=0)
        assert found.parameters <= budget
        assert found.error <= before + 1e-9
        assert found.error == pytest.approx(error_of(found, tails, weights))
        assert set(found.reasons) == {name for name, rank in found.items() if rank is None}
        before = found.error
    whole = budget_ranks(tails, sizes, dense, multiple, weights)
    assert whole == dict.fromkeys(sizes)
    assert whole.error == 0
    assert whole.parameters == dense


def test_equal_modules_get_equal_ranks_within_one_step():
    """Where staying dense is far off: spectra that fall fast, and half the parameters."""
    tails = dict.fromkeys("abcde", tails_of([0.8**k for k in range(64)]))
    sizes = dict.fromkeys("abcde", Size.of_matrix(64, 64))
    for budget in range(5 * 4 * 128, 5 * 2048, 100):
        ranks = list(budget_ranks(tails, sizes, budget, multiple=4, least_share=0).values())
        assert max(ranks) - min(ranks) <= 4
        assert sum(ranks) == budget // (4 * 128) * 4


def test_a_weight_buys_ranks():
    tails = dict.fromkeys("ab", tails_of([0.8**k for k in range(64)]))
    sizes = dict.fromkeys("ab", Size.of_matrix(64, 64))
    found = budget_ranks(tails, sizes, 32 * 128, 1, weights={"a": 1.0, "b": 0.8**-10}, least_share=0)
    assert found == {"a": 11, "b": 21}
    assert budget_ranks(tails, sizes, 3000, 1, weights={"a": 1.0, "b": 0.0}, least_share=0)["b"] == 1


def test_a_budget_beats_one_ratio_at_equal_parameters():
    tails, sizes = drawn(3, 10, largest=40, decay=(0.5, 1.0))
    uniform = uniform_ranks(sizes, 0.6, multiple=1)
    found = budget_ranks(tails, sizes, uniform.parameters, multiple=1, least_share=0)
    assert found.parameters <= uniform.parameters
    assert found.error < 0.8 * error_of(uniform, tails)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("multiple", [1, 8])
def test_no_module_keeps_less_than_its_share(share, multiple):
    """One that seems to need nothing keeps the asked part of what one ratio for all would leave it."""
    tails = {"free": tails_of([1.0] + [0.0] * 63), "dear": tails_of([0.97**k for k in range(64)])}
    sizes = {"free": Size.of_matrix(64, 96), "dear": Size.of_matrix(96, 64)}
    budget = int(0.7 * 2 * 64 * 96)
    assert budget_ranks(tails, sizes, budget, multiple, least_share=0)["free"] == multiple
    found = budget_ranks(tails, sizes, budget, multiple, least_share=share)
    assert found["free"] == uniform_ranks(sizes, share * 0.7, multiple)["free"]
    assert found.parameters <= budget


def test_shares_yield_where_ranks_are_few():
    """The least budget that is possible stays possible: small modules at one multiple keep more than their part."""
    tails, sizes = drawn(0, 5)
    least = sum(size.parameters(options(size, 3)[0]) for size in sizes.values())
    found = budget_ranks(tails, sizes, least, 3, least_share=1.0)
    assert found == {name: options(size, 3)[0] for name, size in sizes.items()}


def test_flat_spectra_stay_dense_or_go_to_the_end():
    """Every rank of a flat spectrum saves too little: half the modules stay as they are instead of all at a half."""
    tails = dict.fromkeys("ab", tails_of([1.0] * 16))
    sizes = dict.fromkeys("ab", Size.of_matrix(16, 16))
    found = budget_ranks(tails, sizes, 256 + 64, multiple=2, least_share=0)
    assert sorted(found.items(), key=str) == [("a", None), ("b", 2)]
    assert found.error == 14
    [reason] = found.reasons.values()
    assert reason == ("worth its parameters: rank 6 would save 64 and lose 0.625 of its energy; break-even rank is 8")


def test_rounding_is_no_error_that_parameters_are_spent_on():
    noisy = tails_of([1.0, 1.0] + [0.0] * 14) + 1e-15 * torch.arange(16, -1, -1)
    found = budget_ranks({"a": noisy}, {"a": Size.of_matrix(16, 16)}, 256, multiple=1, least_share=0)
    assert found == {"a": 2}
    assert found.error == 0


def test_tails_may_end_beyond_break_even_and_inputs_stay_as_they_are():
    tails, sizes = drawn(1, 3)
    before = copy.deepcopy(tails)
    short = {name: tail[: sizes[name].largest_rank + 1] for name, tail in tails.items()}
    for budget in (120, 160, 200):
        assert budget_ranks(short, sizes, budget, 1) == budget_ranks(tails, sizes, budget, 1)
    assert all(torch.equal(tails[name], before[name]) for name in tails)
    short["m0"] = short["m0"][:-1]
    with pytest.raises(SettingError, match=r"tails of m0 must have shape \(\d+,\), for rank 0..\d+ \(or at least up"):
        budget_ranks(short, sizes, 200, 1)


def test_many_modules_are_fast():
    """The shapes of a language model of 7 billion parameters."""
    tails = {f"m{n}": tails_of([(0.99 + n / 30_000) ** k for k in range(4096)]) for n in range(210)}
    sizes = {f"m{n}": Size.of_matrix(4096, 11008 if n % 2 else 4096) for n in range(210)}
    dense = sum(size.dense_parameters for size in sizes.values())
    found = budget_ranks(tails, sizes, dense // 2, least_share=0)
    assert 0.999 * (dense // 2) < found.parameters <= dense // 2


def test_the_least_that_is_possible_is_told():
    sizes = {"a": Size.of_matrix(64, 64), "b": Size.of_matrix(1, 64)}
    tails = {"a": tails_of([1.0] * 64), "b": tails_of([1.0])}
    match = (
        r"max_parameters=1,000 can't be reached: at rank 8 everywhere 2 modules keep 1,088 of 4,160 parameters, "
        r"the fewest with a rank_multiple of 8. Allow at least 1,088, take a smaller multiple or include more modules"
    )
    with pytest.raises(BudgetError, match=match):
        budget_ranks(tails, sizes, 1000)
    assert budget_ranks(tails, sizes, 1088) == {"a": 8, "b": None}


SIZES = {"a": Size.of_matrix(8, 8)}
GOOD = {"a": tails_of([1.0] * 8)}


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, math.nan, True, "half", None])
def test_a_ratio_out_of_range(ratio):
    with pytest.raises(SettingError, match=r"rank_ratio must lie between 0 and 1 \(kept / dense parameters\), got"):
        uniform_ranks(SIZES, ratio)


@pytest.mark.parametrize("energy", [0, 1.1, math.nan, True, None])
def test_an_energy_out_of_range(energy):
    with pytest.raises(SettingError, match=r"energy must be in \(0, 1\]"):
        energy_ranks(GOOD, SIZES, energy)


@pytest.mark.parametrize(
    ("tails", "match"),
    [
        ({}, r"must name the same modules, got \[\] and \['a'\]"),
        ({"a": torch.full((9,), math.nan)}, "tails of a have NaN or infinite values"),
        ({"a": torch.full((9,), math.inf)}, "tails of a have NaN or infinite values"),
        ({"a": torch.ones(9, 1)}, r"tails of a must have shape \(9,\)"),
        ({"a": torch.arange(9.0)}, "must fall from the weight's energy at rank 0 to 0 at rank 8"),
        ({"a": torch.ones(9)}, "must fall from the weight's energy"),
        ({"a": -GOOD["a"].flip(0)}, "must fall from the weight's energy"),
    ],
)
def test_tails_that_are_none(tails, match):
    for allocate in (energy_ranks, lambda *args: budget_ranks(*args[:2], 64)):
        with pytest.raises(SettingError, match=match):
            allocate(tails, SIZES, 0.5)


def test_other_settings_out_of_range():
    for call, match in (
        (lambda: uniform_ranks({}, 0.5), "no module to give ranks to"),
        (lambda: uniform_ranks(SIZES, 0.5, 0), "multiple must be a whole number of at least 1, got 0"),
        (lambda: fixed_ranks(SIZES, 2.5), "rank must be a whole number of at least 1, got 2.5"),
        (lambda: budget_ranks(GOOD, SIZES, 64.0), "max_parameters must be a whole number"),
        (lambda: budget_ranks(GOOD, SIZES, 64, weights={"b": 1}), "weights and sizes must name the same modules"),
        (lambda: budget_ranks(GOOD, SIZES, 64, weights={"a": -1}), "The weight of a must be a number of at least 0"),
        (lambda: budget_ranks(GOOD, SIZES, 64, least_share=1.1), r"least_share must be in \[0, 1\], got 1.1"),
        (lambda: Size(0, 1, 1), "sizes must be at least 1"),
    ):
        with pytest.raises(SettingError, match=match):
            call()
