"""A short distillation run; started by test_ddp.py, alone or under torchrun.

Words: folder, rows per process, accumulation steps, kind of head, and what is special about the run ("", "features",
"cache" or "fsdp").
"""

import sys

import torch
from transformers.distributed import DistributedConfig

import training
from hfshrink import DistillationTrainer
from hfshrink.distillation import HiddenLoss

folder, per_device, accumulation, labels, special = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:6]
student, teacher = training.pair(labels)
args = training.distributed_arguments(folder, per_device, accumulation, max_steps=2, max_grad_norm=0.0)
rows = training.rows(labels=labels)
if special == "fsdp" and args.world_size > 1:  # each process holds half of every weight
    if args.process_index == 0:
        student.save_pretrained(f"{folder}-whole")
    torch.distributed.barrier()
    student = type(student).from_pretrained(f"{folder}-whole", distributed_config=DistributedConfig(fsdp_size=2))
if special == "features":  # of equal length, since hidden states are compared by position
    rows = rows.map(lambda row: {"input_ids": (row["input_ids"] * 6)[:6], "attention_mask": [1] * 6})
trainer = DistillationTrainer(
    student,
    args,
    teacher=teacher,
    losses=[HiddenLoss(layers={0: 1})] if special == "features" else None,
    label_weight=0.0 if special == "features" else 0.5,
    teacher_cache=f"{folder}-cache" if special == "cache" else None,
    train_dataset=rows,
    eval_dataset=training.rows(16, labels, seed=1),
    data_collator=training.collate,
)
trainer.train()
sharded = type(next(trainer.model.parameters()).data).__name__ == "DTensor"
metrics = trainer.evaluate()
trainer.save_model(folder)
if trainer.is_world_process_zero():
    print(f"world={args.world_size}")
    print(f"sharded={int(sharded)}")
    for name, value in [*trainer.state.log_history[-3].items(), *metrics.items()]:
        if name.startswith(("loss", "eval_loss_", "eval_agreement", "eval_teacher_accuracy")):
            print(f"{name}={value}")
training.leave_together()
