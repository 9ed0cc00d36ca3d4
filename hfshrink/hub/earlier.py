"""What is in a repository already: its README, and the files that an earlier push left there."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.hub.contents import PLOTS, RECORD_FILE, Contents, manifest_files, matches
from hfshrink.hub.repositories import Target
from hfshrink.hub.retries import with_retries
from hfshrink.loading import EXPORT_MANIFEST

MARKS = {"export": RECORD_FILE, "dataset": "report.json"}
"""Kind of contents -> the file by which an earlier push is known."""
MAX_BYTES = 16 * 2**20  # a larger README, record or manifest is none

logger = logging.getLogger(__name__)


def read_text(target: Target, name: str, revision: str | None) -> str:
    """A small text file of the repository.

    Raises:
        CheckpointError: It is too large to be one.
    """
    with tempfile.TemporaryDirectory() as folder:
        how = {"repo_type": target.repo_type, "revision": revision, "cache_dir": folder}
        path = with_retries(lambda: target.api.hf_hub_download(target.repo_id, name, **how), f"Reading {name}")
        if Path(path).stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{name} of {target.repo_id} is too large to be read. Shorten or remove it there.")
        return Path(path).read_text(encoding="utf-8", errors="replace")


def stale_files(target: Target, contents: Contents, there: set[str], revision: str | None) -> list[str]:
    """Files that would be read in place of the new ones, and what an earlier push names as its own; nothing else.

    Args:
        target: The repository.
        contents: What is pushed.
        there: Names of its files.
        revision: The commit in which they are.

    Raises:
        SettingError: An export, or rows, would replace weights or rows that hfshrink did not push.
    """
    found = {name for name in there if matches(name, contents.replaced)}
    mark = MARKS.get(contents.kind)
    if found and mark is not None and mark not in there:
        raise SettingError(
            f"{target.repo_id} holds {', '.join(sorted(found)[:3])}, which hfshrink did not push and this "
            f"{contents.kind} would replace. Choose another repository; an export can also go beside weights, with "
            "exports=."
        )
    for place in contents.places:
        if place or RECORD_FILE in there:
            found |= {f"{place}{name}" for name in _named(target, f"{place}{EXPORT_MANIFEST}", there, revision)}
    if "" in contents.places:
        found |= {name for name in _named(target, RECORD_FILE, there, revision) if matches(name, PLOTS)}
    return sorted((found & there) - set(contents.files))


def _named(target: Target, name: str, there: set[str], revision: str | None) -> list[str]:
    """The files that an earlier push's manifest or record names; none where it can't be read."""
    if name not in there:
        return []
    try:
        data: Any = json.loads(read_text(target, name, revision))
        if name == RECORD_FILE:
            return [str(plot["file"]) for plot in data["details"].get("plots") or ()]
        return [EXPORT_MANIFEST, *manifest_files(data)]
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError):
        logger.warning("%s of %s can't be read; what it names stays.", name, target.repo_id)
        return []
