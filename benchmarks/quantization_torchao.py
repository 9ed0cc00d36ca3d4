"""torchao's 8-bit configs beside `quantize`, on quantization.py's movie reviews: bytes, accuracy, memory and time.

Runs itself in runs/venvs/torchao. Variants are made and scored one by one and kept in runs/quantization/torchao.
`--time` then measures all of them interleaved in one run, one thread: for a quiet machine.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
from common import be_quiet, save
from own_venv import enter

import hfshrink
import quantization as benchmark
from hfshrink.calibration import batches
from hfshrink.evaluation import measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.terminal import table

KEPT = benchmark.RUNS / "torchao"
TOKENS = benchmark.LENGTHS["movie"]
OURS = {"torch-fp32": "torch-fp32", "hfshrink int8 (bitsandbytes)": "int8", "hfshrink onnx-int8": "onnx-int8"}
CONFIGS = {
    "torchao int8, dynamic inputs": "Int8DynamicActivationInt8WeightConfig",
    "torchao int8, weights only": "Int8WeightOnlyConfig",
}


def float_folder():
    """The teacher as a folder: what both ways start from."""
    benchmark.run("movie", "torch-fp32")
    return benchmark.RUNS / "movie" / "torch-fp32" / "model"


def config_of(name):
    """A config of torchao with its defaults."""
    from torchao import quantization

    return getattr(quantization, CONFIGS[name])()


def bare(config):
    """The library's own call on a loaded model."""
    from torchao.quantization import quantize_

    model = hfshrink.load(float_folder())[0]
    quantize_(model, config)
    return model


def flat(model):
    """Plain tensors, and what torchao needs to know to put them together again."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict(model.state_dict())


def save_bare(model, folder):
    """Bytes of the file, in torchao's own way into safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors, metadata = flat(model)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", metadata)
    return weight_bytes(folder)


def by_hfshrink(config, folder):
    """The config given to `quantize`, which loads the folder through transformers, records and saves."""
    wrapped = transformers.TorchAoConfig(config)
    return hfshrink.quantize(float_folder(), wrapped, output_dir=folder, overwrite=True)


@torch.no_grad()
def equal_bits(a, b):
    """Whether two models hold the same tensors, codes and scales too, and answer 256 rows with the same bits."""
    states = [flat(model)[0] for model in (a, b)]
    rows = benchmark.scored("movie")[0].select(range(256))
    feed = batches(rows, a, benchmark.tokenizer_of_minilm(), batch_size=8)
    return (
        states[0].keys() == states[1].keys()
        and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        and all(torch.equal(a(**batch).logits, b(**batch).logits) for batch in feed)
    )


def run(name):
    """What is known about a config: both ways made and scored if that is not kept."""
    folder = KEPT / CONFIGS[name]
    kept = folder / "result.json"
    if not kept.is_file():
        model = bare(config_of(name))
        size = save_bare(model, folder / "bare")
        wrapped = by_hfshrink(config_of(name), folder / "model")
        reloaded = hfshrink.load(folder / "model")[0]
        rows, metric = benchmark.scored("movie")
        found = hfshrink.compare(benchmark.dense_scores("movie"), hfshrink.evaluate(model, rows, metric))
        names = ("metric", "a", "b", "difference", "low", "high", "agreement")
        result = {field: getattr(found, field) for field in names} | {
            "size_bytes": size,
            "size_bytes_hfshrink": weight_bytes(folder / "model"),
            "equal_bits": equal_bits(model, wrapped) and equal_bits(model, reloaded),
        }
        kept.write_text(json.dumps(result | benchmark.loaded(folder / "model", TOKENS), indent=1) + "\n")
    return json.loads(kept.read_text())


def measure_times(repeats):
    """CPU and wall milliseconds of all lines, interleaved; nothing is compiled by `torch.compile`."""
    models = {name: hfshrink.load(benchmark.RUNS / "movie" / variant / "model")[0] for name, variant in OURS.items()}
    models |= {name: bare(config_of(name)) for name in CONFIGS}
    times = measure_latencies(models, sequence_length=TOKENS, batch_sizes=(1, 8), threads=1, repeats=repeats)
    found = {name: [dataclasses.asdict(one) for one in times[name]] for name in models}
    (KEPT / "times.json").write_text(json.dumps(found, indent=1) + "\n")


HEADER = ("what", "file MB", "loaded MB", "accuracy", "− float [95 %]", "agreement", "CPU ms, batch 1", "batch 8")
NOTE = (
    "MiniLM-L6, 2,000 test rows of movie reviews, 64 tokens. Differences against the float model with the paired 95 % "
    "interval of resampled rows. *torchao*: its own `quantize_` with the config's defaults, saved by its "
    "own flattening into safetensors; embeddings stay float. Loaded: growth of a fresh process by loading, "
    "libraries not counted. CPU ms of one forward pass, one thread, all lines interleaved in one run; × "
    "against torch-fp32, without `torch.compile`. {equal} torchao {version}."
)
EQUAL = "`hfshrink.quantize(folder, TorchAoConfig(…))`, reloaded, holds and answers the same bits as torchao's call."


def render():
    """Write results/quantization_torchao.json and .md of what is there."""
    found = {name: benchmark.run("movie", variant) for name, variant in OURS.items()} | {
        name: run(name) for name in CONFIGS
    }
    path = KEPT / "times.json"
    times = json.loads(path.read_text()) if path.is_file() else {}
    rows = [_row(name, result, times) for name, result in found.items()]
    equal = EQUAL if all(found[name]["equal_bits"] for name in CONFIGS) else "hfshrink's way differs from it."
    version = importlib.metadata.version("torchao")
    note = NOTE.format(equal=equal, version=version)
    data = {name: {**result, "times": times.get(name)} for name, result in found.items()}
    save("quantization_torchao", {"torchao": version, "lines": data}, f"{table(HEADER, rows)}\n\n{note}")


def _row(name, result, times):
    base, own = times.get("torch-fp32"), times.get(name)
    speeds = [benchmark._speed(base, own, batch) for batch in (0, 1)]
    change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * result[field] for field in ("difference", "low", "high")))
    sizes = (f"{result['size_bytes'] / 1e6:.1f}", f"{result['loaded_bytes'] / 1e6:.0f}")
    return (name, *sizes, f"{result['b']:.4f}", change, f"{100 * result['agreement']:.1f} %", *speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="measure times")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    enter("torchao")
    be_quiet()
    if options.time:
        measure_times(options.repeats)
    render()


if __name__ == "__main__":
    main()
