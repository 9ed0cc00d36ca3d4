"""What is published of a subset: indices, scores, report and card, and rows whose licence lets them be copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.hub.client import secrets_of
from hfshrink.hub.contents import Contents, listed
from hfshrink.hub.leaks import check_file, clean
from hfshrink.hub.models import CardMaker
from hfshrink.hub.repositories import Target
from hfshrink.hub.terms import Terms, may_copy

SUBSET_FILES = ("indices.npy", "scores.npy", "report.json")
SHARD_BYTES = 500 * 10**6


def is_subset(thing: Any) -> bool:
    """Whether something is a `Subset`, by what it has: this room does not import selection."""
    return all(hasattr(thing, name) for name in ("dataset", "indices", "report", "save"))


@dataclass(frozen=True)
class SubsetParts:
    """A subset, and whether its rows are published; see `push_to_hub`."""

    subset: Any
    rows: bool | None = None

    def check(self) -> None:
        """Refuse a subset without rows.

        Raises:
            SettingError: It has none.
        """
        if not len(self.subset.indices):
            raise SettingError("This subset has no rows: there is nothing to publish.")

    def contents(
        self, target: Target, folder: Path, terms: Terms, metadata: dict[str, Any]
    ) -> tuple[Contents, CardMaker]:
        """Write the subset into `folder`, and collect its files.

        Args:
            target: Where it goes to.
            folder: An empty one.
            terms: What the user says of licences.
            metadata: For the card.
        """
        from hfshrink.cards.dataset import dataset_card
        from hfshrink.cards.merging import KEPT, merge_card

        secrets = secrets_of(target.api)
        source = terms.fields(target.api, getattr(self.subset.report, "data", None), "dataset")
        copied, why = may_copy(source, self.rows, terms.accepted)
        self.subset.save(folder / "subset")
        report = clean(self.subset.report.to_dict(), secrets)
        if why:
            report["notes"] = [*report.get("notes", ()), why]
        split = str(report.get("split") or "train").split("[")[0]
        split = split if split.replace("_", "").isalnum() else "train"
        replaced = (f"data/{split}-?????-of-?????.parquet", *SUBSET_FILES)
        found = Contents(listed(folder / "subset", SUBSET_FILES), replaced, kind="dataset")
        found.add_json("report.json", report)
        if copied:
            found.files |= write_rows(self.subset.dataset, folder / "rows", split)
        for name, content in found.files.items():
            check_file(name, content, secrets)

        def card(old: str | None) -> str:
            given = {**metadata, **({} if terms.license is None else {"license": terms.license})}
            new = dataset_card(report, source_card=source, repo_id=target.repo_id, with_rows=copied, **given)
            new = new if old is None else merge_card(old, new, keep=KEPT if terms.license is None else ())
            configs = with_split(new.data.pop("configs", None), split, copied)
            new.data.pop("viewer", None)
            new.data["configs" if configs else "viewer"] = configs or False  # it would show report.json as rows
            text = str(new)
            check_file("The card", text.encode(), secrets)
            return text

        return found, card


def with_split(configs: Any, split: str, copied: bool) -> list[dict[str, Any]]:
    """A card's `configs` that name the files of this split where its rows are published; others' entries stay.

    Example:
        >>> with_split(None, "train", True)
        [{'config_name': 'default', 'data_files': [{'split': 'train', 'path': 'data/train-*'}]}]
        >>> with_split([{"config_name": "mine", "data_dir": "x"}], "train", False)
        [{'config_name': 'mine', 'data_dir': 'x'}]
    """
    known = [dict(one) for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []
    default: dict[str, Any] = next((one for one in known if one.get("config_name") == "default"), {})
    files = default.get("data_files")
    files = files if isinstance(files, list) else []
    kept = [one for one in files if not isinstance(one, dict) or one.get("split") != split]
    ours = [{"split": split, "path": f"data/{split}-*"}] if copied else []
    others = [one for one in known if one is not default]
    if not ours + kept:
        return others
    return [{"config_name": "default", **default, "data_files": [*ours, *kept]}, *others]


def write_rows(dataset: Any, folder: Path, split: str) -> dict[str, Path | bytes]:
    """Write rows as parquet files that `load_dataset` finds; files that they point to go into them.

    Args:
        dataset: A `datasets.Dataset`.
        folder: Where to write.
        split: Name of the split.

    Returns:
        Path in the repository -> file.
    """
    from datasets.features.features import require_storage_embed
    from datasets.table import embed_table_storage

    folder.mkdir(parents=True)
    share = len(dataset) / max(dataset.data.num_rows, 1)
    shards = min(max(1, round(dataset.data.nbytes * share / SHARD_BYTES)), len(dataset))
    found: dict[str, Path | bytes] = {}
    for number in range(shards):
        part = dataset.with_format(None).shard(shards, number, contiguous=True)
        if any(require_storage_embed(feature) for feature in part.features.values()):
            part = part.with_format("arrow").map(
                embed_table_storage, batched=True, batch_size=100, keep_in_memory=True
            )
        name = f"{split}-{number:05d}-of-{shards:05d}.parquet"
        part.with_format(None).to_parquet(folder / name)
        found[f"data/{name}"] = folder / name
    return found
