"""`executorch-int8` on two subjects of quantization.py: bytes, accuracy, memory and time against float in PyTorch.

Runs itself in runs/venvs/executorch. Variants are made and scored one by one and kept in runs/quantization/executorch.
`--time` then measures them interleaved with PyTorch and ONNX Runtime, one thread: for a quiet machine.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"

from common import be_quiet, save
from own_venv import enter

import hfshrink
import quantization as benchmark
from hfshrink.evaluation import measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.quantization.graphs.exporting import quiet
from hfshrink.terminal import table

KEPT = benchmark.RUNS / "executorch"
SUBJECTS = {"movie": "onnx-int8", "garments": "onnx-int8-static"}
"""subject -> the scheme of ONNX Runtime beside it."""
BATCH = 8  # most rows that a program takes: memory is planned for them


def folder_of(subject, variant):
    own = variant == "executorch-int8"
    return (KEPT / subject if own else benchmark.RUNS / subject / variant) / "model"


def make(subject):
    """The program, by the public call, with the calibration rows of the other schemes."""
    model, processor = benchmark.dense(subject)
    rows = benchmark.rows_of(subject, "train").select(range(benchmark.SAMPLES))
    how = {"calibration": rows} if subject in benchmark.IMAGES else {}  # linears quantize their inputs as they come
    target = folder_of(subject, "executorch-int8")
    hfshrink.quantize(
        model, "executorch-int8", output_dir=target, processor=processor, overwrite=True, max_batch=BATCH, **how
    )


def run(subject, variant):
    """What is known about a line: made and scored if that is not kept; every line at the same batch size."""
    kept = KEPT / subject / f"{variant}.json"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder = folder_of(subject, variant)
        if variant != "executorch-int8":
            benchmark.run(subject, variant)
        elif not folder.is_dir():
            make(subject)
        after = hfshrink.evaluate(load(folder), *benchmark.scored(subject), batch_size=BATCH)
        found = hfshrink.compare(dense_scores(subject), after)
        memory = benchmark.loaded(folder, benchmark.LENGTHS.get(subject, 1))
        names = ("metric", "a", "b", "difference", "low", "high", "agreement")
        result = {field: getattr(found, field) for field in names} | {"size_bytes": weight_bytes(folder)}
        kept.write_text(json.dumps(result | memory, indent=1) + "\n")
    return json.loads(kept.read_text())


@cache
def dense_scores(subject):
    """Of the float model, in batches as small as the programs take: rows are padded alike."""
    return hfshrink.evaluate(benchmark.dense(subject)[0], *benchmark.scored(subject), batch_size=BATCH)


def load(folder):
    with quiet():
        return hfshrink.load(folder)[0]


def measure_times(subject, repeats):
    """CPU and wall milliseconds of all lines, interleaved."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(1)
    models = {variant: load(folder_of(subject, variant)) for variant in lines(subject)}
    length = benchmark.LENGTHS.get(subject, 1)
    times = measure_latencies(models, sequence_length=length, batch_sizes=(1, BATCH), threads=1, repeats=repeats)
    found = {variant: [dataclasses.asdict(one) for one in times[variant]] for variant in models}
    (KEPT / subject / "times.json").write_text(json.dumps(found, indent=1) + "\n")


def lines(subject):
    return ("torch-fp32", SUBJECTS[subject], "executorch-int8")


HEADER = ("scheme", "file MB", "loaded MB", "accuracy", "− float [95 %]", "agreement", "CPU ms, batch 1", "batch 8")
NOTE = (
    "All 2,000 test rows. Differences against the float model with the paired 95 % interval of resampled rows. "
    "Embedding tables stay float in ExecuTorch's programs. Loaded: growth of a fresh process by loading, "
    "libraries not counted. CPU ms of one forward pass, one thread, the lines of a model interleaved in one run; × "
    "against torch-fp32. XNNPACK's kernels; programs for at most 8 rows, of 64 tokens for texts. executorch {version}."
)


def render():
    """Write results/quantization_executorch.json and .md of what is there."""
    found, text = {}, []
    for subject in SUBJECTS:
        path = KEPT / subject / "times.json"
        times = json.loads(path.read_text()) if path.is_file() else {}
        found[subject] = {
            variant: {**run(subject, variant), "times": times.get(variant)} for variant in lines(subject)
        }
        rows = [_row(variant, result, times) for variant, result in found[subject].items()]
        text.append(f"**{benchmark.TITLES[subject]}**\n\n{table(HEADER, rows)}")
    version = importlib.metadata.version("executorch")
    text.append(NOTE.format(version=version))
    save("quantization_executorch", {"executorch": version, "subjects": found}, "\n\n".join(text))


def _row(variant, result, times):
    change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * result[field] for field in ("difference", "low", "high")))
    sizes = (f"{result['size_bytes'] / 1e6:.1f}", f"{result['loaded_bytes'] / 1e6:.0f}")
    speeds = [benchmark._speed(times.get("torch-fp32"), times.get(variant), batch) for batch in (0, 1)]
    return (variant, *sizes, f"{result['b']:.4f}", change, f"{100 * result['agreement']:.1f} %", *speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="measure times")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    enter("executorch")
    be_quiet()
    for subject in SUBJECTS if options.time else ():
        measure_times(subject, options.repeats)
    render()


if __name__ == "__main__":
    main()
