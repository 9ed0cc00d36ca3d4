"""What one-shot pruning costs, and what the pruned models of pruning.py and pruning_oneshot.py gain in ONNX Runtime.

`--memory` measures seconds and peak memory of pruning, each method in a process of its own; `--time` times the ONNX
models of seed 0, interleaved, one thread. Both keep what they find in runs/pruning/speed. For a quiet machine.
"""

import argparse
import dataclasses
import gc
import json
import subprocess
import sys
import time

import pruning_oneshot as oneshot
import torch
from common import be_quiet, save
from distillation_data import movie, tokenizer_of_minilm
from transformers import AutoTokenizer

import hfshrink
from distillation import teacher_of
from hfshrink.evaluation import footprint, measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.terminal import table
from pruning import RUNS

KEPT = RUNS / "speed"
GRADUAL = ("half-taylor", "third-taylor")  # arms of pruning.py
MEASURED = (
    "weights/magnitude",
    "weights/wanda",
    "weights/sparsegpt",
    "units-50/search",
    "units-50/magnitude",
)


def measure_one(name, threads):
    """Print memory and seconds of pruning alone, in this fresh process: the growth over the loaded model."""
    torch.set_num_threads(threads)
    kind, method = name.split("/")
    rows, model = movie().rows["train"], teacher_of(movie, 0)
    model(input_ids=torch.tensor([[101, 102]]))  # the arithmetic library starts, and every layer's page is read
    held = sum(p.numel() * p.element_size() for p in model.parameters() if p.count_nonzero())
    gc.collect()
    footprint._reset_peak()
    before, start = footprint._resident("VmRSS"), (time.perf_counter(), time.process_time())
    if kind == "weights":
        hfshrink.prune(model, 0.5, method=method, calibration=rows.select(range(oneshot.FEW)))
    else:
        oneshot.prune(model, kind, method, 0, rows)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    growth = footprint._resident("VmHWM") - before
    found = {"model_bytes": held, "peak_growth_bytes": growth, "seconds": seconds[0], "cpu_seconds": seconds[1]}
    print(json.dumps({**found, "threads": threads}))


def measure_memory(threads):
    found = {}
    for name in MEASURED:
        command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed_models():
    """Name -> folder of the models of seed 0 that are there."""
    found = {"dense": oneshot.dense_folder(0)}
    found |= {name: oneshot.folder_of(*name.split("/"), 0) / "model" for name in oneshot.KEPT}
    for arm in GRADUAL:
        found |= {f"gradual/{path.parts[-4]}/{path.parts[-3]}": path for path in RUNS.glob(f"{arm}/*/seed-0/model")}
    return {name: path for name, path in found.items() if (path / "config.json").is_file()}


def measure_times():
    """CPU time of ONNX models, interleaved, and their ratios to the dense one."""
    exported, found = {}, {}
    for name, folder in timed_models().items():
        has_own = (folder / "tokenizer.json").is_file()
        processor = AutoTokenizer.from_pretrained(folder) if has_own else tokenizer_of_minilm()
        target = KEPT / "onnx" / name
        how = {"output_dir": target, "processor": processor, "overwrite": True}
        exported[name] = hfshrink.quantize(folder, "onnx-fp32", **how)
        found[name] = {"onnx_bytes": weight_bytes(target), **oneshot.sizes(hfshrink.load(folder)[0]), "times": []}
    for length in (32, 128):
        times = measure_latencies(exported, sequence_length=length, batch_sizes=(1, 8), threads=1)
        for name, row in found.items():
            row["times"] += [dataclasses.asdict(one) for one in times[name]]
    dense = [one["cpu_ms"] for one in found["dense"]["times"]]
    for row in found.values():
        row["cpu_ratio"] = [base / one["cpu_ms"] for base, one in zip(dense, row["times"], strict=True)]
    return found


def render():
    """Write results/pruning_speed.json and .md of what was measured."""
    tables = {"times": _times, "memory": _memory}
    paths = {name: KEPT / f"{name}.json" for name in tables}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    save("pruning_speed", found, "\n\n".join(tables[name](part) for name, part in found.items()))


def _memory(found):
    header = ("pruning alone", "seconds", "CPU seconds", "threads", "peak memory above the model")
    rows = [
        (
            name,
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
            str(row["threads"]),
            _mb(row["peak_growth_bytes"]),
        )
        for name, row in found.items()
    ]
    model = _mb(next(iter(found.values()))["model_bytes"])
    note = "Rows read: 2,048 for search, 512 for Wanda and SparseGPT, none for magnitude."
    return f"{table(header, rows)}\n\n{note} The model itself holds {model}. Each line is of a process of its own."


def _times(found):
    dense = found["dense"]
    columns = [f"{one['batch_size']} × {one['sequence_length']}" for one in dense["times"]]
    rows = []
    for name, row in found.items():
        macs = f"{row['encoder_macs'] / dense['encoder_macs']:.2f}"
        ratios = [f"{ratio:.2f}×" for ratio in row["cpu_ratio"]]
        rows.append((name, macs, f"{row['parameters'] / 1e6:.2f} M", _mb(row["onnx_bytes"]), *ratios))
    times = ", ".join(f"{one['cpu_ms']:.1f}" for one in dense["times"])
    return (
        f"{table(('ONNX fp32', 'encoder MACs', 'parameters', 'file', *columns), rows)}\n\nMiniLM-L6, seed 0; how many "
        f"times less CPU time than the dense model takes (rows × tokens; one thread, interleaved; dense: {times} ms)."
    )


def _mb(size):
    return f"{size / 1e6:.1f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="measure what pruning costs")
    parser.add_argument("--time", action="store_true", help="time the ONNX models that are there")
    parser.add_argument("--threads", type=int, default=2, help="of --memory")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    be_quiet()
    if options.one:
        measure_one(options.one, options.threads)
        return
    for name, measure in (("memory", lambda: measure_memory(options.threads)), ("times", measure_times)):
        if options.memory if name == "memory" else options.time:
            KEPT.mkdir(parents=True, exist_ok=True)
            (KEPT / f"{name}.json").write_text(json.dumps(measure(), indent=1) + "\n")
    render()


if __name__ == "__main__":
    main()
