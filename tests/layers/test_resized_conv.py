"""Convolutions and batch norms that lost channels: alone, and saved and loaded inside models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import convnets
from hfshrink.checkpoint import layer_map, set_layers, to_dense
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import empty_layer
from hfshrink.layers.resized_conv import ResizedConv2d
from hfshrink.layers.resized_norm import ResizedBatchNorm2d
from hfshrink.loading import load

ROWS, COLUMNS = torch.tensor([0, 2, 5]), torch.tensor([1, 3])
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "strided": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "no bias": {"kernel_size": 1, "bias": False},
}


def conv(**geometry: Any) -> nn.Conv2d:
    """4 to 6 channels."""
    return nn.Conv2d(4, 6, **{"kernel_size": 3, **geometry})


def depthwise(**geometry: Any) -> nn.Conv2d:
    """6 channels."""
    return nn.Conv2d(6, 6, groups=6, **{"kernel_size": 3, **geometry})


def norm(**settings: Any) -> nn.BatchNorm2d:
    """6 channels."""
    return convnets.shaken(nn.BatchNorm2d(6, **settings))


def resized() -> dict[str, ResizedConv2d | ResizedBatchNorm2d]:
    return {
        "conv": ResizedConv2d.from_dense(conv(), ROWS, COLUMNS),
        "depthwise": ResizedConv2d.from_dense(depthwise(), ROWS),
        "norm": ResizedBatchNorm2d.from_dense(norm(), ROWS),
    }


def maps(channels: int) -> Tensor:
    return torch.randn(2, channels, 9, 8)


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype, name
        assert torch.equal(tensor, other.state_dict()[name]), name


class TestResizedConv2d:
    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_is_the_dense_one_on_what_was_kept(self, geometry: str) -> None:
        dense = conv(**GEOMETRIES[geometry])
        layer = ResizedConv2d.from_dense(dense, ROWS, COLUMNS)
        x = maps(2)
        wide = torch.zeros(2, 4, 9, 8)
        wide[:, COLUMNS] = x
        torch.testing.assert_close(layer(x), dense(wide)[:, ROWS])
        assert layer.weight.shape == (3, 2, *dense.kernel_size)
        assert torch.equal(layer.weight, dense.weight[ROWS][:, COLUMNS])

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    def test_depthwise_keeps_inputs_with_filters(self, geometry: str) -> None:
        dense = depthwise(**GEOMETRIES[geometry])
        layer = ResizedConv2d.from_dense(dense, ROWS)
        x = maps(6)
        torch.testing.assert_close(layer(x[:, ROWS]), dense(x)[:, ROWS])
        assert (layer.groups, layer.in_channels, layer.out_channels) == (3, 3, 3)
        assert layer.dense_shape == tuple(dense.weight.shape)

    def test_one_depthwise_channel_remembers_that_it_is_depthwise(self) -> None:
        layer = ResizedConv2d.from_dense(depthwise(), torch.tensor([4]))
        assert (layer.groups, layer.to_dense().groups) == (1, 6)
        assert empty_layer(layer.spec()).dense_shape == (6, 1, 3, 3)

    @pytest.mark.parametrize("geometry", GEOMETRIES)
    @pytest.mark.parametrize("make", [conv, depthwise])
    def test_to_dense_has_zeros_where_it_was_cut(self, make: Any, geometry: str) -> None:
        dense = make(**GEOMETRIES[geometry])
        columns = COLUMNS if make is conv else None
        again = ResizedConv2d.from_dense(dense, ROWS, columns).to_dense()
        kept = torch.zeros_like(dense.weight)
        if columns is None:
            kept[ROWS] = 1
        else:
            kept[ROWS[:, None], columns] = 1
        assert type(again) is nn.Conv2d
        assert torch.equal(again.weight, dense.weight * kept)
        if dense.bias is not None:
            assert torch.equal(again.bias, dense.bias * torch.isin(torch.arange(6), ROWS))
        dense.load_state_dict(again.state_dict())
        assert torch.equal(again(maps(dense.in_channels).fill_(1)), dense(maps(dense.in_channels).fill_(1)))

    def test_cut_twice_is_cut_once(self) -> None:
        dense = conv()
        first = ResizedConv2d.from_dense(dense, rows=torch.tensor([0, 2, 3, 5]))
        twice = ResizedConv2d.from_dense(first, torch.tensor([0, 1, 3]), COLUMNS)
        assert_same_state(twice, ResizedConv2d.from_dense(dense, ROWS, COLUMNS))
        thin = ResizedConv2d.from_dense(depthwise(), ROWS)
        assert ResizedConv2d.from_dense(thin, torch.tensor([2])).kept()[0].tolist() == [5]

    def test_gradients(self) -> None:
        layer = ResizedConv2d.from_dense(conv(kernel_size=1), ROWS, COLUMNS)
        x = maps(2)
        layer(x).square().sum().backward()
        expected = torch.einsum("bohw,bihw->oi", 2 * layer(x).detach(), x)
        torch.testing.assert_close(layer.weight.grad[:, :, 0, 0], expected)

    def test_modes(self) -> None:
        dense = conv().eval()
        dense.weight.requires_grad_(False)
        layer = ResizedConv2d.from_dense(dense, ROWS)
        for module in (layer, layer.to_dense()):
            assert not module.training
            assert not module.weight.requires_grad
            assert module.bias.requires_grad

    def test_refused(self) -> None:
        class Own(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        with pytest.raises(SettingError, match="Own has a forward of its own"):
            ResizedConv2d.from_dense(Own(4, 6, 3), ROWS)
        with pytest.raises(SettingError, match="4 to 6 channels in 2 groups can't be cut"):
            ResizedConv2d.from_dense(conv(groups=2), ROWS)
        with pytest.raises(SettingError, match="reads the channels that it writes: give rows"):
            ResizedConv2d.from_dense(depthwise(), ROWS, COLUMNS)
        with pytest.raises(SettingError, match=r"Nothing is cut: a convolution of \(6, 4\) channels"):
            ResizedConv2d.from_dense(conv(), torch.arange(6))
        with pytest.raises(SettingError, match=r"columns must lie in 0\.\.3, got 1\.\.4"):
            ResizedConv2d.from_dense(conv(), ROWS, torch.tensor([1, 4]))
        with pytest.raises(SettingError, match="rows is empty"):
            ResizedConv2d.from_dense(conv(), ROWS[:0])

    @pytest.mark.parametrize(
        ("entries", "match"),
        [
            ({"extra": 1}, "needs the entries bias, dense_in_channels, .* got bias, .*extra"),
            ({"in_channels": 0}, r"in_channels must be an integer in 1\.\.2\*\*31, got 0"),
            ({"out_channels": True}, "out_channels must be an integer"),
            ({"out_channels": 6, "in_channels": 4}, "Nothing is cut"),
            ({"in_channels": 5}, r"\(6, 4\) channels \(out, in\) can't be cut to \(3, 5\)"),
            ({"kernel_size": [3, 1025]}, r"kernel_size must be two integers in 1\.\.1024, got \[3, 1025\]"),
            ({"kernel_size": 3}, "kernel_size must be two integers"),
            ({"kernel_size": "same"}, "kernel_size must be two integers"),
            ({"stride": [0, 1]}, "stride must be two integers in 1"),
            ({"dilation": [1.0, 1]}, "dilation must be two integers"),
            ({"padding": "full"}, r"padding must be two integers in 0\.\.1024, or one of same, valid, got full"),
            ({"padding": "same", "stride": [2, 2]}, "padding='same' is not supported for strided"),
            ({"padding_mode": "constant"}, "padding_mode of zeros, reflect, replicate, circular, got .*'constant'"),
            ({"padding_mode": ["zeros"]}, "padding_mode of zeros"),
            ({"depthwise": 1}, "depthwise true or false"),
            ({"depthwise": True}, r"as many filters as input channels, got \(3, 2\) of \(6, 4\)"),
            ({"bias": None}, "bias that is true or false"),
            ({"dense_in_channels": 2**31, "dense_out_channels": 2**31}, "beyond any real model"),
        ],
    )
    def test_spec_from_elsewhere(self, entries: dict[str, Any], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            empty_layer({**resized()["conv"].spec(), **entries})


@pytest.mark.parametrize("name", resized())
class TestBoth:
    def test_spec_survives_json(self, name: str) -> None:
        layer = resized()[name]
        empty = empty_layer(json.loads(json.dumps(layer.spec())))
        assert empty.spec() == layer.spec()
        assert all(tensor.is_meta for tensor in empty.state_dict().values())
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in layer.state_dict().items()}
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in empty.state_dict().items()} == shapes
        assert repr(empty) == repr(layer)

    def test_key_is_loud(self, name: str) -> None:
        layer = resized()[name]
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.to_dense().load_state_dict(layer.state_dict(), strict=False)
        assert layer.dense_shape == tuple(layer.to_dense().weight.shape) != tuple(layer.weight.shape)

    def test_nothing_is_shared_and_nothing_random(self, name: str) -> None:
        layer = resized()[name]
        before = parameters_to_vector(layer.parameters()).clone()
        random = torch.get_rng_state()
        dense = layer.to_dense()
        assert torch.equal(random, torch.get_rng_state())
        with torch.no_grad():
            for tensor in dense.state_dict().values():
                tensor.add_(1)
        assert torch.equal(parameters_to_vector(layer.parameters()), before)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype(self, name: str, dtype: torch.dtype) -> None:
        layer = resized()[name].to(dtype)
        assert {p.dtype for p in (*layer.parameters(), *layer.to_dense().parameters())} == {dtype}
        assert {buffer.dtype for key, buffer in layer.named_buffers() if "kept" in key} == {torch.int32}

    def test_corrupt_index(self, name: str) -> None:
        layer = resized()[name]
        layer.kept_rows[0] = 6
        with pytest.raises(CheckpointError, match=r"corrupt: kept_rows must lie in 0\.\.5"):
            layer.to_dense()


def cut(network: nn.Module) -> nn.Module:
    """Every second filter and batch norm channel gone; what is only stored and loaded need not fit each other."""
    layers: dict[str, Any] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            rows = torch.arange(0, module.out_channels, 2)
            layers[name] = ResizedConv2d.from_dense(module, rows) if len(rows) < module.out_channels else None
        elif isinstance(module, nn.BatchNorm2d):
            layers[name] = ResizedBatchNorm2d.from_dense(module, torch.arange(1, module.num_features, 2))
    set_layers(network, {name: layer for name, layer in layers.items() if layer is not None})
    return network


@pytest.mark.parametrize("family", ["bottleneck", "mobilenet_v2", "efficientnet"])
def test_two_round_trips(family: str, tmp_path: Path) -> None:
    network = cut(convnets.model(family))
    assert {spec["kind"] for spec in layer_map(network).values()} == {"resized_conv2d", "resized_batch_norm2d"}
    for trip in ("first", "second"):
        network.save_pretrained(tmp_path / trip)
        loaded, _ = load(tmp_path / trip)
        assert layer_map(loaded) == layer_map(network)
        assert_same_state(network, loaded)
        assert not loaded.training
        network = loaded
    first, second = (json.loads((tmp_path / trip / "config.json").read_text()) for trip in ("first", "second"))
    assert first["quantization_config"] == second["quantization_config"]


def test_logits_after_loading(tmp_path: Path) -> None:
    """A bottleneck's inner channels cut by hand: same logits when loaded, and when it is dense again."""
    network, batch = convnets.model("bottleneck"), convnets.images()
    block, rows = "resnet.encoder.stages.0.layers.0.layer", torch.tensor([0, 3])
    inner = {part: network.get_submodule(f"{block}.0.{part}") for part in ("convolution", "normalization")}
    after = network.get_submodule(f"{block}.1.convolution")
    set_layers(
        network,
        {
            f"{block}.0.convolution": ResizedConv2d.from_dense(inner["convolution"], rows),
            f"{block}.0.normalization": ResizedBatchNorm2d.from_dense(inner["normalization"], rows),
            f"{block}.1.convolution": ResizedConv2d.from_dense(after, columns=rows),
        },
    )
    expected = convnets.logits(network, batch)
    network.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert torch.equal(convnets.logits(loaded, batch), expected)
    torch.testing.assert_close(convnets.logits(to_dense(loaded), batch), expected, atol=1e-6, rtol=1e-5)
    assert layer_map(loaded) == {}


def test_another_place_is_refused() -> None:
    network = convnets.model("bottleneck")
    with pytest.raises(SettingError, match="Only a Conv2d can be replaced by a ResizedConv2d, got BatchNorm2d"):
        set_layers(network, {"resnet.embedder.embedder.normalization": resized()["conv"]})
    with pytest.raises(SettingError, match=r"of shape \(6, 4, 3, 3\) can't replace one of shape \(8, 3, 7, 7\)"):
        set_layers(network, {"resnet.embedder.embedder.convolution": resized()["conv"]})


@pytest.mark.slow
def test_unregistered_load_fails(tmp_path: Path) -> None:
    """A process that never imports hfshrink must not get a model with random filters."""
    for family in ("bottleneck", "efficientnet"):
        cut(convnets.model(family)).save_pretrained(tmp_path / family)
    program = """
import sys
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    try:
        AutoModelForImageClassification.from_pretrained(folder)
    except RuntimeError as error:
        print("refused", "ismatch" in str(error))
assert "hfshrink" not in sys.modules
"""
    command = [sys.executable, "-c", program, *(str(tmp_path / family) for family in ("bottleneck", "efficientnet"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["refused", "True"] * 2
