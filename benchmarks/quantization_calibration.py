"""Peak memory of choosing activation ranges by percentile: our streaming histograms and ONNX Runtime's calibrator.

A MiniLM-shaped encoder (6 layers, 384 wide) with random weights reads random rows of 128 tokens; the inputs of its 36
linear layers are collected in both. Each number is the growth of the resident memory of a process of its own, from the
loaded float graph on, so that the runs don't share anything.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import be_quiet, save

from hfshrink.evaluation import footprint
from hfshrink.terminal import table

SAMPLES = (32, 512)
LENGTH = 128
BATCH_SIZE = 8
LIMIT_BYTES = 2e9
"""ONNX Runtime's calibrator is not run where the inputs alone would be larger: it keeps more than these."""


def model():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()


def batches(samples):
    generator = torch.Generator().manual_seed(0)
    for _ in range(samples // BATCH_SIZE):
        ids = torch.randint(1000, 30000, (BATCH_SIZE, LENGTH), generator=generator)
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }


def tensor_bytes(samples):
    """What the inputs of all linear layers weigh: 384 wide thrice a layer (one shared by q, k and v), 1536 once."""
    return samples * LENGTH * 6 * (3 * 384 + 1536) * 4


def ours(exported, samples):
    from hfshrink.quantization.graphs.calibrating import collect_histograms
    from hfshrink.quantization.graphs.targets import find_targets
    from hfshrink.quantization.ranges import choose_range

    program = exported.components["model"].program
    tensors = {target.node.inputs[0].name: target.module for target in find_targets(program)}
    found = collect_histograms(exported, program, tensors, batches(samples))
    return {name: choose_range(histogram, "percentile", percentile=99.99) for name, histogram in found.items()}


def library(path, samples):
    """ONNX Runtime's own percentile calibrator, restricted to the same nodes as far as it can be: by operator."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.feed = ({name: value.numpy() for name, value in batch.items()} for batch in batches(samples))

        def get_next(self):
            return next(self.feed, None)

    calibrator = create_calibrator(
        path,
        op_types_to_calibrate=["MatMul"],
        augmented_model_path=str(Path(path).with_name("augmented.onnx")),
        calibrate_method=CalibrationMethod.Percentile,
        extra_options={"percentile": 99.99},
    )
    calibrator.collect_data(Reader())
    return calibrator.compute_data().data


def measure_one(which, samples):
    """Print seconds and growth of this fresh process as JSON."""
    import onnx_ir

    from hfshrink.quantization.graphs.exporting import export_float

    exported = export_float(model())
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        onnx_ir.save(exported.components["model"].program, path)
        footprint._reset_peak()
        before, start = footprint._resident("VmRSS"), time.process_time()
        found = ours(exported, samples) if which == "hfshrink" else library(path, samples)
        seconds = time.process_time() - start
        growth = footprint._resident("VmHWM") - before
    print(json.dumps({"tensors": len(found), "cpu_seconds": seconds, "peak_growth_bytes": growth}))


def measure(which, samples):
    """One row of the table, from a process of its own."""
    row = {"calibrator": which, "samples": samples, "tensor_bytes": tensor_bytes(samples)}
    if which == "onnxruntime" and row["tensor_bytes"] > LIMIT_BYTES:
        return {**row, "note": "not run: it keeps every tensor, which would not fit"}
    command = [sys.executable, "-W", "ignore", __file__, "--one", which, "--samples", str(samples)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return {**row, "note": f"failed: {' '.join(done.stderr.strip().splitlines()[-1:])[:200]}"}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def render(rows):
    header = ("percentile calibration", "samples", "tensors", "peak memory above the model", "CPU seconds")
    cells = []
    for row in rows:
        if "note" in row:
            shown = ("–", row["note"], "–")
        else:
            megabytes = f"{row['peak_growth_bytes'] / 1e6:.0f} MB"
            shown = (str(row["tensors"]), megabytes, f"{row['cpu_seconds']:.1f}")
        cells.append((row["calibrator"], str(row["samples"]), *shown))
    sizes = ", ".join(f"{tensor_bytes(samples) / 1e9:.2f} GB for {samples}" for samples in SAMPLES)
    return (
        f"{table(header, cells)}\n\nMiniLM-shaped encoder with random weights, rows of {LENGTH} tokens in batches of "
        f"{BATCH_SIZE}, one thread; each line is of a process of its own. The inputs of its linear layers alone weigh "
        f"{sizes} samples. ONNX Runtime's calibrator also collects the outputs of MatMul nodes and those of attention."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=SAMPLES[0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    be_quiet()
    if options.one:
        measure_one(options.one, options.samples)
        return
    rows = []
    for which in ("hfshrink", "onnxruntime"):
        for samples in SAMPLES:
            rows.append(measure(which, samples))
            save("quantization_calibration", {"rows": rows}, render(rows))


if __name__ == "__main__":
    main()
