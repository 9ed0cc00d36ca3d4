"""SmolLM2-135M as an ONNX graph that scores and generates: size, perplexity, tokens per second, of each scheme.

The model is traced once; each arm quantizes a copy of that graph. Calibration of GPTQ is 64 × 128 tokens of BBC news,
perplexity is measured on editorials of the New York Times, speed and agreement on the greedy continuation of prompts
from there. Its weights lie on an asymmetric grid of 4 bits in groups of 32 already, so arms are symmetric. Each arm
keeps its graph and result in runs/quantization/generation and is skipped when they are there. One thread.
"""

import argparse
import json
import os
import random
import shutil
import time
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import onnxruntime
import torch
from common import ROOT, be_quiet, save
from pruning_language import CALIBRATION, dense_model, test_rows, tokens

import assets
import hfshrink
from hfshrink.calibration import batches, collect
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.quantization.graphs import dynamic, floating, four_bit, half
from hfshrink.quantization.graphs.decoder import export_decoder
from hfshrink.quantization.graphs.rounding import dequantized, gptq, output_error, round_clipped, round_to_nearest
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "quantization" / "generation"
ROWS, PROMPTS = 4, 4  # rows of 256 tokens for perplexity; prompts for speed and agreement
PROMPT, NEW, TURNS = 64, 32, 3
SIXTY_FOUR, THIRTY_TWO = {"group_size": 64}, {"group_size": 32}
ARMS = {
    "torch-fp32": None,
    "torch-bf16": None,
    "onnx-fp32": (floating.make_float, {}),
    "onnx-fp16": (half.make_half, {}),
    "onnx-int8": (dynamic.make_dynamic, {}),
    "onnx-int4-rtn-64": (four_bit.make_four_bit, {**SIXTY_FOUR, "rounding": "rtn"}),
    "onnx-int4-clip-64": (four_bit.make_four_bit, {**SIXTY_FOUR, "rounding": "clip"}),
    "onnx-int4-hqq-64": (four_bit.make_four_bit, {**SIXTY_FOUR, "rounding": "hqq"}),
    "onnx-int4-gptq-64": (four_bit.make_four_bit, {**SIXTY_FOUR, "rounding": "gptq"}),
    "onnx-int4-clip-32": (four_bit.make_four_bit, {**THIRTY_TWO, "rounding": "clip"}),
    "onnx-int4-gptq-32": (four_bit.make_four_bit, {**THIRTY_TWO, "rounding": "gptq"}),
    "onnx-int4-gptq-32-head-4": (
        four_bit.make_four_bit,
        {**THIRTY_TWO, "rounding": "gptq", "head_bits": 4, "embeddings": "int4"},
    ),
}
"""Arm -> the maker and its options."""


def calibration(part="train", rows=CALIBRATION[0]):
    ids = tokens(assets.bbc_news()[part]["text"], rows, CALIBRATION[1])
    return [{"input_ids": chunk} for chunk in ids.split(8)]


