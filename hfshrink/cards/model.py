"""The model card, rendered from the record alone: a number that the record lacks can't appear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfshrink.cards.dataset import read_report as read_subset
from hfshrink.cards.dataset import subset_details
from hfshrink.cards.dataset_tables import (
    balance_tables,
    coverage_tables,
    danger_sentences,
    fact_table,
    proof_tables,
    subset_sentence,
)
from hfshrink.cards.licences import license_sentences
from hfshrink.cards.limits import group_table, limit_sentences
from hfshrink.cards.merging import marked
from hfshrink.cards.metadata import dataset_link, is_hub_id, model_card_data, training_datasets
from hfshrink.cards.model_tables import compared_table, step_table, training_table
from hfshrink.cards.opening import base_links, made_title, opening_sentence
from hfshrink.cards.plots import read_plots
from hfshrink.cards.rendering import as_json, one_line, plain, render
from hfshrink.cards.reproduce import fingerprint_table, recipe_note, recipe_yaml, version_sentences
from hfshrink.cards.snippets import EXPORTS, TIERS, export_snippets, infer_tier, load_snippet, read_tier
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.loading import infer_task
from hfshrink.record import CompressionReport, config_of
from hfshrink.record import report as read_report
from hfshrink.saving import read_config


def model_card(
    report: Any,
    *,
    model_name: str | None = None,
    repo_id: str | None = None,
    base_card: Any = None,
    tier: str | None = None,
    plots: Sequence[Mapping[str, Any]] | None = None,
    exports: Sequence[str] = (),
    **metadata: Any,
) -> Any:
    """Render a model card: base against compressed, steps, how to load, data, limits, licence, how to reproduce.

    Args:
        report: A `CompressionReport`, or a model, export, folder or Hub id that holds one.
        model_name: Title of the card and of the model index; None takes the repository's name, else one from the
            base model's and the steps.
        repo_id: The Hub id that the snippets load; None leaves a path to fill in.
        base_card: The base model's `ModelCardData`, or a mapping of its fields: licence and language are inherited.
        tier: How the model is stored, one of `hfshrink.cards.snippets.TIERS`; None reads it from the model's config,
            or from the record's steps.
        plots: Images to embed, each with `file` (relative to the card) and `caption`; None takes the record's
            `details["plots"]`.
        exports: Folders beside the weights that hold exports, such as `"onnx/onnx-int8"`.
        **metadata: Further fields of `huggingface_hub.ModelCardData`: `license`, `language`, `datasets`, …; they go
            before what is inherited.

    Returns:
        A `huggingface_hub.ModelCard`; `.save(path)` writes it, `.content` is its text. `merge_card` puts it into a
        README that was edited by hand.

    Raises:
        SettingError: The report has neither steps nor a subset, so there is nothing to tell; no such tier; a
            repository name, licence or `base_model_relation` that the Hub doesn't know.
        CheckpointError: The record can't be read.

    Example:
        >>> from hfshrink.record import StepRecord
        >>> step = StepRecord("quantize", "onnx-int8")
        >>> card = model_card(CompressionReport("some/model", (step,)))
        >>> card.data.base_model, card.data.base_model_relation
        ('some/model', 'quantized')
    """
    from huggingface_hub import ModelCard

    record, stored = _read(report)
    if repo_id is not None and not is_hub_id(repo_id):
        raise SettingError(f"repo_id must be a Hub id, namespace/name, got {one_line(repo_id, 120)!r}.")
    tier = _check_tier(tier or stored or infer_tier(record))
    title = one_line(model_name or (repo_id or "").rpartition("/")[2] or made_title(record), 96)
    data = model_card_data(record, title, tier, base_card, metadata)
    task = str(data.get("pipeline_tag") or "")
    body = render(
        "model_card.md.jinja",
        title=title,
        sentence=opening_sentence(record, data),
        comparison=compared_table(record),
        plots=read_plots(record.details.get("plots") if plots is None else plots),
        steps=step_table(record),
        snippets=[load_snippet(task, tier, repo_id), *export_snippets(task, exports, repo_id)],
        training=training_table(record),
        datasets=[dataset_link(name) for name in training_datasets(record)],
        subset=_subset_parts(record),
        limits=limit_sentences(record),
        groups=group_table(record),
        licence=license_sentences(data, base_links(data) or "the base model"),
        recipe=recipe_yaml(record),
        recipe_note=recipe_note(record),
        fingerprints=fingerprint_table(record),
        versions=version_sentences(record),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{marked(body)}")


def _read(report: Any) -> tuple[CompressionReport, str | None]:
    """The record with its task, and the tier: of both what the model's config says, where there is one."""
    if isinstance(report, CompressionReport):
        record, config = report, {}
    else:
        record = read_report(report)
        config = read_config(report) if isinstance(report, str | Path) else vars(config_of(report))
    if not record.steps and "subset" not in record.details:
        raise SettingError(
            "This record has no steps: hfshrink did nothing to the model, so there is no card to write. If it was "
            "trained on a subset, call subset.attach(model) first."
        )
    if "task" not in record.details and (task := _task(config)):
        record = dataclasses.replace(record, details={**record.details, "task": task})
    record = CompressionReport.from_dict(as_json(record.to_dict(), sort_keys=True))
    return record, None if infer_tier(record) in EXPORTS else read_tier(config)


def _task(config: Mapping[str, Any]) -> str | None:
    from transformers import PreTrainedConfig

    try:
        return infer_task(PreTrainedConfig(architectures=config.get("architectures")))
    except (UnsupportedModelError, TypeError, ValueError):
        return None


def _check_tier(tier: str) -> str:
    if tier not in TIERS:
        raise SettingError(f"tier must be one of {', '.join(TIERS)}, got {one_line(tier, 60)!r}.")
    return tier


def _subset_parts(record: CompressionReport) -> list[str]:
    """The tables of the subset that the model was trained on; empty without, a sentence where they can't be read."""
    details = record.details.get("subset")
    if details is None:
        return []
    try:
        subset = read_subset(details)
    except CheckpointError as error:
        return [f"The record of the subset can't be read: {plain(error)}"]
    coverage, proof = (subset_details(subset, name) for name in ("coverage", "proof"))
    dangers = danger_sentences(subset, coverage, subset.get("license"))
    parts = [subset_sentence(subset), fact_table(subset), *balance_tables(subset), *coverage_tables(coverage)]
    parts += ["Dangers of the subset:", "\n".join(f"- {danger}" for danger in dangers), *proof_tables(proof)]
    return [part for part in parts if part]
