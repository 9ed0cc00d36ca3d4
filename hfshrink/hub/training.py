"""What a Trainer publishes: the same files and card as `push_to_hub`, in mid-run from a snapshot of the checkpoint."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfshrink.errors import HfshrinkError
from hfshrink.hub.bases import read_base
from hfshrink.hub.client import hub_api, staging
from hfshrink.hub.commits import commit
from hfshrink.hub.contents import CARD_FILE, MODEL_FILES, STATES, Contents, listed, read_folder
from hfshrink.hub.models import finished, new_card
from hfshrink.hub.repositories import Target, check_access, open_repository
from hfshrink.hub.retries import reason
from hfshrink.hub.terms import check_terms
from hfshrink.record import model_name, report
from hfshrink.saving import write_text

SNAPSHOT = ".hfshrink-push-"
CARD_ARGUMENTS = ("language", "license", "tags", "model_name", "finetuned_from", "tasks", "dataset_tags")
"""Of `Trainer.create_model_card`, in its order."""
FIELDS = {"finetuned_from": "base_model", "dataset_tags": "datasets"}
"""Argument of `Trainer.create_model_card` -> the card's field, where the names differ."""
TAKEN = ("language", "license", "tags", "model_name", "finetuned_from", "dataset_tags")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Publishing:
    """Where a run goes, and the fields of its base's card."""

    target: Target
    base: dict[str, Any] | None


def open_run(trainer: Any, token: str | None = None, private: bool | None = None) -> None:
    """Check the access and make the repository of a run before it starts; `Trainer.init_hf_repo` calls it.

    Raises:
        SettingError: As of `push_to_hub`. A licence that is not permissive is inherited, with a warning.
        CheckpointError: The Hub can't be reached, or refuses.
    """
    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    private = args.hub_private_repo if private is None else private
    target = Target(hub_api(args.hub_token if token is None else token), name, revision=args.hub_revision)
    target = check_access(target, private)
    base = report(trainer.model).base_model or model_name(trainer.model)
    fields = read_base(target.api, base)
    try:
        check_terms(fields, None, False, base if base and "/" in base else None)
    except HfshrinkError:
        theirs = (fields or {}).get("license")
        logger.warning(
            "The base %s is under %r, which is not permissive: the pushed model names it too.", base, theirs
        )
    open_repository(target, private)
    for left in Path(args.output_dir).glob(f"{SNAPSHOT}*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    trainer.hub_model_id, trainer.push_in_progress = target.repo_id, None
    trainer._publishing = Publishing(target, fields)


def push_run(trainer: Any, message: str, blocking: bool, revision: str | None, card: Mapping[str, Any]) -> Any:
    """Publish what `save_model` wrote into the run's folder, with the card of its record.

    Args:
        trainer: After `save_model`, on its main process.
        message: Of the commit.
        blocking: Whether to wait; else a `Future` is returned.
        revision: Branch.
        card: Arguments of `Trainer.create_model_card`.

    Returns:
        The commit's address.
    """
    trainer._finish_current_push()
    publishing: Publishing = trainer._publishing
    target = publishing.target
    if revision is not None and revision != target.revision:
        target = Target(target.api, target.repo_id, revision=revision)
        open_repository(target)
    folder = Path(trainer.args.output_dir)
    metadata = {"base_card": publishing.base, **card_fields(card)}

    def push() -> Any:
        with staging() as aside:
            contents, text = finished(read_folder(folder), target, aside, metadata)
            return commit(target, contents, text, message)

    return push() if blocking else target.api.run_as_future(push)


def push_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """Publish a checkpoint in the background, in one commit; a failure is logged and training goes on.

    The files are linked aside first: later steps, and the removal of old checkpoints, don't change what is sent.

    Args:
        trainer: On its main process.
        checkpoint: The finished folder.
    """
    from transformers.utils import PushInProgress

    args, busy = trainer.args, trainer.push_in_progress
    busy = None if busy is None or busy.is_done() else busy
    if args.hub_strategy == "end" or (busy is not None and not args.hub_always_push):
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    publishing: Publishing = trainer._publishing
    snapshot, step = _snapshot(checkpoint, Path(args.output_dir)), trainer.state.global_step
    place = {"checkpoint": "last-checkpoint", "all_checkpoints": checkpoint.name}.get(str(args.hub_strategy.value))
    message = f"Training in progress, step {step}{'' if place is None else ', checkpoint'}"

    def push() -> None:
        try:
            with staging() as aside:
                contents = _with_states(read_folder(snapshot), snapshot, place)
                contents, card = finished(contents, publishing.target, aside, {"base_card": publishing.base})
                commit(publishing.target, contents, card, message)
        except HfshrinkError as error:
            logger.warning("The push of step %d failed, training goes on: %s", step, error)
        except Exception as error:  # nobody looks at the job's result
            logger.warning("The push of step %d failed, training goes on: %s", step, reason(error))
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    job = publishing.target.api.run_as_future(push)
    if busy is None:
        trainer.push_in_progress = PushInProgress([job])  # type: ignore[arg-type] # its own call gives a list too
    else:
        busy.jobs.append(job)


def write_card(trainer: Any, arguments: Mapping[str, Any]) -> bool:
    """Write the README of a run's folder from its model's record; what a user wrote into it is kept.

    Args:
        trainer: Any process; the main one writes.
        arguments: As of `Trainer.create_model_card`.

    Returns:
        Whether there was a record to write of.
    """
    record = report(trainer.model)
    if not record.steps or not trainer.is_world_process_zero():
        return bool(record.steps)
    file = Path(trainer.args.output_dir) / CARD_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    old = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None
    publishing = getattr(trainer, "_publishing", None)
    known = {} if publishing is None else {"repo_id": publishing.target.repo_id, "base_card": publishing.base}
    write_text(file, new_card(record, old, {**known, **card_fields(arguments)}))
    return True


def card_fields(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that `Trainer.create_model_card`'s arguments name; those of its own tables are left out.

    Example:
        >>> card_fields({"finetuned_from": "org/base", "tasks": "x", "language": None})
        {'base_model': 'org/base'}
    """
    given = {name: value for name, value in arguments.items() if name in TAKEN and value is not None}
    return {FIELDS.get(name, name): value for name, value in given.items()}


def _snapshot(checkpoint: Path, output_dir: Path) -> Path:
    """A folder beside the checkpoints with links to one's files, or copies where the disk knows no links."""
    snapshot = Path(tempfile.mkdtemp(prefix=SNAPSHOT, dir=output_dir))
    for name, file in listed(checkpoint, (*MODEL_FILES, *STATES)).items():
        (snapshot / name).parent.mkdir(exist_ok=True)
        try:
            os.link(str(file), snapshot / name)
        except OSError:
            shutil.copy2(str(file), snapshot / name)
    return snapshot


def _with_states(contents: Contents, snapshot: Path, place: str | None) -> Contents:
    """The model's files, and where `hub_strategy` asks for it all of the checkpoint in a folder of its own."""
    if place is not None:
        states = listed(snapshot, (*MODEL_FILES, *STATES))
        contents.files |= {f"{place}/{name}": file for name, file in states.items()}
        contents.replaced += (f"{place}/*",)
    return contents
