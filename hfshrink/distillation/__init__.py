"""Distillation: losses, teachers, students, and the Trainer that brings them together."""

from hfshrink.distillation.losses.feature_losses import AttentionLoss, FeatureMapLoss, HiddenLoss, RelationLoss
from hfshrink.distillation.losses.logits import CrossTokenizerLoss, DecoupledLoss, LogitLoss
from hfshrink.distillation.students.making import make_student
from hfshrink.distillation.teachers.cache import cache_teacher
from hfshrink.distillation.teachers.self_teaching import DeepToShallowLoss
from hfshrink.distillation.texts.augmentation import augment
from hfshrink.distillation.texts.filtering import filter_by_teacher
from hfshrink.distillation.texts.on_policy import OnPolicy
from hfshrink.distillation.texts.synthesis import generate_texts, mutate_texts
from hfshrink.distillation.training.run import distill
from hfshrink.distillation.training.trainer import DistillationMixin, DistillationTrainer

__all__ = ["AttentionLoss", "CrossTokenizerLoss", "DecoupledLoss", "DeepToShallowLoss", "DistillationMixin"]
__all__ += ["DistillationTrainer", "FeatureMapLoss", "HiddenLoss", "LogitLoss", "OnPolicy", "RelationLoss", "augment"]
__all__ += ["cache_teacher", "distill", "filter_by_teacher", "generate_texts", "make_student", "mutate_texts"]
