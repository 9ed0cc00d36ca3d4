"""Convolutions as products of thinner ones: each form against the dense layer that it stands for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers import LAYER_KINDS, LowRankConv2d, SeparableConv2d, TuckerConv2d, empty_layer

FORMS = ("low_rank_conv2d", "separable_conv2d", "tucker_conv2d")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "1 x 1": {"kernel_size": 1, "bias": False},
    "a row": {"kernel_size": (1, 5), "padding": (0, 2)},
    "a column": {"kernel_size": (3, 1), "stride": (2, 1)},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "uneven": {"kernel_size": (3, 5), "stride": (2, 3), "padding": (1, 2), "dilation": (2, 1)},
    "same": {"kernel_size": (3, 5), "padding": "same", "dilation": (1, 2)},
    "same, even": {"kernel_size": (2, 4), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "stride": 2},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "stride": (1, 2)},
    "reflect same": {"kernel_size": (2, 3), "padding": "same", "padding_mode": "reflect", "dilation": (3, 1)},
    "replicate": {"kernel_size": (5, 3), "padding": (4, 0), "padding_mode": "replicate", "dilation": (2, 1)},
    "circular": {"kernel_size": 3, "padding": (0, 2), "padding_mode": "circular", "stride": 2},
    "circular, unpadded": {"kernel_size": 3, "padding": "valid", "padding_mode": "circular"},
}


def conv(**geometry: Any) -> nn.Conv2d:
    """4 to 6 channels, in float64."""
    made = nn.Conv2d(4, 6, **{"kernel_size": 3, **geometry}).double()
    if made.bias is not None:
        nn.init.normal_(made.bias)
    return made


def factors(form: str, dense: nn.Conv2d) -> tuple[Tensor, ...]:
    """Random factors of rank 3, Tucker's of 2 and 3, or less where the kernel has no such rank."""
    out, into, height, width = dense.weight.shape
    draw, rank = torch.randn, min(3, out - 1)
    if form == "low_rank_conv2d":
        return draw(out, rank), draw(rank, into, height, width)
    if form == "separable_conv2d":
        return draw(rank, into, height, 1), draw(out, rank, 1, width)
    first = min(2, into)
    return draw(first, into, 1, 1), draw(rank, first, height, width), draw(out, rank, 1, 1)


def factored(form: str, dense: nn.Conv2d | None = None) -> Any:
    dense = conv() if dense is None else dense
    return LAYER_KINDS[form].from_dense(dense, *factors(form, dense))


def slow_kernel(form: str, *given: Tensor) -> Tensor:
    """The kernel, entry by entry."""
    if form == "low_rank_conv2d":
        up, down = given
        return sum(up[:, r, None, None, None] * down[r] for r in range(len(down)))
    if form == "separable_conv2d":
        column, row = given
        return sum(row[:, r][:, None] * column[r] for r in range(len(column)))  # (out, 1, 1, width) · (in, height, 1)
    first, core, last = given
    return sum(
        last[:, s, 0, 0, None, None, None] * first[r, :, 0, 0, None, None] * core[s, r]
        for s in range(len(core))
        for r in range(len(first))
    )


def full_rank_factors(form: str, weight: Tensor) -> tuple[Tensor, ...]:
    """Factors that make just this kernel, without any decomposition."""
    out, into, height, width = weight.shape
    if form == "low_rank_conv2d":  # for at most out - 1 filters that differ
        return torch.eye(out)[:, : out - 1].double(), weight[: out - 1]
    if form == "separable_conv2d" and into * height <= out * width:  # a channel per (input channel, row of pixels)
        column = torch.eye(into * height).double().view(into * height, into, height, 1)
        return column, weight.reshape(out, into * height, 1, width)
    if form == "separable_conv2d":  # a channel per (filter, column of pixels)
        row = torch.eye(out * width).double().view(out * width, out, 1, width).transpose(0, 1)
        return weight.permute(0, 3, 1, 2).reshape(out * width, into, height, 1), row
    return torch.eye(into).double()[..., None, None], weight, torch.eye(out).double()[..., None, None]


