"""The data card of a subset, rendered from its report alone: what the report lacks is "not measured"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfshrink.cards.dataset_tables import (
    balance_tables,
    coverage_tables,
    danger_sentences,
    fact_table,
    proof_tables,
    subset_sentence,
)
from hfshrink.cards.licences import check_license, known_license, license_sentences
from hfshrink.cards.merging import marked
from hfshrink.cards.metadata import is_hub_id
from hfshrink.cards.rendering import as_json, literal, mapping, one_line, plain, render, without_folder
from hfshrink.errors import CheckpointError, SettingError

INHERITED = (
    "license",
    "license_name",
    "license_link",
    "language",
    "multilinguality",
    "task_categories",
    "task_ids",
)
"""Fields that a subset takes over from its source's card: those that picking rows does not change."""
TASK_CATEGORIES = frozenset(
    {
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "text-generation",
        "image-classification",
        "feature-extraction",
    }
)
SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
"""(bound, the Hub's name for fewer rows)."""
PUBLISHED = {
    True: "The rows themselves are published here.",
    False: "Only the numbers of the rows and their scores are published here; the rows themselves are in the source.",
}


def dataset_card(
    report: Any,
    *,
    dataset_name: str | None = None,
    source_card: Any = None,
    repo_id: str | None = None,
    with_rows: bool | None = None,
    **metadata: Any,
) -> Any:
    """Render the data card of a subset: method, class balance, coverage, dangers, proof and how to reproduce.

    Args:
        report: A `Subset`, its `SelectionReport`, or the report's JSON form. The tables of `coverage` and of the
            proof are read from its `details`.
        dataset_name: Title of the card; None makes one from the source's name and the method.
        source_card: The source data set's `DatasetCardData`, or a mapping of its fields: licence, language and tasks
            are inherited.
        repo_id: The Hub id that the snippet loads; None leaves a path to fill in.
        with_rows: Whether the rows themselves are published, or their numbers and scores alone; None says nothing.
        **metadata: Further fields of `huggingface_hub.DatasetCardData`; they go before what is inherited.

    Returns:
        A `huggingface_hub.DatasetCard`; `.save(path)` writes it, `.content` is its text.

    Raises:
        CheckpointError: That is no report of a subset.
        SettingError: A repository name or licence that the Hub doesn't know.

    Example:
        >>> card = dataset_card({"method": "random", "rows": 10000, "size": 3000, "data": "org/reviews"})
        >>> card.data.source_datasets, card.data.size_categories
        (['org/reviews'], '1K<n<10K')
    """
    from huggingface_hub import DatasetCard

    data = read_report(report)
    if repo_id is not None and not is_hub_id(repo_id):
        raise SettingError(f"repo_id must be a Hub id, namespace/name, got {one_line(repo_id, 120)!r}.")
    percent = f"{100 * data['size'] / data['rows']:.3g}"
    source = str(without_folder(data.get("data") or "data")).rpartition("/")[2]
    own = (repo_id or "").rpartition("/")[2]
    title = one_line(dataset_name or own or f"{source}-{data.get('used') or data['method']}-{percent}-percent", 100)
    card_data = _card_data(data, title, source_card, metadata)
    body = render(
        "dataset_card.md.jinja",
        title=title,
        sentence=subset_sentence(data),
        facts=fact_table(data),
        published="" if with_rows is None else PUBLISHED[with_rows],
        snippet=_snippet(data, repo_id, with_rows),
        source=_source(data),
        balance=balance_tables(data),
        coverage=coverage_tables(subset_details(data, "coverage")),
        dangers=danger_sentences(data, subset_details(data, "coverage"), card_data.license),
        proof=proof_tables(subset_details(data, "proof")),
        licence=license_sentences(card_data, _origin(data), "subset"),
        versions=_versions(data),
    )
    return DatasetCard(f"---\n{card_data.to_yaml()}\n---\n\n{marked(body)}")


