"""Training for quantization against quantizing what was trained: MiniLM-L6 on movie reviews at 8, 4, 3 and 2 bits.

All numbers are of the fake-quantized PyTorch model, weights per channel and inputs in 8 bits, heads and tables in
float; one seed is exported to ONNX and compared. Each run (arm, candidate, seed) keeps its result and the scores of
every test row in runs/quantization/training and is skipped when it is there, so that the script can be stopped and
started again. Rates and the way of weight ranges are chosen on the validation rows with seed 0. One thread each.
"""

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import torch
import transformers
from common import ROOT, be_quiet, save
from distillation_data import movie, tokenizer_of_minilm

import hfshrink
from distillation import fit, measure, taught_rows, teacher_of
from hfshrink import CompressionTrainer, LogitLoss
from hfshrink.modules import head_names
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.state import FakeQuantization
from hfshrink.record import StepRecord, append_step
from hfshrink.terminal import table
from pruning import difference, shown, teachers

RUNS = ROOT / "runs" / "quantization" / "training"
STEPS = 94  # one epoch in batches of 32
SEEDS = 3
CALIBRATION = 256  # labelled rows that the ranges of what is not trained come from
FLOAT = 32


@dataclass(frozen=True)
class Arm:
    """One way of quantizing.

    Attributes:
        name: Of its folder.
        bits: Of the weights; FLOAT quantizes nothing.
        trained: Whether it is trained, by the dense model and the labels, for one epoch.
        candidates: (learning rate, weight ranges) to choose from.
    """

    name: str
    bits: int
    trained: bool
    candidates: tuple[tuple[float, str], ...] = ((0.0, "max"),)


ALL = ((2e-5, "max"), (5e-5, "max"), (5e-5, "lsq"))
ARMS = (
    *(Arm(f"post-{bits}", bits, trained=False) for bits in (4, 3, 2, 8)),
    Arm("trained-3", 3, True, ALL),
    Arm("trained-2", 2, True, ALL),
    Arm("trained-float", FLOAT, True, ((2e-5, "max"), (5e-5, "max"))),
    Arm("trained-4", 4, True, ALL),
    Arm("trained-8", 8, True, ((2e-5, "max"),)),
)


def folder_of(arm, candidate, seed):
    rate, ranges = candidate
    return RUNS / arm.name / f"{rate:g}-{ranges}" / f"seed-{seed}"


def run(arm, candidate, seed):
    """The result of one run, computed if it is not there."""
    folder = folder_of(arm, candidate, seed)
    if not (folder / "result.json").is_file():
        start = time.perf_counter()
        transformers.set_seed(seed)
        model = trained(arm, candidate, seed) if arm.trained else rounded(arm, seed)
        if arm.trained:
            model.save_pretrained(folder / "model")
        facts = {"rate": candidate[0], "weight_ranges": candidate[1], "bits": arm.bits, "seed": seed}
        seconds = round(time.perf_counter() - start)
        if arm.bits == FLOAT:
            measure(model, movie(), folder, **facts, seconds=seconds)
        else:
            with fake_quantized(model):
                measure(model, movie(), folder, **facts, seconds=seconds)
        print(f"{arm.name} {candidate} seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    return json.loads((folder / "result.json").read_text())


def trained(arm, candidate, seed):
    """The dense model after one more epoch under its own teaching, quantized or not."""
    teacher, (rate, ranges) = teacher_of(movie, seed), candidate
    how = {"trainer": CompressionTrainer, "teacher": teacher, "losses": [LogitLoss(temperature=2.0)]}
    how |= {"label_weight": 0.5, "quantization": None}
    if arm.bits != FLOAT:
        how["quantization"] = QAT(arm.bits, weight_ranges=ranges)
    student = copy.deepcopy(teacher).requires_grad_(True)
    return fit(student, taught_rows(movie, "train", seed), movie(), seed, rate, STEPS, **how)


def rounded(arm, seed):
    """The dense model rounded to nearest per channel, with the smallest and largest inputs of some training rows."""
    model, subject, settings = copy.deepcopy(teacher_of(movie, seed)).eval(), movie(), QAT(arm.bits)
    fake = FakeQuantization(model, settings)
    for site in fake.sites:
        site.module.train()  # only these watch their inputs; dropout stays off
    rows = subject.rows["train"].select(range(CALIBRATION))
    with fake.installed(), torch.no_grad():
        for first in range(0, CALIBRATION, subject.batch):
            batch = subject.collator([rows[i] for i in range(first, first + subject.batch)])
            model(**{name: value for name, value in batch.items() if name != "labels"})
    fake.after_step(0.0)
    fake.fold()
    step = StepRecord(
        "quantize",
        settings.method,
        settings=settings.given(),
        modules=[site.name for site in fake.sites],
        results={"ranges": fake.ranges()},
    )
    append_step(model, step)
    return model.eval()


def choose(arm):
    """The candidate that does best on the validation rows with seed 0, and all scores."""
    scores = {candidate: run(arm, candidate, 0)["validation"]["accuracy"] for candidate in arm.candidates}
    return max(scores, key=lambda candidate: scores[candidate]), scores


def is_complete(arm):
    """Whether all runs of an arm are there, so that it can be shown without training."""
    if not all((folder_of(arm, candidate, 0) / "result.json").is_file() for candidate in arm.candidates):
        return False
    return all((folder / "result.json").is_file() for folder in folders(arm))


def folders(arm):
    return [folder_of(arm, choose(arm)[0], seed) for seed in range(SEEDS)]


def compare_with_onnx(arm):
    """Accuracy of the exported graph of seed 0, and how often it answers as the PyTorch model does."""
    from hfshrink.quantization.graphs.exporting import export_float
    from hfshrink.quantization.training.exporting import apply_learned

    kept = folders(arm)[0] / "onnx.json"
    if not kept.is_file():
        model, rows = hfshrink.load(folders(arm)[0] / "model")[0].eval(), movie().rows["test"]
        tables = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)]
        graph, changed = apply_learned(
            export_float(model, tokenizer_of_minilm()), model, [*tables, *head_names(model)]
        )
        with fake_quantized(model):
            ours = hfshrink.evaluate(model, rows, ["accuracy"])
        theirs = hfshrink.evaluate(graph, rows, ["accuracy"])
        same = np.mean(np.asarray(ours.predictions) == np.asarray(theirs.predictions))
        found = {
            "arm": arm.name,
            "modules": len(changed),
            "ranges": len(learned_ranges(model)[0]),
            "pytorch": ours.scores[0].value,
            "onnx": theirs.scores[0].value,
            "same_answer": float(same),
        }
        kept.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(kept.read_text())


