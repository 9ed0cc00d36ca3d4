"""Measuring models: `evaluate` (task metrics), `profile` (size, speed, memory) and `compare` (two models, paired)."""

from hfshrink.evaluation.comparison import Comparison, WorstClass, compare
from hfshrink.evaluation.profiling import measure_latencies, profile
from hfshrink.evaluation.scoring import ClassScore, Evaluation, evaluate

__all__ = [
    "ClassScore",
    "Comparison",
    "Evaluation",
    "WorstClass",
    "compare",
    "evaluate",
    "measure_latencies",
    "profile",
]
