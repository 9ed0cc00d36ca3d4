import json

import numpy as np
import pytest
from datasets import Dataset

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.caching import column_digests
from hfshrink.selection.selection_report import SelectionReport
from hfshrink.selection.subset import Subset

FULL = Dataset.from_dict({"text": ["a", "b", "c", "d", "e"], "label": [0, 0, 1, 1, 1]})


def subset(scores=None):
    indices = np.array([1, 2, 4])
    report = SelectionReport("el2n", "el2n", 5, 3, columns=column_digests(FULL), notes=("said",))
    return Subset(FULL.select(indices), indices, scores, report)


@pytest.fixture
def folder(tmp_path):
    subset(np.arange(5.0)).save(tmp_path / "subset")
    return tmp_path / "subset"


def test_saved_and_loaded_subset_is_the_same(folder):
    loaded = Subset.load(folder, FULL)
    assert loaded.indices.tolist() == [1, 2, 4]
    assert loaded.indices.dtype == np.int64
    assert loaded.scores.tolist() == [0, 1, 2, 3, 4]
    assert loaded.report == subset().report
    assert loaded.dataset["text"][:] == ["b", "c", "e"]
    assert len(loaded) == 3
    assert "rows kept" in str(loaded)


def test_scores_are_optional(tmp_path):
    subset().save(tmp_path / "subset")
    assert sorted(file.name for file in (tmp_path / "subset").iterdir()) == ["indices.npy", "report.json"]
    assert Subset.load(tmp_path / "subset", FULL).scores is None


def test_rows_stay_where_they_are():
    mapped = subset().dataset
    assert mapped.data.nbytes == FULL.data.nbytes
    assert mapped._indices is not None


def test_folder_with_files_is_not_overwritten_unasked(folder):
    with pytest.raises(CheckpointError, match="is not empty.*overwrite=True"):
        subset().save(folder)
    subset().save(folder, overwrite=True)
    assert Subset.load(folder, FULL).scores is None


def test_added_column_does_no_harm(folder):
    assert len(Subset.load(folder, FULL.add_column("more", list(range(5))))) == 3


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (FULL.select(range(4)), "The subset was made of 5 rows, the data set has 4"),
        (FULL.select([1, 0, 2, 3, 4]), "the column 'text' or the rows' order has changed"),
        (FULL.rename_columns({"text": "x", "label": "y"}), "made of other rows: no column is the same"),
    ],
)
def test_other_data_set_is_refused(folder, changed, match):
    with pytest.raises(SettingError, match=match):
        Subset.load(folder, changed)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("indices.npy", np.array([1, 1, 4]), r"must hold rising row numbers in 0\.\.4"),
        ("indices.npy", np.array([-1, 2, 4]), r"must hold rising row numbers in 0\.\.4"),
        ("indices.npy", np.array([1, 2, 5]), r"must hold rising row numbers in 0\.\.4"),
        ("indices.npy", np.array([1, 2]), r"must hold 3 numbers, as the report says, got int64 of shape \(2,\)"),
        ("indices.npy", np.array([0.0, 1.0, 2.0]), "must hold 3 numbers, as the report says, got float64"),
        ("scores.npy", np.zeros(3), r"must hold 5 numbers, as the report says, got float64 of shape \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_the_report_are_refused(folder, name, content, match):
    np.save(folder / name, content)
    with pytest.raises(CheckpointError, match=match):
        Subset.load(folder, FULL)


def test_pickled_array_is_refused(folder):
    np.save(folder / "indices.npy", np.array([{}, 1, 2], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"Can't read .*indices\.npy"):
        Subset.load(folder, FULL)


def test_half_written_folder_is_refused(folder):
    (folder / "indices.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        Subset.load(folder, FULL)
    (folder / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"Can't read .*report\.json"):
        Subset.load(folder, FULL)
    (folder / "report.json").unlink()
    with pytest.raises(CheckpointError, match=r"Give the folder that Subset\.save wrote"):
        Subset.load(folder, FULL)


def test_report_of_the_folder_is_checked(folder):
    content = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**content, "size": 9}))
    with pytest.raises(CheckpointError, match="impossible numbers"):
        Subset.load(folder, FULL)
