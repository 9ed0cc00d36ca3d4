"""One-shot pruning of SmolLM2-135M: perplexity without any training.

Calibration is 64 × 128 tokens of BBC news; perplexity is measured on editorials of the New York Times. Each arm is
deterministic, keeps its result in runs/pruning/language and is skipped when it is there. One thread.
"""

import argparse
import json
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import datasets
import numpy as np
import torch
import transformers
from common import ROOT, be_quiet, save
from distillation_table import paired_difference

import assets
import hfshrink
from hfshrink.evaluation.measures import resolve_measures
from hfshrink.evaluation.profiling import count_macs
from hfshrink.pruning.units.weights import prunable
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "pruning" / "language"
ROWS, LENGTH = 16, 256  # of the text that perplexity is measured on
CALIBRATION = (64, 128)
HALF, PAIRS = {"sparsity": 0.5}, {"structure": "2:4"}
UNITS, LAYERS = {"sparsity": 0.2, "structure": "heads+neurons"}, {"sparsity": 0.2, "structure": "layers"}
ARMS = {
    "half-magnitude-row": (
        "50 % of the weights",
        "magnitude, per row",
        {**HALF, "method": "magnitude", "scope": "row"},
    ),
    "half-magnitude": ("50 % of the weights", "magnitude, global", {**HALF, "method": "magnitude"}),
    "half-wanda": ("50 % of the weights", "Wanda", {**HALF, "method": "wanda"}),
    "half-sparsegpt": ("50 % of the weights", "SparseGPT", {**HALF, "method": "sparsegpt"}),
    "pairs-magnitude": ("2:4", "magnitude", {**PAIRS, "method": "magnitude"}),
    "pairs-wanda": ("2:4", "Wanda", {**PAIRS, "method": "wanda"}),
    "pairs-sparsegpt": ("2:4", "SparseGPT", {**PAIRS, "method": "sparsegpt"}),
    "layers-influence": ("6 of 30 layers", "influence", {**LAYERS, "method": "influence"}),
    "layers-spread": ("6 of 30 layers", "spread", {**LAYERS, "method": "spread"}),
    "units-magnitude": ("20 % of heads and neurons", "magnitude", {**UNITS, "method": "magnitude"}),
    "units-search": ("20 % of heads and neurons", "search", {**UNITS, "method": "search"}),
}
"""Arm -> what goes, method, keywords of `prune`."""


def tokens(texts, rows, length):
    """The first rows × length tokens of all texts in a row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.smollm2())
    ids = tokenizer("\n".join(texts), verbose=False)["input_ids"][: rows * length]
    return torch.tensor(ids).view(rows, length)


def test_rows():
    ids = tokens(assets.nyt_snippets()["test"]["text"], ROWS, LENGTH).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def dense_model():
    return transformers.AutoModelForCausalLM.from_pretrained(assets.smollm2()).eval()


def run(name):
    """The result of an arm, or of "dense", made if it is not there."""
    folder = RUNS / name
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    model, start = dense_model(), (time.perf_counter(), time.process_time())
    if name != "dense":
        rows = [{"input_ids": part} for part in tokens(assets.bbc_news()["train"]["text"], *CALIBRATION).split(8)]
        hfshrink.prune(model, **ARMS[name][2], calibration=rows)
    result = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1], **sizes(model)}
    found = hfshrink.evaluate(model, test_rows(), "perplexity")
    folder.mkdir(parents=True, exist_ok=True)
    statistics = resolve_measures("perplexity", "language")[0].statistics(found.predictions, found.references)
    np.savez_compressed(folder / "rows.npz", perplexity=statistics)
    result |= {"perplexity": found.main.value, "results": [step.results for step in hfshrink.report(model).steps]}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}: {found.main.value:.2f}, {result['cpu_seconds']:.0f} CPU s", flush=True)
    return result


def sizes(model):
    """Parameters, the share of zeros in the weights that pruning may touch, and MACs for 128 tokens."""
    weights = [module.weight for module in prunable(model).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    ids = torch.ones(1, 128, dtype=torch.long)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "zeros": zeros,
        "macs": count_macs(model.model, {"input_ids": ids, "use_cache": False}),  # without the head
    }


def interval(name):
    """Perplexity minus that of the dense model, with a 95 % interval of resampled rows."""
    measure = resolve_measures("perplexity", "language")[0]
    before, after = (np.load(RUNS / arm / "rows.npz")["perplexity"][None] for arm in ("dense", name))
    return paired_difference(measure, "perplexity", before, after)


def render(found):
    dense = found["dense"]
    lines = []
    for name, result in found.items():
        what, method = ARMS[name][:2] if name in ARMS else ("dense", "")
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*result["minus_dense"]) if name in ARMS else ""
        share = f"{result['macs'] / dense['macs']:.2f}"
        size = f"{result['parameters'] / 1e6:.1f} M"
        lines.append((what, method, f"{result['perplexity']:.2f}", change, f"{result['zeros']:.1%}", share, size))
    header = ("pruned", "method", "perplexity", "− dense [95 %]", "zeros", "MACs of the layers", "parameters")
    text = (
        f"{table(header, lines)}\n\nSmolLM2-135M, {ROWS} × {LENGTH} tokens of NYT editorials; calibration "
        f"{CALIBRATION[0]} × {CALIBRATION[1]} tokens of BBC news; no training. Deterministic, one run: intervals "
        f"resample the {ROWS} rows. The dense weights lie on a grid of 4 bits, and {dense['zeros']:.2%} of those in "
        "the layers are zeros already. Zeros save neither bytes nor time."
    )
    save("pruning_language", {"arms": found}, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["dense", *ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    options = parser.parse_args()
    be_quiet()
    for name in options.only:
        run(name)
    done = [name for name in names if (RUNS / name / "result.json").is_file()]
    extra = {name: {} if name == "dense" else {"minus_dense": interval(name)} for name in done}
    render({name: {**run(name), **extra[name]} for name in done})


if __name__ == "__main__":
    main()
