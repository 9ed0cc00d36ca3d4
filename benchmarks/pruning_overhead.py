"""What `PruningTrainer` adds to a training step: its masks against a plain Trainer on the same batches.

Interleaved blocks; process CPU time and wall time per step from the end of the third step on, so that start-up does
not count; ratios of medians. Masks are chosen anew every twenty steps, as in a run of 500 steps, which makes 25
updates, and the schedule leaves them alone in the last 30 %, as it does there. For a quiet machine; two threads.
"""

import copy
import statistics
import time

import torch
import transformers
from common import save, timing_arguments
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import assets
from hfshrink import Pruning, PruningTrainer
from hfshrink.terminal import table

SKIPPED = 3  # steps that warm up
UPDATE_STEPS = 20
VARIANTS = {
    "Trainer": None,
    "magnitude 90 %": Pruning(0.9, update_steps=UPDATE_STEPS),
    "movement 90 %": Pruning(0.9, method="movement", update_steps=UPDATE_STEPS),
}


class Clock(TrainerCallback):
    """Seconds per step, (wall, CPU), from the end of step `SKIPPED` to that of the last one."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == SKIPPED:
            self.start = time.perf_counter(), time.process_time()

    def on_epoch_end(self, args, state, control, **kwargs):
        steps = state.global_step - SKIPPED
        self.seconds = (time.perf_counter() - self.start[0]) / steps, (time.process_time() - self.start[1]) / steps


def random_rows(number, length):
    ids = torch.randint(1000, 30000, (number, length), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [i % 2 for i in range(number)]})
    return rows.add_column("attention_mask", torch.ones_like(ids).tolist())


def time_block(model, rows, batch_size, pruning):
    """(wall, CPU) seconds per step of one pass over the rows, on a fresh copy of the model."""
    args = timing_arguments("runs/trainer", batch_size)
    clock, how = Clock(), {"train_dataset": rows}
    model = copy.deepcopy(model)
    trainer = PruningTrainer(model, args, pruning=pruning, **how) if pruning else Trainer(model, args, **how)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def main(steps=63, rounds=5, batch_size=32, length=32):
    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    model = AutoModelForSequenceClassification.from_pretrained(assets.minilm())
    rows = random_rows(steps * batch_size, length)
    times = {name: [] for name in VARIANTS}
    for number in range(rounds + 1):
        for name, pruning in VARIANTS.items():
            some = rows if number else rows.select(range(10 * batch_size))  # the first round warms up
            seconds = time_block(model, some, batch_size, pruning)
            if number:
                times[name].append(seconds)
    report(times, steps, batch_size, length)


def report(times, steps, batch_size, length):
    median = {name: [1e3 * statistics.median(t[i] for t in found) for i in (0, 1)] for name, found in times.items()}
    base = median["Trainer"]
    rows = [
        (name, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / base[0]:.3f}", f"{cpu / base[1]:.3f}")
        for name, (wall, cpu) in median.items()
    ]
    ranges = {name: [min(cpu for _, cpu in found), max(cpu for _, cpu in found)] for name, found in times.items()}
    text = table(("step", "wall ms", "CPU ms", "wall ÷ Trainer", "CPU ÷ Trainer"), rows)
    text += (
        f"\n\nMiniLM-L6, batch {batch_size} × {length} tokens, AdamW, 2 threads; medians of {len(times['Trainer'])} "
        f"interleaved blocks of {steps} steps, the first {SKIPPED} not counted; masks updated every {UPDATE_STEPS} "
        "steps while the sparsity rises, applied after every step."
    )
    save("pruning_overhead", {"milliseconds": median, "cpu_seconds_range": ranges}, text)


if __name__ == "__main__":
    main()
