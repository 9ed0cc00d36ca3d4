"""A Conv2d as two or three thinner convolutions: channels, separable, Tucker-2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import check_forward, copied, empty_parameter, placed
from hfshrink.layers.geometry import geometry_of, geometry_spec, read_geometry


class FactoredConv2d(nn.Module):
    """What the three forms share: a Conv2d of one group, whose kernel is a product of thinner ones.

    Padding that is not zeros is put around the input at once: it copies pixels, and no factor before the one that
    needs it mixes them, so that each form pads exactly as the dense layer does. The bias stands on the last factor.

    Attributes:
        weight: The factor that meets the input.
        bias: Shape (out,), or None.
    """

    kind: str
    replaces: type[nn.Module] = nn.Conv2d
    factors: ClassVar[tuple[str, ...]]
    """Names of the parameters, from the input on."""
    ranks: ClassVar[tuple[str, ...]] = ("rank",)
    """Names of the numbers of channels in between, from the input on."""
    groups = 1
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_channels: int, out_channels: int, *ranks: int, bias: bool = True, **geometry: Any) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values.

        `geometry` holds kernel_size, stride, padding, dilation and padding_mode, as nn.Conv2d takes them.
        """
        super().__init__()
        plain = nn.Conv2d(in_channels, out_channels, bias=False, device="meta", **geometry)  # checks the geometry
        self.in_channels, self.out_channels, self.padding_mode = in_channels, out_channels, plain.padding_mode
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding: str | tuple[int, ...] = plain.padding
        for name, rank in zip(self.ranks, ranks, strict=True):
            setattr(self, name, rank)
        shapes = self._shapes()
        for (name, rank), most in zip(zip(self.ranks, ranks, strict=True), self._most(), strict=True):
            if not 1 <= rank <= most:
                raise SettingError(
                    f"{name} must be in 1..{most} for a convolution of shape {self.dense_shape}, got {rank}."
                )
        if shapes[0] == self.dense_shape:
            raise SettingError(
                f"{self.ranks[0]} must be other than {ranks[0]} for a convolution of shape {self.dense_shape}: the "
                "factor stored as `weight` must not have the dense shape."
            )
        for name, shape in zip(self.factors, shapes, strict=True):
            setattr(self, name, empty_parameter(*shape))
        self.register_parameter("bias", empty_parameter(out_channels) if bias else None)

    @abstractmethod
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors."""

    @abstractmethod
    def _most(self) -> tuple[int, ...]:
        """The highest sensible ranks: those of any kernel of this size."""

    @abstractmethod
    def _kernel(self, *factors: Tensor) -> Tensor:
        """The kernel (out, in, height, width) that the factors make."""

    @classmethod
    def _of_factors(cls, conv: Any, given: tuple[Tensor, ...], ranks: tuple[int, ...]) -> Self:
        """The layer with the factors `given` in the place of a Conv2d's weight, in its dtype and on its device."""
        check_forward(conv, cls.replaces)
        if conv.groups != 1:
            raise SettingError(
                f"A convolution in groups={conv.groups} can't be factored: its filters read different channels. "
                "Leave it out: exclude=…"
            )
        layer = cls(conv.in_channels, conv.out_channels, *ranks, bias=conv.bias is not None, **geometry_of(conv))
        shapes = layer._shapes()
        if any(tuple(factor.shape) != shape for factor, shape in zip(given, shapes, strict=True)):
            raise SettingError(
                f"The factors of a convolution of shape {layer.dense_shape} must have shapes "
                f"{', '.join(map(str, shapes))}, got {', '.join(str(tuple(factor.shape)) for factor in given)}."
            )
        for name, factor in zip(cls.factors, given, strict=True):
            setattr(layer, name, placed(factor, conv.weight))
        layer.bias = copied(conv.bias)
        return layer.train(conv.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries, or sizes that are impossible or beyond any real model.
        """
        sizes, geometry = read_geometry(spec, cls.kind, ("in_channels", "out_channels", *cls.ranks))
        try:
            return cls(*sizes, bias=spec["bias"], **geometry)
        except ValueError as error:  # SettingError, or Conv2d's own
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", *self.ranks)}
        return {"kind": self.kind, **sizes, **geometry_spec(self), "bias": self.bias is not None}

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer stands for: (out, in, height, width)."""
        return self.out_channels, self.in_channels, *self.kernel_size

    def to_dense(self) -> nn.Conv2d:
        """The Conv2d with the kernel that the factors make, multiplied in float64 and rounded once."""
        with torch.no_grad():
            kernel = self._kernel(*(getattr(self, name).double() for name in self.factors)).to(self.weight.dtype)
        sizes = self.in_channels, self.out_channels
        conv = nn.Conv2d(*sizes, bias=self.bias is not None, device="meta", **geometry_of(self))
        conv.weight = nn.Parameter(kernel.contiguous(), requires_grad=self.weight.requires_grad)
        conv.bias = copied(self.bias)
        return conv.train(self.training)

    def _padded(self, x: Tensor) -> tuple[Tensor, str | tuple[int, ...]]:
        """The input with its padding, and the padding that is left to the convolution: that of zeros."""
        if self.padding_mode == "zeros" or self.padding == "valid":
            return x, self.padding
        sides = _sides(self.padding, self.kernel_size, self.dilation)
        return F.pad(x, sides, mode=self.padding_mode), (0, 0)

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}={getattr(self, name)}" for name in self.ranks)
        shown = {name: value for name, value in geometry_of(self).items() if value not in _DEFAULTS.get(name, ())}
        geometry = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.in_channels}, {self.out_channels}, {ranks}, {geometry}, bias={self.bias is not None}"


