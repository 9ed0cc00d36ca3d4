"""One-shot pruning of MiniLM-L6 on movie reviews: what is left of the accuracy without training, and what is gained.

Each run (kind, method, seed) keeps its result and which test rows it got right in runs/pruning/oneshot and is skipped
when it is there. The calibration data are training rows. The method of dropping layers that is trained on afterwards
is chosen on the validation rows with seed 0; the test rows choose nothing. One thread. What is gained in time, and
what pruning itself costs, is in pruning_speed.py.
"""

import argparse
import copy
import json
import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import torch
import transformers
from common import be_quiet, paired_interval
from distillation_data import movie, tokenizer_of_minilm
from pruning_oneshot_table import render

import assets
import hfshrink
from distillation import RUNS as DISTILLED
from distillation import fit, signal, taught_rows, teacher_of
from hfshrink.calibration import batches
from hfshrink.evaluation.profiling import count_macs, weight_bytes
from hfshrink.pruning.search.tuning import search_and_tune
from hfshrink.pruning.units.cutting import cut_units
from hfshrink.pruning.units.groups import find_units
from pruning import EPOCH, RUNS

SEEDS = 3
SEARCHED, FEW = 2048, 512  # training rows that heads and neurons, and layers, are scored on
UNIT_METHODS = ("search", "magnitude", "search-unscaled", "fisher", "random")
LAYER_METHODS = ("spread", "top", "influence", "random")
UNITS = {"structure": "heads+neurons"}
KINDS = {
    "units-50": ("heads and neurons, 50 % off", {"sparsity": 0.5, **UNITS}, UNIT_METHODS),
    "units-40": ("heads and neurons, 40 % off", {"sparsity": 0.4, **UNITS}, ("search", "magnitude", "random")),
    "layers": ("2 of 6 layers off", {"sparsity": 1 / 3, "structure": "layers"}, LAYER_METHODS),
    "layers-tuned": ("2 of 6 layers off, then one epoch", {}, ("chosen",)),
    "vocabulary": ("vocabulary trimmed", {}, ("corpus",)),
}
"""Kind -> title, keywords of `prune`, methods."""
BASELINES = {"units-50": "magnitude", "units-40": "magnitude", "layers": "random"}
KEPT = ("units-50/search", "units-40/search", "layers-tuned/chosen", "vocabulary/corpus")
"""Runs whose model of seed 0 is kept, for pruning_speed.py."""


def folder_of(kind, method, seed):
    return RUNS / "oneshot" / kind / method / f"seed-{seed}"


def correct(folders):
    """Which test rows each seed got right: booleans (seeds, rows)."""
    return np.stack([np.load(folder / "rows.npz")["accuracy"][:, 0] > 0.5 for folder in folders])


def dense_folder(seed):
    return DISTILLED / "teachers" / "movie" / f"seed-{seed}"


def prune(model, kind, method, seed, rows):
    """Prune a copy of the dense model as the kind and the method say."""
    keywords = KINDS[kind][1]
    if method == "search-unscaled":
        return search_unscaled(model, keywords["sparsity"], rows)
    few = rows if kind.startswith("units") else rows.select(range(FEW))
    return hfshrink.prune(model, **keywords, method=method, calibration=few, seed=seed)


def search_unscaled(model, sparsity, rows):
    """The method "search" of `prune` without its last stage."""
    found = list(batches(rows, model, tokenizer_of_minilm(), batch_size=16, samples=SEARCHED))
    masks = [batch["attention_mask"] for batch in found]
    length = round(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks))
    groups = find_units(model, "heads+neurons")
    kept, _ = search_and_tune(model, groups, sparsity, found, sequence_length=length, rescale=False)
    cut_units(model, groups, kept)
    return model


def tune_layers(seed):
    """Drop layers in the way that does best on the validation rows with seed 0, then train for one epoch."""
    scores = {method: run("layers", method, 0)["validation"] for method in KINDS["layers"][2]}
    best = max(scores, key=lambda method: scores[method])
    subject, teacher = movie(), teacher_of(movie, seed)
    model = prune(copy.deepcopy(teacher), "layers", best, seed, subject.rows["train"])
    how = {"trainer": hfshrink.DistillationTrainer, "teacher": teacher, **signal("logits")}
    rows = taught_rows(movie, "train", seed)
    transformers.set_seed(seed)
    return fit(model, rows, subject, seed, 5e-5, EPOCH, **how), {"chosen": best, "validation_of_all": scores}


