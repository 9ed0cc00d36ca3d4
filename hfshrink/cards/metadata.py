"""The metadata of a model card, from the record: nothing that the Hub would refuse, and no number of another's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfshrink.cards.licences import check_license, known_license
from hfshrink.cards.rendering import one_line, plain, without_folder
from hfshrink.cards.snippets import EXPORTS
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.measurement import Score
from hfshrink.record import CompressionReport

RELATIONS = ("finetune", "adapter", "merge", "quantized")
"""What `base_model_relation` may be; huggingface_hub checks none of it."""
TAGS = {
    "make_student": "distillation",
    "distill": "distillation",
    "quantize": "quantized",
    "prune": "pruned",
    "trim_vocabulary": "pruned",
    "factorize": "low-rank",
    "cluster": "clustered",
}
"""technique -> the tag that the Hub's users look for."""
LIBRARIES = {**EXPORTS, "layer-map": "hfshrink"}
"""tier -> the library without which the model does not load, where transformers is not enough."""
INHERITED = ("license", "license_name", "license_link", "language")
"""Fields that a compressed model takes over from its base's card."""
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)


def is_hub_id(name: Any) -> bool:
    """Whether a name can be a repository of the Hub, with its namespace: a folder's or a file's can't.

    Example:
        >>> is_hub_id("org/model-v1.5"), is_hub_id("model"), is_hub_id("../x"), is_hub_id("a/b/c")
        (True, False, False, False)
    """
    return isinstance(name, str) and HUB_ID.fullmatch(name) is not None and ".." not in name


