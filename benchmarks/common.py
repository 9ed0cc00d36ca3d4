"""What every benchmark shares: the machine's name, the results folder, interval arithmetic."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "examples"))  # behind this folder, whose scripts have the same names


def machine():
    """Processor, cores and package versions: the circumstances of every number."""
    from hfshrink.evaluation.machine import processor_name
    from hfshrink.record import versions

    return {"processor": processor_name(), "cores": os.cpu_count(), "versions": versions()}


def be_quiet(threads=1):
    """No progress bars and no chatter of the libraries; so many threads."""
    import datasets
    import torch
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    torch.set_num_threads(threads)


def timing_arguments(folder, batch_size, **kwargs):
    """`TrainingArguments` of one pass that is timed: nothing is saved or logged."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-5,
        num_train_epochs=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **kwargs,
    )


def save(name, data, text):
    """Write a result as JSON and as Markdown, with the machine named."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine(), **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    where = data["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    (RESULTS / f"{name}.md").write_text(f"{text}\n\n{where['processor']}, {where['cores']} cores. {versions}.\n")
    print(text)


def paired_interval(correct_a, correct_b, resamples=5000, seed=0):
    """Mean accuracy difference b − a over all seeds, with a 95 % interval of resampled seeds and rows.

    Args:
        correct_a: Booleans of shape (seeds, rows): which rows a got right.
        correct_b: The same of b, row by row.
        resamples: Number of resampled means.
        seed: Of the resampling.
    """
    difference = np.asarray(correct_b, float) - np.asarray(correct_a, float)  # (seeds, rows)
    generator = np.random.default_rng(seed)
    seeds, rows = difference.shape
    means = [
        difference[generator.integers(seeds, size=seeds)][:, generator.integers(rows, size=rows)].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)
