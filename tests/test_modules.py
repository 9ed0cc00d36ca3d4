"""Counting tensors: wrapper tensors, such as torchao's, count as what they stand for and weigh their parts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hfshrink
import tiny
from hfshrink.modules import count_parameters, memory_bytes


class Packed(SimpleNamespace):
    """As torchao's: the shape of a float weight, made of codes and scales, and few operators."""

    shape = torch.Size([4, 8])

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def numel(self):
        return self.shape.numel()

    def count_nonzero(self):
        raise NotImplementedError("Packed dispatch: attempting to run an unimplemented operator")

    def dequantize(self):
        return self.codes * self.scale[:, None]


@pytest.fixture
def packed():
    """A model of 32 packed, 3 plain parameters and a buffer; 8 + 3 values are not 0."""
    codes = torch.zeros(4, 8, dtype=torch.int8)
    codes[1] = 5
    weight = Packed(codes=codes, scale=torch.ones(4))
    return SimpleNamespace(parameters=lambda: [weight, torch.ones(3)], buffers=lambda: [torch.zeros(1)])


def test_memory_counts_the_parts_of_tensors_that_stand_for_others(packed):
    assert memory_bytes(packed) == 4 * 8 + 4 * 4 + 4 * 3 + 4
    bert = tiny.model("bert")
    assert memory_bytes(bert) == bert.get_memory_footprint()


def test_parameters_that_are_packed_count_as_their_floats(packed):
    assert count_parameters(packed) == (35, 11)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # torch's own, of saving the wrapper tensors
def test_a_model_of_torchao_is_counted_and_profiled():
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    for kind in (quantization.Int8DynamicActivationInt8WeightConfig, quantization.Int8WeightOnlyConfig):
        model = tiny.model("bert")
        with torch.no_grad():
            model.bert.encoder.layer[0].intermediate.dense.weight[3] = 0
        before, weights = count_parameters(model), sum(m.weight.numel() for m in linears(model))
        dense = memory_bytes(model)
        quantization.quantize_(model, kind())
        found = hfshrink.profile(model, sequence_length=4, batch_sizes=(1,), repeats=1, memory=False)
        assert found.parameters == before[0]
        codes = sum(int((m.weight.qdata == 0).sum()) for m in linears(model))
        assert found.nonzero_parameters == before[1] - codes + model.config.hidden_size
        assert dense - 3 * weights < found.memory_bytes < dense - 2 * weights


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]
