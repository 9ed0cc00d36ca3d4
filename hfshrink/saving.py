"""Files: reading a config with bounds, writing a folder or a file so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError

logger = logging.getLogger(__name__)

LOCK = ".lock"  # in a folder that one process writes to at a time
MAX_CONFIG_BYTES = 64 * 2**20  # a larger config.json is no config
LEFTOVER_SECONDS = 24 * 3600  # what a killed run left is removed after a day: until then it may be alive


@contextlib.contextmanager
def save_aside(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Write a folder aside and move it into place when the block ends, so that nobody ever sees half of it.

    Args:
        folder: Where the result shall lie. It may be missing or empty; parents are made.
        overwrite: Whether a folder that holds files is replaced as a whole.

    Yields:
        An empty folder beside it to write into. After an error it is removed, and `folder` is as it was.

    Raises:
        CheckpointError: The folder holds files and `overwrite` is false; it is a file, a link, a mount point or the
            working directory; replacing it would delete the working directory or home; or it can't be written. Raised
            before the block runs where it can be known.

    Example:
        >>> import tempfile
        >>> parent = Path(tempfile.mkdtemp())
        >>> with save_aside(parent / "model") as aside:
        ...     _ = (aside / "config.json").write_text("{}")
        >>> [file.name for file in (parent / "model").iterdir()]
        ['config.json']
    """
    from safetensors import SafetensorError

    target = Path(folder).expanduser().absolute()
    try:
        check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        target = target.parent.resolve() / target.name  # links above the folder are the user's; it is none itself
        _remove_leftovers(target)
        aside = target.with_name(f".{target.name}.aside-{secrets.token_hex(4)}")
        aside.mkdir()
    except OSError as error:
        raise CheckpointError(f"Can't write {target}: {error}. Choose another folder.") from error
    try:
        try:
            yield aside
        except (OSError, SafetensorError) as error:  # a full disk, most likely
            raise CheckpointError(f"Can't write {target}: {error}. It is as it was.") from error
        try:
            _move_into_place(aside, target, overwrite)
        except OSError as error:
            raise CheckpointError(f"Can't move the finished files to {target}: {error}. It is as it was.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_target(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that can't be written or replaced; `save_aside` calls it, long work may call it before.

    Raises:
        CheckpointError: As of `save_aside`.
    """
    target = Path(folder).expanduser().absolute()
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link; give the folder that it points to: {target.resolve()}")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file, expected a folder that is missing or empty.")
    if target.is_mount() or (target.is_dir() and target.samefile(Path.cwd())):
        raise CheckpointError(f"{target} is a mount point or the working directory; name a folder inside it.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            f"{target} is not empty. Choose another folder, empty it, or pass overwrite=True to replace it."
        )
    if any(place.resolve().is_relative_to(target.resolve()) for place in (Path.cwd(), Path.home())):
        raise CheckpointError(
            f"{target} holds the working directory or your home, and overwrite=True would delete it."
        )


def _remove_leftovers(target: Path) -> None:
    """Remove what killed runs left beside `target`; the old folder of a swap only where the swap was completed."""
    swapped = target.is_dir() and any(target.iterdir())
    for kind in ("aside", "replaced"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{kind}-????????"):
            old = not path.is_symlink() and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
            if old and path.is_dir() and (kind == "aside" or swapped):
                shutil.rmtree(path, ignore_errors=True)


def _move_into_place(aside: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # it may have changed since
    if not target.exists() or not any(target.iterdir()):
        if target.exists():
            target.rmdir()
        aside.rename(target)
        return
    replaced = target.with_name(f".{target.name}.replaced-{secrets.token_hex(4)}")
    target.rename(replaced)
    try:
        aside.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def read_config(folder: str | Path, **hub: Any) -> dict[str, Any]:
    """The `config.json` of a folder, or of a Hub id; `hub` goes to the download: `revision`, `token`, ….

    Raises:
        CheckpointError: There is none, it is too large, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not Path(folder).is_dir():
        from transformers.utils.hub import cached_file

        try:
            path = Path(cached_file(str(folder), "config.json", **hub) or "")
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{str(folder)!r} is no folder, and no model of that name can be read: {error}"
            ) from None
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no model: it has no config.json. Give the folder that save_pretrained wrote."
        )
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(
            f"{path} can't be read as JSON ({error}): the folder is half-written or corrupt."
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected a JSON object.")
    return config


def write_text(path: Path, text: str) -> None:
    """Write a file aside and move it into place, so that nobody ever sees half of it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path, keyword: str = "cache_dir") -> Iterator[None]:
    """Hold a folder, which is made; another process that wants it waits here.

    Args:
        folder: Which.
        keyword: The name that the caller gave it by, for the message.

    Raises:
        CheckpointError: It can't be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("%s is in use; waiting for the other process to finish.", folder)
            lock.acquire()
    except OSError as error:
        raise CheckpointError(f"Can't write in {folder}: {error}. Choose another {keyword}.") from error
    try:
        yield
    finally:
        lock.release()
