"""The sparsity at each point of training."""

from itertools import pairwise

import pytest

from hfshrink.errors import SettingError
from hfshrink.pruning.training.schedule import SCHEDULES, sparsity_at

SHARES = [step / 40 for step in range(41)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "cooldown"), [(0.0, 0.0), (0.1, 0.3), (0.3, 0.7), (0.0, 0.9), (0.5, 0.5)])
def test_it_never_falls_and_ends_exactly_at_its_target(schedule, warmup, cooldown):
    how = {"initial_sparsity": 0.2, "warmup": warmup, "cooldown": cooldown}
    values = [sparsity_at(share, 0.9, schedule, **how) for share in SHARES]
    assert all(a <= b + 1e-12 for a, b in pairwise(values))
    assert {value for share, value in zip(SHARES, values, strict=True) if share < warmup} <= {0.2}
    assert {value for share, value in zip(SHARES, values, strict=True) if share >= 1 - cooldown} == {0.9}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cubic", 0.8 - 0.8 * 0.75**3),  # a quarter of the way
        ("linear", 0.2),
        ("one-shot", 0.8),
        ("iterative", 1 - 0.2 ** (1 / 4)),  # the first of 4 jumps; the second comes at a third of the way
    ],
)
def test_a_quarter_of_the_way_by_hand(schedule, expected):
    assert sparsity_at(0.2 + 0.25 * 0.4, 0.8, schedule, warmup=0.2, cooldown=0.4) == pytest.approx(expected)


def test_iterative_jumps_take_the_same_share_of_what_is_left():
    values = sorted({round(sparsity_at(share, 0.9375, "iterative", rounds=4), 9) for share in SHARES})
    assert values == [0.5, 0.75, 0.875, 0.9375]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(SettingError, match="must be one of cubic.*'cosine'"):
        sparsity_at(0.5, 0.5, "cosine")
