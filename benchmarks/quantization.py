"""Every scheme of `quantize` on six models: bytes, accuracy and time against float and the libraries' bare calls.

Variants are made and scored one by one and kept in runs/quantization; what is there is skipped, so that the script
can be stopped and started again. `--time` then measures all variants of a subject interleaved in one run, one
thread: for a quiet machine. Nothing is chosen on test rows: calibration and settings know training rows only.
"""

import argparse
import copy
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pruning_language as language
import transformers
from common import ROOT, be_quiet, save
from distillation_data import bbc, garments, movie, tagged_addresses, tokenizer_of_minilm
from efficientnet_lite import enlarged_garments
from quantization_bare import BARE

import hfshrink
from distillation import teacher_of
from hfshrink.evaluation import measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "quantization"
SAMPLES = 128  # calibration rows
TEXTS = {"movie": movie, "bbc": bbc, "addresses": tagged_addresses}
IMAGES = {"garments": garments, "efficientnet": enlarged_garments}
IN_TORCH = ("torch-fp32", "bf16", "int8", "nf4")
ENCODER = (
    *IN_TORCH,
    "onnx-fp32",
    "onnx-int8",
    "onnx-int8-static",
    "onnx-int4",
    "onnx-fp16",
    "bare-onnx-dynamic",
    "bare-onnx-static",
    "openvino-fp32",
    "openvino-int8",
    "bare-openvino",
)
CONVOLUTIONAL = (
    "torch-fp32",
    "bf16",
    "onnx-fp32",
    "onnx-int8-static",
    "onnx-fp16",
    "bare-onnx-static",
    "openvino-fp32",
    "openvino-int8",
    "bare-openvino",
)
CAUSAL = (*IN_TORCH, "fp4")  # its graphs are in quantization_generation.py
VARIANTS = {**dict.fromkeys(TEXTS, ENCODER), **dict.fromkeys(IMAGES, CONVOLUTIONAL), "smollm2": CAUSAL}
"""subject -> what is made of it."""
NEEDS_DATA = ("onnx-int8-static", "openvino-int8", "onnx-int4")
LENGTHS = {"movie": 64, "bbc": 128, "addresses": 32, "smollm2": 128}


def dense(subject):
    """A float model and its tokenizer; schemes of PyTorch change it."""
    if subject == "smollm2":
        return language.dense_model(), transformers.AutoTokenizer.from_pretrained(language.assets.smollm2())
    if subject in IMAGES:
        model = copy.deepcopy(teacher_of(IMAGES[subject], 0))
        if subject == "garments":
            model.config.image_size = 28  # a graph has one size; without a config's or a processor's it would be 224
        return model, None
    return copy.deepcopy(teacher_of(TEXTS[subject], 0)), tokenizer_of_minilm()


def rows_of(subject, split):
    if subject == "smollm2":
        if split == "test":
            return language.test_rows()
        ids = language.tokens(language.assets.bbc_news()["train"]["text"], *language.CALIBRATION).tolist()
        return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    return {**TEXTS, **IMAGES}[subject]().rows[split]


def metric_of(subject):
    return "perplexity" if subject == "smollm2" else {"addresses": "token_accuracy"}.get(subject, "accuracy")


def scored(subject):
    return rows_of(subject, "test"), metric_of(subject)


@cache
def dense_scores(subject):
    return hfshrink.evaluate(dense(subject)[0], *scored(subject))


def make(subject, variant, folder):
    """Write a variant to its folder."""
    model, processor = dense(subject)
    if variant == "torch-fp32":
        model.save_pretrained(folder)
        return
    rows = rows_of(subject, "train")
    rows = rows.select(range(min(SAMPLES, len(rows))))
    if variant.startswith("bare-"):
        BARE[variant](model, processor, rows, folder)
        return
    options = {"calibration": rows} if variant in NEEDS_DATA else {}
    hfshrink.quantize(model, variant, output_dir=folder, processor=processor, overwrite=True, **options)


def run(subject, variant):
    """What is known about a variant: made and scored if it is not there."""
    folder = RUNS / subject / variant
    kept = folder / "result.json"
    if not kept.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        make(subject, variant, folder / "model")
        after = hfshrink.load(folder / "model")[0]
        found = hfshrink.compare(dense_scores(subject), hfshrink.evaluate(after, *scored(subject)))
        result = {
            name: getattr(found, name) for name in ("metric", "a", "b", "difference", "low", "high", "agreement")
        }
        result |= {"size_bytes": weight_bytes(folder / "model"), **loaded(folder / "model", LENGTHS.get(subject, 1))}
        kept.write_text(json.dumps(result, indent=1) + "\n")
        print(subject, variant, result, flush=True)
    return json.loads(kept.read_text())


def loaded(folder, length):
    """Memory of a fresh process that loads the model and runs one example."""
    command = [sys.executable, "-W", "ignore", "-m", "hfshrink.evaluation.footprint", str(folder), str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"loaded_bytes": None, "peak_memory_bytes": None}
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] for name in ("loaded_bytes", "peak_memory_bytes")}


