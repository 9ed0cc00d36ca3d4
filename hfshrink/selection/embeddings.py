"""`embed`: one vector for each row of a data set, from any model, cached by the content of the rows."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hfshrink.data import INPUT_COLUMNS, batches, encode, find_text_columns, read_dataset
from hfshrink.digests import digest_of
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.inputs import eval_mode
from hfshrink.labels import LABEL_COLUMNS
from hfshrink.loading import load
from hfshrink.modules import accepted_inputs
from hfshrink.record import model_name
from hfshrink.selection.caching import ChunkStore, column_digests, model_digest, processor_digest
from hfshrink.selection.pooling import POOLINGS, Reader
from hfshrink.terminal import progress

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK_ROWS = 1024  # rows that a killed run loses at most in each process
LENGTH_ROWS = 100_000  # rows whose text is in memory at once
TEXT_TASKS = ("text-classification", "token-classification")  # how text, and lists of words, are encoded
IMAGE_COLUMNS = ("image", "img", "pixels")
FORMAT_VERSION = 1  # of what is computed: raise it where the same settings give other numbers


def embed(  # noqa: PLR0913
    dataset: Any,
    model: Any,
    processor: Any = None,
    *,
    pooling: str = "auto",
    batch_size: int = 32,
    cache_dir: str | Path | None = None,
    text_columns: Sequence[str] | None = None,
    max_length: int | None = None,
) -> NDArray[np.float32]:
    """One vector for each row, in the rows' order: of texts, pairs of texts, lists of words, images, or encoded rows.

    Rows of like length are read together, longest first. Started by `accelerate launch` or torchrun, each process
    embeds its share, and all return the whole. Label columns (`label`, `labels`, `ner_tags`, …) are never read; give
    `text_columns` where another column of strings holds the labels.

    Args:
        dataset: A `datasets.Dataset`, a folder of `save_to_disk`, or a Hub id.
        model: A model, folder or Hub id. It stays where it is; one that is loaded here goes to the process's device.
        processor: Its tokenizer or image processor; None looks beside the model. Encoded rows need none.
        pooling: "mean" of the last hidden state over a row's tokens, or an image's places; "cls", that of the first
            token; "features", what the head's last layer reads (of tokens the mean; the last token where a causal
            model classifies by it); "auto": "features" of image classifiers, else "mean". Of an encoder-decoder only
            the encoder is read but for "features".
        batch_size: Rows per forward pass.
        cache_dir: A folder that keeps the vectors by the content of rows, weights and settings: what has changed is
            computed anew, a killed run goes on where it was, and the result is memory-mapped. None keeps them in
            memory.
        text_columns: One or two columns of text; None takes the only one or two that there are.
        max_length: Longest text in tokens; None takes what tokenizer and model can read.

    Returns:
        (n, d) float32; read-only and memory-mapped with `cache_dir`.

    Raises:
        SettingError: Unknown settings, empty or streaming data, rows without tokens or text, or a vector that is NaN
            or infinite.
        UnsupportedModelError: The model has no last hidden state, first token or head, as `pooling` asks for.
        CheckpointError: The model can't be read, or `cache_dir` can't be written or is corrupt.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> embed(Dataset.from_dict({"input_ids": [[1, 2], [3]]}), BertModel(config)).shape
        (2, 8)
    """
    _check_settings(pooling, batch_size, max_length)
    team = Processes.current()
    rows = read_dataset(dataset)
    loaded, found = load(model)
    if not isinstance(loaded, nn.Module):
        raise SettingError(f"Expected a PyTorch model, got {type(loaded).__name__}. Embed with the model before it.")
    if isinstance(model, str | Path) and team.state is not None:
        loaded = loaded.to(team.state.device)
    reader = Reader.of(loaded, pooling)
    task, columns = _columns(rows, reader, text_columns)
    processor = (processor or found) if task else None
    if task and processor is None:
        raise SettingError(
            f"The data set has raw columns ({', '.join(rows.column_names)}) and the model no tokenizer or processor "
            "beside it. Pass processor=, or a data set with input_ids or pixel_values."
        )
    source = Source(rows.with_format(None).select_columns(columns), reader, processor, task, batch_size, max_length)
    if cache_dir is None:
        return _in_memory(source, team)
    settings = source.settings()
    store = ChunkStore(Path(cache_dir).expanduser().absolute() / digest_of(settings), len(rows))
    return _through_store(source, team, store, {**settings, "model": model_name(loaded)})


@dataclass(frozen=True, eq=False)
class Source:
    """The rows that are read, and how."""

    rows: Dataset
    reader: Reader
    processor: Any
    task: str
    batch_size: int
    max_length: int | None

    def settings(self) -> dict[str, Any]:
        """All that the vectors depend on (but for the noise of batches), JSON-safe."""
        digests = column_digests(self.rows)
        return {
            "format_version": FORMAT_VERSION,
            "rows": len(self.rows),
            "columns": {name: digests[name] for name in self.rows.column_names},
            "order": self.rows.column_names,
            "task": self.task,
            "network": model_digest(self.reader.network),
            "pooling": self.reader.pooling,
            "processor": processor_digest(self.processor),
            "max_length": self.max_length,
        }

    def portions(self) -> list[NDArray[np.int64]]:
        """Row numbers in chunks, longest first; equal lengths stay in their order.

        Raises:
            SettingError: A row holds None.
        """
        lengths = np.zeros(len(self.rows), dtype=np.int64)
        for name in self.rows.column_names:
            lengths += _lengths(self.rows, name)
        order = np.argsort(-lengths, kind="stable")
        return [order[start : start + CHUNK_ROWS] for start in range(0, len(order), CHUNK_ROWS)]

    def vectors(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(numbers), d) vectors of some rows.

        Raises:
            SettingError: A row can't be encoded, or its vector is NaN or infinite; the message names it.
        """
        import datasets
        from datasets.table import InMemoryTable

        table = InMemoryTable(self.rows.with_format("arrow")[numbers.tolist()])  # in memory: no files are left behind
        part = datasets.Dataset(table, info=datasets.DatasetInfo(features=self.rows.features), fingerprint="rows")
        for name in table.column_names:
            _check_nulls(table[name], name, numbers)
        chosen = {name: f"{name} (text)" for name in part.column_names if name in LABEL_COLUMNS}
        part = part.rename_columns(chosen)  # text under such a name is no label here
        model, found = self.reader.network, np.zeros((0, 0), dtype=np.float32)
        try:
            texts = part.column_names if self.task in TEXT_TASKS else None
            encoded = encode(part, model, self.processor, self.task, text_columns=texts, max_length=self.max_length)
        except SettingError as error:
            message = re.sub(r"^Row (\d+) ", lambda match: f"Row {numbers[int(match[1])]} ", str(error))
            raise SettingError(message) from None
        with eval_mode(model), torch.inference_mode():
            for places, batch in batches(encoded, model, None, self.batch_size):  # padded on the right
                vectors = self.reader.vectors(batch).numpy()
                if not found.size:
                    found = np.zeros((len(numbers), vectors.shape[1]), dtype=np.float32)
                found[places] = vectors
        broken = np.flatnonzero(~np.isfinite(found).all(axis=1))
        if len(broken):
            raise SettingError(
                f"The embedding of row {numbers[broken[0]]} is NaN or infinite ({len(broken)} of these {len(numbers)} "
                "rows). The weights are broken or overflow: load the model in float32, or check the row."
            )
        return found


