import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hfshrink.errors import SettingError
from hfshrink.selection.request import Settings, check_settings, read_request, wanted_rows
from hfshrink.selection.sources import Sources

ROWS = Dataset.from_dict({"text": [f"row {i}" for i in range(8)], "label": [0, 0, 0, 0, 1, 1, 1, 1]})
POINTS = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def settings(**changes):
    usual = {"method": "random", "fraction": 0.5, "size": None, "stratify": "label", "deduplicate": None, "seed": 0}
    return Settings(**{**usual, "options": {}, **changes})


def read(dataset=ROWS, sources=None, **changes):
    return read_request(dataset, settings(**changes), sources or Sources())


def test_good_request_is_read():
    request = read()
    assert request.size == 4
    assert request.labels.column == "label"
    assert sorted(request.columns) == ["label", "text"]
    assert next(iter(request.texts)) == "row 0"


@pytest.mark.parametrize(("fraction", "size"), [(0.1, 1), (0.26, 3), (0.999, 10), (1, 10), (1e-9, 1)])
def test_fraction_is_rounded_and_gives_a_row_at_least(fraction, size):
    assert wanted_rows(10, fraction, None) == size


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan"), "half", True])
def test_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(SettingError, match=r"fraction must lie in \(0, 1\], got"):
        wanted_rows(10, fraction, None)


def test_a_count_given_as_fraction_is_told_of_size():
    with pytest.raises(SettingError, match="For a number of rows pass size="):
        wanted_rows(10, 4, None)


@pytest.mark.parametrize("size", [0, 11, -1, 2.5, True])
def test_size_outside_its_range_is_refused(size):
    with pytest.raises(SettingError, match=r"size must be a whole number in 1\.\.10"):
        wanted_rows(10, None, size)


@pytest.mark.parametrize(("fraction", "size"), [(None, None), (0.5, 5)])
def test_exactly_one_of_fraction_and_size_is_taken(fraction, size):
    with pytest.raises(SettingError, match="Give either fraction, in"):
        wanted_rows(10, fraction, size)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "k-centre"}, "got 'k-centre'. Did you mean 'k-center'?"),
        ({"options": {"clusters": 3}}, r"select\(method='random'\) does not know 'clusters'"),
        ({"options": {"epochs": 3}}, "does not know 'epochs'"),
        ({"seed": -1}, "seed must be a whole number from 0 on, got -1"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"deduplicate": 1.5}, r"must be True, False, None or a cosine in \(0, 1\), got 1.5"),
        ({"method": "ccs", "options": {"score": "loss"}}, "score must be one of el2n, grand, forgetting, aum, conf"),
        ({"method": "ccs", "options": {"score": "h-score"}}, "got score='h-score' with method='ccs'"),
        ({"method": "el2n", "options": {"score": "aum"}}, "with one of the methods easy, hard, ccs, auto"),
    ],
)
def test_wrong_settings_are_refused(changes, match):
    with pytest.raises(SettingError, match=match):
        check_settings(settings(**changes))


def test_streaming_data_set_is_refused_with_the_methods_that_would_work():
    with pytest.raises(SettingError, match=r"Take rows first: .*'random' works as it is, .*'kmeans'.*'el2n'.* labels"):
        read(ROWS.to_iterable_dataset())


def test_several_splits_are_refused():
    with pytest.raises(SettingError, match="choose one"):
        read(DatasetDict(train=ROWS))


def test_fewer_rows_than_classes_are_refused():
    with pytest.raises(SettingError, match="size must be at least 2, so that each of the 2 classes keeps an example"):
        read(fraction=None, size=1)
    assert read(fraction=None, size=1, stratify=None).size == 1


def test_test_split_is_noted():
    rows = Dataset.from_dict({"text": ["a", "b"]}, split="test")
    assert any("test split" in note for note in read(rows).notes)


def test_cosine_without_embeddings_is_refused():
    with pytest.raises(SettingError, match=r"deduplicate=0\.9 is a cosine and needs embeddings"):
        read(deduplicate=0.9)