def load_export(folder):
    """An export on one thread that does not spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return hfshrink.load(folder, session_options=options)[0]


def traced(model):
    """The float graph, traced if its folder is not there."""
    folder = RUNS / "float"
    if not (folder / "export_cost.json").is_file():
        start = time.process_time()
        export_decoder(model).save_pretrained(folder)
        (folder / "export_cost.json").write_text(json.dumps({"cpu": time.process_time() - start}))
    exported = load_export(folder)
    exported.program.meta.pop("path")  # else it would run the file, not what becomes of the graph
    return exported


def loaded(name, model):
    """The model of an arm, and what its maker reports."""
    if name.startswith("torch"):
        return model.to(torch.bfloat16 if name.endswith("bf16") else torch.float32), {}
    folder = RUNS / name
    if not (folder / "made.json").is_file():
        maker, options = ARMS[name]
        rows = calibration() if options.get("rounding") == "gptq" else None
        start, exported = time.process_time(), traced(model)
        with mock.patch.dict(maker.__globals__, export_graph=lambda *_: exported):
            exported, _, results = maker(model.float(), None, [], calibration=rows, **options)
        shutil.rmtree(folder, ignore_errors=True)
        exported.save_pretrained(folder)
        made = {"megabytes": weight_bytes(folder) / 1e6, "cpu_seconds": time.process_time() - start}
        (folder / "made.json").write_text(json.dumps({**made, "results": results}, default=str) + "\n")
    return load_export(folder), json.loads((folder / "made.json").read_text())


def prompts():
    return tokens(assets.nyt_snippets()["test"]["text"], 64, PROMPT)[-PROMPTS:]  # behind the rows of perplexity


def generate(model, prompt):
    """New tokens, and the CPU seconds they took."""
    start = time.process_time()
    with torch.inference_mode():
        found = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
    return found[0, len(prompt) :].tolist(), time.process_time() - start


def run(name, model):
    """Perplexity and greedy tokens of an arm, measured if they are not there."""
    file = RUNS / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    arm, made = loaded(name, model)
    found = hfshrink.evaluate(arm, test_rows().select(range(ROWS)), "perplexity", batch_size=1)
    result = {**made, "perplexity": found.main.value, "tokens": [generate(arm, prompt)[0] for prompt in prompts()]}
    if name.startswith("torch"):
        result["megabytes"] = sum(p.numel() * p.element_size() for p in arm.parameters()) / 1e6
    file.write_text(json.dumps(result) + "\n")
    print(f"{name}: {result['megabytes']:.0f} MB, perplexity {result['perplexity']:.2f}", flush=True)
    return result


def speeds(names):
    """Median CPU seconds of a prompt and its continuation, all arms in turns in one process."""
    file = RUNS / "speeds.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    if set(names) <= set(known):
        return known
    arms = {name: loaded(name, dense_model())[0] for name in names}
    samples, order, prompt = {name: [] for name in arms}, random.Random(0), prompts()[0]
    for turn in range(1 + TURNS):
        for name in order.sample(sorted(arms), len(arms)):
            seconds = generate(arms[name], prompt)[1]
            if turn:
                samples[name].append(seconds)
    found = {name: {"median": float(np.median(s)), "all": s} for name, s in samples.items()}
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def layer_errors(model):
    """Output error of each layer as a share of rounding to the nearest, on held-out rows, symmetric groups."""
    file = RUNS / "layer_errors.json"
    if file.is_file():
        return json.loads(file.read_text())
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    found = {"gptq": {}, "clip": {}}
    for chunk in (names[i : i + 70] for i in range(0, len(names), 70)):
        grams = [gram(model, rows, chunk) for rows in (calibration(), calibration("test", 16))]
        for name in chunk:
            weight = model.get_submodule(name).weight.detach().float()
            seen, unseen = (its[name].input_gram for its in grams)
            near, clip = (f(weight, 4, 64) for f in (round_to_nearest, round_clipped))
            made = {"near": near, "clip": clip, "gptq": gptq(weight, seen, 4, 64)}
            errors = {key: float(output_error(weight - dequantized(*r, 64), unseen)) for key, r in made.items()}
            for key, its in found.items():
                its[name] = errors[key] / errors["near"]
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def gram(model, rows, names):
    with torch.inference_mode(), collect(model, "input_gram", include=names) as stats:
        for batch in batches(rows, model):
            model(**batch)
    return stats


def render(found, speed, errors):
    base = np.array(found["torch-fp32"]["tokens"])
    lines = []
    for name, its in found.items():
        same = (np.array(its["tokens"]) == base).mean()
        rate = f"{NEW / speed[name]['median']:.1f}" if name in speed else ""
        lines.append((name, f"{its['megabytes']:.0f}", f"{its['perplexity']:.2f}", rate, f"{same:.0%}"))
    text = table(("scheme", "file MB", "perplexity", "tokens per CPU second", "greedy tokens as fp32"), lines)
    text += (
        f"\n\nSmolLM2-135M-Instruct, one thread. Perplexity of {ROWS} × 256 tokens of NYT editorials; greedy "
        f"continuation of {PROMPT} tokens by {NEW}, median of {TURNS} turns of all arms in one process, reading the "
        f"prompt included; equal tokens, place by place, of {PROMPTS} prompts. GPTQ is calibrated on "
        f"{CALIBRATION[0]} × {CALIBRATION[1]} tokens of BBC news. The PyTorch rows count parameters, tied once."
    )
    if errors:
        ratios = {name: np.array(list(its.values())) for name, its in errors.items()}
        parts = [
            f"{name} {values.mean():.2f} on average ({values.min():.2f} to {values.max():.2f})"
            for name, values in ratios.items()
        ]
        text += (
            f"\n\nSquared output error of the {len(ratios['gptq'])} layers at 4 bits, symmetric groups of 64, on held-"
            f"out rows (16 × {CALIBRATION[1]} tokens of BBC news), as a share of rounding to the nearest: "
            f"{'; '.join(parts)}."
        )
    save("quantization_generation", {"arms": found, "speeds": speed, "layer_errors": errors}, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS), help="run these arms only")
    parser.add_argument("--no-speed", action="store_true", help="leave the timing out")
    parser.add_argument("--no-layers", action="store_true", help="leave the errors of layers out")
    options = parser.parse_args()
    be_quiet()
    RUNS.mkdir(parents=True, exist_ok=True)
    errors = {} if options.no_layers else layer_errors(dense_model())
    found = {name: run(name, dense_model()) for name in options.only}
    render(found, {} if options.no_speed else speeds(list(found)), errors)


if __name__ == "__main__":
    main()
