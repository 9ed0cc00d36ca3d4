"""Sums over the inputs of modules against loops, and float32 products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfshrink.errors import SettingError
from hfshrink.layerwise import InputCounter, input_rows


@pytest.mark.parametrize("features", [1, 7, 8, 9, 130])
def test_the_gram_matrix_is_that_of_float64(features):
    layer = nn.Linear(features, 1)
    x = torch.randn(5000, features) * torch.logspace(-3, 3, features)  # outlier features, as transformers have them
    with InputCounter({"a": layer}, "input_gram") as counter:
        for part in x.split(700):
            counter.start(None)
            layer(part)
    found, exact = counter.stats["a"].input_gram, x.double().T @ x.double()
    norms = exact.diagonal().sqrt()
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    assert float(((found - exact) / (norms[:, None] * norms)).abs().max()) < 5e-6
    assert counter.stats["a"].tokens == 5000


def test_float64_stays_exact():
    layer, x = nn.Linear(9, 1).double(), torch.randn(50, 9, dtype=torch.float64)
    with InputCounter({"a": layer}, "input_gram") as counter:
        layer(x)
    torch.testing.assert_close(counter.stats["a"].input_gram, x.T @ x, rtol=1e-14, atol=1e-13)


def test_modules_fed_alike_only_sometimes_are_told_apart():
    first, second = nn.Linear(3, 1), nn.Linear(3, 1)
    x, y, z = torch.randn(3, 4, 3)
    with InputCounter({"a": first, "b": second}, "input_gram") as counter:
        for one, other in ((x, x), (y, z)):
            counter.start(None)
            first(one), second(other)
    for name, rows in (("a", torch.cat([x, y])), ("b", torch.cat([x, z]))):
        torch.testing.assert_close(counter.stats[name].input_gram, (rows.T @ rows).double())
        assert counter.stats[name].tokens == 8


def test_inputs_that_change_in_place_later_count_as_they_were():
    layer, x = nn.Linear(3, 1), torch.randn(4, 3)
    before = x.clone()
    with InputCounter({"a": layer}, "input_gram") as counter, torch.no_grad():
        layer(x)
        x.zero_()
    torch.testing.assert_close(counter.stats["a"].input_gram, (before.T @ before).double())


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1},
        {"padding": "same", "kernel_size": (3, 5)},
        {"padding": (2, 1), "padding_mode": "reflect", "stride": 2},
        {"padding": 2, "dilation": 2, "padding_mode": "circular"},
    ],
)
def test_patches_are_what_a_convolution_multiplies(settings):
    conv = nn.Conv2d(3, 5, **{"kernel_size": 3, **settings})
    x = torch.randn(2, 3, 9, 8)
    out = input_rows(conv, x) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(out, conv(x).flatten(2).transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_infinite_inputs_are_refused_by_name():
    layer = nn.Linear(2, 1)
    with (
        pytest.raises(SettingError, match="input of a has NaN or infinite values"),
        InputCounter({"a": layer}, "input_gram"),
    ):
        layer(torch.tensor([[torch.inf, 0.0]]))
    assert not layer._forward_pre_hooks
