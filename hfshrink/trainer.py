"""`CompressionTrainer`: distillation and pruning in one training run."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from hfshrink.distillation import DistillationMixin
from hfshrink.pruning import PruningMixin

TEACHING = ("teacher", "losses", "teacher_cache", "ema_decay", "on_policy")


class CompressionTrainer(DistillationMixin, PruningMixin, Trainer):
    """Distils and prunes at once; each part is off by default, and then this is the transformers Trainer.

    Pruned models keep most when a teacher guides them (CoFi, arXiv:2204.00408; oBERT, arXiv:2203.07259), often the
    dense model itself. Layer losses (`HiddenLoss(layers="nearest")`) follow the student as it shrinks.

    Args:
        teacher: With `losses`, `label_weight` and all that `DistillationMixin` takes.
        pruning: As `PruningMixin` takes it.
        *args: As for the Trainer.
        **kwargs: As for the Trainer.

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


def _has_answers(dataset: Any) -> bool:
    from hfshrink.distillation.training.rows import has_answers

    return has_answers(dataset)
