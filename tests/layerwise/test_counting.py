"""Sums over the inputs of modules against loops, and float32 products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfshrink.errors import SettingError
from hfshrink.layerwise import InputCounter, input_rows
from hfshrink.layerwise.counting import HELD, TOKENS_PER_FEATURE


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


def test_inputs_that_changed_in_place_are_not_taken_for_the_same():
    first, second, x = nn.Linear(3, 1), nn.Linear(3, 1), torch.randn(4, 3)
    with InputCounter({"a": first, "b": second}, "input_gram") as counter, torch.no_grad():
        first(x)
        x.mul_(2)
        second(x)
    torch.testing.assert_close(counter.stats["b"].input_gram, 4 * counter.stats["a"].input_gram)


def test_few_inputs_wait_for_others():
    """However many modules run in a batch, the inputs of all but the last ones are let go."""
    layers = {str(number): nn.Linear(3, 1) for number in range(5)}
    xs = torch.randn(5, 4, 3).unbind()
    with InputCounter(layers, "input_gram") as counter:
        for turn in (0, 1, 2, 3, 4, 0):
            layers[str(turn)](input=xs[turn])
            assert len(counter._waiting) <= HELD
    for turn, x in enumerate(xs):
        times = 2 if turn == 0 else 1
        torch.testing.assert_close(counter.stats[str(turn)].input_gram, times * (x.T @ x).double())


def sample(tokens, features, length):
    """The positions of tokens (batch, length) that a module with so many features counts, by their numbers."""
    layer = nn.Linear(features, 1)
    numbers = torch.zeros(tokens, features)
    numbers[:, 0] = torch.arange(1, tokens + 1)  # G_00 of one token is the square of its number
    counted = []
    with InputCounter({"a": layer}, "input_gram", tokens) as counter:
        for batch in numbers.view(-1, 4, length, features).unbind():
            counter.start(torch.ones(4, length, dtype=torch.bool))
            layer(batch)
            counted.append(next(iter(counter._waiting.values())).rows[:, 0])
    return torch.cat(counted).long() - 1, counter.stats["a"]


@pytest.mark.parametrize("length", [8, 10, 64])
def test_a_sample_is_even_over_all_tokens_and_over_places_in_a_row(length):
    places, stats = sample(12800, 40, length)
    assert stats.tokens == 12800
    assert abs(len(places) - TOKENS_PER_FEATURE * 40) <= 3
    assert torch.equal(places, sample(12800, 40, length)[0])
    assert set(places.diff().tolist()) <= {8, 13, 21, 5}  # the steps of a golden sequence
    starts = int((places % length == 0).sum()) / (12800 / length)
    assert starts == pytest.approx(0.1, abs=0.02)
    numbers = (places + 1).double()
    torch.testing.assert_close(stats.input_gram[0, 0], numbers.square().sum() * 12800 / len(places), rtol=1e-5, atol=0)


def test_a_sample_of_few_tokens_is_all_of_them():
    places, _ = sample(320, 40, 8)
    assert torch.equal(places, torch.arange(320))


def test_a_sample_leaves_padding_out():
    layer, valid = nn.Linear(1, 1), torch.rand(40, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.where(valid, 1.0, 1e6)[..., None]
    with InputCounter({"a": layer}, "input_gram", int(valid.sum())) as counter:
        for some, mask in zip(x.split(4), valid.split(4), strict=True):
            counter.start(mask)
            layer(some)
    assert counter.stats["a"].tokens == int(valid.sum())
    assert counter.stats["a"].input_gram.item() == pytest.approx(int(valid.sum()))


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