def read_report(report: Any) -> dict[str, Any]:
    """The JSON form of a report, with the numbers that everything else is divided by checked.

    Raises:
        CheckpointError: It is no report.
    """
    report = getattr(report, "report", report)
    data = report.to_dict() if hasattr(report, "to_dict") else report
    if not isinstance(data, Mapping) or not isinstance(data.get("method"), str):
        raise CheckpointError(f"Expected the report of a subset, with its method, got {one_line(data, 80)!r}.")
    rows, size = data.get("rows"), data.get("size")
    if any(isinstance(n, bool) or not isinstance(n, int) for n in (rows, size)) or not 1 <= size <= rows:  # type: ignore[operator]
        raise CheckpointError(
            f"The report of a subset must say how many rows were kept of how many, got {size!r} of {rows!r}."
        )
    return dict(as_json(dict(data)))


def _card_data(data: Mapping[str, Any], title: str, source_card: Any, metadata: dict[str, Any]) -> Any:
    from huggingface_hub import DatasetCardData

    given = source_card.to_dict() if hasattr(source_card, "to_dict") else source_card or {}
    tags = metadata.pop("tags", None) or ()
    task = mapping(data.get("details")).get("task")
    known = {
        "pretty_name": title,
        "size_categories": next((name for bound, name in SIZES if data["size"] < bound), "other"),
        "source_datasets": [data["data"]] if is_hub_id(data.get("data")) else None,
        "task_categories": [task] if isinstance(task, str) and task in TASK_CATEGORIES else None,
        "tags": sorted({"hfshrink", "data-selection", *([tags] if isinstance(tags, str) else tags)}),
    }
    inherited = {name: _clean(given[name]) for name in INHERITED if name in given}
    if inherited.get("license"):
        inherited |= known_license(inherited["license"])
    if metadata.get("license"):
        check_license(metadata["license"])
    own = {name: _clean(value) for name, value in metadata.items()}
    return DatasetCardData(**{**_without_none(known), **_without_none(inherited), **_without_none(own)})


def _clean(value: Any) -> Any:
    """Metadata without line breaks; from another's card nothing but texts and lists of texts."""
    if isinstance(value, str):
        return one_line(value, 200) or None
    if isinstance(value, list | tuple):
        return [one_line(item, 200) for item in value if isinstance(item, str) and item.strip()] or None
    return None


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _snippet(data: Mapping[str, Any], repo_id: str | None, with_rows: bool | None) -> str:
    """Lines of Python; all texts in them are literals, so that none can end its line or the fence."""
    if repo_id and with_rows:
        return f"from datasets import load_dataset\n\nsubset = load_dataset({literal(repo_id)})"
    if is_hub_id(data.get("data")):
        call, names = "load_dataset", ("split", "revision")
        keywords = "".join(f", {name}={literal(data[name])}" for name in names if data.get(name))
        read = f"load_dataset({literal(data['data'])}{keywords})"
    else:
        call, read = "load_from_disk", 'load_from_disk("path/to/the/full/data")'
    place = f'snapshot_download({literal(repo_id)}, repo_type="dataset")' if repo_id else '"path/to/this/folder"'
    download = ["from huggingface_hub import snapshot_download"] if repo_id else []
    return "\n".join(
        (
            f"from datasets import {call}",
            "from hfshrink import Subset",
            *download,
            "",
            f"full = {read}",
            f"subset = Subset.load({place}, full)  # checks that these are the same rows",
        )
    )


def _source(data: Mapping[str, Any]) -> str:
    """Which rows the numbers count, as far as it is recorded."""
    name = _origin(data) if data.get("data") else "the full data (its name is not recorded)"
    split = f", split {plain(data['split'])}" if data.get("split") else ""
    revision = f", revision {plain(data['revision'])}" if data.get("revision") else ", revision not recorded"
    return f"`indices.npy` holds the numbers of the rows in {name}{split}{revision}, in its order."


def _origin(data: Mapping[str, Any]) -> str:
    name = data.get("data")
    if is_hub_id(name):
        return f"[{plain(name)}](https://huggingface.co/datasets/{name})"
    return plain(without_folder(name) or "the source data")


def subset_details(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The tables of `coverage` or of the proof in a report; empty without."""
    return mapping(mapping(report.get("details")).get(name) or report.get(name))


def _versions(data: Mapping[str, Any]) -> str:
    versions = mapping(data.get("versions"))
    return plain(", ".join(f"{name} {version}" for name, version in versions.items()) or "Not recorded.", 1000)
