"""A Conv2d that lost filters (output channels) or input channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import INDEX_DTYPE, checked_index, copied
from hfshrink.layers.geometry import geometry_of, geometry_spec, read_geometry

SIZES = ("in_channels", "out_channels", "dense_in_channels", "dense_out_channels")


class ResizedConv2d(nn.Conv2d):
    """A Conv2d with the filters (rows) and input channels (columns) of a dense one that were kept.

    It computes what a Conv2d of its size does, and remembers what was kept, so that `to_dense` can put zeros
    elsewhere. A depthwise convolution has one filter a channel: its rows are its input channels too.

    Attributes:
        weight: Shape (kept out, kept in, height, width); depthwise (kept out, 1, height, width).
        bias: Shape (kept out,), or None.
        kept_rows: The dense filter of each filter, shape (kept out,), int32, rising; None where none was cut.
        kept_columns: The dense input channel of each one, shape (kept in,), int32, rising; None where none was cut,
            and in depthwise convolutions.

    Example:
        >>> layer = ResizedConv2d.from_dense(nn.Conv2d(3, 4, kernel_size=5), rows=torch.tensor([0, 2]))
        >>> layer
        ResizedConv2d(3, 2 of 4, kernel_size=(5, 5), stride=(1, 1))
        >>> layer.to_dense().weight[1].abs().sum().item()
        0.0
    """

    kind = "resized_conv2d"
    replaces = nn.Conv2d
    kept_rows: Tensor | None
    kept_columns: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dense_in_channels: int,
        dense_out_channels: int,
        bias: bool = True,
        depthwise: bool = False,
        **geometry: Any,
    ) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values.

        `geometry` holds kernel_size, stride, padding, dilation and padding_mode, as nn.Conv2d takes them.
        """
        kept, dense = (out_channels, in_channels), (dense_out_channels, dense_in_channels)
        if not (1 <= in_channels <= dense_in_channels and 1 <= out_channels <= dense_out_channels):
            raise SettingError(
                f"A convolution of {dense} channels (out, in) can't be cut to {kept}: "
                "at least one must stay on each side, and none can be added."
            )
        if kept == dense:
            raise SettingError(
                f"Nothing is cut: a convolution of {dense} channels (out, in) keeps all. Leave the layer as it is."
            )
        if depthwise and (in_channels != out_channels or dense_in_channels != dense_out_channels):
            raise SettingError(
                f"A depthwise convolution has as many filters as input channels, got {kept} of {dense} (out, in)."
            )
        groups = in_channels if depthwise else 1
        super().__init__(in_channels, out_channels, bias=bias, groups=groups, device="meta", **geometry)
        self.dense_in_channels, self.dense_out_channels, self.depthwise = *dense[::-1], depthwise
        for name, size, full in zip(("kept_rows", "kept_columns"), kept, dense, strict=True):
            cut = size < full and not (depthwise and name == "kept_columns")
            self.register_buffer(name, torch.empty(size, dtype=INDEX_DTYPE, device="meta") if cut else None)

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, rows: Tensor | None = None, columns: Tensor | None = None) -> ResizedConv2d:
        """Keep some filters and input channels of a Conv2d, in its dtype and on its device.

        Args:
            conv: The dense layer, weight of shape (out, in, height, width), or depthwise (channels, 1, height,
                width); or one that was resized before, which then shrinks further.
            rows: Filter numbers to keep, shape (kept out,), integers, rising; None keeps all. A depthwise
                convolution keeps the input channels of the same numbers.
            columns: Input channel numbers to keep, shape (kept in,), integers, rising; None keeps all.

        Raises:
            SettingError: Grouped other than depthwise, a subclass with a forward of its own, columns for a depthwise
                convolution, indices of a wrong type, order or range, none at all, or nothing is cut.
        """
        check_conv(conv)
        depthwise = conv.groups > 1 or (isinstance(conv, ResizedConv2d) and conv.depthwise)
        if depthwise and columns is not None:
            raise SettingError("A depthwise convolution reads the channels that it writes: give rows, not columns.")
        device, before = conv.weight.device, (conv.out_channels, conv.in_channels)
        rows = checked_index(rows, before[0], "rows").to(device)
        columns = rows if depthwise else checked_index(columns, before[1], "columns").to(device)
        if (len(rows), len(columns)) == before:
            raise SettingError(
                f"Nothing is cut: a convolution of {before} channels (out, in) keeps all. Leave the layer as it is."
            )
        old = conv if isinstance(conv, ResizedConv2d) else None
        dense = (old.dense_in_channels, old.dense_out_channels) if old is not None else before[::-1]
        layer = cls(len(columns), len(rows), *dense, conv.bias is not None, depthwise, **geometry_of(conv))
        weight = conv.weight.detach()[rows]
        weight = weight if depthwise else weight[:, columns]
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=conv.weight.requires_grad)
        layer.register_parameter("bias", copied(conv.bias, rows))
        for name, index in (("kept_rows", rows), ("kept_columns", columns)):
            if getattr(layer, name) is not None:
                earlier = getattr(conv, name, None)
                setattr(layer, name, (index if earlier is None else earlier.long()[index]).to(INDEX_DTYPE))
        return layer.train(conv.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> ResizedConv2d:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries, or sizes that are impossible or beyond any real model.
        """
        (kept_in, kept_out, dense_in, dense_out), geometry = _read_conv_spec(spec, cls.kind)
        try:
            return cls(kept_in, kept_out, dense_in, dense_out, spec["bias"], spec["depthwise"], **geometry)
        except ValueError as error:  # SettingError, or Conv2d's own
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {
            "kind": self.kind,
            **{name: getattr(self, name) for name in SIZES},
            **geometry_spec(self),
            "depthwise": self.depthwise,
            "bias": self.bias is not None,
        }

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the weight that this layer was cut from: (out, in, height, width), depthwise (out, 1, …)."""
        return self.dense_out_channels, 1 if self.depthwise else self.dense_in_channels, *self.kernel_size

    def kept(self) -> tuple[Tensor, Tensor]:
        """The dense filter and input channel numbers that this layer has, shapes (kept out,), (kept in,), int64.

        Raises:
            CheckpointError: The loaded numbers are not rising within the dense size: the checkpoint is corrupt.
        """
        try:
            rows = checked_index(self.kept_rows, self.dense_out_channels, "kept_rows").to(self.weight.device)
            if self.depthwise:
                return rows, rows
            columns = checked_index(self.kept_columns, self.dense_in_channels, "kept_columns")
        except SettingError as error:
            raise CheckpointError(f"The checkpoint is corrupt: {error}") from None
        return rows, columns.to(self.weight.device)

    def to_dense(self) -> nn.Conv2d:
        """The Conv2d of the dense size: this layer's values where it kept them, zeros elsewhere.

        Raises:
            CheckpointError: The loaded filter or channel numbers are corrupt.
        """
        rows, columns = self.kept()
        values = self.weight.new_zeros(self.dense_shape)
        if self.depthwise:
            values[rows] = self.weight.detach()
        else:
            values[rows[:, None], columns] = self.weight.detach()
        sizes = self.dense_in_channels, self.dense_out_channels
        groups = self.dense_in_channels if self.depthwise else 1
        conv = nn.Conv2d(*sizes, groups=groups, bias=self.bias is not None, device="meta", **geometry_of(self))
        conv.weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            bias = self.bias.new_zeros(self.dense_out_channels)
            bias[rows] = self.bias.detach()
            conv.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        _, rest = super().extra_repr().split(", kernel_size", 1)
        sizes = ((self.in_channels, self.dense_in_channels), (self.out_channels, self.dense_out_channels))
        shown = ", ".join(str(kept) if kept == dense else f"{kept} of {dense}" for kept, dense in sizes)
        return f"{shown}, kernel_size{rest}"


def check_conv(conv: nn.Conv2d) -> None:
    """Raise `SettingError` for a Conv2d that can't be cut: grouped but not depthwise, or with its own forward."""
    if type(conv).forward is not nn.Conv2d.forward:
        raise SettingError(
            f"{type(conv).__name__} has a forward of its own; only convolutions that compute what nn.Conv2d does "
            "can be cut. Leave it out: exclude=…"
        )
    if conv.groups > 1 and not conv.groups == conv.in_channels == conv.out_channels:
        raise SettingError(
            f"A convolution of {conv.in_channels} to {conv.out_channels} channels in {conv.groups} groups can't be "
            "cut; only ungrouped and depthwise ones (one filter a channel) can. Leave it out: exclude=…"
        )


def _read_conv_spec(spec: Mapping[str, Any], kind: str) -> tuple[list[int], dict[str, Any]]:
    """The four sizes and the geometry of a spec that somebody else may have written."""
    found = read_geometry(spec, kind, SIZES, others=("depthwise",))
    if not isinstance(spec["depthwise"], bool):
        raise CheckpointError(f"Expected depthwise true or false, got {str(spec['depthwise'])[:40]!r}.")
    return found
