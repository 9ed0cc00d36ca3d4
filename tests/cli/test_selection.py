import json

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from typer.testing import CliRunner

import tiny
from hfshrink.cli import app
from hfshrink.selection.caching import column_digests
from hfshrink.selection.datamap import DataMap
from hfshrink.selection.subset import Subset

CLASSES = np.arange(40) % 2
ROWS = Dataset.from_dict(
    {
        "text": [f"a {'good' if label else 'bad'} film {row}" for row, label in enumerate(CLASSES)],
        "label": CLASSES.tolist(),
        "source": ["forum"] * 38 + ["letter"] * 2,
    }
)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def rows(tmp_path):
    ROWS.save_to_disk(tmp_path / "reviews")
    return tmp_path / "reviews"


@pytest.fixture
def folder(tmp_path):
    """A data map of the rows, in which row 3 loses against class 0 and row 4 a little."""
    aum = np.ones(40)
    aum[3], aum[4] = -2.0, -0.5
    parts = dict.fromkeys(("confidence", "variability", "correctness", "forgetting", "el2n"), np.full(40, 0.5))
    predicted = np.where(aum < 0, 1 - CLASSES, CLASSES)
    found = DataMap(
        **parts,
        aum=aum,
        epochs=(1, 2),
        columns=column_digests(ROWS.select_columns(["text", "label"])),
        labels=CLASSES.astype(np.int64),
        predicted=predicted.astype(np.int64),
        label_names=("negative", "positive"),
    )
    found.save(tmp_path / "run" / "data_map")
    return tmp_path / "run" / "data_map"


@pytest.mark.parametrize("command", ["select", "data-map"])
def test_help_has_an_example(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example: hfshrink {command} " in done.stdout


def test_select_writes_the_subset_and_its_card(rows, tmp_path):
    out = tmp_path / "subset"
    done = run("select", rows, out, "--fraction", 0.25, "--method", "random", "--seed", 3, "--column", "source")
    assert done.exit_code == 0, done.output
    assert "10 of 40 (25 %), seed 3" in done.stdout
    subset = Subset.load(out, ROWS)
    assert len(subset) == 10
    assert subset.report.data == "reviews"
    by = [part["by"] for part in subset.report.details["coverage"]["partitions"]]
    assert {"label", "length (characters)", "source"} <= set(by)
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "indices.npy", "report.json"]
    card = (out / "README.md").read_text()
    assert card.startswith("---\n")
    assert "10 of 40" in card or "10 of the 40" in card
    assert run("select", rows, out, "--fraction", 0.25, "--method", "random").exit_code == 1  # not empty
    assert run("select", rows, out, "--size", 4, "--method", "random", "--overwrite").exit_code == 0
    assert len(Subset.load(out, ROWS)) == 4


def test_select_writes_the_rows_where_asked_to(rows, tmp_path):
    done = run("select", rows, tmp_path / "subset", "--size", 6, "--method", "random", "--rows")
    assert done.exit_code == 0, done.output
    written = load_from_disk(tmp_path / "subset" / "data")
    assert written["text"][:] == Subset.load(tmp_path / "subset", ROWS).dataset["text"][:]


