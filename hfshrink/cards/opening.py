"""How a model's card opens: its title, and what the model is in one sentence."""

from __future__ import annotations

from typing import Any

from hfshrink.cards.model_tables import both_sides
from hfshrink.cards.rendering import plain, without_folder
from hfshrink.cards.reproduce import training_runs
from hfshrink.measurement import megabytes
from hfshrink.record import CompressionReport, StepRecord

WORDS = {
    "make_student": ("student", "copied into a smaller student"),
    "distill": ("distilled", "distilled ({method})"),
    "prune": ("pruned", "pruned ({method})"),
    "trim_vocabulary": ("trimmed", "its vocabulary trimmed ({method})"),
    "factorize": ("low-rank", "factored into low ranks ({method})"),
    "cluster": ("clustered", "its weights clustered ({method})"),
    "quantize": ("{method}", "quantized ({method})"),
    "to_dense": ("dense", "its layers made dense again"),
}
"""technique -> (its word in a title, what it did to the model)."""
MOST = 6  # steps that a title or sentence names


def made_title(report: CompressionReport) -> str:
    """A title from the base model's name and the steps.

    Example:
        >>> made_title(CompressionReport("org/base", (StepRecord("distill", "logits"), StepRecord("quantize", "nf4"))))
        'base-distilled-nf4'
    """
    base = str(without_folder(report.base_model) or "").rpartition("/")[2]
    words = [WORDS.get(step.technique, ("{method}",))[0].replace("{method}", step.method) for step in report.steps]
    return "-".join(dict.fromkeys([base or "model", *words[-MOST:]]))


def opening_sentence(report: CompressionReport, data: Any) -> str:
    """What the model is: its task, its base, the steps, and how much smaller it is where that is recorded.

    Args:
        report: The record.
        data: The card's metadata.
    """
    task = report.details.get("task")
    kind = f"This {plain(task)} model" if isinstance(task, str) and task else "This model"
    name = report.base_model
    base = base_links(data) or plain(without_folder(name) or "")
    if name and base_links(data) and name not in _bases(data):  # a name that the steps took from a folder
        base = f"{plain(without_folder(name))}, which comes from {base},"
    if not report.steps:
        return f"{kind} {f'is {base}' if base else 'was'} trained on rows that hfshrink picked."
    runs = training_runs(report)
    steps = [" and ".join(_done(step) for step in run) for run in runs[:MOST]]
    more = f", and {len(runs) - MOST:,} more steps" if len(runs) > MOST else ""
    made = f"{kind} is {base} made smaller" if base else f"{kind} was made smaller"
    return f"{made} with hfshrink: {', then '.join(steps)}{more}{_smaller(report)}."


def base_links(data: Any) -> str:
    """The base models of a card's metadata as links; empty without."""
    return ", ".join(f"[{plain(name)}](https://huggingface.co/{name})" for name in _bases(data))


def _bases(data: Any) -> list[str]:
    names = data.get("base_model") or []
    return [names] if isinstance(names, str) else names


def _done(step: StepRecord) -> str:
    kept, structure = step.results.get("kept_layers"), step.settings.get("structure")
    if step.technique == "make_student" and isinstance(kept, list) and step.method == "layers":
        return f"cut to {len(kept):,} of its layers"
    method = plain(step.method)
    if step.technique == "prune" and isinstance(structure, str):
        method = f"{plain(structure)} by {method}"
    if step.technique not in WORDS:
        return f"{plain(step.technique)} ({method})"
    return WORDS[step.technique][1].replace("{method}", method)


def _smaller(report: CompressionReport) -> str:
    base, compressed = both_sides(report)
    if base.size_bytes is not None and compressed.size_bytes is not None:
        return (
            f"; its weight files take {megabytes(compressed.size_bytes)}, those of the base "
            f"{megabytes(base.size_bytes)}"
        )
    if None not in (base.parameters, compressed.parameters) and base.parameters != compressed.parameters:
        return f"; it has {compressed.parameters:,} parameters, the base {base.parameters:,}"
    return ""
