"""What factored models gain in ONNX Runtime, and what factoring costs.

`--time` times ONNX models in float and in int8, dense and at 50 % and 33 % of the parameters, at the shapes of
BERT-base (random weights) and of MiniLM-L6 (seed 0 of factorization.py's subject), interleaved, one thread.
`--cost` compares factoring a BERT-base-shaped model with the bare `torch.linalg.svd` calls that it needs, and the
collection of Gram matrices with a plain forward pass. Both keep what they find in runs/factorization/speed. For a
quiet machine.
"""

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import time

import torch
from common import be_quiet, save
from distillation_data import movie
from transformers import BertConfig, BertModel

import hfshrink
from distillation import teacher_of
from factorization import RUNS
from hfshrink.evaluation import footprint, measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.factorization.statistics import collect_statistics
from hfshrink.terminal import table

KEPT = RUNS / "speed"
RATIOS = (None, 0.5, 0.33)
LENGTH = 128
ROUNDS = 3
FEW, MANY = 40, 1024  # rows: enough for the Gram matrices, and half of what is read at most


def base_shaped():
    """An encoder of BERT-base's shapes, random."""
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=1000)).eval()


MODELS = {"BERT-base shapes": base_shaped, "MiniLM-L6": lambda: copy.deepcopy(teacher_of(movie, 0)).eval()}


def measure_times():
    """CPU times of ONNX models, and their ratios to the dense float one."""
    found = {}
    for title, make in MODELS.items():
        exported, rows = {}, {}
        for ratio in RATIOS:
            model = make() if ratio is None else hfshrink.factorize(make(), ratio, weighting="none")
            for scheme in ("onnx-fp32", "onnx-int8"):
                name = f"{'dense' if ratio is None else f'{ratio:.0%}'} {scheme}"
                folder = KEPT / title.replace(" ", "-") / name.replace(" ", "-")
                exported[name] = hfshrink.quantize(model, scheme, output_dir=folder, overwrite=True)
                rows[name] = {
                    "file_bytes": weight_bytes(folder),
                    "parameters": sum(p.numel() for p in model.parameters()),
                }
            del model
        times = measure_latencies(exported, sequence_length=LENGTH, batch_sizes=(1, 8), threads=1, repeats=15)
        for name, row in rows.items():
            row["times"] = [dataclasses.asdict(one) for one in times[name]]
        dense = [one["cpu_ms"] for one in rows["dense onnx-fp32"]["times"]]
        for row in rows.values():
            row["cpu_ratio"] = [base / one["cpu_ms"] for base, one in zip(dense, row["times"], strict=True)]
        found[title] = rows
    return found


def _clock(call):
    """(wall, CPU) seconds of a call."""
    gc.collect()
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure_cost():
    """Interleaved: the bare SVDs of all Linears' weights and `factorize`; a forward pass and one that collects."""
    torch.set_num_threads(1)
    few, many = _ids(FEW), _ids(MANY)
    weights = [m.weight.detach() for m in base_shaped().modules() if isinstance(m, torch.nn.Linear)]

    def bare(dtype):
        for weight in weights:
            torch.linalg.svd(weight.to(dtype), full_matrices=False)

    def forward(model):
        with torch.no_grad():
            for batch in many:
                model(**batch)

    calls = {
        "bare SVDs, float64": (base_shaped, lambda _: bare(torch.float64)),
        "bare SVDs, float32": (base_shaped, lambda _: bare(torch.float32)),
        "factorize, plain": (base_shaped, lambda model: hfshrink.factorize(model, 0.5, weighting="none")),
        "statistics for it": (base_shaped, lambda model: collect_statistics(model, few, "activation")),
        "factorize, whitened": (base_shaped, lambda model: hfshrink.factorize(model, 0.5, calibration=few)),
        "forward pass": (MODELS["MiniLM-L6"], forward),
        "collecting statistics": (MODELS["MiniLM-L6"], lambda model: collect_statistics(model, many, "activation")),
    }
    found = {name: {"seconds": [], "peak_growth_bytes": None} for name in calls}
    for _ in range(ROUNDS):
        for name, (make, call) in calls.items():
            model = make()
            footprint._reset_peak()
            before = footprint._resident("VmRSS")
            found[name]["seconds"].append(_clock(lambda call=call, model=model: call(model)))
            found[name]["peak_growth_bytes"] = footprint._resident("VmHWM") - before
    for row in found.values():
        row["wall_s"], row["cpu_s"] = (statistics.median(one[i] for one in row["seconds"]) for i in (0, 1))
    return {"tokens": [FEW * LENGTH, MANY * LENGTH], "calls": found}


def _ids(rows):
    ids = torch.randint(1000, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(16)]


def render():
    """Write results/factorization_speed.json and .md of what was measured."""
    tables = {"times": _times, "cost": _cost}
    paths = {name: KEPT / f"{name}.json" for name in tables}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.is_file()}
    save("factorization_speed", found, "\n\n".join(tables[name](part) for name, part in found.items()))


def _times(found):
    lines = []
    for title, rows in found.items():
        for name, row in rows.items():
            times = [f"{one['cpu_ms']:.1f}" for one in row["times"]]
            ratios = [f"{ratio:.2f}×" for ratio in row["cpu_ratio"]]
            size = f"{row['file_bytes'] / 1e6:.1f}"
            lines.append(
                (
                    title,
                    name,
                    f"{row['parameters'] / 1e6:.1f} M",
                    size,
                    *(x for p in zip(times, ratios, strict=True) for x in p),
                )
            )
    header = (
        "model",
        "kept, numbers",
        "parameters",
        "file MB",
        "CPU ms",
        "÷ dense fp32",
        "CPU ms, batch 8",
        "÷ dense fp32",
    )
    note = (
        f"ONNX Runtime, {LENGTH} tokens, one thread, all lines of a model interleaved in one run. Plain SVD: the time "
        "depends on the ranks alone."
    )
    return f"{table(header, lines)}\n\n{note}"


def _cost(found):
    calls = found["calls"]
    svd, forward = calls["bare SVDs, float32"]["cpu_s"], calls["forward pass"]["cpu_s"]
    lines = []
    for name, row in calls.items():
        base = forward if name in ("forward pass", "collecting statistics") else svd
        growth = f"{max(0, row['peak_growth_bytes']) / 1e6:.0f}"
        lines.append((name, f"{row['cpu_s']:.1f}", f"{row['cpu_s'] / base:.2f}×", growth))
        if name == "factorize, whitened":
            rest = row["cpu_s"] - calls["statistics for it"]["cpu_s"]
            lines.append(("the same less the statistics", f"{rest:.1f}", f"{rest / base:.2f}×", ""))
    header = ("call", "CPU s", "÷ bare", "peak MB above the model")
    few, many = found["tokens"]
    note = (
        f"Medians of {ROUNDS} interleaved rounds, one thread. The first six lines: 12 layers of BERT-base's shapes, "
        f"all Linears, against `torch.linalg.svd` in float32; {few:,} calibration tokens, whose forward pass is part "
        f"of the statistics. The last two: MiniLM-L6, {many:,} tokens, against the forward pass."
    )
    return f"{table(header, lines)}\n\n{note}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="time ONNX models")
    parser.add_argument("--cost", action="store_true", help="measure what factoring costs")
    options = parser.parse_args()
    be_quiet()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, measure in (("times", measure_times), ("cost", measure_cost)):
        if options.time if name == "times" else options.cost:
            (KEPT / f"{name}.json").write_text(json.dumps(measure(), indent=1) + "\n")
    render()


if __name__ == "__main__":
    main()
