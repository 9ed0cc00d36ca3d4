"""A training run that makes a data map; started by test_datamap.py, alone or under torchrun.

Words: folder, rows per process, kind of head. Several processes stop after two epochs and go on from the checkpoint.
"""

import sys
from pathlib import Path

from transformers import Trainer

import training
from hfshrink.selection.datamap_callback import DataMapCallback


def train(folder, per_device, labels, epochs, resume=None):
    """The callback's and the Trainer's arguments after a run."""
    network, _ = training.pair(labels)
    args = training.distributed_arguments(
        folder,
        per_device,
        1,
        max_steps=-1,
        num_train_epochs=epochs,
        save_strategy="epoch",
        average_tokens_across_devices=labels == "causal",  # the Trainer would double the loss of classes
    )
    callback = DataMapCallback(batch_size=3)
    Trainer(
        network,
        args,
        train_dataset=training.rows(16, labels),
        data_collator=training.collate,
        callbacks=[callback],
    ).train(resume_from_checkpoint=resume)
    return callback, args


if __name__ == "__main__":
    folder, per_device, labels = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if per_device < 4:
        callback, args = train(folder, per_device, labels, 2)
        if args.process_index == 0:
            (Path(folder) / "data_map" / "epochs" / "epoch-00002.safetensors").unlink()
        callback, args = train(folder, per_device, labels, 3, f"{folder}/checkpoint-8")
    else:
        callback, args = train(folder, per_device, labels, 3)
    if args.process_index == 0:
        print(f"world={args.world_size}")
    training.leave_together()
