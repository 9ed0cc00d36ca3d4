"""`executorch-int8`: programs take any batch and length, give nearly the model's answers, and reload."""

import pytest
import torch
from torch import nn
from transformers.exporters import ExportedModel

import tiny
from hfshrink.errors import MissingDependencyError, SettingError
from hfshrink.inputs import random_inputs
from hfshrink.quantization.runtimes.executorch import make_executorch_int8


@pytest.fixture(scope="module")
def runtime():
    pytest.importorskip("torchao")
    return pytest.importorskip("executorch.exir")


@pytest.fixture(scope="module")
def bert(runtime):
    model = tiny.model("bert", num_hidden_layers=1)
    return model, make_executorch_int8(model, tiny.tokenizer(), ["classifier"])


def test_an_encoder_is_int8_close_and_takes_other_shapes(bert):
    model, (exported, changed, results) = bert
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(changed) == linears - {"classifier"}
    assert results == {"samples": 0, "max_batch": 8, "max_length": 34}
    for rows, length in ((1, 5), (5, 19), (8, 32)):
        inputs = random_inputs(model, rows, length, tiny.tokenizer(), 9, pairs=True)
        expected = tiny.logits(model, inputs)
        assert 0 < (exported(**inputs).logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_length_that_memory_is_planned_for_can_be_chosen(runtime):
    model = tiny.model("bert", num_hidden_layers=1)
    exported, _, results = make_executorch_int8(model, None, ["classifier"], max_batch=1, max_length=4)
    assert (results["max_batch"], results["max_length"]) == (1, 4)
    inputs = random_inputs(model, 1, 4)
    expected = tiny.logits(model, inputs)
    assert (exported(**inputs).logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("length", [1, 35])
def test_lengths_that_the_model_has_not(runtime, length):
    with pytest.raises(SettingError, match=f"at least 2 and at most the model's 34 positions, got {length}"):
        make_executorch_int8(tiny.model("bert"), None, [], max_length=length)


def test_the_model_is_left_as_it_was(bert):
    model, (exported, *_) = bert
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert exported.config is not model.config


def test_folders_reload_to_the_same_answers(bert, tmp_path):
    model, (exported, *_) = bert
    exported.save_pretrained(tmp_path)
    inputs = random_inputs(model, 2, 9, tiny.tokenizer())
    assert torch.equal(ExportedModel.from_pretrained(tmp_path)(**inputs).logits, exported(**inputs).logits)


def test_convolutions_are_int8_where_there_is_calibration_data(runtime):
    model = tiny.model("resnet")
    rows = [tiny.inputs("resnet", batch=4, seed=seed) for seed in range(3)]
    exported, changed, results = make_executorch_int8(model, None, ["classifier.1"], calibration=rows)
    assert set(changed) == {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert results["samples"] == 12
    inputs = tiny.inputs("resnet", batch=1, seed=9)
    expected = tiny.logits(model, inputs)
    assert 0 < (exported(**inputs).logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_convolutions_without_calibration_data_are_an_error(runtime):
    with pytest.raises(SettingError, match="no Linear outside .*convolutions need calibration="):
        make_executorch_int8(tiny.model("resnet"), None, ["classifier.1"])


def test_a_missing_package_is_named():
    try:
        import executorch.exir  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"hfshrink\[executorch\]"):
            make_executorch_int8(tiny.model("bert"), None, [])
    else:
        pytest.skip("executorch is installed")
