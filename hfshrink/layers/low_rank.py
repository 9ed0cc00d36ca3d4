"""A Linear as the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import check_forward, copied, dense_linear, empty_parameter, placed, read_spec


class LowRankLinear(nn.Module):
    """y = up · (down · x) + bias, with up of shape (out, rank) and down of shape (rank, in).

    `down` is stored under the dense layer's name `weight`: its shape can't fit there, so a load without hfshrink fails
    instead of filling the layer at random. That is why the rank must be smaller than `out_features`.

    Where one Linear makes q, k and v at once, the three share the factor down.

    Attributes:
        weight: The factor down, shape (rank, in).
        up: The factor up, shape (out, rank).
        bias: Shape (out,), or None.

    Example:
        >>> linear = nn.Linear(3, 4)
        >>> layer = LowRankLinear.from_dense(linear, up=torch.ones(4, 1), down=torch.ones(1, 3))
        >>> layer, torch.equal(layer.to_dense().weight, torch.ones(4, 3))
        (LowRankLinear(in_features=3, out_features=4, rank=1, bias=True), True)
    """

    kind = "low_rank"
    replaces: type[nn.Module] = nn.Linear
    weight: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, rank: int, bias: bool = True) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        super().__init__()
        if not 1 <= rank < out_features:
            raise SettingError(
                f"rank must be in 1..{out_features - 1} for a weight of shape ({out_features}, {in_features}), "
                f"got {rank}: the factor stored as `weight` must not have the dense shape."
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.weight = empty_parameter(rank, in_features)
        self.up = empty_parameter(out_features, rank)
        self.register_parameter("bias", empty_parameter(out_features) if bias else None)

    @classmethod
    def from_dense(cls, linear: Any, up: Tensor, down: Tensor) -> Self:
        """Put two factors in the place of a Linear's weight, in its dtype and on its device; the bias is copied.

        Args:
            linear: The dense layer, weight of shape (out, in).
            up: Shape (out, rank).
            down: Shape (rank, in).

        Raises:
            SettingError: The shapes don't fit each other and the weight, the rank is not in 1..out-1, or the layer
                has a forward of its own.
        """
        check_forward(linear, cls.replaces)
        return cls._of_factors(linear, tuple(linear.weight.shape), up, down)

    @classmethod
    def _of_factors(cls, dense: Any, shape: tuple[int, ...], up: Tensor, down: Tensor) -> Self:
        """The layer with `up` and `down` in the place of the weight of `dense`, whose (out, in) are `shape`."""
        out_features, in_features = shape
        rank = down.shape[0] if down.ndim == 2 else -1
        if tuple(up.shape) != (out_features, rank) or tuple(down.shape) != (rank, in_features):
            raise SettingError(
                "up and down must have shapes (out, rank) and (rank, in) for a weight of shape "
                f"({out_features}, {in_features}), got {tuple(up.shape)} and {tuple(down.shape)}."
            )
        layer = cls(in_features, out_features, rank, bias=dense.bias is not None)
        layer.weight, layer.up = placed(down, dense.weight), placed(up, dense.weight)
        layer.bias = copied(dense.bias)
        return layer.train(dense.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        in_features, out_features, rank = read_spec(spec, cls.kind, ("in_features", "out_features", "rank"))
        try:
            return cls(in_features, out_features, rank, bias=spec["bias"])
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
        }

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the weight that this layer stands for: (out, in)."""
        return self.out_features, self.in_features

    def to_dense(self) -> nn.Module:
        """The Linear with weight up · down, multiplied in float64 and rounded once to the layer's dtype."""
        return dense_linear(self._product(), self.bias, like=self)

    def _product(self) -> Tensor:
        """The weight up · down of shape (out, in), in the layer's dtype."""
        with torch.no_grad():
            return (self.up.double() @ self.weight.double()).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return F.linear(F.linear(x, self.weight), self.up, self.bias)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"
