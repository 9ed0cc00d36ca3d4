"""The table of compressed layers, and building one from the spec in a checkpoint."""

from __future__ import annotations

from typing import Any

from hfshrink.errors import CheckpointError
from hfshrink.layers.low_rank import LowRankLinear
from hfshrink.layers.low_rank_conv import LowRankConv2d, SeparableConv2d, TuckerConv2d
from hfshrink.layers.low_rank_conv1d import LowRankConv1D
from hfshrink.layers.low_rank_embedding import LowRankEmbedding
from hfshrink.layers.quantized import QuantizedLinear
from hfshrink.layers.resized import ResizedLinear
from hfshrink.layers.resized_conv import ResizedConv2d
from hfshrink.layers.resized_conv1d import ResizedConv1D
from hfshrink.layers.resized_norm import ResizedBatchNorm2d

CompressedLayer = (
    LowRankLinear
    | LowRankConv1D
    | LowRankConv2d
    | SeparableConv2d
    | TuckerConv2d
    | LowRankEmbedding
    | ResizedLinear
    | ResizedConv1D
    | ResizedConv2d
    | ResizedBatchNorm2d
    | QuantizedLinear
)

LAYER_KINDS: dict[str, type[CompressedLayer]] = {
    "low_rank": LowRankLinear,
    "low_rank_conv1d": LowRankConv1D,
    "low_rank_conv2d": LowRankConv2d,
    "separable_conv2d": SeparableConv2d,
    "tucker_conv2d": TuckerConv2d,
    "low_rank_embedding": LowRankEmbedding,
    "resized": ResizedLinear,
    "resized_conv1d": ResizedConv1D,
    "resized_conv2d": ResizedConv2d,
    "resized_batch_norm2d": ResizedBatchNorm2d,
    "quantized": QuantizedLinear,
}
"""kind in a spec -> the class of the layer. A class names its `kind`, and in `replaces` the dense class it stands for;
`dense_shape` is the shape of that one's `weight`. The resized ones check their indices in `kept()`."""


def empty_layer(spec: Any) -> CompressedLayer:
    """The layer that a spec describes, on the meta device.

    Args:
        spec: What `layer.spec()` gave, perhaps read from somebody else's `config.json`.

    Raises:
        CheckpointError: No dict, an unknown kind, or entries that describe no possible layer of that kind.

    Example:
        >>> empty_layer({"kind": "low_rank", "in_features": 16, "out_features": 24, "rank": 4, "bias": True})
        LowRankLinear(in_features=16, out_features=24, rank=4, bias=True)
    """
    if not isinstance(spec, dict):
        raise CheckpointError(
            f"Expected the spec of a layer as a JSON object, got {type(spec).__name__}: {str(spec)[:80]}"
        )
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in LAYER_KINDS:
        raise CheckpointError(
            f"Unknown kind of layer {str(kind)[:40]!r}; this hfshrink knows {', '.join(LAYER_KINDS)}. "
            "A newer one may know it: pip install -U hfshrink"
        )
    return LAYER_KINDS[kind].empty(spec)