def maps() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # as the dense layer says too
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("form", FORMS)
class TestAgainstDense:
    def test_equals_the_composed_kernel(self, form: str, geometry: str) -> None:
        dense, x = conv(**GEOMETRIES[geometry]), maps()
        given = factors(form, dense)
        layer = LAYER_KINDS[form].from_dense(dense, *given)
        dense.weight.data = slow_kernel(form, *(factor.double() for factor in given))
        torch.testing.assert_close(layer(x), dense(x))
        again = layer.to_dense()
        assert type(again) is nn.Conv2d
        torch.testing.assert_close(again.weight, dense.weight)
        assert again.extra_repr() == dense.extra_repr()
        torch.testing.assert_close(again(x), dense(x))

    def test_full_rank_changes_nothing(self, form: str, geometry: str) -> None:
        dense, x = conv(**GEOMETRIES[geometry]), maps()
        if form == "low_rank_conv2d":
            dense.weight.data[-1] = 0  # full rank itself would have the dense shape
        given = full_rank_factors(form, dense.weight.detach())
        if form == "separable_conv2d" and geometry == "a column":
            pytest.skip("full rank of a kernel of width 1 would have the dense shape")
        layer = LAYER_KINDS[form].from_dense(dense, *given)
        torch.testing.assert_close(layer(x), dense(x))
        torch.testing.assert_close(layer.to_dense().weight, dense.weight)

    def test_spec_survives_json(self, form: str, geometry: str) -> None:
        layer = factored(form, conv(**GEOMETRIES[geometry]))
        empty = empty_layer(json.loads(json.dumps(layer.spec())))
        assert type(empty) is type(layer)
        assert empty.spec() == layer.spec()
        assert repr(empty) == repr(layer)
        shapes = {key: tensor.shape for key, tensor in layer.state_dict().items()}
        assert {key: tensor.shape for key, tensor in empty.state_dict().items()} == shapes
        assert all(tensor.is_meta for tensor in empty.state_dict().values())

    def test_key_is_loud(self, form: str, geometry: str) -> None:
        layer = factored(form, conv(**GEOMETRIES[geometry]))
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.to_dense().load_state_dict(layer.state_dict(), strict=False)


