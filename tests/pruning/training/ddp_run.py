"""A short pruning run; started by test_ddp.py, alone or under torchrun.

Words: folder, rows per process, accumulation steps, method, structure, and "taught" for a CompressionTrainer.
"""

import sys

import training
from hfshrink import CompressionTrainer, Pruning, PruningTrainer

folder, per_device, accumulation, method, structure, special = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:7]
student, teacher = training.pair("class")
args = training.distributed_arguments(folder, per_device, accumulation, max_steps=4)
taught = special == "taught"
trainer = (CompressionTrainer if taught else PruningTrainer)(
    student,
    args,
    pruning=Pruning(0.5, structure, method, warmup=0.0, update_steps=1),
    train_dataset=training.rows(32),
    data_collator=training.collate,
    **({"teacher": teacher} if taught else {}),
)
trainer.train()
if args.process_index == 0:
    student.save_pretrained(folder)
    print(f"world={args.world_size}")
training.leave_together()
