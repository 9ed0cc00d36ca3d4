"""Keywords of `factorize` that can't work are refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from hfshrink import report
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.factorization.request import Request
from hfshrink.factorization.run import factorize

NOWHERE = "/no/such/folder"  # every error here comes before it is looked for
ROWS = [tiny.inputs("bert")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Give exactly one of rank_ratio, rank, energy, .*, got none of them"),
        ({"rank_ratio": 0.5, "rank": 4}, "Give exactly one of .*, got rank_ratio and rank"),
        ({"rank_ratio": 0.0}, r"rank_ratio must lie between 0 and 1 \(kept / dense parameters\), got 0.0"),
        ({"rank_ratio": 1}, "rank_ratio must lie between 0 and 1 .*, got 1"),
        ({"rank_ratio": True}, "rank_ratio must lie between 0 and 1 .*, got True"),
        ({"rank_ratio": "half"}, "rank_ratio must lie between 0 and 1 .*, got 'half'"),
        ({"energy": 1.5}, "energy must lie between 0 and 1 .*, got 1.5"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"max_parameters": -1}, "max_parameters must be a whole number of at least 1, got -1"),
        ({"max_size_bytes": "1MB"}, "max_size_bytes must be a whole number of at least 1, got '1MB'"),
        ({"max_drop": -0.1}, "max_drop must be a number of at least 0, such as 0.01, got -0.1"),
        ({"max_drop": 0.01}, "max_drop needs labelled rows in calibration="),
        ({"max_drop": 0.1, "calibration": ROWS, "update_inputs": True}, "max_drop measures factors that it keeps"),
        ({"rank_ratio": 0.5, "metric": "accuracy"}, "metric= belongs to max_drop="),
        ({"rank_ratio": 0.5, "rank_multiple": 0}, "rank_multiple must be a whole number of at least 1, got 0"),
        ({"rank_ratio": 0.5, "form": "cp"}, "form must be one of channel, separable, tucker, got 'cp'"),
        ({"energy": 0.5, "form": "tucker"}, "The form 'tucker' has two ranks a layer: give rank_ratio, got energy"),
        ({"rank_ratio": 0.5, "weighting": "svd"}, "weighting must be one of none, fisher, activation, .*, got 'svd'"),
        ({"rank_ratio": 0.5, "weighting": "fisher"}, "weighting='fisher' needs data: give calibration="),
        ({"rank_ratio": 0.5, "update_inputs": True}, "which weighting='none' does not read"),
        ({"rank_ratio": 0.5, "update_inputs": True, "weighting": "fisher", "calibration": ROWS}, "'fisher' does not"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(SettingError, match=message):
        factorize(NOWHERE, **settings)


def test_folders_that_cannot_be_written(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path / "model")
    with pytest.raises(SettingError, match="holds the model that is read"):
        factorize(tmp_path / "model", 0.5, output_dir=tmp_path / "model", overwrite=True)
    with pytest.raises(CheckpointError, match="overwrite"):
        factorize(NOWHERE, 0.5, output_dir=tmp_path / "model")
    with pytest.raises(CheckpointError, match="There is no folder"):
        factorize(NOWHERE, 0.5)


def test_models_that_cannot_be_factored():
    from torch import nn
    from transformers import BertConfig

    with pytest.raises(SettingError, match="Expected a transformers model, .*, got Sequential"):
        factorize(nn.Sequential(nn.Linear(8, 8)), 0.5)
    export = type("ExportedModel", (), {"config": BertConfig(), "components": {}})()
    with pytest.raises(UnsupportedModelError, match="A ExportedModel can't be factored: its weights lie in a graph"):
        factorize(export, 0.5)
    model = tiny.model("bert")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(SettingError, match="quantized by bitsandbytes"):
        factorize(model, 0.5)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny.model("bert").save_pretrained(tmp_path / "model")
    made = factorize("~/model", 0.5, rank_multiple=1, output_dir=Path("~/small"))
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert made == tmp_path / "small"
    assert report(made).steps[-1].technique == "factorize"


def test_metrics_of_any_form_have_names_for_the_record():
    class Kind:
        def compute(self, predictions, references):
            return {}

    def own(predictions, references):
        return 0.0

    how = ["fisher", ROWS, "channel", False, 8, "*", None, None, False]
    for metric, title in (("f1", "f1"), (own, "own"), (Kind(), "Kind"), (["f1", own], ["f1", "own"])):
        request = Request(NOWHERE, None, None, None, None, None, 0.01, metric, *how)
        assert json.loads(json.dumps(request.settings))["metric"] == title
