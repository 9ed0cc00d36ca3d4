"""Peak memory of quantizing a checkpoint of 4 GB file to file, against loading it with transformers and saving it.

Makes a Llama-shaped checkpoint of random float32 weights, about 1.0 billion of them, shard by shard in a temporary
folder, and converts it in a process of its own for each row. Memory is read from /proc every 20 ms: `Anonymous` is
what the process allocated, `VmHWM` the largest resident set, which counts the pages of mapped files too (the kernel
takes those back when it needs room). Needs 9 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import be_quiet, save
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hfshrink.evaluation import footprint
from hfshrink.quantization.weights.bits import load_bits, quantize_layers
from hfshrink.quantization.weights.streaming import stream_weights
from hfshrink.terminal import table

SHAPE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 17,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
    "dtype": torch.float32,
}
SOURCE_SHARD, TARGET_SHARD = 10**9, "500MB"
ARMS = ("nf4", "int8", "bf16", "nf4, loaded and saved")


def make_checkpoint(folder, **shape):
    """Write random weights shard by shard; their number."""
    config = LlamaConfig(**{**SHAPE, **shape}, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator, shards, filled = torch.Generator().manual_seed(0), [[]], 0
    for name, weight in model.state_dict().items():
        if filled + 4 * weight.numel() > SOURCE_SHARD:
            shards.append([])
            filled = 0
        shards[-1].append((name, weight.shape))
        filled += 4 * weight.numel()
    where = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        parts = {name: torch.randn(size, generator=generator).mul_(0.02) for name, size in names}
        save_file(parts, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(parts, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    return sum(weight.numel() for weight in model.state_dict().values())


def anonymous():
    """Bytes that this process allocated, file mappings apart."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    line = next(line for line in lines if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


class Watch(threading.Thread):
    """Keeps the largest `anonymous()` that it saw."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self):
        while not self.over.wait(0.02):
            self.peak = max(self.peak, anonymous())


def measure_one(arm, source, target):
    """Convert in this fresh process and print what it took."""
    warm = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**SHAPE, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1})
    )
    quantize_layers(warm, "nf4")  # libraries are read before the clock starts
    footprint._reset_peak()
    before, resident = anonymous(), footprint._resident("VmRSS")
    watch, start = Watch(), time.perf_counter()
    watch.start()
    if arm in ("nf4", "int8", "bf16"):
        stream_weights(source, target, arm, max_shard_size=TARGET_SHARD)
    else:
        load_bits(source, "nf4")[0].save_pretrained(target, max_shard_size=TARGET_SHARD)
    seconds = time.perf_counter() - start
    watch.over.set()
    watch.join()
    found = {
        "seconds": seconds,
        "before_anonymous_bytes": before,
        "peak_anonymous_growth_bytes": watch.peak - before,
        "peak_resident_growth_bytes": footprint._resident("VmHWM") - resident,
        "files_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
    }
    print(json.dumps(found))


def measure(arms):
    """Each arm on one checkpoint, which is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "float").mkdir()
        parameters = make_checkpoint(folder / "float")
        size = sum(file.stat().st_size for file in (folder / "float").glob("*.safetensors"))
        found = {"parameters": parameters, "source_bytes": size, "largest_bytes": 4 * 32_000 * 2048, "arms": {}}
        for arm in arms:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                command = [sys.executable, "-W", "ignore", __file__, "--one", arm, "--source", str(folder / "float")]
                command += ["--target", str(Path(target) / "out")]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found["arms"][arm] = json.loads(done.stdout.splitlines()[-1])
    return found


def render(found):
    header = ("scheme", "files", "peak allocated", "peak resident, mapped files included", "seconds")
    rows = [
        (
            arm,
            _mb(row["files_bytes"]),
            _mb(row["peak_anonymous_growth_bytes"]),
            _mb(row["peak_resident_growth_bytes"]),
            f"{row['seconds']:.0f}",
        )
        for arm, row in found["arms"].items()
    ]
    bound = 500e6 + 2 * found["largest_bytes"]
    note = (
        f"A Llama-shaped checkpoint of {found['parameters'] / 1e9:.2f} billion float32 weights "
        f"({_mb(found['source_bytes'])}), written in shards of at most {TARGET_SHARD}; its largest tensor takes "
        f"{_mb(found['largest_bytes'])}, so that one shard and twice that tensor are {_mb(bound)}. Memory above what "
        "the process held before (libraries read). One thread, each row in a process of its own, once."
    )
    save("quantization_streaming", found, f"{table(header, rows)}\n\n{note}")


def _mb(size):
    return f"{size / 1e6:,.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--one", "--source", "--target"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, help="rows to measure")
    options = parser.parse_args()
    be_quiet()
    if options.one:
        measure_one(options.one, Path(options.source), Path(options.target))
    else:
        render(measure(options.arms))


if __name__ == "__main__":
    main()
