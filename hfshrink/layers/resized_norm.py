"""A BatchNorm2d that lost channels."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import INDEX_DTYPE, checked_index, copied, read_spec


class ResizedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d with the channels of a dense one that were kept.

    Attributes:
        weight: Shape (kept,).
        bias: Shape (kept,).
        running_mean: Shape (kept,).
        running_var: Shape (kept,).
        kept_rows: The dense channel of each channel, shape (kept,), int32, rising.

    Example:
        >>> layer = ResizedBatchNorm2d.from_dense(nn.BatchNorm2d(4), rows=torch.tensor([0, 2]))
        >>> layer
        ResizedBatchNorm2d(2 of 4, eps=1e-05, momentum=0.1)
        >>> layer.to_dense().weight.tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    kind = "resized_batch_norm2d"
    replaces = nn.BatchNorm2d
    kept_rows: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: int, dense_num_features: int, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        if not 1 <= num_features < dense_num_features:
            raise SettingError(
                f"A batch norm of {dense_num_features} channels can be cut to 1..{dense_num_features - 1}, "
                f"got {num_features}."
            )
        super().__init__(num_features, eps=eps, momentum=momentum, device="meta")
        self.dense_num_features = dense_num_features
        self.register_buffer("kept_rows", torch.empty(num_features, dtype=INDEX_DTYPE, device="meta"))

    @classmethod
    def from_dense(cls, norm: nn.BatchNorm2d, rows: Tensor) -> ResizedBatchNorm2d:
        """Keep some channels of a BatchNorm2d with their statistics, in its dtype and on its device.

        Args:
            norm: The dense layer, weight of shape (channels,); or one that was resized before, which then shrinks
                further.
            rows: Channel numbers to keep, shape (kept,), integers, rising.

        Raises:
            SettingError: A subclass with a forward of its own, no weight or no running statistics, indices of a wrong
                type, order or range, none at all, or nothing is cut.
        """
        check_norm(norm)
        rows = checked_index(rows, norm.num_features, "rows").to(norm.weight.device)
        dense = norm.dense_num_features if isinstance(norm, ResizedBatchNorm2d) else norm.num_features
        if len(rows) == norm.num_features:
            raise SettingError(
                f"Nothing is cut: a batch norm of {norm.num_features} channels keeps all. Leave the layer as it is."
            )
        layer = cls(len(rows), dense, norm.eps, norm.momentum)
        for name in ("weight", "bias"):
            layer.register_parameter(name, copied(getattr(norm, name), rows))
        for name in ("running_mean", "running_var"):
            setattr(layer, name, getattr(norm, name)[rows].contiguous())
        tracked: Any = norm.num_batches_tracked
        layer.num_batches_tracked = tracked.clone()
        earlier = norm.kept_rows.long() if isinstance(norm, ResizedBatchNorm2d) else None
        layer.kept_rows = (rows if earlier is None else earlier[rows]).to(INDEX_DTYPE)
        return layer.train(norm.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> ResizedBatchNorm2d:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries, impossible sizes, or numbers that are not finite.
        """
        expected = {"kind", "bias", "num_features", "dense_num_features", "eps", "momentum"}
        if set(spec) != expected:
            raise CheckpointError(
                f"A layer of kind {cls.kind!r} needs the entries {', '.join(sorted(expected))}, "
                f"got {', '.join(sorted(map(str, spec)))[:200]}."
            )
        sizes = {name: value for name, value in spec.items() if name not in ("eps", "momentum")}
        kept, dense = read_spec(sizes, cls.kind, ("num_features", "dense_num_features"))
        eps, momentum = spec["eps"], spec["momentum"]
        if not _is_number(eps) or eps < 0 or not (momentum is None or (_is_number(momentum) and 0 <= momentum <= 1)):
            raise CheckpointError(
                f"Expected a finite eps of 0 or more and a momentum in 0..1 or null, got {str(eps)[:40]} and "
                f"{str(momentum)[:40]} in a layer of kind {cls.kind!r}."
            )
        if not spec["bias"]:
            raise CheckpointError(f"A layer of kind {cls.kind!r} always has a bias; its spec says that it has none.")
        try:
            return cls(kept, dense, eps, momentum)
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {
            "kind": self.kind,
            "num_features": self.num_features,
            "dense_num_features": self.dense_num_features,
            "eps": self.eps,
            "momentum": self.momentum,
            "bias": True,
        }

    @property
    def dense_shape(self) -> tuple[int]:
        """Shape (channels,) of the weight that this layer was cut from."""
        return (self.dense_num_features,)

    def kept(self) -> tuple[Tensor]:
        """The dense channel numbers that this layer has, shape (kept,), int64.

        Raises:
            CheckpointError: The loaded numbers are not rising within the dense size: the checkpoint is corrupt.
        """
        try:
            rows = checked_index(self.kept_rows, self.dense_num_features, "kept_rows")
        except SettingError as error:
            raise CheckpointError(f"The checkpoint is corrupt: {error}") from None
        return (rows.to(self.weight.device),)

    def to_dense(self) -> nn.BatchNorm2d:
        """The BatchNorm2d of the dense size; a channel that was cut gives 0: weight 0, bias 0, mean 0, variance 1.

        Raises:
            CheckpointError: The loaded channel numbers are corrupt.
        """
        (rows,) = self.kept()
        norm = nn.BatchNorm2d(self.dense_num_features, self.eps, self.momentum, device="meta")
        for name in ("weight", "bias"):
            own = getattr(self, name)
            values = own.new_zeros(self.dense_num_features)
            values[rows] = own.detach()
            setattr(norm, name, nn.Parameter(values, requires_grad=own.requires_grad))
        for name, filler in (("running_mean", 0.0), ("running_var", 1.0)):
            own = getattr(self, name)
            values = own.new_full((self.dense_num_features,), filler)
            values[rows] = own
            setattr(norm, name, values)
        norm.num_batches_tracked = self.num_batches_tracked.clone()
        return norm.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_features} of {self.dense_num_features}, eps={self.eps}, momentum={self.momentum}"


def check_norm(norm: nn.BatchNorm2d) -> None:
    """Raise `SettingError` for a BatchNorm2d that can't be cut: its own forward, no weight or no statistics."""
    if type(norm).forward is not nn.BatchNorm2d.forward:
        raise SettingError(
            f"{type(norm).__name__} has a forward of its own; only batch norms that compute what nn.BatchNorm2d does "
            "can be cut. Leave its convolution out: exclude=…"
        )
    if not norm.affine or not norm.track_running_stats:
        raise SettingError(
            "Only a batch norm with a weight and running statistics can be cut, got "
            f"affine={norm.affine} and track_running_stats={norm.track_running_stats}. "
            "Leave its convolution out: exclude=…"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # isfinite fails on larger integers
