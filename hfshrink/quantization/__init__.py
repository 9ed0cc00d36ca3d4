"""Quantization: fewer bits per number."""

from hfshrink.quantization.perturbations import perturbation
from hfshrink.quantization.run import quantize
from hfshrink.quantization.schemes import SCHEMES
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import QATMixin, QATTrainer

__all__ = ["QAT", "SCHEMES", "QATMixin", "QATTrainer", "fake_quantized", "learned_ranges", "perturbation", "quantize"]
