"""Quantization: fewer bits per number."""

from hfshrink.quantization.run import quantize
from hfshrink.quantization.schemes import SCHEMES

__all__ = ["SCHEMES", "quantize"]
