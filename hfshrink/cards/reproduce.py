"""How to make the model again: the record's steps as a recipe, the seed, the data's fingerprints, the versions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfshrink.cards.rendering import LONGEST, one_line, plain, safe_table, without_folders
from hfshrink.record import CompressionReport, StepRecord

NOT_RECORDED = "not recorded"
DEEPEST = 6  # levels of mappings in mappings
METHOD_KEYWORDS = {"quantize": "scheme", "prune": "method", "factorize": "weighting"}
"""technique -> the keyword that the record keeps as the step's method."""


def recipe(report: CompressionReport) -> dict[str, Any]:
    """The steps as `base`, `seed` and `steps`: verbs with the keywords that were given, as far as JSON can hold them.

    Example:
        >>> step = StepRecord("quantize", "onnx-int8", {"calibration": "reviews"})
        >>> recipe(CompressionReport("org/base", (step,)))
        {'base': 'org/base', 'steps': [{'quantize': {'scheme': 'onnx-int8', 'calibration': 'reviews'}}]}
    """
    found: dict[str, Any] = {"base": report.base_model}
    seed = next((seed for step in report.steps if (seed := _seed(step)) is not None), None)
    if seed is not None:
        found["seed"] = seed
    found["steps"] = [_step(step) for step in report.steps]
    return dict(_safe(found, DEEPEST + 3))


def recipe_yaml(report: CompressionReport) -> str:
    """The recipe as YAML that can end no fence and hold no markup.

    Example:
        >>> print(recipe_yaml(CompressionReport("org/base", (StepRecord("to_dense", "low_rank"),))))
        base: org/base
        steps:
        - to_dense: {}
    """
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts with a sign of markup in double quotes, where it can be written as a number."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent(dumper: Any, text: str) -> Any:
        style = '"' if any(sign in text for sign in "`<>") else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    text: str = yaml.dump(recipe(report), Dumper=Dumper, sort_keys=False, allow_unicode=False, width=110).rstrip("\n")
    for sign, code in (("`", r"\x60"), ("<", r"\x3C"), (">", r"\x3E")):
        text = text.replace(sign, code)
    return text


def fingerprint_table(report: CompressionReport) -> str:
    """Fingerprints of the data, as far as they are recorded; empty without."""
    known = report.details.get("fingerprints")
    rows = [(name, value) for name, value in known.items()] if isinstance(known, Mapping) else []
    subset = report.details.get("subset")
    columns = subset.get("columns") if isinstance(subset, Mapping) else None
    rows += [(f"column {name}", value) for name, value in columns.items()] if isinstance(columns, Mapping) else []
    return safe_table(("data", "fingerprint of the content"), rows)


def version_sentences(report: CompressionReport) -> list[str]:
    """The packages of the last step, and of earlier steps that were made with others."""
    groups: dict[str, list[str]] = {}
    for place, step in enumerate(report.steps, start=1):
        text = ", ".join(f"{name} {version}" for name, version in step.versions.items())
        groups.setdefault(text, []).append(str(place))
    if len(groups) <= 1:
        return [plain(text or "Not recorded.", 1000) for text in groups]
    return [f"Step {', '.join(places)}: {plain(text or NOT_RECORDED, 1000)}." for text, places in groups.items()]


def _step(step: StepRecord) -> dict[str, Any]:
    settings = {name: value for name, value in step.settings.items() if value is not None}
    training = settings.pop("training", None)
    keyword = METHOD_KEYWORDS.get(step.technique)
    if keyword and keyword not in settings and not isinstance(training, Mapping):
        settings = {keyword: step.method, **settings}
    call = {step.technique: settings}
    return {"train": {**training, **call}} if isinstance(training, Mapping) else call


def _seed(step: StepRecord) -> Any:
    training = step.settings.get("training")
    for settings in (step.settings, training if isinstance(training, Mapping) else {}):
        if isinstance(settings.get("seed"), int):
            return settings["seed"]
    return None


def _safe(value: Any, depth: int) -> Any:
    """Mappings, lists, texts, numbers and truth values; without secrets, folders of a machine and what is None."""
    if depth == 0:
        return one_line(value)
    if isinstance(value, Mapping):
        pairs = {one_line(name, 100): _safe(item, depth - 1) for name, item in without_folders(value).items()}
        return {name: item for name, item in pairs.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_safe(item, depth - 1) for item in value]
    if isinstance(value, str):
        return one_line(value, LONGEST)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else one_line(value)