@dataclass(frozen=True)
class Processes:
    """The processes that share the work; one without `state`, accelerate's `PartialState`."""

    state: Any = None
    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those that were launched together; accelerate is asked only where there are several."""
        is_running = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not is_running and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())  # without, it sees one process on a CPU
        return cls(state, state.process_index, state.num_processes)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.state.wait_for_everyone()

    def gathered(self, array: NDArray[np.float32] | None, rows: int) -> NDArray[np.float32]:
        """The sum over all processes, of which each filled other rows and left zeros; None had nothing to fill."""
        if self.count == 1 and array is not None:
            return array
        width = torch.tensor([0 if array is None else array.shape[1]]).to(self.state.device)
        torch.distributed.all_reduce(width, op=torch.distributed.ReduceOp.MAX)
        whole = np.zeros((rows, int(width)), dtype=np.float32) if array is None else array
        for start in range(0, rows, CHUNK_ROWS):  # a device need not hold all rows
            block = torch.from_numpy(whole[start : start + CHUNK_ROWS]).to(self.state.device)
            torch.distributed.all_reduce(block)
            whole[start : start + CHUNK_ROWS] = block.cpu().numpy()
        return whole


def _in_memory(source: Source, team: Processes) -> NDArray[np.float32]:
    whole = None
    for _, numbers in _own(source.portions(), team):
        vectors = source.vectors(numbers)
        if whole is None:
            whole = np.zeros((len(source.rows), vectors.shape[1]), dtype=np.float32)
        whole[numbers] = vectors
    return team.gathered(whole, len(source.rows))


def _through_store(
    source: Source, team: Processes, store: ChunkStore, about: Mapping[str, Any]
) -> NDArray[np.float32]:
    found = store.whole() if team.count == 1 else None
    if found is not None:
        return found
    with store.locked() if team.rank == 0 else contextlib.nullcontext():
        team.wait()  # from here on nobody else writes in the folder
        if (found := store.whole()) is None:
            portions = source.portions()
            for number, numbers in _own(portions, team):
                if not store.has(number, len(numbers)):
                    store.write(number, source.vectors(numbers))
            team.wait()
            if team.rank == 0:
                store.join(portions, about)
            team.wait()
            found = store.whole()
        team.wait()
    if found is None:
        raise CheckpointError(f"{store.folder} is not seen by all processes. Give a cache_dir that they share.")
    return found


def _own(portions: list[NDArray[np.int64]], team: Processes) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(number, rows) of this process's portions, with a bar on the first process."""
    own = list(enumerate(portions))[team.rank :: team.count]
    with without_bars():
        yield from progress(own, f"embeddings, {CHUNK_ROWS} rows a step") if team.rank == 0 else own


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bars of datasets' own for each chunk."""
    import datasets

    were_on = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_on:
            datasets.enable_progress_bars()


