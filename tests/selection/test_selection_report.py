import json

import numpy as np
import pytest

from hfshrink.errors import CheckpointError
from hfshrink.selection.selection_report import ClassShare, SelectionReport, class_shares

REPORT = SelectionReport(
    method="auto",
    used="ccs",
    rows=100,
    size=30,
    seed=3,
    why="because",
    source="arXiv:2210.15809",
    settings={"fraction": 0.3, "strata": 50},
    score="el2n",
    scored_by="probes on embeddings",
    model="some/model",
    data="reviews",
    split="train",
    revision="abc",
    columns={"text": "12"},
    balance=(ClassShare("label", "good", 60, 15), ClassShare("label", "bad", 40, 15)),
    duplicates={"rows": 4, "groups": 3, "conflicting": 1, "removed": 5, "threshold": 0.95},
    held_out={"rows": 20, "overlap": 2, "threshold": None, "first": [1, 2]},
    seconds={"scores": 1.25},
    notes=("look", "again"),
)


def test_report_survives_json():
    assert SelectionReport.from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT


def test_report_is_json_safe_whatever_was_given():
    odd = SelectionReport("random", "random", 2, 1, settings={"a": np.float32(2), "b": float("nan"), "c": (1, object)})
    plain = odd.to_dict()["settings"]
    assert json.loads(json.dumps(plain, allow_nan=False)) == {"a": 2.0, "b": None, "c": [1, "<class 'object'>"]}


def test_fraction_and_distance_of_the_classes():
    assert REPORT.fraction == 0.3
    assert REPORT.balance_distance == pytest.approx(0.1)
    assert SelectionReport("random", "random", 4, 2).balance_distance is None


def test_table_shows_classes_full_against_subset():
    shown = str(REPORT)
    assert "| label  | good  | 60           | 15        | 25.0 %     |" in shown
    for part in ("auto → ccs (arXiv:2210.15809)", "because", "30 of 100 (30 %), seed 3", "total variation 0.1000"):
        assert part in shown
    assert "4 rows; 1 with another label; 5 removed (equal, or cosine above 0.95)" in shown
    assert "note: look" in shown


def test_table_of_many_classes_is_cut():
    many = SelectionReport("random", "random", 60, 30, balance=tuple(ClassShare("x", str(i), 2, 1) for i in range(30)))
    assert "and 10 more" in str(many)


def test_shares_count_each_class():
    shares = class_shares("label", np.array(["b", "a", "b"]), np.array([0]))
    assert shares == (ClassShare("label", "a", 1, 0), ClassShare("label", "b", 2, 1))


def test_class_numbers_without_a_name_stay_numbers():
    assert [share.name for share in class_shares("label", np.array([0, 7]), np.array([0]), ["only"])] == ["0", "7"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 99}, "Expected a selection report of format 1, got 99"),
        ({"method": 3}, "has method='3', which is no method"),
        ({"rows": True}, "has rows='True', which is no rows"),
        ({"rows": 10}, "impossible numbers"),
        ({"balance": [{"column": "label"}]}, "is incomplete"),
        ({"balance": [{"column": "label", "name": "a", "full": 1, "kept": 2}]}, "more rows of a class than there are"),
        ({"balance": [{"column": "label", "name": "a", "full": "1", "kept": 0}]}, "impossible numbers"),
        ({"seconds": {"scores": "long"}}, "impossible numbers"),
        ({"held_out": {"overlap": "many"}}, "impossible numbers"),
    ],
)
def test_reports_from_elsewhere_are_checked(change, match):
    with pytest.raises(CheckpointError, match=match):
        SelectionReport.from_dict({**REPORT.to_dict(), **change})


def test_report_that_is_none_or_incomplete_is_refused():
    with pytest.raises(CheckpointError, match="got 'list'"):
        SelectionReport.from_dict([])
    with pytest.raises(CheckpointError, match="is incomplete"):
        SelectionReport.from_dict({"format_version": 1})
