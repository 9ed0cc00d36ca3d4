"""How to load a model: a few lines of Python that run as they stand, for each way in which a model is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfshrink.cards.rendering import literal
from hfshrink.loading import TASKS
from hfshrink.record import CompressionReport, StepRecord

PLACE = "path/to/this/model"
EXPORTS = {"onnx": "onnx", "openvino": "openvino", "executorch": "executorch"}
"""Tiers that are graphs of a runtime, with the Hub's name of its library."""
TIERS = ("native", "layer-map", "bitsandbytes", *EXPORTS)
"""How a model is stored: plain transformers; layers that `import hfshrink` brings; packed by bitsandbytes; graphs."""
NEEDS = {
    "native": "It is an ordinary transformers model: `pip install transformers torch`.",
    "layer-map": "Its compressed layers come from hfshrink; without the first import the load fails: "
    "`pip install hfshrink`.",
    "bitsandbytes": "bitsandbytes unpacks its weights: `pip install transformers torch accelerate bitsandbytes`.",
    "onnx": "It runs in ONNX Runtime: `pip install transformers torch onnx onnxscript onnxruntime`.",
    "openvino": "It runs in OpenVINO: `pip install transformers torch openvino`.",
    "executorch": "It runs in ExecuTorch: `pip install transformers torch executorch`.",
}
BITS = frozenset({"int8", "nf4", "fp4"})
"""Schemes of `quantize` that bitsandbytes stores."""
UNITS = frozenset({"heads", "neurons", "heads+neurons", "channels"})
TEXT = ('processor("An example.", return_tensors="pt")', "logits")
CALLS = {
    "question-answering": ('processor("A question?", "A text.", return_tensors="pt")', "start_logits"),
    "feature-extraction": ('processor("An example.", return_tensors="pt")', "last_hidden_state"),
    "image-classification": ('processor(image, return_tensors="pt")', "logits"),
}
"""task -> (call of the processor, the output to read); `TEXT` for all others."""
GENERATING = ("text-generation", "text2text-generation")


@dataclass(frozen=True)
class Snippet:
    """Lines of Python, and what must be installed for them."""

    code: str
    needs: str


def read_tier(config: Mapping[str, Any]) -> str | None:
    """The tier that a model's config names; None for one that it doesn't tell from an export."""
    kind = config.get("quantization_config")
    method = kind.get("quant_method") if isinstance(kind, Mapping) else getattr(kind, "quant_method", None)
    known = {"hfshrink": "layer-map", "bitsandbytes": "bitsandbytes"}
    return known.get(str(getattr(method, "value", method)))


def infer_tier(report: CompressionReport) -> str:
    """The tier that a record's steps lead to; where widths may differ by layer, the one that loads both.

    Example:
        >>> infer_tier(CompressionReport(steps=(StepRecord("factorize", "none"), StepRecord("quantize", "onnx-int8"))))
        'onnx'
    """
    if not report.steps:
        return "native"
    runtime = report.steps[-1].method.partition("-")[0]
    if report.steps[-1].technique == "quantize" and runtime in EXPORTS:
        return runtime
    if report.details.get("tier") in TIERS:
        return str(report.details["tier"])
    tier = "native"
    for step in report.steps:
        tier = _tier_after(step, tier)
    return tier


def _tier_after(step: StepRecord, tier: str) -> str:
    before, after = step.before.parameters, step.after.parameters
    cut = before is not None and after is not None and after < before
    if step.technique == "to_dense":
        return "native"
    if step.technique == "factorize" or (step.technique == "quantize" and step.method == "mixed"):
        return "layer-map"
    if step.technique == "prune" and cut and step.settings.get("structure") in UNITS:
        return "layer-map"
    if step.technique == "quantize" and step.method in BITS:
        return "bitsandbytes"
    return tier


def load_snippet(task: str, tier: str, repo_id: str | None = None) -> Snippet:
    """How to load a model and run it once.

    Args:
        task: Of `hfshrink.loading.TASKS`; the bare model is loaded for any other.
        tier: Of `TIERS`.
        repo_id: Its Hub id; None stands for a path that the reader fills in.

    Example:
        >>> print(load_snippet("text-classification", "layer-map", "me/small").code.splitlines()[0])
        import hfshrink  # its layers
    """
    task = task if task in TASKS else "feature-extraction"
    place = literal(repo_id or PLACE)
    if tier in EXPORTS:
        lines = _cached_export(place) if task == "text-generation" else _export(task, tier, place)
    else:
        lines = _transformers(task, tier, place)
    more = {"image-classification": " pillow torchvision"}.get(task, "")
    more += " hfshrink" if task == "text-generation" and tier in EXPORTS else ""
    needs = f"{NEEDS[tier][:-2]}{more}`."
    return Snippet("\n".join([*lines, *_run(task)]), needs)


def export_snippets(task: str, folders: Sequence[str], repo_id: str | None = None) -> list[Snippet]:
    """How to load exports that lie in folders beside the weights, such as `onnx/onnx-int8`."""
    found = []
    for folder in folders:
        tier = folder.rpartition("/")[2].partition("-")[0]
        code = f"model = ExportedModel.from_pretrained({literal(repo_id or PLACE)}, subfolder={literal(folder)})"
        head = "from transformers.exporters import ExportedModel"
        found.append(Snippet(f"{head}\n\n{code}", NEEDS.get(tier, NEEDS["onnx"])))
    return found


def _transformers(task: str, tier: str, place: str) -> list[str]:
    auto, processor = TASKS[task][0], _processor(task)
    lines = ["import hfshrink  # its layers"] if tier == "layer-map" else []
    lines += [*_image_import(task), f"from transformers import {', '.join(sorted((auto, processor)))}", ""]
    return [
        *lines,
        f"model = {auto}.from_pretrained({place})",
        f"processor = {processor}.from_pretrained({place})",
    ]


def _export(task: str, tier: str, place: str) -> list[str]:
    processor = _processor(task)
    how = ', device="cpu", config={"INFERENCE_PRECISION_HINT": "f32"}' if tier == "openvino" else ""
    return [
        *_image_import(task),
        f"from transformers import {processor}",
        "from transformers.exporters import ExportedModel",
        "",
        f"model = ExportedModel.from_pretrained({place}{how})",
        f"processor = {processor}.from_pretrained({place})",
    ]


def _cached_export(place: str) -> list[str]:
    """Its graph takes a key-value cache: `hfshrink.load` brings `generate`."""
    return ["import hfshrink", "", f"model, processor = hfshrink.load({place})"]


def _image_import(task: str) -> list[str]:
    return ["from PIL import Image"] if task == "image-classification" else []


def _processor(task: str) -> str:
    return "AutoImageProcessor" if task == "image-classification" else "AutoTokenizer"


def _run(task: str) -> list[str]:
    if task in GENERATING:
        return [
            'inputs = processor("An example", return_tensors="pt", return_token_type_ids=False)',
            "tokens = model.generate(**inputs, max_new_tokens=20)",
            "outputs = processor.decode(tokens[0], skip_special_tokens=True)",
        ]
    call, output = CALLS.get(task, TEXT)
    image = ['image = Image.open("an-image.png")'] if task == "image-classification" else []
    return [*image, f"outputs = model(**{call}).{output}"]
