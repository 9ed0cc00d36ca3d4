"""What is published of a model: its files, its exports, the record, the results, the plots and the card."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfshrink.cards.rendering import plain
from hfshrink.cards.snippets import read_tier
from hfshrink.errors import CheckpointError, MissingDependencyError, SettingError
from hfshrink.hub.client import secrets_of
from hfshrink.hub.contents import (
    PROCESSORS,
    RECORD_FILE,
    RESULTS_FILE,
    TOKENIZERS,
    Contents,
    add_exports,
    clean_configs,
    listed,
    read_folder,
)
from hfshrink.hub.leaks import check_file, clean
from hfshrink.hub.repositories import Target
from hfshrink.hub.terms import Terms, check_terms
from hfshrink.loading import EXPORT_MANIFEST, find_processor
from hfshrink.record import CompressionReport, config_of
from hfshrink.record import report as read_report
from hfshrink.saving import read_config

CardMaker = Callable[[str | None], str]
"""The README that is there, None without -> the new one."""
SCHEME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelParts:
    """A model or export, or its folder, with what goes beside it; see `push_to_hub`."""

    model: Any
    processor: Any
    exports: Mapping[str, Any]
    max_shard_size: int | str = "50GB"

    def check(self) -> None:
        """Refuse what can't be published, before anything is written or sent.

        Raises:
            SettingError: No record, or a name of an export that is no folder's.
            CheckpointError: No such folder.
        """
        places = [self.model, *self.exports.values()]
        for place in places:
            if isinstance(place, str | Path) and not Path(place).is_dir():
                raise CheckpointError(
                    f"There is no folder {Path(place).name!r}. Give a model, or the folder that it was saved to."
                )
        if isinstance(self.model, str | Path):
            read_folder(Path(self.model))
        if not read_report(self.model).steps:
            raise SettingError(
                "This model has no record: hfshrink did nothing to it, so there is nothing to tell on a card. Publish "
                "it with model.push_to_hub(repo_id) of transformers."
            )
        for scheme, export in self.exports.items():
            if not SCHEME.fullmatch(scheme) or ".." in scheme:
                raise SettingError(f"exports= must map names such as 'onnx-int8' to exports, got {scheme[:80]!r}.")
            theirs, ours = (_model_type(place) for place in (export, self.model))
            if theirs != ours:
                raise SettingError(f"The export {scheme!r} is of a {theirs} model, the weights are of a {ours} model.")

    def contents(
        self, target: Target, folder: Path, terms: Terms, metadata: dict[str, Any]
    ) -> tuple[Contents, CardMaker]:
        """Write what is missing into `folder`, and collect everything.

        Args:
            target: Where it goes to.
            folder: An empty one.
            terms: What the user says of licences.
            metadata: For the card.
        """
        base = metadata.get("base_model") or read_report(self.model).base_model
        base = base if isinstance(base, str) and base.count("/") == 1 else None
        fields = terms.fields(target.api, base)
        check_terms(fields, terms.license, terms.accepted, base)
        root = _saved(self.model, folder / "model", self.max_shard_size)
        found = read_folder(root)
        processor = self._processor()
        if processor is not None:
            processor.save_pretrained(folder / "processor")
            found.files |= listed(folder / "processor", (*TOKENIZERS, *PROCESSORS))
        exports = {name: _saved(made, folder / "exports" / name, None) for name, made in self.exports.items()}
        add_exports(found, exports)
        given = {**metadata, "base_card": fields, "license": terms.license}
        return finished(found, target, folder, {name: value for name, value in given.items() if value is not None})

    def _processor(self) -> Any:
        if self.processor is not None or isinstance(self.model, str | Path):
            return self.processor
        return find_processor(self.model)


def finished(contents: Contents, target: Target, folder: Path, metadata: dict[str, Any]) -> tuple[Contents, CardMaker]:
    """Clean the files and add record, results and plots.

    Args:
        contents: The model's files; changed in place.
        target: Where they go to.
        folder: For what is written anew.
        metadata: For `model_card`.

    Raises:
        CheckpointError: A file holds a token or another secret.
    """
    secrets = secrets_of(target.api)
    clean_configs(contents, lambda data: clean(data, secrets))
    config = _config_json(contents)
    _warn_of_code(config)
    report = CompressionReport() if "hfshrink" not in config else CompressionReport.from_dict(config["hfshrink"])
    if report.steps:
        report = _with_plots(contents, report, folder)
        contents.add_json(RECORD_FILE, report.to_dict())
        contents.add_json(RESULTS_FILE, _results(report))
    for name, content in contents.files.items():
        check_file(name, content, secrets)

    places = sorted({name.rpartition("/")[0] for name in contents.files if name.endswith(f"/{EXPORT_MANIFEST}")})
    how = {"repo_id": target.repo_id, "exports": places, "tier": contents.export_format or read_tier(config)}

    def card(old: str | None) -> str:
        text = new_card(report, contents.readme if old is None else old, {**metadata, **how})
        check_file("The card", text.encode(), secrets)
        return text

    return contents, card


def new_card(report: CompressionReport, old: str | None, metadata: dict[str, Any]) -> str:
    """The text of a model's README, with what a user wrote into the old one."""
    from hfshrink.cards import merge_card, model_card
    from hfshrink.cards.merging import KEPT

    card = model_card(report, **metadata) if report.steps else unfinished_card(metadata)
    return str(card if old is None else merge_card(old, card, keep=() if metadata.get("license") else KEPT))