def trim(model):
    """Trim to the training and the unlabelled texts; also the tokenizer, and how it reads the test texts."""
    texts = assets.movie_reviews(train=3000)
    corpus = [*texts["train"]["text"], *texts["unlabelled"]["text"]]
    model, tokenizer = hfshrink.trim_vocabulary(model, corpus, tokenizer_of_minilm())
    known = tokenizer.get_vocab()
    read = [tokenizer_of_minilm().tokenize(text) for text in texts["test"]["text"]]
    changed = [sum(piece not in known for piece in pieces) for pieces in read]
    facts = {
        **{name: value for name, value in hfshrink.report(model).steps[-1].results.items() if "vocabulary" in name},
        "changed_test_tokens": sum(changed) / sum(len(pieces) for pieces in read),
        "changed_test_rows": float(np.mean([number > 0 for number in changed])),
    }
    return model, tokenizer, facts


def run(kind, method, seed):
    """The result of one run, made if it is not there."""
    folder = folder_of(kind, method, seed)
    if (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    subject, start = movie(), (time.perf_counter(), time.process_time())
    rows, tokenizer, facts = subject.rows, tokenizer_of_minilm(), {}
    if kind == "layers-tuned":
        model, facts = tune_layers(seed)
    elif kind == "vocabulary":
        model, tokenizer, facts = trim(copy.deepcopy(teacher_of(movie, seed)))
        rows = assets.movie_reviews(train=3000)  # texts, to be read by the new tokenizer
    else:
        model = prune(copy.deepcopy(teacher_of(movie, seed)), kind, method, seed, rows["train"])
    seconds = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    folder.mkdir(parents=True, exist_ok=True)
    if seed == 0 and f"{kind}/{method}" in KEPT:
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        facts["weight_bytes"] = weight_bytes(folder / "model")
        facts["tokenizer_bytes"] = (folder / "model" / "tokenizer.json").stat().st_size
    if kind.startswith("layers"):
        facts["validation"] = hfshrink.evaluate(model, rows["validation"], "accuracy").main.value
    order = np.argsort([len(ids) for ids in subject.rows["test"]["input_ids"]], kind="stable")  # little padding
    how = {"processor": tokenizer, "max_length": 64}
    found = hfshrink.evaluate(model, rows["test"].select(order), "accuracy", **how)
    np.savez_compressed(folder / "rows.npz", accuracy=found.correct()[np.argsort(order), None])
    result = {**facts, **sizes(model), **seconds, "test": found.main.value}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{kind} {method} seed {seed}: {found.main.value:.4f}, {seconds['cpu_seconds']:.0f} CPU s", flush=True)
    return result


def sizes(model):
    """Parameters, those that are not zero, and MACs of the encoder for 128 tokens."""
    hidden = torch.zeros(1, 128, model.config.hidden_size)
    parameters = list(model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzero_parameters": sum(int(p.count_nonzero()) for p in parameters),
        "encoder_macs": count_macs(model.base_model.encoder, {"hidden_states": hidden}),
    }


def arm_numbers(kind, method):
    """What the seeds that are there reached, with intervals; None where there are none."""
    seeds = [seed for seed in range(SEEDS) if (folder_of(kind, method, seed) / "result.json").is_file()]
    if not seeds:
        return None
    results = [run(kind, method, seed) for seed in seeds]
    ours = correct([folder_of(kind, method, seed) for seed in seeds])
    dense = correct([dense_folder(seed) for seed in seeds])
    minus = None
    baseline = [folder_of(kind, BASELINES.get(kind, ""), seed) for seed in seeds]
    if method != BASELINES.get(kind) and all((folder / "rows.npz").is_file() for folder in baseline):
        minus = paired_interval(correct(baseline), ours)
    return {
        "title": KINDS[kind][0],
        "seeds": seeds,
        "minus_dense": paired_interval(dense, ours),
        "minus_baseline": minus,
        "results": results,
    }


def collect():
    """All that is there: the dense model and the arms."""
    accuracy = correct([dense_folder(seed) for seed in range(SEEDS)]).mean(1)
    arms = {f"{kind}/{method}": arm_numbers(kind, method) for kind, row in KINDS.items() for method in row[2]}
    dense = {**sizes(teacher_of(movie, 0)), "test": accuracy.tolist()}
    return {"dense": dense, "arms": {name: arm for name, arm in arms.items() if arm is not None}}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS), help="run these kinds only")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    parser.add_argument("--render", action="store_true", help="only write the tables of what is there")
    options = parser.parse_args()
    be_quiet()
    if not options.render:
        for seed in options.seeds:
            for kind in options.only:
                for method in KINDS[kind][2]:
                    run(kind, method, seed)
    render(collect())


if __name__ == "__main__":
    main()
