"""The quickstart's claim, three times: 3-layer students with and without distillation, and int8, against the teacher.

Every seed has its own teacher, students and order of rows; the 2,000 test rows are the same and chose nothing.
Resumable: finished seeds are kept in runs/main_job. Latency is measured once all training is over, interleaved.
"""

import argparse
import json

import numpy as np
from common import ROOT, paired_interval, save

NAMES = {
    "teacher": "teacher, 6 layers",
    "teacher, ONNX fp32": "teacher, ONNX fp32",
    "student, labels only": "student, 3 layers, labels only",
    "student, distilled": "student, 3 layers, distilled",
    "student, distilled, ONNX int8": "student, distilled, ONNX int8",
}
PAIRS = (
    ("student, labels only", "student, distilled"),
    ("teacher", "student, labels only"),
    ("teacher", "student, distilled"),
    ("student, distilled", "student, distilled, ONNX int8"),
    ("teacher", "student, distilled, ONNX int8"),
)


def run_seed(seed, folder):
    """Train and evaluate one seed: {model: which test rows it got right}."""
    from transformers import AutoTokenizer

    import assets
    import hfshrink
    import quickstart

    done = folder / "correct.json"
    tokenizer = AutoTokenizer.from_pretrained(assets.minilm())
    reviews, rows = quickstart.encoded_reviews(tokenizer)
    teacher_folder = folder / "teacher"
    if not done.is_file():
        teacher = quickstart.fine_tuned_teacher(tokenizer, rows, seed, teacher_folder)
        quickstart.train_students(teacher, tokenizer, rows, seed, folder)
        folders = quickstart.quantize_all(teacher_folder, reviews["validation"], folder)
        correct = {}
        for name, path in folders.items():
            correct[name] = [bool(right) for right in hfshrink.evaluate(path, reviews["test"]).correct()]
        done.write_text(json.dumps(correct))
    return json.loads(done.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train-only", action="store_true", help="stop before the latency is measured")
    options = parser.parse_args()
    runs = ROOT / "runs" / "main_job"
    correct = []
    for seed in range(options.seeds):
        correct.append(run_seed(seed, runs / f"seed-{seed}"))
        print(seed, {name: round(float(np.mean(rows)), 4) for name, rows in correct[-1].items()}, flush=True)
    if not options.train_only:
        report(correct, measure_costs(runs / "seed-0"))


def measure_costs(folder):
    """{model: {size, latency at batch 1 and 8}} of one seed's models, interleaved, one thread."""
    import hfshrink
    from hfshrink.evaluation import measure_latencies
    from hfshrink.evaluation.profiling import weight_bytes
    from quickstart import TOKENS

    paths = ("teacher", "teacher-onnx", "plain", "distilled", "int8")
    folders = dict(zip(NAMES, (folder / path for path in paths), strict=True))
    models = {name: hfshrink.load(path)[0] for name, path in folders.items()}
    times = measure_latencies(models, sequence_length=TOKENS, batch_sizes=(1, 8), repeats=60)
    return {
        name: {
            "runtime": times[name][0].runtime,
            "size_bytes": weight_bytes(path),
            **{f"cpu_ms_batch_{t.batch_size}": t.cpu_ms for t in times[name]},
            **{f"latency_ms_p50_batch_{t.batch_size}": t.latency_ms_p50 for t in times[name]},
        }
        for name, path in folders.items()
    }


def report(correct, costs):
    from hfshrink.terminal import table

    stacked = {name: np.array([run[name] for run in correct]) for name in NAMES}  # (seeds, rows)
    fp32 = {costs[name]["runtime"]: costs[name] for name in ("teacher", "teacher, ONNX fp32")}
    models, rows = {}, []
    for name, title in NAMES.items():
        cost, by_seed = costs[name], stacked[name].mean(1)
        speed = {b: fp32[cost["runtime"]][f"cpu_ms_batch_{b}"] / cost[f"cpu_ms_batch_{b}"] for b in (1, 8)}
        models[name] = {**cost, "accuracy": by_seed.tolist(), "speedup_batch_1": speed[1], "speedup_batch_8": speed[8]}
        accuracy = f"{by_seed.mean():.4f} ({by_seed.min():.4f} to {by_seed.max():.4f})"
        times = (f"{cost['cpu_ms_batch_1']:.1f}", f"{speed[1]:.2f} ×", f"{speed[8]:.2f} ×")
        rows.append((title, cost["runtime"], accuracy, f"{cost['size_bytes'] / 1e6:.1f}", *times))
    header = (
        "model",
        "runtime",
        f"accuracy, {len(correct)} seeds (range)",
        "file MB",
        "CPU ms",
        "speed-up",
        "batch 8",
    )
    differences = {f"{a} → {b}": paired_interval(stacked[a], stacked[b]) for a, b in PAIRS}
    paired = [
        (pair, f"{100 * d:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}")
        for pair, (d, low, high) in differences.items()
    ]
    text = table(header, rows) + "\n\n" + table(("pair", "points", "95 % interval"), paired)
    text += (
        f"\n\nMovie reviews, {stacked['teacher'].shape[1]:,} test rows that chose nothing. CPU ms: one forward pass, "
        "batch 1, 128 tokens, one thread, interleaved. Speed-ups are against the teacher's floats in the same "
        "runtime. Intervals resample seeds and rows, paired."
    )
    save("main_job", {"models": models, "differences": differences, "seeds": len(correct)}, text)


if __name__ == "__main__":
    main()
