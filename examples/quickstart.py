"""The main job on real input: fine-tune a teacher, distil a student, quantize it, measure all of them, write the card.

`make demo` runs it (12 minutes on 2 cores, 8 when the teacher is cached); `make demo ARGS=--quick` takes 2 minutes and
proves only that everything works. Models, card, table and plot are written to `--output` (default: runs/quickstart).
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import assets
import hfshrink
from hfshrink.distillation import add_teacher_logits
from hfshrink.evaluation import Evaluation, measure_latencies
from hfshrink.record import Measurement, table

matplotlib.use("Agg")
LABELS = {0: "negative", 1: "positive"}
TEACHER = {"num_train_epochs": 2, "learning_rate": 5e-5}
STUDENT = {"num_train_epochs": 4, "learning_rate": 1e-4}  # both students; chosen on the validation rows
LAYERS = [0, 2, 5]
LENGTH = 128  # tokens of the timed inputs


def train(model, rows, tokenizer, seed, trainer=transformers.Trainer, **settings):
    """Train in place; the same settings for every model, so that only what is passed differs."""
    distillation = {name: settings.pop(name) for name in ("losses", "label_weight") if name in settings}
    args = TrainingArguments(
        output_dir="runs/trainer",
        per_device_train_batch_size=32,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=not sys.stderr.isatty(),
        **settings,
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer(
        model, args, train_dataset=rows, data_collator=collator, processing_class=tokenizer, **distillation
    ).train()
    return model.eval()


def fine_tuned_teacher(tokenizer, rows, seed, cache):
    """MiniLM-L6 fine-tuned on the reviews, kept for the next run."""
    if not (cache / "model.safetensors").is_file():
        transformers.set_seed(seed)
        labels = {"id2label": LABELS, "label2id": {name: number for number, name in LABELS.items()}}
        teacher = AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **labels)
        train(teacher, rows, tokenizer, seed, **TEACHER)
        teacher.save_pretrained(cache)
        tokenizer.save_pretrained(cache)
    return AutoModelForSequenceClassification.from_pretrained(cache)


def students(teacher, tokenizer, rows, seed):
    """The same student, trained on the labels alone and with the teacher's logits besides.

    Equal steps and settings.
    """
    plain = hfshrink.make_student(teacher, layers=LAYERS)
    train(plain, rows, tokenizer, seed, **STUDENT)
    distilled = hfshrink.make_student(teacher, layers=LAYERS)
    taught = add_teacher_logits(rows, teacher, tokenizer)  # the teacher runs once, not in every epoch
    with_teacher = {"losses": [hfshrink.LogitLoss(temperature=2.0)], "label_weight": 0.5}
    train(distilled, taught, tokenizer, seed, hfshrink.DistillationTrainer, **with_teacher, **STUDENT)
    return plain, distilled


def measured(folders, test):
    """(evaluation, measurement) of each folder; latencies interleaved in one run, one thread."""
    models = {name: hfshrink.load(folder) for name, folder in folders.items()}
    found = {}
    for name, (model, tokenizer) in models.items():
        evaluation = hfshrink.evaluate(model, test, processor=tokenizer)
        size = hfshrink.profile(folders[name], sequence_length=LENGTH, batch_sizes=(1,), repeats=5)
        found[name] = (evaluation, size.merged(evaluation.to_measurement()))
    times = measure_latencies(
        {name: model for name, (model, _) in models.items()}, sequence_length=LENGTH, batch_sizes=(1,), repeats=40
    )
    return {name: (e, m.merged(Measurement(latency=times[name]))) for name, (e, m) in found.items()}


def row(name, measurement, baseline):
    """One line of the table; `baseline` is the teacher's float measurement in the same runtime."""
    latency, fp32 = measurement.latency[0], baseline.latency[0]
    return (
        name,
        latency.runtime,
        str(measurement.scores[0]),
        "" if measurement.parameters is None else f"{measurement.parameters / 1e6:.1f} M",
        f"{measurement.size_bytes / 1e6:.1f}",
        f"{latency.cpu_ms:.1f}",
        f"{fp32.cpu_ms / latency.cpu_ms:.2f} x",
    )


