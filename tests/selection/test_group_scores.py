"""The worst group of predictions: means by hand, intervals that cover, groups that are too small."""

import json

import numpy as np
import pytest

from hfshrink.errors import SettingError
from hfshrink.selection.group_scores import worst_group


def test_means_by_hand_the_worst_first():
    found = worst_group([1, 1, 0, 1, 0, 0], ["a", "a", "a", "b", "b", "c"], min_rows=2)
    assert [(group.name, group.rows) for group in found.groups] == [("b", 2), ("a", 3)]
    assert found.worst.value == 0.5
    assert found.groups[1].value == pytest.approx(2 / 3)
    assert found.mean == 0.5
    assert found.gap == 0
    assert found.small == {"c": 1}
    assert "1 groups of fewer than 2 rows are left out." in str(found)
    assert json.loads(json.dumps(found.to_dict()))["groups"][0]["name"] == "b"


def test_intervals_narrow_with_the_rows_and_a_certain_group_has_none():
    generator = np.random.default_rng(0)
    groups = np.repeat(["small", "large", "sure"], [30, 3000, 30])
    right = np.where(groups == "sure", True, generator.random(3060) < 0.7)
    found = {group.name: group for group in worst_group(right, groups, resamples=300).groups}
    assert (found["sure"].low, found["sure"].high) == (1.0, 1.0)
    widths = {name: group.high - group.low for name, group in found.items()}
    assert 0.15 < widths["small"] < 0.4
    assert widths["large"] == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 3000) ** 0.5, rel=0.2)
    assert found["large"].low < 0.7 < found["large"].high


def test_numbers_are_groups_and_scores_need_not_be_truth_values():
    found = worst_group([0.5, 1.5, -2.0, -4.0], np.array([3, 3, 7, 7]), min_rows=2, resamples=10)
    assert [(group.name, group.value) for group in found.groups] == [("7", -3.0), ("3", 1.0)]
    assert found.gap == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("scores", "groups", "message"),
    [
        ([], [], "one number or truth value for each row, at least one"),
        ([1.0, float("nan")], ["a", "a"], "score of row 1 is nan"),
        ([1, 0, 1], ["a", "b"], r"one for each of the 3 scores, got shape \(2,\)"),
        ([1, 0, 1], ["a", "b", "b"], r"min_rows must be a whole number in 1..2, the rows of the largest of 2 groups"),
        (["yes"], ["a"], "Scores must be one number"),
    ],
)
def test_what_can_not_be_scored_is_refused(scores, groups, message):
    with pytest.raises(SettingError, match=message):
        worst_group(scores, groups, min_rows=5)
