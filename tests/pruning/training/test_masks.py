"""Hidden weights are zeros whose values are kept aside."""

import torch
from torch import nn

import tiny
from hfshrink.pruning.training.masks import hidden_features, masked_weight, reading_weights
from hfshrink.pruning.units.groups import find_units


def test_what_is_shown_again_has_the_value_it_was_hidden_with():
    mask = masked_weight("w", nn.Parameter(torch.tensor([1.0, -2.0, 3.0])))
    mask.hide(torch.tensor([True, True, False]))
    assert mask.weight.tolist() == [0.0, 0.0, 3.0]
    with torch.no_grad():
        mask.weight += torch.tensor([9.0, 9.0, 1.0])  # an optimizer that moves all
    mask.reapply()
    assert mask.weight.tolist() == [0.0, 0.0, 4.0]
    mask.hide(torch.tensor([False, True, True]))
    assert mask.weight.tolist() == [1.0, 0.0, 0.0]
    assert mask.aside.tolist() == [0.0, -2.0, 4.0]
    assert mask.full().tolist() == [1.0, -2.0, 4.0]


def test_halves_come_back_bit_by_bit():
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = masked_weight("w", nn.Parameter(weight.clone()))
    mask.hide(torch.arange(64) % 2 == 0)
    assert torch.equal(mask.full(), weight)


def test_features_of_units_that_go():
    positions = torch.tensor([[0, 3], [1, 4], [2, 5]])
    hidden = hidden_features(torch.tensor([True, False, True]), positions, 7)
    assert hidden.nonzero().flatten().tolist() == [1, 4]


def test_the_mask_of_a_reader_is_one_row_of_its_inputs():
    model = tiny.model("gpt2")  # Conv1D holds (in, out)
    group = next(group for group in find_units(model, "neurons"))
    [(mask, dim, positions)] = reading_weights(model, group)
    assert mask.hidden.shape[dim] == mask.weight.shape[dim] == positions.numel()
    assert mask.hidden.numel() == positions.numel()