class LowRankConv2d(FactoredConv2d):
    """y = up · (down ∗ x) + bias: the kernel writes `rank` channels, a 1 × 1 convolution all (arXiv:1505.06798).

    `down` is stored under the dense layer's name `weight`: with rank < out its shape can't fit there, so a load
    without hfshrink fails instead of filling the layer at random. It has stride, padding and dilation.

    Attributes:
        weight: The factor down, shape (rank, in, height, width).
        up: Shape (out, rank, 1, 1).
        bias: Shape (out,), or None.

    Example:
        >>> conv = nn.Conv2d(2, 4, kernel_size=3, padding=1)
        >>> layer = LowRankConv2d.from_dense(conv, up=torch.ones(4, 1), down=torch.ones(1, 2, 3, 3))
        >>> layer
        LowRankConv2d(2, 4, rank=1, kernel_size=(3, 3), padding=(1, 1), bias=True)
        >>> layer(torch.ones(1, 2, 5, 5)).shape
        torch.Size([1, 4, 5, 5])
    """

    kind = "low_rank_conv2d"
    factors = ("weight", "up")
    rank: int
    up: nn.Parameter

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, up: Tensor, down: Tensor) -> LowRankConv2d:
        """Put two factors in the place of a Conv2d's weight, in its dtype and on its device; the bias is copied.

        Args:
            conv: The dense layer, weight of shape (out, in, height, width).
            up: Shape (out, rank).
            down: Shape (rank, in, height, width).

        Raises:
            SettingError: Groups, a forward of its own, shapes that don't fit, or a rank that is not in 1..out-1.
        """
        return cls._of_factors(conv, (down, up[..., None, None]), (len(down),))

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.rank, self.in_channels, *self.kernel_size), (self.out_channels, self.rank, 1, 1)

    def _most(self) -> tuple[int, ...]:
        return (max(self.out_channels - 1, 0),)

    def _kernel(self, *factors: Tensor) -> Tensor:
        down, up = factors
        return torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        x, padding = self._padded(x)
        x = F.conv2d(x, self.weight, None, self.stride, padding, self.dilation)
        return F.conv2d(x, self.up, self.bias)


