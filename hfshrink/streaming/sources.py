"""A checkpoint's safetensors files, read tensor by tensor under the names that the model has for them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import CheckpointError, HfshrinkError, SettingError, UnsupportedModelError
from hfshrink.loading import TASKS, infer_task

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
REOPEN_BYTES = 64 * 2**20  # a file is opened anew after so many: what was read through a mapping counts as memory
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
"""Tokenizer, processor and generation settings; not pickles, not code."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the model lies."""

    file: Path
    key: str
    shape: torch.Size
    dtype: str  # of safetensors: "F32", "BF16", "F8_E4M3", …

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        digits = "".join(character for character in self.dtype.partition("_")[0] if character.isdigit())
        return self.shape.numel() * max(1, int(digits or 8) // 8)


def find_folder(source: str | Path, trust_remote_code: bool = False) -> Path:
    """The folder of a checkpoint; a Hub id is downloaded to the cache, safetensors and settings only.

    Raises:
        CheckpointError: There is no such model.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", *SIDE_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{str(source)!r} is no folder, and no model of that name can be read: {error}"
        ) from None


def check_outside(source: str | Path, output_dir: str | Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read: replacing it would delete the source.

    Raises:
        SettingError: It is, or does. Hub ids lie elsewhere and pass.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and folder.resolve().is_relative_to(Path(output_dir).expanduser().resolve()):
        raise SettingError(f"output_dir {output_dir} holds the model that is read. Choose another folder.")


def empty_model(source: str | Path, task: str | None = None, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The model of a checkpoint on meta: all names and shapes, no weights.

    Raises:
        UnsupportedModelError: The config names no architecture, or one that fits no task.
        CheckpointError: The config is missing, corrupt, or of a family that transformers does not know.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
        auto = getattr(transformers, TASKS[infer_task(config, task)][0])
        with torch.device("meta"):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        if isinstance(error, HfshrinkError):
            raise
        raise CheckpointError(f"The config of {str(source)!r} makes no model: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or the shards that its index names.

    Raises:
        CheckpointError: There are none, the index is corrupt, or a file that it names is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / INDEX} is no index of safetensors files: {error!r}") from None
        bad = [str(name) for name in names if Path(str(name)).name != name or not (folder / str(name)).is_file()]
        if bad or not names:
            raise CheckpointError(f"{folder / INDEX} names {', '.join(bad[:3]) or 'no files'}, which is not there.")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise CheckpointError(
        f"{folder} has neither {SINGLE} nor {INDEX}. Streaming reads safetensors only; convert other weights with "
        "AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
    )


def find_tensors(files: Iterable[Path], model: Any) -> tuple[dict[str, Place], list[str]]:
    """Where each tensor of a model lies, and the keys that the model has no use for.

    Keys are renamed as `from_pretrained` does: legacy names, and the prefix of the base model.

    Args:
        files: The checkpoint's safetensors files.
        model: The model, on meta.

    Returns:
        Name in the model's state -> place, tied tensors once, in the model's order; keys that are not used.

    Raises:
        UnsupportedModelError: transformers would join, split or turn tensors of this family while loading.
        CheckpointError: A file is corrupt, a tensor is missing, or one has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted, transforms = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    found: dict[str, Place] = {}
    unused = []
    for place in _tensors_in(files):
        name, operation = rename_source_key(place.key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and place.key in wanted:
            name, operation = place.key, None
        if name not in wanted:
            unused.append(place.key)
        elif operation is not None:
            raise UnsupportedModelError(
                f"transformers rebuilds {place.key!r} while it loads a {type(model).__name__} ({operation!r}), which "
                "can't be done tensor by tensor. Load the model and compress it in memory."
            )
        else:
            _check_shape(name, place, wanted[name])
            found[name] = place
    return _in_order(found, wanted, model), unused


def fingerprint(files: Iterable[Path]) -> str:
    """A short hash of names, sizes, times and headers: another checkpoint, or a changed one, has another."""
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        with file.open("rb") as stream:
            length = min(int.from_bytes(stream.read(8), "little"), status.st_size)
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
            digest.update(stream.read(length))
    return digest.hexdigest()[:32]


def read_tensors(places: Iterable[tuple[str, Place]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, mapped from their files; let go of each before the next one is asked for.

    Raises:
        CheckpointError: A file is corrupt.
    """
    from safetensors import SafetensorError, safe_open

    current, handle, read = None, None, 0
    for name, place in places:
        try:
            if handle is None or place.file != current or read > REOPEN_BYTES:
                handle = None  # the old mapping goes before the new one comes
                handle, current, read = safe_open(place.file, framework="pt"), place.file, 0
            tensor = handle.get_tensor(place.key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{place.file} can't be read; it is half-written or corrupt: {error}") from None
        read += place.size_bytes
        yield name, tensor
        del tensor


def _tensors_in(files: Iterable[Path]) -> Iterator[Place]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - it is no dict
                    part = handle.get_slice(key)
                    yield Place(file, key, torch.Size(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} can't be read; it is half-written or corrupt: {error}") from None


def _check_shape(name: str, place: Place, expected: torch.Tensor) -> None:
    if place.shape != expected.shape:
        raise CheckpointError(
            f"{place.file.name} holds {place.key} of shape {tuple(place.shape)}, the config asks for "
            f"{tuple(expected.shape)} ({name}). Do the config and the weights belong together?"
        )


def _in_order(found: dict[str, Place], wanted: dict[str, Any], model: Any) -> dict[str, Place]:
    """The places in the model's order, each group of tied names once, complete."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, original in tied.items():
        place = found.pop(name, None)
        if place is not None:
            found.setdefault(original, place)
    missing = [name for name in wanted if name not in found and name not in tied]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} of the weights of {type(model).__name__} ({', '.join(missing[:3])}, "
            "…): it is half-written, was saved with parametrized weights, or is of another model."
        )
    return {name: found[name] for name in wanted if name in found}
