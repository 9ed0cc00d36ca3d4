"""An Embedding as the product of a narrow table and a small matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import check_forward, empty_parameter, placed, read_spec

SIZES = ("num_embeddings", "embedding_dim", "rank")


class LowRankEmbedding(nn.Module):
    """y = up[id] · down, with up of shape (words, rank) and down of shape (rank, dim), as ALBERT (arXiv:1909.11942).

    `up` is stored under the dense layer's name `weight`: with rank < dim its shape can't fit there, so a load without
    hfshrink fails instead of filling the table at random.

    Attributes:
        weight: The narrow table up, shape (words, rank).
        down: Shape (rank, dim).
        bias: None; an Embedding has none.
        padding_idx: The id whose row of `up` gets no gradient, or None.

    Example:
        >>> table = nn.Embedding(5, 3)
        >>> layer = LowRankEmbedding.from_dense(table, up=torch.arange(5.0)[:, None], down=torch.ones(1, 3))
        >>> layer
        LowRankEmbedding(5, 3, rank=1)
        >>> layer(torch.tensor([4])).tolist()
        [[4.0, 4.0, 4.0]]
    """

    kind = "low_rank_embedding"
    replaces: type[nn.Module] = nn.Embedding
    weight: nn.Parameter
    down: nn.Parameter
    bias = None

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int, padding_idx: int | None = None) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        super().__init__()
        if not 1 <= rank < embedding_dim:
            raise SettingError(
                f"rank must be in 1..{embedding_dim - 1} for a table of shape ({num_embeddings}, {embedding_dim}), "
                f"got {rank}: the factor stored as `weight` must not have the dense shape."
            )
        if padding_idx is not None and not 0 <= padding_idx < num_embeddings:
            raise SettingError(f"padding_idx must be in 0..{num_embeddings - 1} or None, got {padding_idx}.")
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.padding_idx = padding_idx
        self.weight = empty_parameter(num_embeddings, rank)
        self.down = empty_parameter(rank, embedding_dim)

    @classmethod
    def from_dense(cls, embedding: nn.Embedding, up: Tensor, down: Tensor) -> LowRankEmbedding:
        """Put two factors in the place of an Embedding's table, in its dtype and on its device.

        Args:
            embedding: The dense table, weight of shape (words, dim).
            up: Shape (words, rank).
            down: Shape (rank, dim).

        Raises:
            SettingError: The shapes don't fit each other and the table, the rank is not in 1..dim-1, or the embedding
                does more than look up rows: it scales them, counts positions from elsewhere, limits norms, or has
                gradients of its own.
        """
        check_forward(embedding, cls.replaces)
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise SettingError(
                f"Only a plain table can be factored, got max_norm={embedding.max_norm}, "
                f"scale_grad_by_freq={embedding.scale_grad_by_freq}, sparse={embedding.sparse}."
            )
        words, dim = embedding.weight.shape
        rank = down.shape[0] if down.ndim == 2 else -1
        if tuple(up.shape) != (words, rank) or tuple(down.shape) != (rank, dim):
            raise SettingError(
                "up and down must have shapes (words, rank) and (rank, dim) for a table of shape "
                f"({words}, {dim}), got {tuple(up.shape)} and {tuple(down.shape)}."
            )
        layer = cls(words, dim, rank, embedding.padding_idx)
        layer.weight, layer.down = placed(up, embedding.weight), placed(down, embedding.weight)
        return layer.train(embedding.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> LowRankEmbedding:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        expected = {"kind", "padding_idx", *SIZES}
        if set(spec) != expected:
            raise CheckpointError(
                f"A layer of kind {cls.kind!r} needs the entries {', '.join(sorted(expected))}, "
                f"got {', '.join(sorted(map(str, spec)))[:200]}."
            )
        padding = spec["padding_idx"]
        sizes = {name: value for name, value in spec.items() if name != "padding_idx"}
        words, dim, rank = read_spec({**sizes, "bias": False}, cls.kind, SIZES)
        if padding is not None and type(padding) is not int:
            raise CheckpointError(f"padding_idx must be an integer or null, got {str(padding)[:40]!r}.")
        try:
            return cls(words, dim, rank, padding)
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in SIZES}, "padding_idx": self.padding_idx}

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape of the table that this layer stands for: (words, dim)."""
        return self.num_embeddings, self.embedding_dim

    def to_dense(self) -> nn.Embedding:
        """The Embedding with the table up · down, multiplied in float64 and rounded once to the layer's dtype."""
        with torch.no_grad():
            table = (self.weight.double() @ self.down.double()).to(self.weight.dtype)
        made = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        made.weight = nn.Parameter(table, requires_grad=self.weight.requires_grad)
        return made.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integers -> (…, dim)."""
        return F.embedding(ids, self.weight, self.padding_idx) @ self.down

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}{padding}"
