"""What cached numbers depend on, as digests of content, and a folder that keeps an array chunk by chunk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hfshrink.digests import digest_of, weights_digest
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.labels import LABEL_COLUMNS
from hfshrink.record import config_of, versions
from hfshrink.saving import locked, write_text

logger = logging.getLogger(__name__)

BLOCK = 1000  # rows whose content is in memory at once
BLOCK_BYTES = 2**26  # of an array
ARRAY_FILE, ABOUT_FILE = "embeddings.npy", "embeddings.json"
NO_CONTENT = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "hfshrink", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type", "use_cache", "output_hidden_states", "output_attentions", "return_dict"),
)
"""Entries of a config that change no hidden state: names, what is returned, and what the weights say themselves."""


def array_digest(array: NDArray[Any]) -> str:
    """BLAKE2b of an array: type, shape and values, block by block, so that a memory map is not read as a whole.

    Example:
        >>> array_digest(np.arange(4)) == array_digest(np.arange(8)[::2] // 2)
        True
    """
    digest = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=16)
    step = max(1, BLOCK_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), step):
        digest.update(np.ascontiguousarray(array[start : start + step]).data)
    return digest.hexdigest()


def column_digests(dataset: Any) -> dict[str, str]:
    """BLAKE2b of the content of each column: values in order, whatever their integer type or place on disk.

    Of images and sounds that the data set knows by their paths the files are read.

    Args:
        dataset: A `datasets.Dataset`; anything else has no columns and gives an empty dict.

    Example:
        >>> from datasets import Dataset
        >>> one, two = Dataset.from_dict({"a": [1, 2]}), Dataset.from_dict({"a": [0, 1, 2]}).select([1, 2])
        >>> column_digests(one) == column_digests(two)
        True
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return {}
    rows = dataset.with_format("arrow")
    digests = {name: hashlib.blake2b(digest_size=16) for name in dataset.column_names}
    for start in range(0, len(rows), BLOCK):
        table = rows[start : start + BLOCK]
        for name, digest in digests.items():
            array = table[name].combine_chunks()
            embed = getattr(dataset.features[name], "embed_storage", None)
            for piece in _content(array if embed is None else embed(array)):
                digest.update(piece)
    return {name: digest.hexdigest() for name, digest in sorted(digests.items())}


def check_rows(
    dataset: Any, rows: int, columns: Mapping[str, str], what: str = "data map", *, must_share: bool = False
) -> None:
    """Refuse a data set that something was not made of; columns that only one side has say nothing.

    Args:
        dataset: The rows that it shall be used for.
        rows: Number of rows that it was made of.
        columns: Their `column_digests`.
        what: Its name, for the message.
        must_share: Whether both must have a column in common; else a warning says that contents were not compared.

    Raises:
        SettingError: Another number of rows, another content of a column that both have, or no such column.
    """
    cure = "Give the data set that it was made of, before any filter, or make a new one."
    if len(dataset) != rows:
        raise SettingError(f"The {what} was made of {rows:,} rows, the data set has {len(dataset):,}. {cure}")
    shared = [name for name in getattr(dataset, "column_names", None) or () if name in columns]
    if not shared and must_share:
        raise SettingError(f"The {what} was made of other rows: no column is the same. {cure}")
    if not set(shared) - set(LABEL_COLUMNS):
        logger.warning(
            "No column of the data set but labels is among the %s's (%s): that its rows are the same was not checked.",
            *(what, ", ".join(columns)),
        )
    digests = column_digests(dataset.select_columns(shared))
    changed = next((name for name in shared if digests[name] != columns[name]), None)
    if changed is not None:
        raise SettingError(
            f"The {what} was made of other rows: the column {changed!r} or the rows' order has changed. {cure}"
        )


def _content(array: Any) -> Iterator[bytes]:
    """The bytes of an Arrow array: where it is null, lengths, and the values themselves."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = getattr(array, "storage", array)
    kind = array.type
    if array.null_count:
        yield np.packbits(array.is_null().to_numpy(zero_copy_only=False)).tobytes()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield pc.fill_null(pc.list_value_length(array), -1).cast(pa.int64()).to_numpy().tobytes()
        yield from _content(pc.list_flatten(array))
    elif pa.types.is_struct(kind):
        for field in kind:
            value = array.field(field.name)
            if field.name == "path":  # of an image: its folder is the machine's
                value = pa.array([None if path is None else Path(path).name for path in value.to_pylist()])
            yield from _content(value)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        wide = pa.int64() if pa.types.is_integer(kind) else pa.float64()
        yield pc.fill_null(array.cast(wide, safe=False), 0).to_numpy().tobytes()
    else:
        yield repr(array.to_pylist()).encode()


def model_digest(network: nn.Module) -> str:
    """BLAKE2b of a network: its class, config, and all weights and buffers.

    Raises:
        SettingError: A weight was offloaded to disk and can't be read here.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> before = model_digest(model)
        >>> model.pooler.dense.bias.data += 1
        >>> model_digest(model) == before
        False
    """
    settings = {name: value for name, value in config_of(network).to_dict().items() if name not in NO_CONTENT}
    return weights_digest(network, prefix=f"{type(network).__name__}{digest_of(settings)}")


def processor_digest(processor: Any) -> str | None:
    """BLAKE2b of what a tokenizer or image processor does to a row; None without one."""
    if processor is None:
        return None
    parts = [getattr(processor, name) for name in ("tokenizer", "image_processor") if hasattr(processor, name)]
    return digest_of([_processor_settings(part) for part in parts or [processor]])


def _processor_settings(part: Any) -> dict[str, Any]:
    own: dict[str, Any] = {"class": type(part).__name__}
    if hasattr(part, "get_vocab"):
        own |= {"truncation_side": part.truncation_side, "max_length": int(part.model_max_length)}
        backend = getattr(part, "backend_tokenizer", None)
        rules = dict(json.loads(backend.to_str())) if backend is not None else part.get_vocab()
        return own | {"rules": {n: v for n, v in rules.items() if n not in ("truncation", "padding")}}  # of last call
    return own | {"settings": part.to_dict() if hasattr(part, "to_dict") else {}}


@dataclass(frozen=True)
class ChunkStore:
    """A folder that keeps one (n, d) float32 array: chunks of rows while it is computed, one file when it is whole.

    Attributes:
        folder: Of this array alone; its name is the digest of all that the array depends on.
        rows: n.
    """

    folder: Path
    rows: int

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, which is made; another run that wants it waits here.

        Raises:
            CheckpointError: It can't be written.
        """
        with locked(self.folder):
            for left in self.folder.glob(".*.aside-*"):
                left.unlink(missing_ok=True)  # of a run that was killed: whoever writes holds the lock
            yield

    def whole(self) -> NDArray[np.float32] | None:
        """The whole array, memory-mapped and read-only; None where it is not there yet.

        Raises:
            CheckpointError: The file is corrupt.
        """
        path = self.folder / ARRAY_FILE
        if not path.is_file():
            return None
        found = _read(path)
        if found is None or found.ndim != 2 or len(found) != self.rows:
            raise CheckpointError(f"{path} is truncated or corrupt. Delete it; its rows are embedded again.")
        return found

    def has(self, number: int, rows: int) -> bool:
        """Whether a chunk of so many rows lies there; a corrupt one counts as missing."""
        path = self._chunk(number)
        found = _read(path) if path.is_file() else None
        if found is None and path.is_file():
            logger.warning("%s is truncated or corrupt; its rows are embedded again.", path)
        return found is not None and found.ndim == 2 and len(found) == rows

    def write(self, number: int, vectors: NDArray[np.float32]) -> None:
        """Write a chunk aside and move it into place.

        Raises:
            CheckpointError: It can't be written.
        """
        with self._aside(self._chunk(number)) as path, path.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)

    def join(self, portions: Sequence[NDArray[np.int64]], about: Mapping[str, Any]) -> None:
        """Put the chunks together in the order of the rows, and delete them.

        Args:
            portions: Row numbers of each chunk.
            about: What is to be known of the array, JSON-safe.

        Raises:
            CheckpointError: A chunk is missing or corrupt, or the disk is full.
        """
        with self._aside(self.folder / ARRAY_FILE) as path:
            whole = None
            for number, rows in enumerate(portions):
                vectors = _read(self._chunk(number))
                if vectors is None or len(vectors) != len(rows):
                    raise CheckpointError(
                        f"{self._chunk(number)} is missing or corrupt. Start again: others are kept."
                    )
                if whole is None:
                    shape = (self.rows, vectors.shape[1])
                    whole = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
                whole[rows] = vectors
            if whole is not None:
                whole.flush()
            write_text(self.folder / ABOUT_FILE, json.dumps({**about, "versions": versions()}, indent=2) + "\n")
        for number in range(len(portions)):
            self._chunk(number).unlink(missing_ok=True)

    def _chunk(self, number: int) -> Path:
        return self.folder / f"chunk-{number:06d}.npy"

    @contextlib.contextmanager
    def _aside(self, target: Path) -> Iterator[Path]:
        path = target.with_name(f".{target.name}.aside-{os.getpid()}")
        try:
            yield path
            path.replace(target)
        except OSError as error:
            raise CheckpointError(f"Can't write {target}: {error}. Finished chunks are kept.") from error
        finally:
            path.unlink(missing_ok=True)


def _read(path: Path) -> NDArray[np.float32] | None:
    """A float32 array, memory-mapped; None where the file is missing, truncated or something else."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if isinstance(found, np.ndarray) and found.dtype == np.float32 else None
