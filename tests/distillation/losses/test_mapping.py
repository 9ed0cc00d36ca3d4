"""Which layer is matched with which."""

import math
from itertools import combinations

import pytest
import torch

from hfshrink.distillation.losses.mapping import find_layer, map_layers, match_rising, teaching_layers
from hfshrink.errors import SettingError


def test_uniform_map_is_tinyberts():
    # TinyBERT4 learns from layers 3, 6, 9, 12 of BERT-base, TinyBERT6 from 2, 4, …, 12 (counted from 1)
    assert map_layers(4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert list(map_layers(6, 12).values()) == [1, 3, 5, 7, 9, 11]


def test_skip_and_last_maps_are_pkds():
    # PKD6 from BERT-base: skip {2, 4, 6, 8, 10}, last {7, 8, 9, 10, 11} (counted from 1)
    assert map_layers(6, 12, "skip") == {0: 1, 1: 3, 2: 5, 3: 7, 4: 9}
    assert map_layers(6, 12, "last") == {0: 6, 1: 7, 2: 8, 3: 9, 4: 10}


@pytest.mark.parametrize("layers", ["uniform", "skip", "last"])
def test_equal_depths_match_layer_by_layer(layers):
    mapping = map_layers(5, 5, layers)
    assert mapping == {i: i for i in range(len(mapping))}
    assert len(mapping) == (5 if layers == "uniform" else 4)


def test_every_map_rises_and_stays_inside_the_teacher():
    for teacher in range(1, 30):
        for student in range(1, teacher + 1):
            values = list(map_layers(student, teacher).values())
            assert values[-1] == teacher - 1
            assert values == sorted(set(values))
            assert values[0] >= 0
            # never more than half a layer from TinyBERT's line
            assert all(abs(v + 1 - (i + 1) * teacher / student) <= 0.5 for i, v in enumerate(values))


def test_explicit_pairs_may_count_from_the_end():
    assert map_layers(3, 12, {0: 0, -1: -1, 1: 6}) == {0: 0, 2: 11, 1: 6}
    assert find_layer(-12, 12, "teacher") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 2), "student has 4 layers, the teacher only 2.*uniform"),
        ((1, 6, "skip"), "student has only one .the teacher 6"),
        ((2, 6, "every"), "layers must be one of uniform, skip, last or a mapping, got 'every'"),
        ((2, 6, "nearest"), 'got .nearest.. Only HiddenLoss takes "nearest"'),
        ((2, 6, {}), "at least one pair.*got {}"),
        ((2, 6, [1, 2]), "or name at least one pair"),
        ((2, 6, {2: 0}), r"student has 2 layers, 0\.\.1 .*got layer 2"),
        ((2, 6, {0: 6}), r"teacher has 6 layers, 0\.\.5 .*got layer 6"),
        ((2, 6, {"0": 1}), "got layer '0'"),
        ((2, 6, {True: 1}), "got layer True"),
        ((2, 6, {1: 1, -1: 2}), "names the student's layer 1 twice"),
    ],
)
def test_maps_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        map_layers(*arguments)


def test_every_third_of_twelve_layers_teaches_as_in_cofi():
    assert teaching_layers(12, 12) == (2, 5, 8, 11)  # 3, 6, 9, 12 counted from 1


def test_layers_that_teach_are_spread_evenly_and_end_with_the_last():
    for teacher in range(1, 30):
        for student in range(1, 15):
            layers = teaching_layers(student, teacher)
            assert len(layers) == min(4, student, teacher)
            assert layers[-1] == teacher - 1
            steps = [b - a for a, b in zip((-1, *layers), layers, strict=False)]
            assert min(steps) >= 1
            assert max(steps) - min(steps) <= 1


def every_rising_match(distances):
    """Total distance of each match that there is, by trying all."""
    depth, count = len(distances), len(distances[0])
    return {
        match: math.fsum(distances[i][j] for j, i in enumerate(match)) for match in combinations(range(depth), count)
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [4, 5, 8])
def test_the_rising_match_is_the_least_of_all(depth, count):
    for seed in range(30):
        distances = torch.rand(depth, count, generator=torch.Generator().manual_seed(seed)).tolist()
        totals = every_rising_match(distances)
        assert match_rising(distances) == min(totals, key=totals.get)


def test_where_the_nearest_layers_cross_the_order_wins():
    distances = [[5.0, 0.0], [4.0, 3.0], [0.0, 9.0]]  # alone, the first would take layer 2 and the second layer 0
    assert match_rising(distances) == (0, 1)  # 5 + 3, where (0, 2) costs 5 + 9 and (1, 2) 4 + 9


def test_of_equal_matches_the_lower_layers_are_taken():
    assert match_rising([[1.0], [1.0], [1.0]]) == (0,)
    assert match_rising([[0.0, 2.0], [0.0, 2.0], [3.0, 2.0], [3.0, 2.0]]) == (0, 1)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_still_gives_a_rising_match(number):
    for broken in range(5):
        distances = [[number if i >= broken else 1.0] * 3 for i in range(5)]
        match = match_rising(distances)
        assert len(match) == 3
        assert list(match) == sorted(set(match))


def test_a_rising_match_needs_enough_layers():
    with pytest.raises(SettingError, match="student has 2 layers, too few to match 3 layers"):
        match_rising([[1.0] * 3] * 2)