def model_card_data(report: CompressionReport, title: str, tier: str, base_card: Any, given: Mapping[str, Any]) -> Any:
    """The metadata: what the caller gives goes before the record's, and that before the base's card's.

    Args:
        report: The record.
        title: Name in the model index.
        tier: Of `snippets.TIERS`.
        base_card: The base's `ModelCardData`, a mapping of its fields, or None.
        given: Fields of `huggingface_hub.ModelCardData`.

    Raises:
        SettingError: A relation, licence or base model that the Hub would not know; metadata that it can't parse.
    """
    from huggingface_hub import ModelCardData

    given = {name: value for name, value in given.items() if value is not None}
    _check(given)
    results = _eval_results(report, given.get("pipeline_tag"))
    base = given.pop("base_model", None) or (report.base_model if is_hub_id(report.base_model) else None)
    known: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": _relation(report) if base else None,
        "library_name": LIBRARIES.get(tier, "transformers"),
        "pipeline_tag": _line(report.details.get("task")),
        "datasets": [name for name in training_datasets(report) if is_hub_id(name)] or None,
        "metrics": sorted({_line(score.metric) for score in report.compressed.scores}) or None,
        "eval_results": results or None,
        "model_name": title if results else None,
    }
    tags = {"hfshrink", *(TAGS[step.technique] for step in report.steps if step.technique in TAGS)}
    asked = given.pop("tags", ())
    tags |= {str(_line(tag)) for tag in ([asked] if isinstance(asked, str) else asked)}
    fields = {**known, **_inherited(report, base_card), **{name: _clean(value) for name, value in given.items()}}
    if not base:
        fields.pop("base_model_relation", None)
    try:
        data = ModelCardData(tags=sorted(tags), **{n: value for n, value in fields.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise SettingError(f"These metadata are none of a model card: {one_line(error)}") from None
    return _checked(data)


def read_card_data(source: str | Path, **hub: Any) -> Any:
    """The metadata of a model's card, for `model_card(base_card=…)`.

    Args:
        source: A README.md, a folder that holds one, or a Hub id.
        **hub: Go to `huggingface_hub.ModelCard.load`, such as `token`.

    Raises:
        CheckpointError: There is no card, or none that can be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    path = Path(source) / "README.md" if Path(source).is_dir() else Path(source)
    if not path.exists() and not is_hub_id(str(source)):
        raise CheckpointError(
            f"Expected a README.md, a folder with one or a Hub id, got {str(source)!r}: no such file."
        )
    try:
        return ModelCard.load(path if path.exists() else str(source), ignore_metadata_errors=True, **hub).data
    except (OSError, ValueError, TypeError, YAMLError) as error:  # of the network: kinds of OSError
        raise CheckpointError(f"The card of {str(source)!r} can't be read: {one_line(error)}") from None


def training_datasets(report: CompressionReport) -> list[str]:
    """Names of the data that the model was trained on: the record's `datasets`, and the source of its `subset`."""
    named = report.details.get("datasets")
    subset = report.details.get("subset")
    names = [named] if isinstance(named, str) else list(named) if isinstance(named, list | tuple) else []
    if isinstance(subset, Mapping):
        names += [subset.get("repo_id"), subset.get("data")]
    return list(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def dataset_link(name: str) -> str:
    """A data set's name, with a link where it is a Hub id."""
    shown = plain(without_folder(name))
    return f"[{shown}](https://huggingface.co/datasets/{name})" if is_hub_id(name) else shown


def _check(given: Mapping[str, Any]) -> None:
    relation = given.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise SettingError(
            f"base_model_relation must be one of {', '.join(RELATIONS)}, got {one_line(relation, 60)!r}."
        )
    if "license" in given:
        check_license(given["license"])
    bases = given.get("base_model") or ()
    for base in [bases] if isinstance(bases, str) else bases:
        if not is_hub_id(base):
            raise SettingError(
                f"base_model must be a Hub id, namespace/name, got {one_line(without_folder(base), 120)!r}. Leave it "
                "out for a model that is not on the Hub."
            )


def _relation(report: CompressionReport) -> str:
    return "quantized" if any(step.technique == "quantize" for step in report.steps) else "finetune"


def _inherited(report: CompressionReport, base_card: Any) -> dict[str, Any]:
    """From the record's details where they stand there, else from the base's card."""
    fields = base_card.to_dict() if hasattr(base_card, "to_dict") else base_card
    fields = fields if isinstance(fields, Mapping) else {}
    source = fields if not report.details.get("license") else report.details
    found = {name: _clean(source.get(name)) for name in INHERITED[:3]}
    found["language"] = _clean(report.details.get("language") or fields.get("language"))
    if found["license"]:
        found |= known_license(found["license"])
    return {name: value for name, value in found.items() if value}


def _eval_results(report: CompressionReport, task: Any) -> list[Any]:
    from huggingface_hub import EvalResult

    revisions = report.details.get("dataset_revisions")
    revisions = revisions if isinstance(revisions, Mapping) else {}
    results = []
    for score in report.compressed.scores:
        if score.value is None:
            continue
        name = _dataset(score)
        results.append(
            EvalResult(
                task_type=_line(task or report.details.get("task")) or "other",
                dataset_type=name,
                dataset_name=name,
                dataset_split=_line(score.split),
                dataset_revision=_line(revisions.get(score.dataset)),
                metric_type=_line(score.metric) or "unknown",
                metric_value=round(score.value, 6),
            )
        )
    return results


def _dataset(score: Score) -> str:
    return _line(without_folder(score.dataset)) or "unknown"


def _line(value: Any) -> str | None:
    return (one_line(value, 200) or None) if isinstance(value, str) else None


def _clean(value: Any) -> Any:
    """Texts without line breaks, also in lists and mappings; numbers and truth values as they are."""
    if isinstance(value, str):
        return _line(value)
    if isinstance(value, list | tuple):
        return [item for item in map(_clean, value) if item is not None] or None
    if isinstance(value, Mapping):
        return {one_line(name, 200): _clean(item) for name, item in value.items()} or None
    return value


def _checked(data: Any) -> Any:
    """The metadata as the Hub will read them: written as YAML, and read back."""
    import yaml
    from huggingface_hub import ModelCardData

    try:
        text = data.to_yaml()
        again = yaml.safe_load(text)
        same = ModelCardData(**again).to_dict() == data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise SettingError(f"These metadata can't be written as YAML: {one_line(error)}") from None
    if not same:
        raise SettingError(f"These metadata are read back from YAML as something else: {one_line(again)}")
    return data