def _columns(rows: Dataset, reader: Reader, text_columns: Sequence[str] | None) -> tuple[str, list[str]]:
    """The task by which `encode` reads the rows, "" for encoded ones, and the columns that it needs."""
    import datasets

    taken = accepted_inputs(reader.network)
    if text_columns is None and any(name in rows.column_names for name in INPUT_COLUMNS):
        names = [name for name in rows.column_names if name in taken and name not in LABEL_COLUMNS]
        if not names:
            raise SettingError(
                f"The model reads none of {', '.join(rows.column_names)}; it reads {', '.join(sorted(taken))}."
            )
        return "", names
    if text_columns is None and "pixel_values" in taken:
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        images = images or [name for name in IMAGE_COLUMNS if name in rows.column_names]
        if not images:
            raise SettingError(f"Found no column of images among {', '.join(rows.column_names)}; call it 'image'.")
        return "image-classification", images[:1]
    names = find_text_columns(rows, text_columns)
    is_words = [getattr(rows.features[name], "dtype", "") != "string" for name in names]
    return "token-classification" if all(is_words) else "text-classification", names


def _lengths(rows: Dataset, name: str) -> NDArray[np.int64]:
    """(n,) how long the values of a column are, in its own unit: letters, words or tokens; 0 for images.

    Raises:
        SettingError: A value is None.
    """
    import pyarrow.compute as pc

    feature = rows.features[name]
    is_text = getattr(feature, "dtype", "") == "string"
    lengths = np.zeros(len(rows), dtype=np.int64)
    if not is_text and name != "input_ids" and getattr(getattr(feature, "feature", None), "dtype", "") != "string":
        return lengths
    column, measure = (
        rows.select_columns([name]).with_format("arrow"),
        pc.utf8_length if is_text else pc.list_value_length,
    )
    for start in range(0, len(rows), LENGTH_ROWS):
        array = column[start : start + LENGTH_ROWS][name]
        _check_nulls(array, name, np.arange(start, start + len(array)))
        lengths[start : start + len(array)] = np.asarray(measure(array), dtype=np.int64)
    return lengths


def _check_nulls(array: Any, name: str, numbers: NDArray[np.int64]) -> None:
    if array.null_count:
        row = numbers[np.flatnonzero(array.is_null().to_numpy())[0]]
        raise SettingError(f"Row {row} has None in the column {name!r}. Filter such rows out first.")


def _check_settings(pooling: str, batch_size: int, max_length: int | None) -> None:
    if pooling not in POOLINGS:
        raise SettingError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}.")
    for name, value in (("batch_size", batch_size), ("max_length", 1 if max_length is None else max_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {value!r}.")