def numbers(arm, others):
    """What the table and the JSON say of an arm."""
    candidate, tried = choose(arm)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders(arm)]
    found = {
        "bits": arm.bits,
        "trained": arm.trained,
        "candidate": candidate,
        "validation": {f"{rate:g} {ranges}": score for (rate, ranges), score in tried.items()},
        "accuracy": [result["test"]["accuracy"] for result in results],
        "minus_dense": difference(teachers(SEEDS), folders(arm)),
        "seconds": [result["seconds"] for result in results],
    }
    rival = next((other for other in others if other.bits == arm.bits and not other.trained), None)
    if arm.trained and rival is not None:
        (lost, _, high), left = difference(teachers(SEEDS), folders(rival)), found["minus_dense"][0]
        found["minus_post_training"] = difference(folders(rival), folders(arm))
        found["recovered"] = 1 - left / lost if high < 0 else None  # where anything was lost for sure
    return found


def render(arms, graph):
    found = {arm.name: numbers(arm, arms) for arm in arms}
    dense = [json.loads((folder / "result.json").read_text())["test"]["accuracy"] for folder in teachers(SEEDS)]
    rows = [("float", "no", "", f"{np.mean(dense):.4f}", "", "", "")]
    for arm in found.values():
        bits = "float" if arm["bits"] == FLOAT else f"{arm['bits']}-bit weights, 8-bit inputs"
        how = f"{arm['candidate'][0]:g}, {arm['candidate'][1]}" if arm["trained"] else ""
        gain = shown(arm["minus_post_training"]) if "minus_post_training" in arm else ""
        recovered = f"{arm['recovered']:.0%}" if arm.get("recovered") is not None else ""
        score, lost = f"{np.mean(arm['accuracy']):.4f}", shown(arm["minus_dense"])
        rows.append((bits, "yes" if arm["trained"] else "no", how, score, lost, gain, recovered))
    header = (
        "numbers",
        "trained",
        "rate, ranges",
        "accuracy",
        "points − dense [95 %]",
        "− post-training",
        "recovered",
    )
    text = table(header, rows)
    text += (
        "\n\nMiniLM-L6 fine-tuned on 3,000 movie reviews (the dense model, 2 epochs), 2,000 test rows, 3 seeds. Not "
        f"trained: rounded to nearest per output channel, smallest and largest inputs of {CALIBRATION} training rows. "
        f"Trained: {STEPS} more steps of 32 rows with fake quantization, taught by the dense model and the labels; "
        "the float row says what such an epoch brings without it. Head and embedding tables stay float. Intervals "
        "resample seeds and rows, paired. Recovered: of the points that post-training quantization loses, where its "
        "interval excludes no loss."
    )
    if graph is not None:
        text += (
            f" ONNX graph with the learned ranges ({graph['arm']}, seed 0): accuracy {graph['onnx']:.4f} against "
            f"{graph['pytorch']:.4f} in PyTorch, the same answer on {graph['same_answer']:.2%} of the test rows."
        )
    save("quantization_training", {"dense": dense, "arms": found, "onnx": graph}, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these arms only")
    parser.add_argument("--render", action="store_true", help="train nothing: write the table of what is complete")
    options = parser.parse_args()
    be_quiet()
    for arm in () if options.render else ARMS:
        if arm.name in options.only:
            candidate, _ = choose(arm)
            for seed in range(SEEDS):
                run(arm, candidate, seed)
    finished = [arm for arm in ARMS if is_complete(arm)]
    exported = next((arm for arm in finished if arm.name == "trained-4"), None)
    render(finished, None if exported is None else compare_with_onnx(exported))


if __name__ == "__main__":
    main()
