"""Pruning: gradual in the Trainer, one-shot, and cut for real."""

from hfshrink.pruning.cutting import cut_masked
from hfshrink.pruning.oneshot import prune
from hfshrink.pruning.perturbations import perturbation
from hfshrink.pruning.settings import Pruning
from hfshrink.pruning.trainer import PruningMixin, PruningTrainer
from hfshrink.pruning.vocabulary import trim_vocabulary

__all__ = ["Pruning", "PruningMixin", "PruningTrainer", "cut_masked", "perturbation", "prune", "trim_vocabulary"]
