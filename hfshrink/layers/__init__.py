"""Compressed layers: made `from_dense`, described by a `spec`, built `empty` from it, turned back `to_dense`."""

from hfshrink.layers.kinds import LAYER_KINDS, CompressedLayer, empty_layer
from hfshrink.layers.low_rank import LowRankLinear
from hfshrink.layers.resized import ResizedLinear

__all__ = ["LAYER_KINDS", "CompressedLayer", "LowRankLinear", "ResizedLinear", "empty_layer"]
