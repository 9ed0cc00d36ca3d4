"""How to make the model again: the record's steps as a recipe, the seed, the data's fingerprints, the versions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hfshrink.cards.rendering import (
    LONGEST,
    MOST_ROWS,
    NOT_RECORDED,
    mapping,
    one_line,
    plain,
    safe_table,
    without_folders,
)
from hfshrink.record import CompressionReport, StepRecord

MOST_LINES = 400  # of a recipe in a card
DEEPEST = 6  # levels of mappings in mappings
METHOD_KEYWORDS = {"quantize": "scheme", "prune": "method", "factorize": "weighting"}
"""technique -> the keyword that the record keeps as the step's method."""
TRAINING = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
"""Training arguments that the steps of a Trainer record."""
UNSET = {"max_steps": -1, "gradient_accumulation_steps": 1}
"""Training arguments that say nothing at these values."""
KINDS = frozenset({"Dataset", "DatasetDict", "IterableDataset", "DataLoader", "list", "tuple", "dict", "generator"})
"""What a record holds in the place of data that were given as an object of Python."""


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
    found["steps"] = [_entry(run) for run in training_runs(report)]
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
    lines = text.splitlines()
    more = [f"# and {len(lines) - MOST_LINES:,} more lines: the record holds them"] if len(lines) > MOST_LINES else []
    return "\n".join(lines[:MOST_LINES] + more)


def recipe_note(report: CompressionReport) -> str:
    """What the recipe can't name; empty where it names all."""
    kinds = {value for step in report.steps for value in step.settings.values() if isinstance(value, str)} & KINDS
    if not kinds:
        return ""
    return f"In place of data that were given as an object, the recipe has its kind: {', '.join(sorted(kinds))}."


def training_of(step: StepRecord) -> dict[str, Any]:
    """The training arguments of a step; empty where it did not train.

    Example:
        >>> training_of(StepRecord("distill", "logits", {"num_train_epochs": 3, "max_steps": -1, "label_weight": 0.5}))
        {'num_train_epochs': 3}
    """
    inner = step.settings.get("training")
    settings = inner if isinstance(inner, Mapping) else step.settings
    if "num_train_epochs" not in settings:
        return {}
    found = {name: settings[name] for name in TRAINING if settings.get(name) not in (None, UNSET.get(name))}
    if "max_steps" in found:  # the Trainer does not heed the epochs then
        found.pop("num_train_epochs", None)
    return found


def training_runs(report: CompressionReport) -> list[list[StepRecord]]:
    """The steps, those of one training together: a Trainer that prunes and distils at once appends a step for each.

    Such steps began at the same model, trained with the same arguments, and ended within a second of each other.
    """
    runs: list[list[StepRecord]] = []
    for step in report.steps:
        if runs and _is_same_run(runs[-1][0], step):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def _is_same_run(first: StepRecord, step: StepRecord) -> bool:
    ours, theirs = ({**training_of(one), "gradient_accumulation_steps": None} for one in (first, step))
    if ours != theirs or not training_of(step) or first.technique == step.technique or first.before != step.before:
        return False
    return first.seconds is not None and step.seconds is not None and abs(first.seconds - step.seconds) < 1


def fingerprint_table(report: CompressionReport) -> str:
    """Fingerprints of the data, as far as they are recorded; empty without."""
    known = report.details.get("fingerprints")
    columns = mapping(mapping(report.details.get("subset")).get("columns"))
    rows = [*mapping(known).items(), *((f"column {name}", value) for name, value in columns.items())]
    return safe_table(("data", "fingerprint of the content"), rows[:MOST_ROWS])


def version_sentences(report: CompressionReport) -> list[str]:
    """The packages of the last step, and of earlier steps that were made with others."""
    groups: dict[str, list[str]] = {}
    for place, step in enumerate(report.steps, start=1):
        text = ", ".join(f"{name} {version}" for name, version in step.versions.items())
        groups.setdefault(text, []).append(str(place))
    groups = dict(list(groups.items())[:MOST_ROWS])
    if len(groups) <= 1:
        return [plain(text or "Not recorded.", 1000) for text in groups]
    return [f"Step {', '.join(places)}: {plain(text or NOT_RECORDED, 1000)}." for text, places in groups.items()]


def _entry(run: list[StepRecord]) -> dict[str, Any]:
    """A call with its keywords; what a Trainer did at once under `train`, with its arguments."""
    if len(run) == 1 and not isinstance(run[0].settings.get("training"), Mapping):
        return {run[0].technique: _keywords(run[0])}
    training = {name: value for step in run for name, value in training_of(step).items()}
    calls = {step.technique: _without(_keywords(step), ("training", *TRAINING)) for step in run}
    return {"train": training | calls}


def _keywords(step: StepRecord) -> dict[str, Any]:
    given = {name: value for name, value in step.settings.items() if value not in (None, UNSET.get(name))}
    keyword = METHOD_KEYWORDS.get(step.technique)
    if keyword and keyword not in given and "training" not in given:
        return {keyword: step.method, **given}
    return given


def _without(call: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in names}


def _seed(step: StepRecord) -> Any:
    for settings in (step.settings, mapping(step.settings.get("training"))):
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
