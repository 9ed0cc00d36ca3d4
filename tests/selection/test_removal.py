import logging

import numpy as np
import pytest
from datasets import Dataset

from hfshrink.errors import SettingError
from hfshrink.selection.removal import refilled
from hfshrink.selection.run import select
from tests import tiny

TEXTS = ["the cat", "The  CAT", "a dog", "a bird", "fish", "red sun", "a dog", "blue"]
ROWS = Dataset.from_dict({"text": TEXTS, "label": [0, 0, 0, 0, 1, 1, 1, 1]})
POINTS = np.eye(8, dtype=np.float32)
POINTS[5] = POINTS[4] + 0.01 * POINTS[5]  # near-duplicates
NEAR = POINTS


def test_equal_rows_are_counted_and_stay_where_nothing_is_said():
    subset = select(ROWS, 1.0, "random")
    assert len(subset) == 8
    assert subset.report.duplicates == {"rows": 2, "groups": 2, "conflicting": 1}
    assert "2 rows; 1 with another label; none removed" in str(subset)


def test_equal_rows_are_removed_on_demand():
    subset = select(ROWS, 1.0, "random", deduplicate=True)
    assert subset.indices.tolist() == [0, 2, 3, 4, 5, 7]
    assert subset.report.duplicates["removed"] == 2
    assert subset.report.duplicates["threshold"] is None


def test_near_rows_are_removed_where_there_are_embeddings():
    subset = select(ROWS, 1.0, "random", deduplicate=True, embeddings=NEAR)
    assert len(subset) == 5
    assert len({4, 5} & set(subset.indices.tolist())) == 1
    assert subset.report.duplicates["threshold"] == 0.95


def test_threshold_can_be_named():
    assert len(select(ROWS, 1.0, "random", deduplicate=0.99999, embeddings=NEAR)) == 6


def test_false_keeps_duplicates_even_of_auto():
    scores = np.linspace(0, 1, 8)
    assert (
        select(ROWS, 0.5, scores=scores, embeddings=NEAR, deduplicate=False).report.duplicates.get("removed") is None
    )
    assert select(ROWS, 0.5, scores=scores, embeddings=NEAR).report.duplicates["removed"] == 2


def test_no_removed_row_is_picked():
    scores = np.linspace(0, 1, 8)
    subset = select(ROWS, 0.5, "hard", scores=scores, deduplicate=True)
    assert not {1, 6} & set(subset.indices.tolist())
    assert subset.scores.tolist() == scores.tolist()
    coreset = select(ROWS, 0.5, "herding", embeddings=NEAR, deduplicate=True)
    assert not {1, 6} & set(coreset.indices.tolist())


def test_size_beyond_what_is_left_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        subset = select(ROWS, 0.9, "random", deduplicate=True)
    assert len(subset) == 6
    assert "Only 6 rows are left without duplicates; 7 were asked for" in caplog.text


def test_class_that_duplicates_empty_is_warned_of(caplog):
    rows = Dataset.from_dict({"text": ["a", "b", "c", "a"], "label": [0, 0, 0, 1]})
    with caplog.at_level(logging.WARNING):
        subset = select(rows, 0.5, "random", deduplicate=True)
    assert "Every row of 1 is a duplicate" in caplog.text
    assert len(subset) == 2


def test_rows_that_can_not_be_compared_are_noted():
    subset = select(Dataset.from_dict({"label": [0, 1] * 3}), 0.5, "random", deduplicate=True)
    assert len(subset) == 3
    assert any("equal rows were not counted" in note for note in subset.report.notes)


def test_training_rows_among_the_held_out_are_reported(caplog):
    test = Dataset.from_dict({"text": ["Fish", "other"], "label": [1, 0]})
    with caplog.at_level(logging.WARNING):
        subset = select(ROWS, 0.5, "random", held_out=test)
    assert subset.report.held_out == {"rows": 2, "overlap": 1, "threshold": None, "first": [4]}
    assert "1 training rows are in the held-out data too" in caplog.text


def test_near_held_out_rows_are_found_by_the_model():
    test = Dataset.from_dict({"text": ["fish very"]})
    model, tokenizer = tiny.model("bert"), tiny.tokenizer()
    given = {"model": model, "processor": tokenizer, "deduplicate": 0.2, "held_out": test}
    assert select(ROWS, 0.5, "random", **given).report.held_out["overlap"] >= 1
    assert select(ROWS, 0.5, "random", **{**given, "deduplicate": None}).report.held_out["overlap"] == 0


def test_held_out_data_without_the_columns_is_refused():
    with pytest.raises(SettingError, match="held_out lacks the columns text of the data set; it has words"):
        select(ROWS, 0.5, "random", held_out=Dataset.from_dict({"words": ["a"]}))


def test_removed_rows_come_back_as_far_as_they_are_needed():
    kept, others = np.array([0, 5]), np.array([0, 1, 2, 5])
    assert refilled(kept, others, 2, 0).tolist() == [0, 5]
    assert refilled(kept, others, 9, 0).tolist() == [0, 1, 2, 5]
    assert len(refilled(kept, others, 3, 0)) == 3
