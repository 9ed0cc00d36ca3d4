"""What `DistillationTrainer` adds to a training step: its step against a bare loop of the same arithmetic.

Both run the same batches: student forward and backward, teacher forward, the same loss, AdamW. The Trainer's own share
is shown by a plain Trainer against the bare student. Interleaved blocks, process CPU time and wall time, ratios of
medians.
"""

import statistics
import time

import torch
from common import save, timing_arguments


class Clock:
    """Seconds per step: (wall, CPU)."""

    def __enter__(self):
        self.start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error):
        self.wall, self.cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def main(steps=10, rounds=7, batch_size=32, length=32):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, Trainer

    import assets
    import hfshrink

    torch.set_num_threads(2)
    teacher = AutoModelForSequenceClassification.from_pretrained(assets.minilm()).eval().requires_grad_(False)
    student = hfshrink.make_student(teacher, num_layers=3).train()
    ids = torch.randint(1000, 30000, (steps * batch_size, length), generator=torch.Generator().manual_seed(0))
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "labels": [i % 2 for i in range(len(ids))]})
    rows = rows.add_column("attention_mask", torch.ones_like(ids).tolist())
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": torch.arange(batch_size) % 2}
        for part in ids.split(batch_size)
    ]

    def bare(with_teacher):
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        loss_of = hfshrink.LogitLoss()
        for batch in batches:
            outputs = student(**batch)
            loss = outputs.loss
            if with_teacher:
                with torch.no_grad():
                    theirs = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                loss = 0.5 * loss + loss_of(outputs, theirs, head="single_label", mask=None)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def trainer(cls, **kwargs):
        args = timing_arguments("runs/trainer", batch_size)
        return cls(student, args, train_dataset=rows, **kwargs)

    plain, distilling = trainer(Trainer), trainer(hfshrink.DistillationTrainer, teacher=teacher)
    variants = {
        "bare student": lambda: bare(False),
        "Trainer": plain.train,
        "bare student + teacher": lambda: bare(True),
        "DistillationTrainer": distilling.train,
    }
    times = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            with Clock() as clock:
                run()
            if number:  # the first round warms up
                times[name].append((clock.wall / steps, clock.cpu / steps))
    report(times, steps, batch_size, length)


def report(times, steps, batch_size, length):
    from hfshrink.terminal import table

    median = {name: [1e3 * statistics.median(t[i] for t in found) for i in (0, 1)] for name, found in times.items()}
    baseline = {"Trainer": "bare student", "DistillationTrainer": "bare student + teacher"}
    rows = []
    for name, (wall, cpu) in median.items():
        base = median[baseline.get(name, name)]
        rows.append((name, f"{wall:.1f}", f"{cpu:.1f}", f"{wall / base[0]:.3f}", f"{cpu / base[1]:.3f}"))
    text = table(("step", "wall ms", "CPU ms", "wall ÷ bare", "CPU ÷ bare"), rows)
    text += (
        f"\n\nMiniLM-L6 teacher, 3-layer student, batch {batch_size} × {length} tokens, AdamW, 2 threads; medians of "
        f"{len(times['Trainer'])} interleaved blocks of {steps} steps, Trainer start-up included."
    )
    save("step_overhead", {"milliseconds": median}, text)


if __name__ == "__main__":
    main()
