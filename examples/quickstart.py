"""The main job on real input: fine-tune a teacher, distil a student, quantize it, measure all of them, write the card.

`make demo` runs it; `make demo ARGS=--quick` takes a few rows and shows that it works, not how well. Models, card,
table and plot are written to `--output`.
"""

import argparse
import dataclasses
import logging
import sys
import time
import warnings
from pathlib import Path

import datasets
import matplotlib
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import assets
import hfshrink
from hfshrink.distillation import cache_teacher
from hfshrink.evaluation import measure_latencies
from hfshrink.measurement import Measurement
from hfshrink.saving import save_aside
from hfshrink.terminal import table
from publishing import push_and_load

LABELS = ("negative", "positive")
TEACHER = {"num_train_epochs": 2, "learning_rate": 5e-5}
STUDENT = {"num_train_epochs": 4}
PLAIN_RATE, DISTILLED_RATE = 1e-4, 2e-4  # of these two, each did better in one run on the validation rows
TOKENS = 128  # length of the timed inputs
HEADER = ("model", "runtime", "accuracy [95 %]", "parameters", "file MB", "CPU ms", "speed-up, same runtime")


def train(model, rows, tokenizer, seed, trainer=transformers.Trainer, distillation=(), **settings):
    """Train in place, every model in the same way."""
    args = TrainingArguments(
        output_dir="runs/trainer",
        per_device_train_batch_size=32,
        train_sampling_strategy="group_by_length",
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
    common = {"train_dataset": rows, "data_collator": collator, "processing_class": tokenizer}
    trainer(model, args, **common, **dict(distillation)).train()
    return model.eval()


def encoded_reviews(tokenizer, quick=False):
    """The reviews, and the training rows as tokens."""
    reviews = assets.movie_reviews()
    if quick:
        reviews["train"], reviews["test"] = reviews["train"].select(range(640)), reviews["test"].select(range(400))
    rows = reviews["train"].map(lambda r: tokenizer(r["text"], truncation=True, max_length=64), remove_columns="text")
    return reviews, rows.rename_column("label", "labels")


def fine_tuned_teacher(tokenizer, rows, seed, folder):
    """MiniLM-L6 fine-tuned on the reviews; kept in `folder` for the next run."""
    if not folder.is_dir():
        transformers.set_seed(seed)
        names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
        teacher = AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **names)
        train(teacher, rows, tokenizer, seed, **TEACHER)
        with save_aside(folder) as aside:
            teacher.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def train_students(teacher, tokenizer, rows, seed, output):
    """The same student twice, on the same rows for as many steps: from the labels alone, and from the teacher too."""
    plain = hfshrink.make_student(teacher, num_layers=3)
    train(plain, rows, tokenizer, seed, learning_rate=PLAIN_RATE, **STUDENT)
    distilled = hfshrink.make_student(teacher, num_layers=3)
    taught = cache_teacher(rows, teacher)  # the teacher runs once, not in every epoch
    how = {"losses": [hfshrink.LogitLoss(temperature=2.0)], "label_weight": 0.5}
    train(
        distilled, taught, tokenizer, seed, hfshrink.DistillationTrainer, how, learning_rate=DISTILLED_RATE, **STUDENT
    )
    for student, name in ((plain, "plain"), (distilled, "distilled")):
        student.save_pretrained(output / name)
        tokenizer.save_pretrained(output / name)


def quantize_all(teacher_folder, validation, output):
    """Float ONNX of the teacher, the baseline of the runtime, and int8 ONNX of the distilled student."""
    hfshrink.quantize(teacher_folder, "onnx-fp32", output_dir=output / "teacher-onnx", overwrite=True)
    quantized = {"calibration": validation, "output_dir": output / "int8", "overwrite": True}
    hfshrink.quantize(output / "distilled", "onnx-int8", **quantized)
    return {
        "teacher": teacher_folder,
        "teacher, ONNX fp32": output / "teacher-onnx",
        "student, labels only": output / "plain",
        "student, distilled": output / "distilled",
        "student, distilled, ONNX int8": output / "int8",
    }


def measure(folders, test):
    """(evaluation, measurement) of each model on the test rows; latencies interleaved in one run, one thread."""
    models = {name: hfshrink.load(folder)[0] for name, folder in folders.items()}
    times = measure_latencies(models, sequence_length=TOKENS, batch_sizes=(1,), repeats=40)
    found = {}
    for name, folder in folders.items():
        evaluation = hfshrink.evaluate(folder, test)
        sizes = hfshrink.profile(folder, sequence_length=TOKENS, batch_sizes=(), memory=False)
        steps = hfshrink.report(folder).steps
        known = Measurement(parameters=steps[-1].after.parameters if steps else None, latency=times[name])
        found[name] = evaluation, known.merged(sizes).merged(evaluation.to_measurement())
    return found


