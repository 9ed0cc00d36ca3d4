import logging

import numpy as np
import pytest
from datasets import Dataset

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection import dangers
from hfshrink.selection.coverage_table import Coverage, Thresholds
from hfshrink.selection.dangers import read_thresholds, summary
from hfshrink.selection.embeddings import embed
from hfshrink.selection.groups import coverage
from hfshrink.selection.probing import train_probes
from hfshrink.selection.run import select
from hfshrink.selection.selection_report import SelectionReport
from tests import tiny

CLASSES = np.arange(60) % 2
ROWS = Dataset.from_dict(
    {
        "text": [f"row {i}" for i in range(60)],
        "label": CLASSES.tolist(),
        "source": ["letter"] * 20 + ["forum"] * 40,
    }
)
POINTS = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
FIRST = {"method": "hard", "stratify": None, "scores": -np.arange(60.0)}


def test_select_tells_what_coverage_tells():
    subset = select(ROWS, 0.25, "herding", embeddings=POINTS, columns=["source"], seed=2)
    found = coverage(ROWS, subset.indices, embeddings=POINTS, columns=["source"], text_columns=["text"], seed=2)
    assert Coverage.from_dict(subset.report.details["coverage"]) == found
    assert SelectionReport.from_dict(subset.report.to_dict()) == subset.report


def test_a_lost_group_is_logged_once_and_shown(caplog):
    with caplog.at_level(logging.WARNING):
        subset = select(ROWS, 0.2, **FIRST, columns="source")
    told = [record for record in caplog.records if "leaves out" in record.getMessage()]
    assert len(told) == 1
    subset_warnings = subset.report.details["coverage"]["warnings"]
    assert subset.indices.max() < 20
    assert any("1 of 2 groups are lost: forum (40 rows)" in text for text in subset_warnings)
    assert all(text in told[0].getMessage() for text in subset_warnings)
    assert "groups lost; " in str(subset)
    assert f"warning: {subset_warnings[0]}" in str(subset)


def test_thresholds_can_be_set_as_a_mapping_or_an_object():
    quiet = {"min_rows": 100, "largest_distance": 1, "significance": 0}
    for given in (quiet, Thresholds(**quiet)):
        found = select(ROWS, 0.2, **FIRST, columns="source", thresholds=given).report
        assert found.details["coverage"]["warnings"] == []
        assert "groups lost; no warnings" in str(found)


def test_coverage_can_be_left_out():
    assert "coverage" not in select(ROWS, 0.2, "random", coverage=False).report.details


def test_many_pairs_are_measured_only_on_demand(monkeypatch):
    monkeypatch.setattr(dangers, "PAIRS", 60 * 15 - 1)
    short = select(ROWS, 0.25, "herding", embeddings=POINTS).report.details["coverage"]
    assert short["radius"] is None
    assert short["notes"] == [
        "clusters and distances: 60 × 15 pairs of rows are more than 899; ask for them with coverage=True."
    ]
    asked = select(ROWS, 0.25, "herding", embeddings=POINTS, coverage=True).report.details["coverage"]
    assert asked["radius"]["measured_rows"] == 60
    assert select(ROWS, 14 / 60, "herding", embeddings=POINTS).report.details["coverage"]["radius"] is not None


def test_the_column_that_was_stratified_by_is_told():
    found = select(ROWS, 0.25, "random", stratify="source").report.details["coverage"]
    assert "source" in [part["by"] for part in found["partitions"]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"thresholds": {"rows": 3}}, "thresholds must be Thresholds, or a mapping of min_rows, least_ratio"),
        ({"thresholds": {"min_rows": -1}}, "The threshold min_rows must be a number from 0"),
        ({"columns": "author"}, "There is no column 'author'; the data set has text, label, source"),
        ({"coverage": "all"}, "coverage must be True, False or None, got 'all'"),
    ],
)
def test_wrong_options_of_the_coverage_are_refused(options, match):
    with pytest.raises(SettingError, match=match):
        select(ROWS, 0.25, "random", **options)


def test_missing_thresholds_are_the_usual_ones():
    assert read_thresholds(None) == Thresholds()


def test_a_record_that_is_no_coverage_is_refused():
    content = select(ROWS, 0.25, "random").report.to_dict()
    for broken in ({"partitions": 3}, {"rows": 1, "size": 1, "partitions": [{"groups": []}]}, "text"):
        with pytest.raises(CheckpointError, match="Expected a record of a subset's coverage"):
            SelectionReport.from_dict({**content, "details": {"coverage": broken}})
    part = {**content["details"]["coverage"]["partitions"][0], "lost_count": "many"}
    with pytest.raises(CheckpointError, match="impossible numbers of groups"):
        SelectionReport.from_dict({**content, "details": {"coverage": {"rows": 2, "size": 1, "partitions": [part]}}})
    assert summary({}) == ("", ())


@pytest.mark.parametrize("named", ["sentiment", "source"])
def test_texts_are_embedded_without_labels_and_metadata(named):
    texts = ["good film", "bad plot", "the cat sings", "a dog eats fish", "great story", "poor dull movie"]
    rows = Dataset.from_dict({"text": texts, named: ["b", "a"] * 3})
    model, tokenizer = tiny.model("bert", "text-classification"), tiny.tokenizer()
    given = {"label_column": named} if named == "sentiment" else {"columns": named}
    subset = select(rows, 0.5, "herding", model=model, processor=tokenizer, deduplicate=True, **given)
    vectors = embed(rows.select_columns("text"), model, tokenizer)
    assert subset.indices.tolist() == (
        select(rows, 0.5, "herding", embeddings=vectors, deduplicate=True, **given).indices.tolist()
    )
    lengths = [part for part in subset.report.details["coverage"]["partitions"] if part["by"] == "length (characters)"]
    assert len(lengths) == 1


def test_probes_of_other_embeddings_or_labels_are_refused():
    probes = train_probes(POINTS, CLASSES, seeds=1, epochs=2)
    assert len(select(ROWS, 0.25, "el2n", embeddings=POINTS, data_map=probes)) == 15
    assert len(select(ROWS, 0.25, "el2n", data_map=probes)) == 15
    with pytest.raises(SettingError, match="made on other embeddings: the data set, its order or the model"):
        select(ROWS, 0.25, "el2n", embeddings=POINTS[::-1].copy(), data_map=probes)
    turned = ROWS.remove_columns("label").add_column("label", (1 - CLASSES).tolist())
    with pytest.raises(SettingError, match="made on other labels"):
        select(turned, 0.25, "el2n", data_map=probes)
