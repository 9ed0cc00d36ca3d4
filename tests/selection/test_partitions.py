"""Partitions: every row is in one group, named by what it is; ranges by quantiles, crosses by a slow loop."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hfshrink.errors import SettingError
from hfshrink.selection.partitions import (
    cross,
    divide_by_cluster,
    divide_by_column,
    divide_by_label,
    divide_by_length,
    divide_by_number,
    divide_by_values,
)


def rows_of(partition):
    return {
        partition.name(group): np.flatnonzero(partition.codes == group).tolist() for group in range(len(partition))
    }


def test_classes_have_the_names_of_the_data_set():
    features = Features({"label": ClassLabel(names=["bad", "good", "unused"])})
    data = Dataset.from_dict({"label": [1, 0, 1, -1]}, features=features)
    named = {"bad": [1], "good": [0, 2], "missing": [3]}
    assert rows_of(divide_by_label(data)) == named
    assert rows_of(divide_by_label(data, np.array([1, 0, 1, -1]))) == named
    assert rows_of(divide_by_label(data, np.array([0, 0, 1, 1]))) == {"0": [0, 1], "1": [2, 3]}  # other labels
    assert rows_of(divide_by_label(data, ["b", "a", "b", "b"])) == {"a": [1], "b": [0, 2, 3]}


def test_labels_that_are_numbers_are_cut_into_ranges_and_lists_divide_nothing():
    assert rows_of(divide_by_label(Dataset.from_dict({"label": [0.1, 0.2, 0.3, 0.4]}), ranges=2)) == {
        "0.1 to 0.2": [0, 1],
        "0.3 to 0.4": [2, 3],
    }
    assert divide_by_label(Dataset.from_dict({"labels": [[0, 1], [1]]})) is None
    assert divide_by_label(Dataset.from_dict({"text": ["a", "b"]})) is None
    assert len(divide_by_label(Dataset.from_dict({"label": list(range(77))}))) == 77  # many classes are no numbers


def test_columns_of_each_kind():
    data = Dataset.from_dict(
        {
            "source": ["web", None, "book", "web"],
            "spoken": [True, False, None, True],
            "stars": [1, 5, 1, None],
            "price": [0.5, None, float("nan"), 2.5],
            "length": [1, 1, 2, 2],
            "empty": [None, None, None, "x"],
        }
    )
    assert rows_of(divide_by_column(data, "source")) == {"book": [2], "web": [0, 3], "missing": [1]}
    assert rows_of(divide_by_column(data, "spoken")) == {"False": [1], "True": [0, 3], "missing": [2]}
    assert rows_of(divide_by_column(data, "stars")) == {"1": [0, 2], "5": [1], "missing": [3]}
    assert rows_of(divide_by_column(data, "price", 2)) == {"0.5": [0], "2.5": [3], "missing": [1, 2]}
    assert rows_of(divide_by_column(data, "empty")) == {"x": [3], "missing": [0, 1, 2]}
    assert divide_by_column(data, "length").by == "column length"  # not the rows' own length


def test_whole_numbers_of_many_values_are_cut_into_ranges():
    data = Dataset.from_dict({"year": [*range(100), None]}).shuffle(seed=0)
    found = divide_by_column(data, "year", 4)
    assert [found.name(group) for group in range(5)] == ["0 to 24", "25 to 49", "50 to 74", "75 to 99", "missing"]
    years = data["year"]
    assert all(years[row] is None or 25 <= years[row] < 50 for row in rows_of(found)["25 to 49"])


def test_a_text_called_missing_joins_the_missing():
    assert rows_of(divide_by_column(Dataset.from_dict({"a": ["missing", "x", None]}), "a")) == {
        "x": [1],
        "missing": [0, 2],
    }


def test_columns_that_make_no_groups_are_refused():
    data = Dataset.from_dict({"id": [str(n) for n in range(1001)], "tags": [["a"]] * 1001})
    with pytest.raises(SettingError, match="'id' has 1,001 different values, at most 1,000 make groups"):
        divide_by_column(data, "id")
    with pytest.raises(SettingError, match="'tags' must hold one text, number or truth value a row"):
        divide_by_column(data, "tags")
    with pytest.raises(SettingError, match="no column 'source'; the data set has id, tags"):
        divide_by_column(data, "source")


def test_ranges_have_like_numbers_of_rows_and_keep_equal_values_together():
    values = np.random.default_rng(0).normal(size=1000)
    assert np.bincount(divide_by_number("x", values, 4).codes).tolist() == [250] * 4
    assert rows_of(divide_by_number("x", np.array([7.0] * 9 + [8.0]), 4)) == {"7": list(range(9)), "8": [9]}
    assert rows_of(divide_by_number("x", np.full(3, np.nan), 4)) == {"missing": [0, 1, 2]}


def test_lengths_are_characters_words_or_tokens():
    texts = Dataset.from_dict({"text": ["äb", "abcd", "a", None], "label": ["long text"] * 4})
    assert divide_by_length(texts, 2, skip=["label"]).by == "length (characters)"
    assert rows_of(divide_by_length(texts, 2, skip=["label"])) == {"0 to 1": [2, 3], "2 to 4": [0, 1]}
    pairs = Dataset.from_dict({"a": ["x", "xx"], "b": ["y", "yyyy"]})
    assert rows_of(divide_by_length(pairs, 2)) == {"2": [0], "6": [1]}
    words = Dataset.from_dict({"words": [["a"], ["a", "b"]]}, features=Features({"words": Sequence(Value("string"))}))
    assert divide_by_length(words).by == "length (words)"
    assert rows_of(divide_by_length(words, 2)) == {"1": [0], "2": [1]}
    tokens = Dataset.from_dict({"input_ids": [[1, 2, 3], [1]]})
    assert divide_by_length(tokens).by == "length (tokens)"
    assert rows_of(divide_by_length(tokens, 2)) == {"1": [1], "3": [0]}


def test_clusters_are_named_by_their_nearest_row():
    pytest.importorskip("sklearn")
    points = np.array([[0.0], [0.2], [0.4], [9.0], [9.2], [9.4]], dtype=np.float32)
    found = divide_by_cluster(points, 2)
    assert sorted(map(sorted, rows_of(found).values())) == [[0, 1, 2], [3, 4, 5]]
    assert {name.partition(" ")[2] for name in rows_of(found)} == {"(like row 1)", "(like row 4)"}
    assert len(divide_by_cluster(np.ones((3, 2), dtype=np.float32), 3)) == 1  # empty clusters are no groups


def test_crosses_agree_with_a_slow_loop():
    generator = np.random.default_rng(1)
    drawn = [generator.integers(0, 4, 60) for _ in range(3)]
    margins = [divide_by_values(name, values) for name, values in zip("abc", drawn, strict=True)]
    crossed = cross(*margins)
    expected = {}
    for row, values in enumerate(zip(*drawn, strict=True)):
        expected.setdefault(" × ".join(map(str, values)), []).append(row)
    assert rows_of(crossed) == expected
    assert crossed.row_names().tolist() == [" × ".join(map(str, values)) for values in zip(*drawn, strict=True)]
    for factor, margin in enumerate(margins):
        assert (crossed.keys[crossed.codes, factor] == margin.codes).all()