@pytest.mark.parametrize("form", FORMS)
class TestEachForm:
    def test_gradients_are_those_of_the_product(self, form: str) -> None:
        """The chain rule by hand: d kernel / d factor is linear, so autograd through the slow kernel agrees."""
        dense, x = conv(padding=1, stride=2), maps()
        layer = factored(form, dense)
        layer(x).square().sum().backward()
        order = {"low_rank_conv2d": ("up", "weight")}.get(form, layer.factors)
        leaves = [getattr(layer, name).detach().clone().requires_grad_() for name in order]
        kernel = slow_kernel(
            form, *(leaf[..., 0, 0] if name == "up" else leaf for name, leaf in zip(order, leaves, strict=True))
        )
        nn.functional.conv2d(x, kernel, dense.bias, 2, 1).square().sum().backward()
        for name, leaf in zip(order, leaves, strict=True):
            torch.testing.assert_close(getattr(layer, name).grad, leaf.grad)
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)

    def test_no_load_can_fit_whatever_the_rank(self, form: str) -> None:
        """No ranks that are allowed give `weight` the dense shape, for any small kernel and number of channels."""
        kind, made = LAYER_KINDS[form], 0
        for out, into in ((1, 1), (2, 2), (3, 2), (2, 3), (4, 4)):
            for kernel in ((1, 1), (1, 2), (2, 1), (2, 2)):
                for ranks in torch.cartesian_prod(*[torch.arange(1, 9)] * len(kind.ranks)).view(-1, len(kind.ranks)):
                    try:
                        layer = kind(into, out, *ranks.tolist(), kernel_size=kernel)
                    except SettingError:
                        continue
                    made += 1
                    assert tuple(layer.weight.shape) != (out, into, *kernel) == layer.dense_shape
        assert made > 20

    def test_modes_devices_and_copies(self, form: str) -> None:
        dense = conv().half()
        dense.weight.requires_grad_(False)
        given, random = factors(form, dense), torch.get_rng_state()
        layer = LAYER_KINDS[form].from_dense(dense.eval(), *given)
        again = layer.to_dense()
        assert torch.equal(random, torch.get_rng_state())
        assert not layer.training
        assert not again.training
        assert {p.dtype for p in (*layer.parameters(), *again.parameters())} == {torch.float16}
        assert not any(getattr(layer, name).requires_grad for name in layer.factors)
        assert layer.bias.requires_grad
        assert not again.weight.requires_grad
        before = parameters_to_vector(layer.parameters()).clone()
        with torch.no_grad():
            for tensor in (*again.parameters(), *dense.parameters(), *given):
                tensor.add_(1)
        assert torch.equal(parameters_to_vector(layer.parameters()), before)

    def test_an_image_without_batch(self, form: str) -> None:
        for mode in ("zeros", "reflect"):
            layer, x = factored(form, conv(padding=1, padding_mode=mode)), maps()
            torch.testing.assert_close(layer(x[0]), layer(x)[0])

    def test_what_code_asks_a_convolution(self, form: str) -> None:
        """MobileNet's padding as TensorFlow has it reads kernel, stride and dilation off the layer."""
        dense = conv(kernel_size=(3, 5), stride=2, padding=(1, 2), dilation=(1, 2))
        layer = factored(form, dense)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        for name in (*names, "padding_mode"):
            assert getattr(layer, name) == getattr(dense, name), name
        assert not isinstance(layer, nn.Conv2d)

    def test_groups_are_refused(self, form: str) -> None:
        with pytest.raises(SettingError, match="groups=2 can't be factored"):
            factored(form, conv(groups=2))

    def test_other_classes_are_refused(self, form: str) -> None:
        class Standardized(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) * 2

        with pytest.raises(SettingError, match="Standardized is computed in a way of its own"):
            factored(form, Standardized(4, 6, 3))
        with pytest.raises(SettingError, match="Expected Conv2d, got Conv1d"):
            LAYER_KINDS[form].from_dense(nn.Conv1d(4, 6, 3), *factors(form, conv()))

    @pytest.mark.parametrize(
        ("entries", "match"),
        [
            ({"extra": 1}, "needs the entries bias, dilation, .* got bias, .*extra"),
            ({"in_channels": 0}, r"in_channels must be an integer in 1\.\.2\*\*31, got 0"),
            ({"out_channels": True}, "out_channels must be an integer"),
            ({"kernel_size": [3, 1025]}, "kernel_size must be two integers"),
            ({"stride": [0, 1]}, "stride must be two integers in 1"),
            ({"padding": "full"}, "padding must be two integers .* got full"),
            ({"padding": "same", "stride": [2, 2]}, "padding='same' is not supported for strided"),
            ({"padding_mode": "constant"}, "padding_mode of zeros, reflect"),
            ({"bias": 1}, "bias that is true or false"),
            ({"in_channels": 2**31, "out_channels": 2**31}, "beyond any real model"),
            ({"in_channels": 2**19, "out_channels": 2**18}, "1,236,950,581,248 weights is beyond any real model"),
            ({"kind": ["low"]}, "Unknown kind"),
        ],
    )
    def test_spec_from_elsewhere(self, form: str, entries: dict[str, Any], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            empty_layer({**factored(form).spec(), **entries})


@pytest.mark.parametrize(
    ("form", "ranks", "match"),
    [
        ("low_rank_conv2d", {"rank": 6}, r"rank must be in 1\.\.5 for a convolution of shape \(6, 4, 3, 3\), got 6"),
        ("separable_conv2d", {"rank": 13}, r"rank must be in 1\.\.12 .* got 13"),
        (
            "separable_conv2d",
            {"rank": 6, "kernel_size": [3, 1]},
            "rank must be other than 6 .* must not have the dense",
        ),
        ("tucker_conv2d", {"in_rank": 5}, r"in_rank must be in 1\.\.4 .* got 5"),
        ("tucker_conv2d", {"out_rank": 7}, r"out_rank must be in 1\.\.6 .* got 7"),
        ("tucker_conv2d", {"in_rank": 4, "out_channels": 4, "kernel_size": [1, 1]}, "in_rank must be other than 4"),
        ("tucker_conv2d", {"in_rank": 0}, "in_rank must be an integer"),
    ],
)
def test_ranks(form: str, ranks: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        empty_layer({**factored(form).spec(), **ranks})


class TestByHand:
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])

    def test_low_rank(self) -> None:
        dense = nn.Conv2d(1, 2, 2)
        dense.bias.data = torch.tensor([1.0, -1.0])
        layer = LowRankConv2d.from_dense(dense, torch.tensor([[2.0], [3.0]]), torch.ones(1, 1, 2, 2))
        assert layer(self.x).flatten().tolist() == [21.0, 29.0]
        assert sum(p.numel() for p in layer.parameters()) == 4 + 2 + 2

    def test_separable(self) -> None:
        dense = nn.Conv2d(1, 1, 2, bias=False)
        column, row = torch.tensor([1.0, 10.0]).view(1, 1, 2, 1), torch.tensor([1.0, 100.0]).view(1, 1, 1, 2)
        layer = SeparableConv2d.from_dense(dense, column, row)
        assert layer(self.x).item() == 1 + 30 + 200 + 4000
        assert layer.to_dense().weight.flatten().tolist() == [1.0, 100.0, 10.0, 1000.0]

    def test_tucker(self) -> None:
        dense = nn.Conv2d(1, 1, 2, bias=False)
        two, kernel = torch.full((1, 1, 1, 1), 2.0), torch.tensor([1.0, 0.0, 0.0, 5.0]).view(1, 1, 2, 2)
        layer = TuckerConv2d.from_dense(dense, two, kernel, 3 * two)
        assert layer(self.x).item() == 2 * 6 * (1 + 20)
        assert layer.to_dense().weight.flatten().tolist() == [12.0, 0.0, 0.0, 60.0]


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("low_rank_conv2d", [(6, 2), (3, 4, 3, 3)]),
        ("low_rank_conv2d", [(6, 2), (2, 4, 3, 1)]),
        ("separable_conv2d", [(2, 4, 3, 1), (6, 2, 3, 1)]),
        ("separable_conv2d", [(2, 4, 3), (6, 2, 1, 3)]),
        ("tucker_conv2d", [(2, 4, 1, 1), (3, 3, 3, 3), (6, 3, 1, 1)]),
        ("tucker_conv2d", [(2, 4), (3, 2, 3, 3), (6, 3)]),
    ],
)
def test_shapes(form: str, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(SettingError, match=r"of shape \(6, 4, 3, 3\) must have shapes \(.*\), \(.*\), got \("):
        LAYER_KINDS[form].from_dense(conv(), *(torch.ones(shape) for shape in shapes))
