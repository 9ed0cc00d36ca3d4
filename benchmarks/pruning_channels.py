"""Channels of small convolutional nets on Fashion-MNIST: half of them cut out, before and after 150 steps of training.

A ResNet of transformers (the teachers of distillation.py) and a VGG-like net of plain modules, trained here. Each run
(net, method, seed) keeps its result and which test rows it got right in runs/pruning/channels and is skipped when it
is there. Nothing is chosen. `--time` times ONNX models: do it on a quiet machine. One thread.
"""

import argparse
import copy
import dataclasses
import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # the same numbers whatever the number of cores

import numpy as np
import torch
import transformers
from common import ROOT, be_quiet, paired_interval, save
from distillation_data import garments
from torch import nn

import hfshrink
from distillation import fit, teacher_of
from hfshrink.evaluation import measure_latencies
from hfshrink.evaluation.profiling import count_macs, weight_bytes
from hfshrink.terminal import table

RUNS = ROOT / "runs" / "pruning" / "channels"
SEEDS, STEPS, TUNED_STEPS, RATE, TUNED_RATE = 3, 600, 150, 2e-3, 1e-3
METHODS = ("dense", "magnitude", "random")
NETS = ("resnet", "vgg")
SHAPE = (1, 28, 28)


class Labelled(nn.Module):
    """A plain net as the Trainer wants it: takes a batch with labels, gives loss and logits."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def vgg_like(widths=(32, 32, 64, 64, 128, 128), classes=10):
    """Pairs of 3 × 3 convolutions, each pair pooled, and two Linears."""
    layers, before = [], SHAPE[0]
    for number, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * (number % 2)
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * before, 128), nn.ReLU(), nn.Linear(128, classes))


def dense_net(name, seed):
    """The trained net of a seed; the VGG-like one is kept in its folder."""
    if name == "resnet":
        return copy.deepcopy(teacher_of(garments, seed))
    path = RUNS / "vgg" / "trained" / f"seed-{seed}.pt"
    transformers.set_seed(seed)
    net, subject = vgg_like(), garments()
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        fit(Labelled(net), subject.rows["train"], subject, seed, RATE, STEPS)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    return net.eval()


@torch.no_grad()
def correct(net, rows):
    """Which rows a net gets right: booleans (rows,)."""
    parts = []
    for batch in rows.iter(200):
        output = net(batch["pixel_values"])
        logits = output if isinstance(output, torch.Tensor) else output.logits
        parts.append(logits.argmax(-1) == batch["labels"])
    return torch.cat(parts).numpy()


def run(name, method, seed):
    """The result of one run, made if it is not there; "dense" is only trained on."""
    folder = RUNS / name / method / f"seed-{seed}"
    if not (folder / "result.json").is_file():
        net, subject = dense_net(name, seed), garments()
        if method != "dense":
            example = {} if name == "resnet" else {"calibration": torch.zeros(2, *SHAPE)}
            hfshrink.prune(net, 0.5, "channels", method, seed=seed, **example)
        before = correct(net, subject.rows["test"])
        transformers.set_seed(seed)
        trained = net if name == "resnet" else Labelled(net)
        fit(trained, subject.rows["train"], subject, seed, TUNED_RATE, TUNED_STEPS)
        after = correct(net.eval(), subject.rows["test"])
        folder.mkdir(parents=True, exist_ok=True)
        if name == "resnet" and seed == 0:
            net.save_pretrained(folder / "model")
        np.savez_compressed(folder / "rows.npz", before=before, after=after)
        result = {"before": float(before.mean()), "after": float(after.mean()), **sizes(net)}
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name} {method} seed {seed}: {result['before']:.4f}, tuned {result['after']:.4f}", flush=True)
    return json.loads((folder / "result.json").read_text())


def sizes(net):
    image = torch.zeros(1, *SHAPE)
    named = {"pixel_values" if hasattr(net, "config") else "input": image}
    return {"parameters": sum(p.numel() for p in net.parameters()), "macs": count_macs(net, named)}


def rows_of(name, method, stage):
    """Booleans (seeds, test rows)."""
    return np.stack([np.load(RUNS / name / method / f"seed-{seed}" / "rows.npz")[stage] for seed in range(SEEDS)])


def measure_times():
    """CPU time of the ResNet of seed 0 in ONNX Runtime, dense against cut, interleaved."""
    size = transformers.ViTImageProcessor(size={"height": SHAPE[1], "width": SHAPE[2]})
    exported, files = {}, {}
    for method in METHODS:
        target = RUNS / "onnx" / method
        how = {"output_dir": target, "processor": size, "overwrite": True}
        exported[method] = hfshrink.quantize(RUNS / "resnet" / method / "seed-0" / "model", "onnx-fp32", **how)
        files[method] = weight_bytes(target)
    times = measure_latencies(exported, batch_sizes=(1, 8), threads=1, processor=size)
    found = {
        method: {"onnx_bytes": files[method], "times": [dataclasses.asdict(time) for time in times[method]]}
        for method in METHODS
    }
    (RUNS / "times.json").write_text(json.dumps(found, indent=1) + "\n")


def render():
    """Write results/pruning_channels.json and .md."""
    found, lines = {}, []
    for name in NETS:
        for method in METHODS:
            results = [run(name, method, seed) for seed in range(SEEDS)]
            found[f"{name}/{method}"] = arm = {"results": results}
            cells = [name, method]
            for stage in ("before", "after"):
                values = [result[stage] for result in results]
                cells.append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
                for other in ("dense", "random"):
                    pair = rows_of(name, other, stage), rows_of(name, method, stage)
                    arm[f"{stage}_minus_{other}"] = paired_interval(*pair)
            cells += ["" if method == other else _points(arm[f"after_minus_{other}"]) for other in ("dense", "random")]
            parameters, macs = (np.mean([result[key] for result in results]) for key in ("parameters", "macs"))
            lines.append((*cells, f"{parameters / 1e6:.3f} M", f"{macs / 1e6:.1f} M"))
    header = ("net", "channels", "cut only (range)", f"{TUNED_STEPS} steps later (range)", "− dense [95 %]")
    text = (
        f"{table((*header, '− random [95 %]', 'parameters', 'MACs'), lines)}\n\nFashion-MNIST, 2,000 training and "
        f"2,000 test images, {SEEDS} seeds; half of the channels of every group go, those with the smallest L1 norm "
        f"or random ones. The dense nets got the same {TUNED_STEPS} steps of 32 images, at {TUNED_RATE:g}, not "
        "chosen. Differences after these steps, in points; intervals resample seeds and test rows, paired. MACs for "
        "one image."
    )
    data = {"arms": found}
    if (RUNS / "times.json").is_file():
        data["times"] = json.loads((RUNS / "times.json").read_text())
        text += "\n\n" + _times(data["times"])
    save("pruning_channels", data, text)


def _points(interval):
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in interval))


def _times(found):
    dense = found["dense"]["times"]
    rows = []
    for method, row in found.items():
        pairs = zip(dense, row["times"], strict=True)
        cells = [f"{time['cpu_ms']:.2f} ms, {base['cpu_ms'] / time['cpu_ms']:.2f}×" for base, time in pairs]
        rows.append((method, f"{row['onnx_bytes'] / 1e6:.2f} MB", *cells))
    header = ("ResNet, ONNX fp32", "file", *(f"{time['batch_size']} images" for time in dense))
    return f"{table(header, rows)}\n\nCPU time of one thread, interleaved, and how many times less than dense."


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", action="store_true", help="time the ONNX models of what was run")
    options = parser.parse_args()
    be_quiet()
    for seed in range(SEEDS):
        for name in NETS:
            for method in METHODS:
                run(name, method, seed)
    if options.time:
        measure_times()
    render()


if __name__ == "__main__":
    main()
