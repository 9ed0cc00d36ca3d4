"""From the files of a checkpoint to those of another one, shard by shard; a call that was killed goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.record import versions
from hfshrink.saving import save_aside, write_text
from hfshrink.streaming.skeleton import Skeleton
from hfshrink.streaming.sources import INDEX, SIDE_FILES, SINGLE, fingerprint, read_tensors, weight_files

MANIFEST = "streaming.json"
NOT_COPIED = ("config.json", "trainer_state.json")
SPARE_BYTES = 2**20  # of headers and config files, when the space on disk is checked


@dataclass(frozen=True)
class Plan:
    """What becomes of a checkpoint, decided before the first tensor is read.

    Attributes:
        title: What is done to it, such as "nf4": for the bar and the messages.
        source: What is read.
        sizes: Name -> bytes that are written for it, at most; in the order in which they are written.
        shard_bytes: Largest output file; a larger tensor has a file of its own.
        settings: All that decides the result besides the source, JSON-safe: only a call with the same ones goes on
            where another one was killed.
        has_code: Whether the source's Python files are copied.
    """

    title: str
    source: Skeleton
    sizes: dict[str, int]
    shard_bytes: int
    settings: list[Any] = field(default_factory=list)
    has_code: bool = False

    @cached_property
    def shards(self) -> list[list[str]]:
        """The names in each output file."""
        return split(self.sizes, self.shard_bytes)

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(self.source.places[name].size_bytes for name in self.sizes)

    @cached_property
    def key(self) -> dict[str, Any]:
        """What the manifest of an earlier call must hold, so that its files can be taken over."""
        key = {
            "source": fingerprint(weight_files(self.source.folder)),
            "settings": [self.title, self.shard_bytes, *self.settings],
            "versions": versions(),
        }
        return dict(json.loads(json.dumps(key)))  # as it is read back: tuples are lists

    def file_name(self, shard: int) -> str:
        """Name of an output file, as transformers names them."""
        if len(self.shards) == 1:
            return SINGLE
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"


def write_checkpoint(
    plan: Plan,
    output_dir: str | Path,
    convert: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
    finish: Callable[[Path, dict[str, Any]], None],
    overwrite: bool = False,
) -> None:
    """Read, convert and write all tensors; at most one output shard and what `convert` holds are in memory.

    Finished shards wait in a hidden folder beside `output_dir`, where the same call finds them after a kill.

    Args:
        plan: What is read, and how it is distributed.
        output_dir: Where the result shall lie; missing or empty.
        convert: (name, tensor) -> key -> tensor to write; it must copy, as the tensor is mapped from its file. After a
            `SettingError` of it nothing is kept.
        finish: Called with the folder, weights, index and side files in it, and the results so far, before it is moved
            into place: writes the config and the record. The results: `source_bytes` and `size_bytes` (tensors read
            and written), `shards`, `resumed_shards`.
        overwrite: Whether a folder with files in it may be replaced.

    Raises:
        SettingError: Of `convert`.
        CheckpointError: Files are corrupt, `output_dir` can't be written, another process writes it, or there is no
            space.
    """
    partial = partial_folder(output_dir)
    with save_aside(output_dir, overwrite=overwrite) as aside, _alone(partial):
        done = _open_partial(partial, plan)
        _check_space(partial.parent, plan, done)
        resumed = len(done)
        _write_shards(plan, partial, convert, done)
        try:
            for name in done:
                (partial / name).rename(aside / name)
            _write_index(plan, done, aside)
            _copy_side_files(plan, aside)
            results = {
                "source_bytes": plan.source_bytes,
                "size_bytes": sum(shard["tensor_bytes"] for shard in done.values()),
                "shards": len(done),
                "resumed_shards": resumed,
            }
            finish(aside, results)
        except BaseException:
            _move_back(done, aside, partial)
            raise
    shutil.rmtree(partial, ignore_errors=True)


def write_config(model: Any, folder: Path) -> None:
    """Write the config of a model, which may lie on meta, as `save_pretrained` does."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


def partial_folder(output_dir: str | Path) -> Path:
    """Where the finished shards of a call wait until all are there."""
    target = Path(output_dir).expanduser().absolute()
    return target.with_name(f".{target.name}.streaming")


