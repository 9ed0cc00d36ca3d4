"""The proof of a subset: trained on it, on all rows and on random ones, and told apart with intervals."""

from hfshrink.proof.results import Arm, Difference, Interval, Proof, Scores
from hfshrink.proof.run import evaluate_subset

__all__ = ["Arm", "Difference", "Interval", "Proof", "Scores", "evaluate_subset"]