HEADER = ("model", "runtime", "accuracy [95 %]", "parameters", "file MB", "CPU ms", "speed-up, same runtime")


def plot(rows, path):
    """Accuracy against size; the bubble is the CPU time of one forward pass."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, m in rows.items():
        size, score, cpu = m.size_bytes / 1e6, m.scores[0], m.latency[0].cpu_ms
        points = axes.scatter(size, score.value, s=12 * cpu, alpha=0.5)
        axes.errorbar(
            size, score.value, [[score.value - score.low], [score.high - score.value]], c=points.get_facecolor()[0]
        )
        axes.annotate(
            f"{name}\n{cpu:.1f} ms", (size, score.value), xytext=(8, 4), textcoords="offset points", fontsize=8
        )
    axes.set(
        xlabel="file size (MB)", ylabel="accuracy", title="Movie reviews, 2,000 test rows; bubble: CPU ms, 1 thread"
    )
    axes.margins(x=0.25, y=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rows and one epoch: shows that it works, not how well"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="folder for models, card and plot"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    reviews = assets.movie_reviews()
    if options.quick:
        reviews["train"], reviews["test"] = reviews["train"].select(range(600)), reviews["test"].select(range(400))
        TEACHER["num_train_epochs"] = STUDENT["num_train_epochs"] = 1
    rows = reviews["train"].map(lambda r: tokenizer(r["text"], truncation=True, max_length=64), remove_columns="text")
    rows = rows.rename_column("label", "labels")
    output = options.output
    print("teacher: 6 layers, fine-tuned …", flush=True)
    cache = assets.CACHE / f"teacher-{'quick-' * options.quick}{options.seed}"
    teacher = fine_tuned_teacher(tokenizer, rows, options.seed, cache)
    print("students: 3 layers, without and with distillation …", flush=True)
    plain, distilled = students(teacher, tokenizer, rows, options.seed)
    folders = {"teacher": cache, "student, labels only": output / "plain", "student, distilled": output / "distilled"}
    for model, name in ((plain, "plain"), (distilled, "distilled")):
        model.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)
    print("export and quantize …", flush=True)
    folders["teacher, ONNX fp32"] = output / "teacher-onnx"
    hfshrink.quantize(cache, "onnx-fp32", output_dir=output / "teacher-onnx", overwrite=True)
    folders["student, distilled, int8"] = output / "int8"
    hfshrink.quantize(
        output / "distilled",
        "onnx-int8",
        output_dir=output / "int8",
        calibration=reviews["validation"],
        overwrite=True,
    )
    print("measure on the test rows …", flush=True)
    found: dict[str, tuple[Evaluation, Measurement]] = measured(folders, reviews["test"])
    report_and_card(found, output)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Models, card and plot: {output}/")


def report_and_card(found, output):
    """The table, the plot, the paired comparison, and the card from the record."""
    measurements = {name: m for name, (_, m) in found.items()}
    fp32 = {
        name: measurements["teacher, ONNX fp32" if m.latency[0].runtime == "onnxruntime" else "teacher"]
        for name, m in measurements.items()
    }
    text = table(HEADER, [row(name, m, fp32[name]) for name, m in measurements.items()])
    print(f"\n{text}\n\nCPU ms: batch 1, {LENGTH} tokens, 1 thread, variants interleaved.\n")
    for name, other in (("student, labels only", "student, distilled"), ("teacher", "student, distilled, int8")):
        print(f"{name} -> {other}\n{hfshrink.compare(found[name][0], found[other][0])}\n")
    plot(measurements, output / "accuracy-size.png")
    (output / "table.md").write_text(text + "\n")
    report = hfshrink.report(output / "int8")
    import dataclasses

    report = dataclasses.replace(
        report, base=measurements["teacher, ONNX fp32"], compressed=measurements["student, distilled, int8"]
    )
    report.save(output / "int8")
    hfshrink.model_card(report, model_name="MiniLM-L3-movie-reviews-int8", license="apache-2.0", language="en").save(
        output / "int8" / "README.md"
    )


if __name__ == "__main__":
    main()