def split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes; a larger tensor has a group of its own.

    Example:
        >>> split({"a": 3, "b": 2, "c": 9, "d": 1}, most=5)
        [['a', 'b'], ['c'], ['d']]
    """
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def to_bytes(size: Any) -> int:
    """Bytes of a size such as `"5GB"`, as transformers reads it.

    Raises:
        SettingError: It is no such size.

    Example:
        >>> to_bytes("500MB")
        500000000
    """
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        found = size if isinstance(size, int) else parse_size_to_int(size)
    except (ValueError, AttributeError):
        found = 0
    if isinstance(size, bool) or found <= 0:
        raise SettingError(f'max_shard_size must be bytes or a size such as "5GB" or "500MB", got {size!r}.')
    return found


@contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Keep other processes from the same folder; the lock of a killed one is free."""
    from filelock import FileLock, Timeout

    path = partial.with_suffix(".lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"Another process writes to {partial} now. Wait until it is done, or choose another output_dir."
        ) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def _open_partial(partial: Path, plan: Plan) -> dict[str, Any]:
    """What an earlier call with the same source and settings finished: file name -> its entry in the manifest."""
    try:
        manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] == plan.key:
            names = (plan.file_name(number) for number in range(len(plan.shards)))
            shards = {name: manifest["shards"][name] for name in names if name in manifest["shards"]}
            return {name: entry for name, entry in shards.items() if _is_whole(partial / name, entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # none, or not ours: start anew
    shutil.rmtree(partial, ignore_errors=True)
    return {}


def _is_whole(file: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is there, and holds what the manifest says."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file() or file.stat().st_size != entry["file_bytes"] or type(entry["tensor_bytes"]) is not int:
        return False
    try:
        with safe_open(file, framework="pt") as handle:
            return sorted(handle.keys()) == sorted(entry["keys"])
    except SafetensorError:
        return False


def _check_space(parent: Path, plan: Plan, done: dict[str, Any]) -> None:
    needed = sum(plan.sizes.values()) + SPARE_BYTES - sum(shard["file_bytes"] for shard in done.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{plan.title} writes {needed:,} bytes to {parent}, where {free:,} are free. Make space or "
            "choose another disk."
        )


def _write_shards(plan: Plan, partial: Path, convert: Callable[..., Any], done: dict[str, Any]) -> None:
    """Write the shards that are not there yet, and note each in the manifest."""
    from tqdm.auto import tqdm

    partial.mkdir(exist_ok=True)
    with tqdm(total=plan.source_bytes, desc=plan.title, unit="B", unit_scale=True, disable=None, delay=2) as bar:
        for number, names in enumerate(plan.shards):
            file = plan.file_name(number)
            if file not in done:
                done[file] = _write_shard(partial / file, _convert_all(plan, names, convert, bar, partial))
                write_text(partial / MANIFEST, json.dumps({"key": plan.key, "shards": done}))
            else:
                bar.update(sum(plan.source.places[name].size_bytes for name in names))


def _convert_all(
    plan: Plan, names: Iterable[str], convert: Callable[..., Any], bar: Any, partial: Path
) -> dict[str, torch.Tensor]:
    """The tensors of one shard."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in read_tensors((name, plan.source.places[name]) for name in names):
            tensors |= convert(name, tensor)
            bar.update(plan.source.places[name].size_bytes)
            del tensor  # its mapping goes before the next one comes
    except SettingError:  # a value that does not fit: there is nothing to go on with
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return tensors


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a file aside and move it into place; its entry in the manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"Can't write {path}: {error}. What is finished stays beside it; the same call goes on from there."
        ) from error
    return {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "keys": list(tensors),
    }


def _copy_side_files(plan: Plan, folder: Path) -> None:
    """Tokenizer, processor and generation settings; the config is written by the caller."""
    for pattern in (*SIDE_FILES, *(["*.py"] if plan.has_code else [])):
        for file in plan.source.folder.glob(pattern):
            if file.name not in NOT_COPIED and not file.name.endswith(".index.json") and file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write_index(plan: Plan, done: dict[str, Any], folder: Path) -> None:
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(shard["tensor_bytes"] for shard in done.values())},
        "weight_map": {key: name for name, shard in sorted(done.items()) for key in shard["keys"]},
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _move_back(done: dict[str, Any], aside: Path, partial: Path) -> None:
    """After an error at the very end, the same call shall find the shards again."""
    for name in done:
        if (aside / name).is_file():
            (aside / name).rename(partial / name)