def measure_memory(subject, variants):
    """Loaded memory of these variants, as far as they are there, anew."""
    for kept in [RUNS / subject / variant / "result.json" for variant in VARIANTS[subject] if variant in variants]:
        if not kept.is_file():
            continue
        found = json.loads(kept.read_text()) | loaded(kept.parent / "model", LENGTHS.get(subject, 1))
        kept.write_text(json.dumps(found, indent=1) + "\n")


def measure_times(subject, repeats):
    """CPU and wall milliseconds of all variants that are there, interleaved."""
    folders = {variant: RUNS / subject / variant / "model" for variant in VARIANTS[subject]}
    models = {variant: hfshrink.load(folder)[0] for variant, folder in folders.items() if folder.is_dir()}
    length = LENGTHS.get(subject, 1)
    times = measure_latencies(models, sequence_length=length, batch_sizes=(1, 8), threads=1, repeats=repeats)
    found = {variant: [dataclasses.asdict(one) for one in times[variant]] for variant in models}
    (RUNS / subject / "times.json").write_text(json.dumps(found, indent=1) + "\n")


def runtime_of(variant):
    return next((name for name in ("onnx", "openvino") if name in variant), "torch")


def render():
    """Write results/quantization.json and .md of what is there."""
    found, text = {}, []
    for subject, variants in VARIANTS.items():
        kept = {v: RUNS / subject / v / "result.json" for v in variants}
        results = {v: json.loads(path.read_text()) for v, path in kept.items() if path.is_file()}
        if not results:
            continue
        path = RUNS / subject / "times.json"
        times = json.loads(path.read_text()) if path.is_file() else {}
        found[subject] = {v: {**result, "times": times.get(v)} for v, result in results.items()}
        text.append(f"**{TITLES[subject]}**\n\n{_table(subject, found[subject])}")
    text.append(NOTE)
    save("quantization", {"subjects": found}, "\n\n".join(text))


TITLES = {
    "movie": "MiniLM-L6, movie reviews, 64 tokens",
    "bbc": "MiniLM-L6, BBC news, 128 tokens",
    "addresses": "MiniLM-L6, tags of addresses, 32 tokens",
    "garments": "ResNet, Fashion-MNIST",
    "efficientnet": "EfficientNet-Lite0, Fashion-MNIST enlarged to 128 × 128 pixels",
    "smollm2": "SmolLM2-135M, perplexity (lower is better), 128 tokens",
}
NOTE = (
    "Test rows chose nothing; the 128 calibration rows are training rows. Differences against the float model in "
    "PyTorch, with the paired 95 % interval of resampled rows; points for shares, plain numbers for perplexity. "
    "Loaded: growth of a fresh process by loading. CPU ms of one forward pass, one thread, all lines of a model "
    "interleaved in one run; × against float in the same runtime. *bare*: the libraries' own calls with defaults "
    "(benchmarks/quantization_bare.py). OpenVINO computes in float32, not in bfloat16, as the others do."
)


def _table(subject, found):
    scale = 1 if subject == "smollm2" else 100
    rows = []
    for variant, result in found.items():
        base = found.get({"torch": "torch-fp32"}.get(runtime_of(variant), f"{runtime_of(variant)}-fp32"), {})
        change = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(scale * result[name] for name in ("difference", "low", "high")))
        agreement = "" if result["agreement"] is None else f"{100 * result['agreement']:.1f} %"
        speed = [_speed(base.get("times"), result["times"], batch) for batch in (0, 1)]
        size = f"{result['size_bytes'] / 1e6:.1f}"
        memory = "" if result["loaded_bytes"] is None else f"{result['loaded_bytes'] / 1e6:.0f}"
        rows.append(
            (variant.replace("bare-", "*bare* "), size, memory, f"{result['b']:.4f}", change, agreement, *speed)
        )
    header = ("scheme", "file MB", "loaded MB", found[next(iter(found))]["metric"], "− float [95 %]", "agreement")
    return table((*header, "CPU ms, batch 1", "batch 8"), rows)


def _speed(base, times, batch):
    if not times:
        return ""
    ms = times[batch]["cpu_ms"]
    return f"{ms:.1f}" + (f" ({base[batch]['cpu_ms'] / ms:.2f} ×)" if base else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--variants", nargs="+", help="of these subjects")
    parser.add_argument("--time", action="store_true", help="measure times of what is there")
    parser.add_argument("--memory", action="store_true", help="measure memory of what is there anew")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--render", action="store_true", help="make nothing: write the tables of what is there")
    options = parser.parse_args()
    be_quiet()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    for subject in () if options.render or options.time or options.memory else options.only:
        for variant in VARIANTS[subject]:
            if options.variants is None or variant in options.variants:
                run(subject, variant)
    for subject in options.only if options.memory else ():
        measure_memory(subject, options.variants or VARIANTS[subject])
    for subject in options.only if options.time else ():
        measure_times(subject, options.repeats)
    render()


if __name__ == "__main__":
    main()