def test_select_with_a_model_a_split_and_options(tmp_path):
    DatasetDict(train=ROWS, test=ROWS.select(range(4))).save_to_disk(tmp_path / "splits")
    tiny.model("bert").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    words = ["select", tmp_path / "splits", tmp_path / "subset", "--fraction", 0.2, "--method", "k-center"]
    words += [
        "--model",
        tmp_path / "model",
        "--split",
        "train",
        "--column",
        "source",
        "--cache-dir",
        tmp_path / "kept",
    ]
    words += ["--held-out", tmp_path / "splits", "--held-out-split", "test", "--option", "normalize=false"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    report = Subset.load(tmp_path / "subset", ROWS).report
    assert report.used == "k-center"
    assert report.settings["normalize"] is False
    assert report.held_out["overlap"] == 4
    assert "4 training rows are in the held-out data too" in done.stdout
    assert report.details["coverage"]["radius"] is not None
    assert list((tmp_path / "kept").glob("*/embeddings.npy"))


def test_select_ranks_by_a_data_map(rows, folder, tmp_path):
    words = ["select", rows, tmp_path / "subset", "--size", 2, "--method", "aum", "--data-map", folder]
    done = run(*words, "--stratify", "none")
    assert done.exit_code == 0, done.output
    assert Subset.load(tmp_path / "subset", ROWS).indices.tolist() == [3, 4]


def test_select_takes_thresholds_and_deduplicates(tmp_path):
    Dataset.from_dict({"text": ["same"] * 20 + [f"row {i}" for i in range(20)], "label": [0, 1] * 20}).save_to_disk(
        tmp_path / "rows"
    )
    words = ["select", tmp_path / "rows", tmp_path / "subset", "--fraction", 0.5, "--method", "random"]
    done = run(*words, "--deduplicate", "true", "--threshold", "min_rows=1", "--threshold", "least_ratio=0.9")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "subset" / "report.json").read_text())
    assert report["duplicates"]["removed"] == 19
    thresholds = report["details"]["coverage"]["thresholds"]
    assert (thresholds["min_rows"], thresholds["least_ratio"]) == (1, 0.9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fraction", 1.5], "fraction must lie in (0, 1]"),
        (["--fraction", 0.5, "--method", "kmeans"], "needs embeddings"),
        (["--fraction", 0.5], "'auto' needs something to judge rows by"),
        (["--fraction", 0.5, "--method", "random", "--deduplicate", "yes"], "--deduplicate must be true, false or"),
        (
            ["--fraction", 0.5, "--method", "random", "--threshold", "rows"],
            "--threshold takes name=value, such as min",
        ),
        (["--fraction", 0.5, "--method", "random", "--threshold", "rows=1"], "thresholds must be Thresholds, or"),
        (["--fraction", 0.5, "--method", "random", "--column", "author"], "There is no column 'author'"),
        (["--fraction", 0.5, "--method", "random", "--held-out", "nowhere"], "Can't read the data set"),
    ],
)
def test_select_leaves_nothing_behind_when_it_fails(rows, tmp_path, words, message):
    before = sorted(tmp_path.iterdir())
    done = run("select", rows, tmp_path / "subset", *words)
    assert done.exit_code == 1
    assert message in str(done.exception)
    assert sorted(tmp_path.iterdir()) == before


def test_data_map_is_summed_up(folder):
    for place in (folder, folder.parent):  # of the map, and of the Trainer
        done = run("data-map", place)
        assert done.exit_code == 0, done.output
        assert "AUM below 0 (likely label errors) | 2" in done.stdout
        assert "predicted" not in done.stdout


def test_data_map_lists_label_errors_with_their_texts(folder, rows):
    done = run("data-map", folder, "--errors", 1, "--data", rows)
    assert done.exit_code == 0, done.output
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "film" in line]
    assert lines == [["3", "positive", "negative", "-2.0", "0.5", "a good film 3 / forum"]]


def test_data_map_exports_all_label_errors_and_plots(folder, tmp_path):
    done = run("data-map", folder, "--plot", tmp_path / "map.png", "--export", tmp_path / "errors.json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "errors.json").read_text())
    assert [(line["row"], line["given"], line["predicted"]) for line in found] == [
        (3, "positive", "negative"),
        (4, "negative", "positive"),
    ]
    assert run("data-map", folder, "--export", tmp_path / "errors.csv", "--errors", 1).exit_code == 0
    text = (tmp_path / "errors.csv").read_text()
    assert text == "row,given,predicted,aum,confidence\n3,positive,negative,-2.0,0.5\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plot", "nowhere/map.png"], "must lie in a folder that exists"),
        (["--plot", "map.gif"], "must end in .png or .svg"),
        (["--export", "errors.txt"], "--export must end in .json or .csv"),
        (["--errors", -1], "top must be a whole number of at least 1"),
    ],
)
def test_data_map_tells_what_is_wrong(folder, words, message):
    done = run("data-map", folder, *words)
    assert done.exit_code == 1
    assert message in str(done.exception)


def test_data_map_of_other_rows_and_no_data_map(folder, tmp_path):
    ROWS.select(range(39, -1, -1)).save_to_disk(tmp_path / "turned")
    done = run("data-map", folder, "--errors", 1, "--data", tmp_path / "turned")
    assert "the rows' order has changed" in str(done.exception)
    assert "Give the folder that the data map was written to" in str(run("data-map", tmp_path).exception)
