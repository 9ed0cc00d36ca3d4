"""A card that someone edited by hand, rendered anew: what stands between the markers is replaced, the rest is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfshrink.cards.rendering import one_line
from hfshrink.errors import CheckpointError

BEGIN = "<!-- hfshrink:begin: what follows is generated; write above it or below the end -->"
END = "<!-- hfshrink:end -->"
MARKER = re.compile(r"^[ \t]*<!--[ \t]*hfshrink:(begin|end)\b[^\n]*?-->[ \t]*(?:\n|\Z)", re.MULTILINE)
KEPT = ("license", "license_name", "license_link")
"""Metadata that stay as they are found: a licence that someone wrote by hand goes before an inherited one."""
UNITED = ("tags", "datasets")
"""Lists to which a user may have added."""
GENERATED = ("model-index", "base_model_relation", "metrics")
"""Metadata that only describe the weights of their day: without new ones the old ones go."""
METADATA = re.compile(r"\s*---[ \t]*\n(.*?)(?:^|\n)---[ \t]*(?:\n|\Z)", re.DOTALL)

logger = logging.getLogger(__name__)


def merge_card(old_text: str, new_card: Any, *, keep: Sequence[str] = KEPT) -> Any:
    r"""Put a new card in the place of the generated part of an old one.

    Text before the begin marker and after the end marker is kept as it stands. A card without markers is kept as a
    whole below the new one; so is one with damaged markers (one is missing, or they stand in another order), without
    them and with a warning: no text of a user is lost. Metadata: new values go before old ones, what only the old card
    has is kept, tags and data sets are united. Merging twice changes nothing more.

    Args:
        old_text: The README as it is.
        new_card: What `model_card` or `dataset_card` made.
        keep: Metadata that stay as the old card has them.

    Returns:
        A card of the new one's class.

    Raises:
        CheckpointError: The old metadata are no YAML mapping.

    Example:
        >>> from hfshrink.cards.dataset import dataset_card
        >>> card = dataset_card({"method": "random", "rows": 10, "size": 5}, license="mit")
        >>> merged = merge_card("---\nlicense: cc-by-4.0\n---\nWritten by hand.\n", card)
        >>> merged.data.license, merged.content.endswith("\nWritten by hand.\n")
        ('cc-by-4.0', True)
    """
    from huggingface_hub.utils import yaml_dump

    old = old_text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    metadata, old_body = _split(old)
    new_metadata, new_body = _split(new_card.content)
    merged = _merge_metadata(metadata, new_metadata, keep)
    head = yaml_dump(merged, sort_keys=False).strip() if merged else ""
    text = f"---\n{head}\n---\n{_merge_body(old_body, new_body)}"
    return type(new_card)(text)


def marked(body: str) -> str:
    """A generated body between its markers."""
    return f"{BEGIN}\n\n{body.strip()}\n\n{END}\n"


def _split(text: str) -> tuple[dict[str, Any], str]:
    import yaml

    found = METADATA.match(text)
    if found is None:
        return {}, text
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"The metadata between the first two lines '---' of the old README.md are no YAML: {one_line(error)}. "
            "Mend or remove them."
        ) from None
    if data is not None and not isinstance(data, Mapping):
        if ":" not in found[1]:  # two rules with text between them
            return {}, text
        raise CheckpointError(
            f"The metadata of the old README.md must be a mapping, got {type(data).__name__}: {one_line(data, 80)!r}."
        )
    return dict(data or {}), text[found.end() :]


def _merge_metadata(old: Mapping[str, Any], new: Mapping[str, Any], keep: Sequence[str]) -> dict[str, Any]:
    merged = {**new, **{name: value for name, value in old.items() if name not in new and name not in GENERATED}}
    kept = {name: old[name] for name in keep if old.get(name)}
    if kept:  # one thing: a licence's name belongs to its identifier
        merged = {name: value for name, value in merged.items() if name not in keep or name in kept} | kept
    for name in UNITED:
        if old.get(name) and new.get(name):
            both = [*_as_list(new[name]), *_as_list(old[name])]
            merged[name] = sorted({str(item) for item in both}) if name == "tags" else list(dict.fromkeys(both))
    return merged


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _merge_body(old: str, new: str) -> str:
    if not old.strip():
        return new.lstrip("\n")
    marks = list(MARKER.finditer(old))
    kinds = [mark[1] for mark in marks]
    if not marks or kinds != ["begin", "end"] * (len(kinds) // 2):
        if marks:
            logger.warning(
                "The README's markers are damaged (%s): all of its old text is kept below the new card.",
                ", ".join(kinds),
            )
        return f"{new.strip()}\n\n{MARKER.sub('', old).strip()}\n"
    before = old[: marks[0].start()]
    after = "".join(
        old[end.end() : start.start() if start is not None else len(old)]
        for end, start in zip(marks[1::2], [*marks[2::2], None], strict=True)
    )
    return f"{before}{new.strip()}\n{after}"