def unfinished_card(metadata: dict[str, Any]) -> Any:
    """The card of a run that goes on: it has no record yet, so there is nothing to tell but that."""
    from huggingface_hub import ModelCard, ModelCardData

    from hfshrink.cards.merging import marked

    name = str(metadata.get("model_name") or metadata["repo_id"].rpartition("/")[2])
    data = ModelCardData(library_name="transformers", tags=["hfshrink"])
    body = (
        f"# {plain(name)}\n\nThis model is in training; hfshrink has recorded no finished step. Nothing was measured."
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{marked(body)}")


def _saved(model: Any, folder: Path, max_shard_size: int | str | None) -> Path:
    """The folder of a model or export; a loaded one is saved to `folder`."""
    if isinstance(model, str | Path):
        return Path(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    sharding = {} if hasattr(model, "components") or max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **sharding)
    return folder


def _model_type(model: Any) -> str | None:
    if isinstance(model, str | Path):
        return read_config(model).get("model_type")
    return config_of(model).model_type


def _config_json(contents: Contents) -> dict[str, Any]:
    config = contents.files["config.json"]
    return dict(json.loads(config if isinstance(config, bytes) else config.read_bytes()))


def _warn_of_code(config: dict[str, Any]) -> None:
    """A model class of its own is a program: it is not uploaded, and without it nobody can load the model."""
    classes = config.get("auto_map")
    own = [name for name in classes.values() if "--" not in str(name)] if isinstance(classes, dict) else []
    if own:
        logger.warning(
            "config.json names code of its own (%s), which is not uploaded: put those files on the Hub yourself.",
            ", ".join(str(name)[:80] for name in own[:3]),
        )


def _with_plots(contents: Contents, report: CompressionReport, folder: Path) -> CompressionReport:
    from hfshrink.cards import write_plots

    told = [plot for plot in report.details.get("plots") or () if plot.get("file") in contents.files]
    try:
        drawn = write_plots(report, folder / "plots")
    except MissingDependencyError:
        logger.info("Without matplotlib the card has no plots: pip install 'hfshrink[plots]'")
        drawn = []
    contents.files |= {plot["file"]: folder / plot["file"] for plot in drawn}
    own = {plot["file"] for plot in drawn}
    plots = [*drawn, *(plot for plot in told if plot["file"] not in own)]
    return dataclasses.replace(report, details={**report.details, "plots": plots}) if plots else report


def _results(report: CompressionReport) -> dict[str, Any]:
    """The measurements alone, for programs that compare models."""
    data = report.to_dict()
    return {
        "format_version": data["format_version"],
        "base_model": report.base_model,
        "task": report.details.get("task"),
        "base": data["base"],
        "compressed": data["compressed"],
    }
