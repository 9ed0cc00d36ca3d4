"""`CompressionTrainer`: distillation, pruning and training for quantization in one run."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hfshrink.distillation import DistillationMixin
from hfshrink.errors import SettingError
from hfshrink.pruning import PruningMixin
from hfshrink.quantization.training.trainer import QATMixin

TEACHING = ("teacher", "losses", "teacher_cache", "ema_decay", "on_policy")


class CompressionTrainer(DistillationMixin, PruningMixin, QATMixin, Trainer):
    """Distils, prunes and quantizes at once; each part is off by default, and then this is the transformers Trainer.

    Pruned models keep most when a teacher guides them (CoFi, arXiv:2204.00408; oBERT, arXiv:2203.07259), often the
    dense model itself, and so do models of few bits (TernaryBERT, arXiv:2009.12812). Layer losses
    (`HiddenLoss(layers="nearest")`) follow the student as it shrinks. The teacher computes in float; zeros of pruning
    stay zeros on the grid of quantization, and units are cut after the weights are folded.

    Args:
        teacher: With `losses`, `label_weight` and all that `DistillationMixin` takes.
        pruning: As `PruningMixin` takes it.
        quantization: As `QATMixin` takes it.
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

    Raises:
        SettingError: What the parts refuse, or groups of weights that cutting units would tear apart.

    Example:
        >>> import copy, tempfile
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hfshrink import Pruning
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> teacher = BertForSequenceClassification(BertConfig(**sizes))
        >>> model = copy.deepcopy(teacher)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [0, 1]})
        >>> settings = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        >>> args = TrainingArguments(tempfile.mkdtemp(), **settings)
        >>> how = {"teacher": teacher, "pruning": Pruning(0.5, "heads+neurons")}
        >>> output = CompressionTrainer(model, args, train_dataset=rows, **how).train()  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> [step["technique"] for step in model.config.hfshrink["history"]]
        ['prune', 'distill']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not any(kwargs.get(name) is not None for name in TEACHING) and not _has_answers(
            kwargs.get("train_dataset")
        ):
            kwargs |= {"losses": [], "label_weight": 1.0}
        super().__init__(*args, **kwargs)
        if self.pruning is not None and self.quantization is not None:
            _check_groups(self.pruning, self.quantization)


def _check_groups(pruning: Any, quantization: Any) -> None:
    """Inputs that are cut out would move the others into groups whose scale is not theirs."""
    if quantization.group_size is not None and pruning.is_structured and pruning.cut:
        raise SettingError(
            f"group_size={quantization.group_size} and cutting {pruning.structure} don't go together: the inputs that "
            "stay would change groups. Take group_size=None, or prune first and train with QAT afterwards."
        )


def _has_answers(dataset: Any) -> bool:
    from hfshrink.distillation.training.rows import has_answers

    return has_answers(dataset)
