"""A short distillation run; started by test_ddp.py, alone or under torchrun."""

import os
import sys

import test_trainer
from transformers import TrainingArguments

from hfshrink import DistillationTrainer

folder, per_device, accumulation, labels = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
student, teacher = test_trainer.pair(labels)
args = TrainingArguments(
    output_dir=folder,
    per_device_train_batch_size=per_device,
    gradient_accumulation_steps=accumulation,
    max_steps=2,
    learning_rate=0.1,
    lr_scheduler_type="constant",
    optim="sgd",
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
)
trainer = DistillationTrainer(
    student,
    args,
    teacher=teacher,
    train_dataset=test_trainer.rows(labels=labels),
    data_collator=test_trainer.collate,
)
trainer.train()
trainer.save_model(folder)
if trainer.is_world_process_zero():
    print(f"world={args.world_size}")
    for name, value in trainer.state.log_history[-2].items():
        if name.startswith("loss"):
            print(f"{name}={value}")
