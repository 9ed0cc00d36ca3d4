"""Batch norms that lost channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convnets
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import empty_layer
from hfshrink.layers.resized_norm import ResizedBatchNorm2d

ROWS = torch.tensor([0, 2, 5])


def norm(**settings: Any) -> nn.BatchNorm2d:
    """6 channels, with a scale, a bias and statistics of seven batches."""
    return convnets.shaken(nn.BatchNorm2d(6, **settings))


def maps() -> Tensor:
    return torch.randn(2, 6, 5, 4)


def test_is_the_dense_one_on_what_was_kept() -> None:
    dense = norm(eps=1e-3, momentum=0.2)
    layer = ResizedBatchNorm2d.from_dense(dense, ROWS)
    x = maps()
    torch.testing.assert_close(layer(x[:, ROWS]), dense(x)[:, ROWS])
    for module in (layer, dense):
        module.train()
    torch.testing.assert_close(layer(x[:, ROWS]), dense(x)[:, ROWS])
    torch.testing.assert_close(layer.running_var, dense.running_var[ROWS])  # of eight batches, the last with 0.2
    torch.testing.assert_close(layer.running_mean, dense.running_mean[ROWS])
    assert layer.num_batches_tracked == dense.num_batches_tracked == 8


def test_to_dense_gives_zero_where_it_was_cut() -> None:
    dense = norm(eps=1e-3, momentum=None)
    again = ResizedBatchNorm2d.from_dense(dense, ROWS).to_dense()
    cut = [1, 3, 4]
    assert type(again) is nn.BatchNorm2d
    assert again.running_var[cut].tolist() == [1.0] * 3
    assert not again(maps())[:, cut].any()
    assert torch.equal(again.running_var[ROWS], dense.running_var[ROWS])
    assert (again.eps, again.momentum, int(again.num_batches_tracked)) == (1e-3, None, 7)
    x = maps()
    assert torch.equal(again(x)[:, ROWS], dense(x)[:, ROWS])


def test_cut_twice_is_cut_once() -> None:
    dense = norm()
    first = ResizedBatchNorm2d.from_dense(dense, torch.tensor([0, 2, 3, 5]))
    twice = ResizedBatchNorm2d.from_dense(first, torch.tensor([0, 1, 3]))
    once = ResizedBatchNorm2d.from_dense(dense, ROWS)
    assert list(twice.state_dict()) == list(once.state_dict())
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())


def test_refused() -> None:
    with pytest.raises(SettingError, match="SyncBatchNorm has a forward of its own"):
        ResizedBatchNorm2d.from_dense(nn.SyncBatchNorm(6), ROWS)
    with pytest.raises(SettingError, match="affine=False and track_running_stats=True"):
        ResizedBatchNorm2d.from_dense(nn.BatchNorm2d(6, affine=False), ROWS)
    with pytest.raises(SettingError, match="track_running_stats=False"):
        ResizedBatchNorm2d.from_dense(nn.BatchNorm2d(6, track_running_stats=False), ROWS)
    with pytest.raises(SettingError, match="a batch norm of 6 channels keeps all"):
        ResizedBatchNorm2d.from_dense(norm(), torch.arange(6))
    with pytest.raises(SettingError, match="must rise without repeats"):
        ResizedBatchNorm2d.from_dense(norm(), torch.tensor([2, 0]))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"extra": 1}, "needs the entries bias, dense_num_features, eps, .*extra"),
        ({"num_features": 6}, r"of 6 channels can be cut to 1\.\.5, got 6"),
        ({"num_features": -1}, "num_features must be an integer"),
        ({"eps": float("nan")}, "finite eps of 0 or more .* got nan"),
        ({"eps": "1e-5"}, "finite eps"),
        ({"eps": True}, "finite eps"),
        ({"momentum": float("inf")}, "momentum in 0..1 or null, got .* inf"),
        ({"eps": 10**400}, "finite eps of 0 or more .* got 1000"),  # JSON may hold it, no float does
        ({"momentum": -0.1}, "momentum in 0..1"),
        ({"bias": False}, "always has a bias"),
    ],
)
def test_spec_from_elsewhere(entries: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**ResizedBatchNorm2d.from_dense(norm(), ROWS).spec(), **entries})
