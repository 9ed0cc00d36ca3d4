"""Plots show what the record holds, and none is made of nothing."""

import dataclasses
import struct

import pytest

from cards.records import EVIL, full_report
from hfshrink import CompressionReport
from hfshrink.cards import model_card, write_plots
from hfshrink.cards.plots import layer_values, read_plots, sensitivity_values
from hfshrink.errors import CheckpointError
from hfshrink.record import StepRecord

pytest.importorskip("matplotlib")


def record(**results):
    return CompressionReport("a/b", (StepRecord("prune", "x", results=results),))


def test_files_are_images_and_their_names_stand_in_the_card(tmp_path):
    report = full_report()
    step = StepRecord("factorize", "none", results={"ranks": {f"layer {i} $x$": i + 1 for i in range(100)}})
    report = dataclasses.replace(report, steps=(*report.steps, step))
    plots = write_plots(report, tmp_path / "plots")
    assert [plot["file"] for plot in plots] == ["plots/size-metric.png", "plots/layers-rank.png"]
    assert plots[0]["caption"] == "Size of the weight files against accuracy (org/reviews, test, 2,000 rows)"
    for plot in plots:
        data = (tmp_path / plot["file"]).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert all(100 < side < 5000 for side in struct.unpack(">II", data[16:24]))
    text = model_card(report, plots=plots).content
    assert "](plots/size-metric.png)" in text
    assert "](plots/layers-rank.png)" in text
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["layers-rank.png", "size-metric.png"]


def test_nothing_is_drawn_without_numbers(tmp_path):
    base = dataclasses.replace(full_report().base, size_bytes=None)
    assert write_plots(dataclasses.replace(full_report(), base=base), tmp_path / "plots") == []
    assert write_plots(record(ranks="x", kept=[1], sensitivity=3, plan={"modules": 4}), tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_units_kept_of_all_are_shares():
    assert layer_values(record(kept={"a": [3, 4], "b": [0, 4], "c": [1, 0], "d": "x"})) == {
        "kept share of the units": {"a": 0.75, "b": 0.0}
    }
    assert layer_values(record(kept={"a": 3, "b": True})) == {"kept units": {"a": 3}}


def test_sensitivities_are_the_highest_rise_of_each_place():
    rows = [{"place": "a", "rise": 0.1}, {"place": "a", "rise": 0.3}, {"place": "b", "rise": None}]
    assert sensitivity_values(record(sensitivity={"title": "heads", "rows": rows})) == ("heads", {"a": 0.3})
    plan = {"modules": {"a": {"rise": 0.2, "precision": "4"}}}
    assert sensitivity_values(record(plan=plan)) == ("at the precision chosen", {"a": 0.2})


@pytest.mark.parametrize("text", [EVIL, "$x_{", "\\frac{", "名前", ""])
def test_names_of_modules_are_drawn_as_text(text, tmp_path):
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        assert len(write_plots(record(ranks={text: 3, "b": 2}), tmp_path / "plots")) == 1


@pytest.mark.parametrize(
    "file",
    ["../a.png", "/a.png", "a/../b.png", "https://e.org/a.png", "a.exe", "a b.png", "a.png)", "a.png\n", 3, None],
)
def test_only_images_below_the_card_are_embedded(file):
    assert read_plots([{"file": file, "caption": "x"}]) == []


def test_a_folder_that_can_not_be_written_is_told(tmp_path):
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(CheckpointError, match="Can't write .*layers-rank.png"):
        write_plots(record(ranks={"a": 3}), tmp_path / "plots")
