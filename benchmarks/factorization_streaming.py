"""Peak memory of factoring a checkpoint of 2 GB file to file, against loading it, factoring it and saving it.

Makes a Llama-shaped checkpoint of random float32 weights, about 0.5 billion of them, in a temporary folder, and
factors the weights that `--include` names (those of one layer of eight by default: their kinds decide the peak, and
decompositions take their time) in a process of its own for each row. Memory is read as in quantization_streaming.py.
Needs 4 GB of disk.
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
from quantization_streaming import Watch, anonymous, make_checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from hfshrink import load
from hfshrink.evaluation import footprint
from hfshrink.factorization.run import factorize
from hfshrink.factorization.streaming import stream_factors
from hfshrink.terminal import table

SHAPE = {"vocab_size": 16_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8}
SHARD = "500MB"
ARMS = ("streamed", "loaded, factored and saved")


def warm_up(folder):
    """Read the libraries before the clock starts."""
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**small, num_attention_heads=2, architectures=["LlamaForCausalLM"])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "tiny")
    factorize(load(folder / "tiny")[0], 0.5, output_dir=folder / "tiny-memory")
    stream_factors(folder / "tiny", folder / "tiny-streamed", rank_ratio=0.5)


def measure_one(arm, source, target, include):
    """Factor in this fresh process and print what it took."""
    warm_up(target.parent)
    footprint._reset_peak()
    before, resident = anonymous(), footprint._resident("VmRSS")
    watch, start = Watch(), time.perf_counter()
    watch.start()
    if arm == "streamed":
        stream_factors(source, target, rank_ratio=0.8, include=include, max_shard_size=SHARD)
    else:
        factorize(load(source)[0], 0.8, include=include, output_dir=target, max_shard_size=SHARD)
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


def measure(arms, include):
    """Each arm on one checkpoint, which is deleted afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "float").mkdir()
        parameters = make_checkpoint(folder / "float", **SHAPE)
        size = sum(file.stat().st_size for file in (folder / "float").glob("*.safetensors"))
        largest = 4 * SHAPE["vocab_size"] * SHAPE["hidden_size"]
        factored = 4 * SHAPE["intermediate_size"] * SHAPE["hidden_size"]
        found = {"parameters": parameters, "source_bytes": size, "largest_bytes": largest, "include": include}
        found |= {"largest_factored_bytes": factored, "threads": torch.get_num_threads(), "arms": {}}
        for arm in arms:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                command = [sys.executable, "-W", "ignore", __file__, "--one", arm, "--source", str(folder / "float")]
                command += ["--target", str(Path(target) / "out"), "--include", include]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found["arms"][arm] = json.loads(done.stdout.splitlines()[-1])
    return found


def render(found):
    header = ("path", "files", "peak allocated", "peak resident, mapped files included", "seconds")
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
    bound = 500e6 + 4 * found["largest_bytes"]
    note = (
        f"A Llama-shaped checkpoint of {found['parameters'] / 1e9:.2f} billion float32 weights "
        f"({_mb(found['source_bytes'])}), of which {found['include']} are factored to 80 % of their parameters, "
        f"written in shards of at most {SHARD}. The largest tensor takes {_mb(found['largest_bytes'])}, so that one "
        f"shard and four times that tensor are {_mb(bound)}; the largest that is factored takes "
        f"{_mb(found['largest_factored_bytes'])}. Memory above what the process held before (libraries read). "
        f"{found['threads']} thread(s), each row in a process of its own, once."
    )
    save("factorization_streaming", found, f"{table(header, rows)}\n\n{note}")


def _mb(size):
    return f"{size / 1e6:,.0f} MB"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("--one", "--source", "--target"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS, help="rows to measure")
    parser.add_argument("--include", default="model.layers.0.*", help="wildcard of the modules to factor")
    options = parser.parse_args()
    be_quiet()
    if options.one:
        measure_one(options.one, Path(options.source), Path(options.target), options.include)
    else:
        render(measure(options.arms, options.include))


if __name__ == "__main__":
    main()
