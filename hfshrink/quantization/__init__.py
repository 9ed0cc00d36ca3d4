"""Quantization: fewer bits per number."""

from hfshrink.quantization.schemes import SCHEMES, quantize

__all__ = ["SCHEMES", "quantize"]
