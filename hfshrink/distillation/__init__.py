"""Distillation: losses, teachers, students, and the Trainer that brings them together."""

from hfshrink.distillation.losses import LogitLoss, binary_cross_entropy, kl_divergence, mean_squared_error
from hfshrink.distillation.student import make_student, spread_layers
from hfshrink.distillation.teacher import add_teacher_logits, align, label_order
from hfshrink.distillation.trainer import DistillationMixin, DistillationTrainer

__all__ = [
    "DistillationMixin",
    "DistillationTrainer",
    "LogitLoss",
    "add_teacher_logits",
    "align",
    "binary_cross_entropy",
    "kl_divergence",
    "label_order",
    "make_student",
    "mean_squared_error",
    "spread_layers",
]