def results_table(measurements):
    """One row a model; speed-ups are against the teacher's floats in the same runtime."""
    fp32 = {
        measurements[name].latency[0].runtime: measurements[name].latency[0].cpu_ms for name in list(measurements)[:2]
    }
    rows = []
    for name, m in measurements.items():
        latency = m.latency[0]
        millions, megabytes = f"{m.parameters / 1e6:.1f} M", f"{m.size_bytes / 1e6:.1f}"
        speed = f"{fp32[latency.runtime] / latency.cpu_ms:.2f} ×"
        rows.append((name, latency.runtime, str(m.scores[0]), millions, megabytes, f"{latency.cpu_ms:.1f}", speed))
    return table(HEADER, rows)


def plot(measurements, path):
    """Accuracy against size; the area of a bubble is the CPU time of one forward pass."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for number, (name, m) in enumerate(measurements.items()):
        size, score, cpu = m.size_bytes / 1e6, m.scores[0], m.latency[0].cpu_ms
        colour = axes.scatter(size, score.value, s=12 * cpu, alpha=0.5).get_facecolor()[0]
        axes.errorbar(size, score.value, [[score.value - score.low], [score.high - score.value]], color=colour)
        label = f"{name}\n{cpu:.1f} ms"
        axes.annotate(
            label,
            (size, score.value),
            (8, 12 - 30 * (number % 2)),
            textcoords="offset points",
            fontsize=8,
            color=colour[:3],
        )
    title = f"Movie reviews, {score.examples:,} test rows. Bubble: CPU ms (batch 1, {TOKENS} tokens, 1 thread)"
    axes.set(xlabel="file size (MB)", ylabel="accuracy", title=title)
    axes.margins(x=0.3, y=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_card(measurements, compared, folder):
    """Put the measurements and the comparison into the record of the int8 model, and render its card from there."""
    base, compressed = measurements["teacher, ONNX fp32"], measurements["student, distilled, ONNX int8"]
    report = hfshrink.report(folder)
    details = {**report.details, "comparison": compared.to_dict()}
    dataclasses.replace(report, base=base, compressed=compressed, details=details).save(folder)
    title = "MiniLM-L3-movie-reviews-int8"
    known = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0", "language": "en"}
    hfshrink.model_card(folder, model_name=title, **known).save(folder / "README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, one epoch: shows that it works, not how well")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--push-to-test-hub", action="store_true", help="push the int8 model to the tests' Hub, load it"
    )
    options = parser.parse_args()
    if options.quick:
        TEACHER["num_train_epochs"] = STUDENT["num_train_epochs"] = 1
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    start = time.perf_counter()

    def say(what):
        print(f"[{time.perf_counter() - start:4.0f} s] {what}", flush=True)

    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    reviews, rows = encoded_reviews(tokenizer, options.quick)
    say(f"teacher: all 6 layers, fine-tuned on {len(rows):,} reviews (or taken from the last run)")
    teacher_folder = assets.CACHE / f"teacher-{'quick-' if options.quick else ''}seed-{options.seed}"
    teacher = fine_tuned_teacher(tokenizer, rows, options.seed, teacher_folder)
    say("students: 3 of its layers, trained without and with the teacher")
    train_students(teacher, tokenizer, rows, options.seed, options.output)
    say("export the teacher, quantize the distilled student")
    folders = quantize_all(teacher_folder, reviews["validation"], options.output)
    say(f"measure all on {len(reviews['test']):,} test rows")
    found = measure(folders, reviews["test"])
    measurements = {name: measurement for name, (_, measurement) in found.items()}
    text = results_table(measurements)
    print(f"\n{text}\n\nCPU ms: one forward pass, batch 1, {TOKENS} tokens, 1 thread, models interleaved.")
    for one, other in (("student, labels only", "student, distilled"), ("teacher", "student, distilled, ONNX int8")):
        print(f"\n{one} → {other}:\n{hfshrink.compare(found[one][0], found[other][0])}")
    (options.output / "table.md").write_text(text + "\n")
    plot(measurements, options.output / "accuracy-size.png")
    compared = hfshrink.compare(found["teacher, ONNX fp32"][0], found["student, distilled, ONNX int8"][0])
    write_card(measurements, compared, options.output / "int8")
    print()
    if options.push_to_test_hub:
        say("push the int8 model to the Hub of the tests, load it by its id in a fresh process")
        print("pushed: {}\nloaded: {}\n".format(*push_and_load(options.output / "int8")))
    say(f"done. Models, table, plot, and the card (int8/README.md) are in {options.output}/")


if __name__ == "__main__":
    main()
