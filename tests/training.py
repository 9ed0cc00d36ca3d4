"""Tiny training runs: arguments, rows, a student with its teacher for every kind of head, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def distributed_arguments(folder, per_device, accumulation, **kwargs):
    """Arguments under which two processes must do what one does: rows in order, plain descent, logs of each step."""
    return arguments(
        output_dir=folder,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **kwargs,
    )


def launch(script, processes, *words):
    """What a script prints, started in processes of its own; it must print their number as `world=…`."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--standalone",
    ]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"world={processes}" in done.stdout.splitlines(), "the launcher started another number of processes"
    return done.stdout


def leave_together():
    """The end of a process among several: none goes while another still talks to it, which would abort that one."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
