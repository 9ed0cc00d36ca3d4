"""The one commit that changes a repository: all or nothing, safe to repeat, resumed after an interruption."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hfshrink.errors import CheckpointError, HfshrinkError, SettingError
from hfshrink.hub.client import quiet_unless_terminal, told
from hfshrink.hub.contents import CARD_FILE, Contents
from hfshrink.hub.earlier import read_text, stale_files
from hfshrink.hub.repositories import Target, head, tags
from hfshrink.hub.retries import status_of, with_retries

BATCH = 4  # files that are sent at once; after each batch it is known what the Hub has

logger = logging.getLogger(__name__)


def commit(target: Target, contents: Contents, card: Callable[[str | None], str] | None, message: str) -> Any:
    """Send everything in one commit; where somebody else pushed meanwhile, read their README again and try once more.

    Large files go first and stay on the Hub, unseen, until a commit names them: an interrupted push changes nothing,
    and the next one does not send them again.

    Args:
        target: As `open_repository` returned it.
        contents: The files.
        card: The text of the README that is there (None without) -> the new one; None leaves it alone.
        message: First line of the commit's message.

    Returns:
        huggingface_hub's `CommitInfo`: a text, the commit's address. Without any change that of the latest commit.

    Raises:
        CheckpointError: What was and what was not uploaded.
    """
    progress = _Progress(target, contents)
    with quiet_unless_terminal():
        for last in (False, True):
            try:
                with told(progress.text, target.api):
                    info = _commit_once(progress, card, message)
                break
            except _PushedMeanwhileError:
                if last:
                    raise CheckpointError(
                        f"Somebody pushes to {target.repo_id} at the same time: the branch moved twice meanwhile. "
                        "Nothing of this push is visible; large files are kept, so that another try is quick."
                    ) from None
                logger.warning("Somebody pushed to %s meanwhile; its README is read again.", target.repo_id)
        _set_tag(target, info)
    return info


class _PushedMeanwhileError(HfshrinkError):
    """The branch moved between reading and committing."""


@dataclass
class _Progress:
    """What is on its way where, and how far it is."""

    target: Target
    contents: Contents
    uploaded: list[str] = field(default_factory=list)
    committing: bool = False

    def text(self) -> str:
        """What was and what was not uploaded, for an error."""
        left = [name for name in self.contents.files if name not in self.uploaded]
        has = f"The Hub has received {', '.join(self.uploaded)}" if self.uploaded else "Nothing was uploaded"
        lacks = f", but not {', '.join(left)}" if left and self.uploaded else ""
        # while a commit is on its way its answer may be lost
        state = "no commit was confirmed" if self.committing else "the repository is as it was"
        return (
            f"The push to {self.target.repo_id} failed. {has}{lacks}; {state}, and another try sends only what is "
            "missing. The reason"
        )


def _commit_once(progress: _Progress, card: Callable[[str | None], str] | None, message: str) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    target, contents = progress.target, progress.contents
    api, where = target.api, {"repo_id": target.repo_id, "repo_type": target.repo_type, "revision": target.revision}
    parent = head(target)
    there = set(with_retries(lambda: api.list_repo_files(**where), "Listing files"))
    files = dict(contents.files)
    if card is not None:
        text = card(read_text(target, CARD_FILE, parent) if CARD_FILE in there else None)
        _validate(target, text)
        files[CARD_FILE] = text.encode()
    adding = [CommitOperationAdd(name, file) for name, file in sorted(files.items())]
    stale = stale_files(target, contents, there, parent)
    if stale:
        logger.info("Replaced by this push: %s.", ", ".join(stale))
    _send(target, adding, progress.uploaded)
    operations = [*adding, *(CommitOperationDelete(name, is_folder=False) for name in stale)]
    expected = {} if target.create_pr else {"parent_commit": parent}
    progress.committing = True
    try:
        # A lost answer is no second commit: the parent would not fit, and then nothing is left to change.
        tries = 1 if target.create_pr else 3
        how = {**where, **expected, "create_pr": target.create_pr, "commit_message": message}
        return with_retries(lambda: api.create_commit(operations=operations, **how), "The commit", tries)
    except OSError as error:
        if status_of(error) == 412:
            raise _PushedMeanwhileError from None
        raise


def _send(target: Target, adding: list[Any], uploaded: list[str]) -> None:
    """Upload the large files among these, a few at a time; small ones go with the commit itself."""
    where = {"repo_id": target.repo_id, "repo_type": target.repo_type, "revision": target.revision}
    how = {**where, "create_pr": target.create_pr, "free_memory": False}
    for start in range(0, len(adding), BATCH):
        batch = adding[start : start + BATCH]
        with_retries(functools.partial(target.api.preupload_lfs_files, additions=batch, **how), "Uploading", tries=3)
        ignored = next((op.path_in_repo for op in batch if getattr(op, "_should_ignore", False)), None)
        if ignored is not None:
            raise SettingError(f"{target.repo_id} has a .gitignore that leaves {ignored} out. Remove that line there.")
        large = [op.path_in_repo for op in batch if getattr(op, "_is_uploaded", False)]
        uploaded.extend(name for name in large if name not in uploaded)


def _validate(target: Target, text: str) -> None:
    """Ask the Hub whether it takes a README, before anything large is sent."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def ask() -> Any:
        answer = get_session().post(
            f"{target.api.endpoint}/api/validate-yaml", json={"content": text, "repoType": target.repo_type}
        )
        errors = answer.json().get("errors") if answer.status_code == 400 else None
        if not errors:
            hf_raise_for_status(answer)
        return errors

    errors = with_retries(ask, "Checking the card")
    if errors:
        what = "; ".join(str(error.get("message"))[:200] for error in errors[:5])
        raise SettingError(f"The Hub refuses the metadata of the card: {what}. Correct what was given, or the README.")


def _set_tag(target: Target, info: Any) -> None:
    if target.tag is None:
        return
    with told(f"The files are in {info.oid[:8]}, but the tag {target.tag!r} could not be set", target.api):
        found = tags(target).get(target.tag)
        if found is None:
            how = {"repo_type": target.repo_type, "revision": info.oid}
            with_retries(lambda: target.api.create_tag(target.repo_id, tag=target.tag, **how), "Setting the tag")
        elif found != info.oid:
            raise CheckpointError(f"The files are in {info.oid[:8]}; the tag {target.tag!r} stays at {found[:8]}.")
