"""Single modules made smaller: convolutions, and modules that can't be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convnets
import cuts
import tiny
from hfshrink.checkpoint import layer_map, to_dense
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers.low_rank import LowRankLinear
from hfshrink.loading import load
from hfshrink.pruning.units.cutting import cut_masked, cut_units
from hfshrink.pruning.units.groups import UnitAxis, UnitGroup, find_units, mask_units


class TestConvolutions:
    """Groups by hand: a plain net, with a module that is cut on both sides, a depthwise one and a flattened end."""

    @pytest.fixture
    def network(self) -> nn.Sequential:
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5),
        )  # fmt: skip
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        return net.eval()

    @pytest.fixture
    def groups(self) -> list[UnitGroup]:
        single = torch.arange(6)[:, None]
        writes = tuple(UnitAxis(name, "out", single) for name in ("0", "1", "3", "4"))
        flat = torch.arange(64).view(4, 16)
        return [
            UnitGroup("a", "channels", writes, (UnitAxis("6", "in", single),)),
            UnitGroup(
                "b", "channels", (UnitAxis("6", "out", torch.arange(4)[:, None]),), (UnitAxis("9", "in", flat),)
            ),
        ]

    def test_cut_equals_masked(self, network: nn.Sequential, groups: list[UnitGroup]) -> None:
        kept = {"a": torch.tensor([1, 0, 1, 1, 0, 1]).bool(), "b": torch.tensor([1, 0, 0, 1]).bool()}
        images = torch.randn(2, 3, 4, 4)
        zeroed = copy.deepcopy(network)
        for group in groups:
            mask_units(zeroed, group, kept[group.name])
        assert cut_units(network, groups, kept) == ["0", "1", "3", "4", "6", "9"]
        torch.testing.assert_close(network(images), zeroed(images), atol=1e-5, rtol=1e-5)
        assert [tuple(p.shape) for p in network.parameters() if p.ndim > 1] == [
            (4, 3, 3, 3), (4, 1, 3, 3), (2, 4, 1, 1), (5, 32),
        ]  # fmt: skip
        assert (network[3].in_channels, network[3].out_channels, network[3].groups) == (4, 4, 4)
        assert {type(module) for module in network} == {type(module) for module in zeroed}
        network.train()(images).sum().backward()

    def test_of_a_transformers_model(self, tmp_path: Path) -> None:
        pytest.importorskip("torch_pruning")
        network, images = convnets.model("resnet"), convnets.images()
        kept = {g.name: torch.arange(g.units) % 3 != 0 for g in find_units(network, "channels")}
        small = cuts.masked(network, "channels", kept)
        expected = convnets.logits(small, images)
        assert cut_masked(small, "channels")
        torch.testing.assert_close(convnets.logits(small, images), expected, atol=1e-5, rtol=1e-5)
        small.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        assert layer_map(loaded) == layer_map(small) != {}
        assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        torch.testing.assert_close(convnets.logits(to_dense(loaded), images), expected, atol=1e-5, rtol=1e-5)

    def test_grouped(self, groups: list[UnitGroup], network: nn.Sequential) -> None:
        network[3] = nn.Conv2d(6, 6, 3, groups=2)
        with pytest.raises(
            UnsupportedModelError, match=r"3 is a Conv2d in 2 groups; what can be cut are Linear, Conv"
        ):
            cut_units(network, groups, {"a": torch.arange(6) > 0})

    def test_forward_of_its_own(self, groups: list[UnitGroup], network: nn.Sequential) -> None:
        class Padded(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x)

        network[6] = Padded(6, 4, 1)
        with pytest.raises(UnsupportedModelError, match="6 is a Padded with a forward of its own"):
            cut_units(network, groups, {"a": torch.arange(6) > 0})


class TestBadInput:
    @pytest.fixture
    def network(self) -> Any:
        return tiny.model("bert")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan(self, network: Any, value: float) -> None:
        network.bert.encoder.layer[1].output.dense.weight.data[0, 0] = value
        with pytest.raises(SettingError, match=r"layer.1.output.dense has NaN or infinite weights"):
            cut_units(network, find_units(network, "neurons"), cuts.even_units(network, "neurons"))
        assert network.bert.encoder.layer[0].intermediate.dense.out_features == 24

    def test_low_rank(self, network: Any) -> None:
        dense = network.bert.encoder.layer[0].output.dense
        factored = LowRankLinear.from_dense(dense, torch.ones(16, 1), torch.ones(1, 24))
        groups, kept = find_units(network, "neurons"), cuts.even_units(network, "neurons")
        network.bert.encoder.layer[0].output.dense = factored
        with pytest.raises(SettingError, match=r"output.dense is a LowRankLinear, .* Prune first, and compress then"):
            cut_units(network, groups, kept)

    def test_parametrized(self, network: Any) -> None:
        torch.nn.utils.parametrizations.weight_norm(network.bert.encoder.layer[0].output.dense)
        groups = find_units(tiny.model("bert"), "neurons")
        with pytest.raises(SettingError, match=r"output.dense is wrapped: parametrized"):
            cut_units(network, groups, cuts.even_units(tiny.model("bert"), "neurons"))

    def test_offloaded(self, network: Any) -> None:
        down = network.bert.encoder.layer[0].output.dense
        down.forward = down.forward  # as accelerate's hooks do
        with pytest.raises(SettingError, match=r"output.dense is wrapped: .* offloaded by device_map=.* one device"):
            cut_units(network, find_units(network, "neurons"), cuts.even_units(network, "neurons"))
