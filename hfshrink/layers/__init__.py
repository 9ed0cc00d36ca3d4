"""Compressed layers: made `from_dense`, described by a `spec`, built `empty` from it, turned back `to_dense`."""

from hfshrink.layers.attention import check_split, fit_heads, scale_heads
from hfshrink.layers.kinds import LAYER_KINDS, CompressedLayer, empty_layer
from hfshrink.layers.low_rank import LowRankLinear
from hfshrink.layers.low_rank_conv import LowRankConv2d, SeparableConv2d, TuckerConv2d
from hfshrink.layers.low_rank_conv1d import LowRankConv1D
from hfshrink.layers.low_rank_embedding import LowRankEmbedding
from hfshrink.layers.places import check_parts, check_place
from hfshrink.layers.quantized import QuantizedLinear
from hfshrink.layers.resized import ResizedLinear
from hfshrink.layers.resized_conv import ResizedConv2d
from hfshrink.layers.resized_conv1d import ResizedConv1D
from hfshrink.layers.resized_norm import ResizedBatchNorm2d

__all__ = [
    "LAYER_KINDS",
    "CompressedLayer",
    "LowRankConv1D",
    "LowRankConv2d",
    "LowRankEmbedding",
    "LowRankLinear",
    "QuantizedLinear",
    "ResizedBatchNorm2d",
    "ResizedConv1D",
    "ResizedConv2d",
    "ResizedLinear",
    "SeparableConv2d",
    "TuckerConv2d",
    "check_parts",
    "check_place",
    "check_split",
    "empty_layer",
    "fit_heads",
    "scale_heads",
]
