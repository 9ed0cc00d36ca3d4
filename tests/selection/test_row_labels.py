import logging

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hfshrink.errors import SettingError
from hfshrink.selection.row_labels import read_labels


def read(columns, stratify="label", label_column=None, features=None):
    notes = []
    return read_labels(Dataset.from_dict(columns, features=features), stratify, label_column, notes), notes


def test_label_means_the_label_column_whatever_its_name():
    labels, notes = read({"text": ["a", "b", "c", "d"], "labels": [0, 1, 1, 0]})
    assert (labels.column, labels.strata_column) == ("labels", "labels")
    assert labels.strata is labels.values
    assert labels.can_be_learnt
    assert notes == []


def test_named_column_is_stratified_by_and_the_labels_are_still_found():
    labels, _ = read({"source": ["x", "y", "x", "y"], "label": [0, 1, 1, 0]}, "source")
    assert labels.strata.tolist() == ["x", "y", "x", "y"]
    assert labels.values.tolist() == [0, 1, 1, 0]


def test_none_switches_groups_off():
    labels, _ = read({"label": [0, 0, 1, 1]}, None)
    assert labels.strata is None
    assert labels.values is not None


def test_label_column_can_be_named():
    labels, _ = read({"topic": ["a", "a", "b", "b"]}, label_column="topic")
    assert labels.strata.tolist() == ["a", "a", "b", "b"]


def test_rows_without_labels_are_taken_alike_and_the_reader_is_told():
    labels, notes = read({"text": ["a", "b"]})
    assert labels.strata is None
    assert "No label column was found" in notes[0]


def test_real_numbers_are_no_classes():
    labels, notes = read({"label": [0.5, 1.5]})
    assert labels.strata is None
    assert not labels.can_be_learnt
    assert "has no classes" in notes[0]


def test_one_class_can_not_be_learnt():
    labels, _ = read({"label": [1, 1]})
    assert not labels.can_be_learnt


def test_rows_of_tags_are_grouped_by_their_rarest():
    tags = [[0, 0, 1], [0, -100], [0, 2, 1], [0, 2], [0, 1, 1], []]
    features = Features({"ner_tags": List(ClassLabel(names=["O", "PER", "LOC"]))})
    labels, _ = read({"ner_tags": tags}, features=features)
    assert labels.values is None
    assert labels.strata.tolist() == ["PER", "O", "LOC", "LOC", "PER", ""]


def test_a_language_models_own_tokens_are_no_tags():
    ids = [[1, 2], [2, 3]]
    labels, notes = read({"input_ids": ids, "labels": ids})
    assert labels.strata is None
    assert "has no classes" in notes[0]


def test_class_with_one_row_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        _, notes = read({"label": ["a", "a", "rare"]})
    assert "Classes with one row only" in notes[0]
    assert "rare" in caplog.text


@pytest.mark.parametrize(
    ("columns", "stratify", "features", "match"),
    [
        ({"label": [0, 1]}, "source", None, "There is no column 'source'; the data set has label"),
        (
            {"label": [0, 1], "x": [0.5, 1.5]},
            "x",
            None,
            "stratify='x' must name a column with one class or name a row",
        ),
        ({"label": [0, None]}, "label", Features({"label": Value("int64")}), "The column 'label': A label is missing"),
    ],
)
def test_columns_that_can_not_serve_are_refused(columns, stratify, features, match):
    with pytest.raises(SettingError, match=match):
        read(columns, stratify, features=features)
