"""A short run of training for quantization; started by test_ddp.py, alone or under torchrun.

Words: folder, rows per process, accumulation steps, "max" or "lsq", and "taught" for a CompressionTrainer.
"""

import sys

import training
from hfshrink import CompressionTrainer
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import QATTrainer

folder, per_device, accumulation, ranges, special = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6]
student, teacher = training.pair("class")
args = training.distributed_arguments(folder, per_device, accumulation, max_steps=4)
taught = special == "taught"
learned = {"weight_ranges": "lsq", "activation_ranges": "lsq"} if ranges == "lsq" else {}
trainer = (CompressionTrainer if taught else QATTrainer)(
    student,
    args,
    quantization=QAT(4, **learned),
    train_dataset=training.rows(32),
    data_collator=training.collate,
    **({"teacher": teacher} if taught else {}),
)
trainer.train()
if args.process_index == 0:
    student.save_pretrained(folder)
    print(f"world={args.world_size}")
training.leave_together()
