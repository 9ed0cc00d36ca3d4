"""GPT-2's Conv1D, a Linear with a transposed weight, as the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import CheckpointError
from hfshrink.layers.common import check_forward
from hfshrink.layers.low_rank import LowRankLinear
from hfshrink.layers.resized_conv1d import plain_conv1d


class LowRankConv1D(LowRankLinear):
    """y = up · (down · x) + bias in the place of a Conv1D, whose weight stands as (in, out).

    The factors stand as in `LowRankLinear`: down (rank, in) is stored under the name `weight`. It has the dense shape
    (in, out) only where rank = in = out, which `rank < out` rules out. In the fused `c_attn` q, k and v share down.

    Attributes:
        weight: The factor down, shape (rank, in).
        up: The factor up, shape (out, rank).
        bias: Shape (out,).

    Example:
        >>> import torch
        >>> layer = LowRankConv1D.from_dense(Conv1D(4, 3), up=torch.ones(4, 1), down=torch.ones(1, 3))
        >>> layer
        LowRankConv1D(in_features=3, out_features=4, rank=1, bias=True)
        >>> layer.to_dense().weight.shape
        torch.Size([3, 4])
    """

    kind = "low_rank_conv1d"
    replaces: type[nn.Module] = Conv1D

    @classmethod
    def from_dense(cls, conv: Any, up: Tensor, down: Tensor) -> Self:
        """Put two factors in the place of a Conv1D's weight, in its dtype and on its device; the bias is copied.

        Args:
            conv: The dense layer, weight of shape (in, out).
            up: Shape (out, rank).
            down: Shape (rank, in).

        Raises:
            SettingError: The shapes don't fit each other and the weight, the rank is not in 1..out-1, or the layer
                has a forward of its own.
        """
        check_forward(conv, cls.replaces)
        in_features, out_features = conv.weight.shape
        return cls._of_factors(conv, (out_features, in_features), up, down)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> Self:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        layer = super().empty(spec)
        if layer.bias is None:
            raise CheckpointError("A Conv1D always has a bias, got a spec without one.")
        return layer

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the weight that this layer stands for: (in, out)."""
        return self.in_features, self.out_features

    def to_dense(self) -> Conv1D:
        """The Conv1D with weight (up · down)ᵀ, multiplied in float64 and rounded once to the layer's dtype."""
        bias: Any = self.bias
        return plain_conv1d(self._product().T, bias, like=self)
