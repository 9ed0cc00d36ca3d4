import numpy as np
import pytest
from datasets import Array2D, Dataset, Features, Image, Value

from hfshrink.errors import SettingError
from hfshrink.selection.contents import is_text, row_texts


def test_text_is_taken_as_it_is_and_labels_are_left_out():
    texts = row_texts(Dataset.from_dict({"text": ["one", "two"], "kind": ["a", "b"]}), label_column="kind")
    assert texts.columns == ("text",)
    assert list(texts) == ["one", "two"]
    assert len(texts) == 2


def test_texts_can_be_gone_through_twice():
    texts = row_texts(Dataset.from_dict({"text": ["one", "two"]}))
    assert list(texts) == list(texts)


def test_pairs_stay_apart():
    first, second = row_texts(Dataset.from_dict({"a": ["x y", "x"], "b": ["z", "y z"]}))
    assert " ".join(first.split()) != " ".join(second.split())


def test_lists_of_words_become_a_text():
    assert list(row_texts(Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[0, 1]]}))) == ["a b"]


def test_encoded_rows_are_told_apart_by_their_ids():
    one, two, three = row_texts(Dataset.from_dict({"input_ids": [[1, 2], [1, 2], [2, 1]], "text": ["a", "b", "a"]}))
    assert one == two != three


def test_images_are_told_apart_by_their_content():
    images = [np.full((2, 2, 3), value, dtype=np.uint8) for value in (0, 0, 9)]
    rows = Dataset.from_dict(
        {"photo": images, "label": [0, 1, 0]}, Features({"photo": Image(), "label": Value("int64")})
    )
    one, two, three = row_texts(rows)
    assert one == two != three
    assert not is_text(rows, row_texts(rows))


def test_pixels_are_told_apart():
    rows = Dataset.from_dict(
        {"pixel_values": np.eye(2)[None].repeat(2, 0) * [[[1]], [[2]]]},
        Features({"pixel_values": Array2D((2, 2), "float32")}),
    )
    one, two = row_texts(rows)
    assert one != two
    assert not is_text(rows, row_texts(rows))


def test_rows_without_content_or_with_too_many_texts_can_not_be_compared():
    assert row_texts(Dataset.from_dict({"label": [1, 2]})) is None
    many = Dataset.from_dict({name: ["x"] for name in "abc"})
    assert row_texts(many) is None
    assert list(row_texts(many, ["b"])) == ["x"]
    assert not is_text(many, None)


def test_missing_text_column_is_refused():
    with pytest.raises(SettingError, match="text_columns must be one or two of a, got"):
        row_texts(Dataset.from_dict({"a": ["x"]}), ["b"])
