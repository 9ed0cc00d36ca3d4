"""A Linear that lost rows or columns of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import INDEX_DTYPE, checked_index, copied, dense_linear, read_spec


class ResizedLinear(nn.Linear):
    """A Linear with the rows (outputs) and columns (inputs) of a dense one that were kept.

    It computes what a Linear of its size does, and remembers what was kept, so that `to_dense` can put zeros
    elsewhere.

    Attributes:
        weight: Shape (kept out, kept in).
        bias: Shape (kept out,), or None.
        kept_rows: The dense row of each row, shape (kept out,), int32, rising; None where no row was cut.
        kept_columns: The dense column of each column, shape (kept in,), int32, rising; None where no column was cut.

    Example:
        >>> layer = ResizedLinear.from_dense(nn.Linear(3, 4), rows=torch.tensor([0, 2]))
        >>> layer
        ResizedLinear(in_features=3, out_features=2 of 4, bias=True)
        >>> layer.to_dense().weight[1].tolist()
        [0.0, 0.0, 0.0]
    """

    kind = "resized"
    replaces: type[nn.Module] = nn.Linear
    kept_rows: Tensor | None
    kept_columns: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, dense_in_features: int, dense_out_features: int, bias: bool = True
    ) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        if not (1 <= in_features <= dense_in_features and 1 <= out_features <= dense_out_features):
            raise SettingError(
                f"A weight of shape ({dense_out_features}, {dense_in_features}) can't be cut to "
                f"({out_features}, {in_features}): at least one row and one column must stay, and none can be added."
            )
        if in_features == dense_in_features and out_features == dense_out_features:
            raise SettingError(
                f"Nothing is cut: a weight of shape ({dense_out_features}, {dense_in_features}) keeps all rows and "
                "columns. Leave the layer as it is."
            )
        super().__init__(in_features, out_features, bias=bias, device="meta")
        self.dense_in_features, self.dense_out_features = dense_in_features, dense_out_features
        for name, kept, dense in (
            ("kept_rows", out_features, dense_out_features),
            ("kept_columns", in_features, dense_in_features),
        ):
            index = torch.empty(kept, dtype=INDEX_DTYPE, device="meta") if kept < dense else None
            self.register_buffer(name, index)

    @classmethod
    def from_dense(cls, linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> ResizedLinear:
        """Keep some rows and columns of a Linear, in its dtype and on its device.

        Args:
            linear: The dense layer, weight of shape (out, in); or one that was resized before, which then shrinks
                further.
            rows: Row numbers to keep, shape (kept out,), integers, rising; None keeps all.
            columns: Column numbers to keep, shape (kept in,), integers, rising; None keeps all.

        Raises:
            SettingError: Indices of a wrong type, order or range, none at all, or nothing is cut.
        """
        device = linear.weight.device
        out_features, in_features = linear.weight.shape
        rows = checked_index(rows, out_features, "rows").to(device)
        columns = checked_index(columns, in_features, "columns").to(device)
        dense_out, dense_in = linear.dense_shape if isinstance(linear, ResizedLinear) else (out_features, in_features)
        if len(rows) == out_features and len(columns) == in_features:
            raise SettingError(
                f"Nothing is cut: a weight of shape ({out_features}, {in_features}) keeps all rows and columns. "
                "Leave the layer as it is."
            )
        layer = cls(len(columns), len(rows), dense_in, dense_out, bias=linear.bias is not None)
        weight = linear.weight.detach()[rows][:, columns]
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
        layer.register_parameter("bias", copied(linear.bias, rows))
        for name, index in (("kept_rows", rows), ("kept_columns", columns)):
            if getattr(layer, name) is not None:
                before = getattr(linear, name, None)
                setattr(layer, name, (index if before is None else before.long()[index]).to(INDEX_DTYPE))
        return layer.train(linear.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> ResizedLinear:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        names = ("in_features", "out_features", "dense_in_features", "dense_out_features")
        kept_in, kept_out, dense_in, dense_out = read_spec(spec, cls.kind, names)
        try:
            return cls(kept_in, kept_out, dense_in, dense_out, bias=spec["bias"])
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dense_in_features": self.dense_in_features,
            "dense_out_features": self.dense_out_features,
            "bias": self.bias is not None,
        }

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight that this layer was cut from."""
        return self.dense_out_features, self.dense_in_features

    def kept(self) -> tuple[Tensor, Tensor]:
        """The dense row and column numbers that this layer has, shapes (kept out,) and (kept in,), int64.

        Raises:
            CheckpointError: The loaded numbers are not rising within the dense size: the checkpoint is corrupt.
        """
        found = []
        for name, index, dense in (
            ("kept_rows", self.kept_rows, self.dense_out_features),
            ("kept_columns", self.kept_columns, self.dense_in_features),
        ):
            try:
                found.append(checked_index(index, dense, name).to(self.weight.device))
            except SettingError as error:
                raise CheckpointError(f"The checkpoint is corrupt: {error}") from None
        return found[0], found[1]

    def to_dense(self) -> nn.Linear:
        """The Linear of the dense size: this layer's values where it kept them, zeros elsewhere.

        Raises:
            CheckpointError: The loaded row or column numbers are corrupt.
        """
        rows, columns = self.kept()
        weight = self.weight.new_zeros(self.dense_shape)
        weight[rows[:, None], columns] = self.weight.detach()
        bias = None
        if self.bias is not None:
            bias = self.bias.new_zeros(self.dense_out_features)
            bias[rows] = self.bias.detach()
            bias.requires_grad_(self.bias.requires_grad)
        return dense_linear(weight, bias, like=self)

    def extra_repr(self) -> str:
        sizes = (
            (self.in_features, self.dense_in_features),
            (self.out_features, self.dense_out_features),
        )
        shown = [str(kept) if kept == dense else f"{kept} of {dense}" for kept, dense in sizes]
        return f"in_features={shown[0]}, out_features={shown[1]}, bias={self.bias is not None}"