class SeparableConv2d(FactoredConv2d):
    """y = horizontal ∗ (vertical ∗ x) + bias: a column of the kernel, then a row (arXiv:1405.3866, arXiv:1404.0736).

    Stride, padding and dilation of the height belong to the column, those of the width to the row. `vertical` is
    stored under the dense layer's name `weight`: its width 1 can't fit there, so a load without hfshrink fails instead
    of filling the layer at random. Where the kernel itself is 1 wide, the rank must be other than `out_channels`.

    Attributes:
        weight: The factor vertical, shape (rank, in, height, 1).
        horizontal: Shape (out, rank, 1, width).
        bias: Shape (out,), or None.

    Example:
        >>> factors = {"vertical": torch.ones(1, 2, 3, 1), "horizontal": torch.ones(4, 1, 1, 3)}
        >>> layer = SeparableConv2d.from_dense(nn.Conv2d(2, 4, kernel_size=3), **factors)
        >>> layer
        SeparableConv2d(2, 4, rank=1, kernel_size=(3, 3), bias=True)
        >>> torch.equal(layer.to_dense().weight, torch.ones(4, 2, 3, 3))
        True
    """

    kind = "separable_conv2d"
    factors = ("weight", "horizontal")
    rank: int
    horizontal: nn.Parameter

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, vertical: Tensor, horizontal: Tensor) -> SeparableConv2d:
        """Put two factors in the place of a Conv2d's weight, in its dtype and on its device; the bias is copied.

        Args:
            conv: The dense layer, weight of shape (out, in, height, width).
            vertical: Shape (rank, in, height, 1).
            horizontal: Shape (out, rank, 1, width).

        Raises:
            SettingError: Groups, a forward of its own, shapes that don't fit, or a rank out of range.
        """
        return cls._of_factors(conv, (vertical, horizontal), (len(vertical),))

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        height, width = self.kernel_size
        return (self.rank, self.in_channels, height, 1), (self.out_channels, self.rank, 1, width)

    def _most(self) -> tuple[int, ...]:
        height, width = self.kernel_size
        return (min(self.in_channels * height, self.out_channels * width),)

    def _kernel(self, *factors: Tensor) -> Tensor:
        vertical, horizontal = factors
        return torch.einsum("rih,orw->oihw", vertical[..., 0], horizontal[:, :, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        x, padding = self._padded(x)
        column, row = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        x = F.conv2d(x, self.weight, None, (self.stride[0], 1), column, (self.dilation[0], 1))
        return F.conv2d(x, self.horizontal, self.bias, (1, self.stride[1]), row, (1, self.dilation[1]))


class TuckerConv2d(FactoredConv2d):
    """y = last · (core ∗ (first · x)) + bias: fewer channels before and behind the kernel (arXiv:1511.06530).

    The core has stride, padding and dilation. `first` is stored under the dense layer's name `weight`: a 1 × 1 kernel
    can't fit there, so a load without hfshrink fails instead of filling the layer at random. Where the dense kernel is
    1 × 1 itself, `in_rank` must be other than `out_channels`.

    Attributes:
        weight: The factor first, shape (in_rank, in, 1, 1).
        core: Shape (out_rank, in_rank, height, width).
        last: Shape (out, out_rank, 1, 1).
        bias: Shape (out,), or None.

    Example:
        >>> factors = torch.ones(1, 3, 1, 1), torch.ones(2, 1, 5, 5), torch.ones(4, 2, 1, 1)
        >>> TuckerConv2d.from_dense(nn.Conv2d(3, 4, kernel_size=5, padding="same"), *factors)
        TuckerConv2d(3, 4, in_rank=1, out_rank=2, kernel_size=(5, 5), padding=same, bias=True)
    """

    kind = "tucker_conv2d"
    factors = ("weight", "core", "last")
    ranks = ("in_rank", "out_rank")
    in_rank: int
    out_rank: int
    core: nn.Parameter
    last: nn.Parameter

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, first: Tensor, core: Tensor, last: Tensor) -> TuckerConv2d:
        """Put three factors in the place of a Conv2d's weight, in its dtype and on its device; the bias is copied.

        Args:
            conv: The dense layer, weight of shape (out, in, height, width).
            first: Shape (in_rank, in, 1, 1).
            core: Shape (out_rank, in_rank, height, width).
            last: Shape (out, out_rank, 1, 1).

        Raises:
            SettingError: Groups, a forward of its own, shapes that don't fit, or ranks that are not in 1..in, 1..out.
        """
        return cls._of_factors(conv, (first, core, last), (len(first), len(core)))

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        first, last = (self.in_rank, self.in_channels, 1, 1), (self.out_channels, self.out_rank, 1, 1)
        return first, (self.out_rank, self.in_rank, *self.kernel_size), last

    def _most(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels

    def _kernel(self, *factors: Tensor) -> Tensor:
        first, core, last = factors
        return torch.einsum("os,srhw,ri->oihw", last[:, :, 0, 0], core, first[:, :, 0, 0])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height, width)."""
        x, padding = self._padded(F.conv2d(x, self.weight))
        x = F.conv2d(x, self.core, None, self.stride, padding, self.dilation)
        return F.conv2d(x, self.last, self.bias)


_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "stride": ((1, 1),),
    "padding": ((0, 0), "valid"),
    "dilation": ((1, 1),),
    "padding_mode": ("zeros",),
}
"""What a layer's line does not show."""


def _sides(padding: str | tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Pixels to add left, right, above and below, as `F.pad` takes them."""
    if isinstance(padding, tuple):
        return [padding[1], padding[1], padding[0], padding[0]]
    height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))  # "same"; the odd one comes last
    return [width // 2, width - width // 2, height // 2, height - height // 2]
