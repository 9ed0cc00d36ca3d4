"""Tiny distillation runs: arguments, rows, and a student with its teacher for every kind of head."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import TrainingArguments

import tiny
from hfshrink import DistillationTrainer
from hfshrink.data import collate as stack


def arguments(**kwargs):
    return TrainingArguments(
        **{
            "output_dir": "out",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "optim": "sgd",  # Adam turns rounding errors of tiny gradients into whole steps
            **kwargs,
        }
    )


def rows(count=16, labels="class", length=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, tiny.VOCABULARY, (count, length), generator=generator).tolist()
    ids = [
        row[: 2 + i % (length - 1)] for i, row in enumerate(ids)
    ]  # lengths differ, so that means of means would be wrong
    made = {
        "class": [i % 2 for i in range(count)],
        "regression": [float(i) / count for i in range(count)],
        "multi": [[float(i % 2), float(i % 3 == 0)] for i in range(count)],
        "tokens": [[-100 if j == 0 else (i + j) % 2 for j in range(len(row))] for i, row in enumerate(ids)],
        "causal": ids,
    }
    data = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return Dataset.from_dict(data if labels is None else {**data, "labels": made[labels]})


def collate(batch):
    return stack({name: [row[name] for row in batch] for name in batch[0]}, tiny.model("bert"))


HEADS = {
    "class": ("bert", "text-classification", {}),
    "regression": ("bert", "text-classification", {"num_labels": 1}),
    "multi": ("bert", "text-classification", {"problem_type": "multi_label_classification"}),
    "tokens": ("bert", "token-classification", {}),
    "causal": ("llama", "text-generation", {}),
}


def no_dropout(family):
    if family == "llama":
        return {}
    return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pair(labels="class", **config):
    family, task, extra = HEADS[labels]
    settings = {**no_dropout(family), **extra, **config}
    return tiny.model(family, task, seed=1, num_hidden_layers=1, **settings), tiny.model(
        family, task, seed=2, **settings
    )


def trainer(student, teacher, data, cls=DistillationTrainer, losses=None, label_weight=0.5, **kwargs):
    return cls(
        student,
        arguments(**kwargs),
        teacher=teacher,
        losses=losses,
        label_weight=label_weight,
        train_dataset=data,
        data_collator=collate,
    )
