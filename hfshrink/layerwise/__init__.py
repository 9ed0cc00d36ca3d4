"""Techniques that go through a model layer by layer: their calibration rows, the statistics of each layer's inputs."""

from hfshrink.layerwise.counting import InputCounter, input_rows
from hfshrink.layerwise.rows import TOKENS, CalibrationData, first_tokens
from hfshrink.layerwise.running import frozen, hidden_of, run_layer, without_cache
from hfshrink.layerwise.walking import walk

__all__ = [
    "TOKENS",
    "CalibrationData",
    "InputCounter",
    "first_tokens",
    "frozen",
    "hidden_of",
    "input_rows",
    "run_layer",
    "walk",
    "without_cache",
]
