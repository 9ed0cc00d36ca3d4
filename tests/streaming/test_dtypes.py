"""The dtype in which a checkpoint would be loaded."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

import tiny
from hfshrink.streaming.dtypes import float_dtypes, is_kept_float32, own_dtype
from hfshrink.streaming.sources import Place, empty_model, find_tensors, weight_files


def place(dtype):
    return Place(Path(), "", torch.Size((2,)), dtype)


def test_the_config_s_dtype_goes_before_that_of_the_files():
    places = {"ids": place("I64"), "weight": place("F16")}
    assert own_dtype(SimpleNamespace(dtype=None), places) == torch.float16
    assert own_dtype(SimpleNamespace(dtype="bfloat16"), places) == torch.bfloat16
    assert own_dtype(SimpleNamespace(dtype=torch.float64), places) == torch.float64
    assert own_dtype(SimpleNamespace(dtype=None), {"ids": place("I64")}) == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_a_loaded_model_has_just_these_dtypes(family, stored, dtype, tmp_path):
    tiny.model(family, "feature-extraction").to(stored).save_pretrained(tmp_path)
    places, _ = find_tensors(weight_files(tmp_path), empty_model(tmp_path))
    expected = AutoModel.from_pretrained(tmp_path, dtype=dtype).state_dict()
    found = float_dtypes(empty_model(tmp_path), places, dtype)
    assert found == {name: tensor.dtype for name, tensor in expected.items() if tensor.is_floating_point()}


def test_families_that_keep_weights_in_float32():
    model = SimpleNamespace(_keep_in_fp32_modules=["wo"], _keep_in_fp32_modules_strict=["gate"])
    assert is_kept_float32(model, "layer.0.wo.weight", torch.float16)
    assert not is_kept_float32(model, "layer.0.wo.weight", torch.bfloat16)
    assert is_kept_float32(model, "layer.0.gate.weight", torch.bfloat16)
    assert not is_kept_float32(model, "layer.0.gate.weight", torch.float32)
    assert not is_kept_float32(model, "layer.0.other.weight", torch.float16)
