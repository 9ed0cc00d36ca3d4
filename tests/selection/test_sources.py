import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hfshrink.errors import SettingError
from hfshrink.selection.caching import column_digests
from hfshrink.selection.datamap import DataMap
from hfshrink.selection.run import select

CLASSES = np.repeat([0, 1, 2], [24, 12, 4])
SCORES = np.random.default_rng(0).random(40)
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
ROWS = Dataset.from_dict({"text": [f"row {i}" for i in range(40)], "label": CLASSES.tolist()}, features=FEATURES)


def data_map(rows=ROWS, **changes):
    parts = dict.fromkeys(("confidence", "variability", "correctness", "aum", "forgetting", "el2n"), SCORES / 2)
    return DataMap(**{**parts, "epochs": (1, 2), "columns": column_digests(rows), "model": "trained", **changes})


FEW = Dataset.from_dict({"text": [f"row {i}" for i in range(8)], "label": [0, 0, 0, 0, 1, 1, 1, 1]})
VECTORS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("method", "sources", "match"),
    [
        ("kmeans", {}, r"needs embeddings. Pass model= \(a model, a folder or a Hub id"),
        ("el2n", {}, "needs scores. Pass scores=, data_map=, or for probes model="),
        ("random", {"scores": np.zeros(8)}, "uses no scores"),
        ("kmeans", {"model": "x", "embeddings": VECTORS}, "Give either model= or embeddings=, got both"),
        ("el2n", {"scores": np.zeros(8), "data_map": "x"}, "Give either scores= or data_map=, got both"),
        ("kmeans", {"embeddings": VECTORS[:5]}, "embeddings must have one vector for each of 8 rows, got 5"),
        ("kmeans", {"embeddings": VECTORS * [1, np.nan, 1]}, "The embedding of row 0 holds NaN or infinity"),
        ("kmeans", {"embeddings": VECTORS.astype(int)}, "embeddings must be real numbers of shape"),
        ("el2n", {"scores": np.zeros(7)}, r"scores must be one number for each of 8 rows, got shape \(7,\)"),
        ("el2n", {"scores": [0, 1, np.nan, 0, 0, 0, 0, 0]}, "The score of row 2 is NaN"),
        ("el2n", {"data_map": 3}, "data_map must be a DataMap, its folder, or probes, got int"),
    ],
)
def test_sources_that_are_missing_or_do_not_fit_are_refused(method, sources, match):
    with pytest.raises(SettingError, match=match):
        select(FEW, 0.5, method, **sources)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (FEW.remove_columns("label"), r"found no label column \(text\).* label_column="),
        (Dataset.from_dict({"label": [0.1] * 8}), "found not two classes, one a row, in 'label'"),
        (Dataset.from_dict({"label": [1] * 8}), "found not two classes"),
    ],
)
def test_probes_without_labels_are_refused(rows, match):
    with pytest.raises(SettingError, match=match):
        select(rows, 0.5, "el2n", embeddings=VECTORS)


def test_equal_labels_alone_do_not_make_the_same_rows():
    other = FEW.map(lambda row: {"sentence": f"another {row['text']}"}, remove_columns="text")
    with pytest.raises(SettingError, match="held_out lacks the columns text"):  # not: the same rows
        select(FEW, 0.5, "random", held_out=other)


def test_held_out_rows_may_not_be_the_training_rows():
    with pytest.raises(SettingError, match="dataset and held_out are the same rows"):
        select(FEW, 0.5, "random", held_out=FEW.select(range(8)))


@pytest.mark.parametrize("name", ["scores", "embeddings"])
def test_arrays_of_the_held_out_length_are_told_so(name):
    given = np.zeros((3, 2), dtype=np.float32) if name == "embeddings" else np.zeros(3)
    with pytest.raises(
        SettingError, match=rf"{name} has as many rows as held_out \(3\), so it seems made on the held"
    ):
        select(FEW, 0.5, "kmeans" if name == "embeddings" else "el2n", held_out=FEW.select(range(3)), **{name: given})


def test_data_map_may_lie_in_a_folder(tmp_path):
    data_map().save(tmp_path)
    assert len(select(ROWS, 0.25, "el2n", data_map=tmp_path)) == 10


def test_data_map_of_other_rows_is_refused():
    changed = ROWS.select([1, 0, *range(2, 40)])
    with pytest.raises(SettingError, match="was made of other rows"):
        select(changed, 0.25, "el2n", data_map=data_map())


def test_scores_of_the_held_out_rows_are_refused():
    test = Dataset.from_dict({"text": [f"test {i}" for i in range(40)], "label": CLASSES.tolist()}, features=FEATURES)
    with pytest.raises(SettingError, match="The data map was made on the held-out rows"):
        select(ROWS, 0.25, "el2n", data_map=data_map(test), held_out=test)
    other = select(test, 0.25, "el2n", scores=SCORES)
    with pytest.raises(SettingError, match="The subset's scores were made on the held-out rows"):
        select(ROWS, 0.25, "el2n", scores=other, held_out=test)
