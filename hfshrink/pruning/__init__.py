"""Pruning: gradual in the Trainer, one-shot, and cut for real."""

from hfshrink.pruning.oneshot.run import prune
from hfshrink.pruning.perturbations import perturbation
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.trainer import PruningMixin, PruningTrainer
from hfshrink.pruning.units.cutting import cut_masked
from hfshrink.pruning.vocabulary.trimming import trim_vocabulary

__all__ = ["Pruning", "PruningMixin", "PruningTrainer", "cut_masked", "perturbation", "prune", "trim_vocabulary"]
