"""A teacher's answers: how it is asked, and what is kept of its logits: all, a random sample, or the largest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hfshrink.data import collate, row_lengths
from hfshrink.distillation.teachers.alignment import ask_teacher, check_finite
from hfshrink.distillation.teachers.collator import check_inputs, find_positions
from hfshrink.distillation.teachers.store import DTYPES, Row
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.modules import accepted_inputs
from hfshrink.terminal import progress

if TYPE_CHECKING:
    from datasets import Dataset

ROW_TASKS = ("text-classification", "image-classification")  # one answer per example
CHUNK = 128  # positions that are drawn at once: float64 of all would take four times a row's logits


def row_parts(signal: str, entries: int, dtype: str, classes: int) -> dict[str, str]:
    """The parts of a row's answer and their dtypes, as small as the vocabulary and the number of draws allow.

    Example:
        >>> row_parts("sampled", 50, "float32", classes=30522)
        {'widths': 'U8', 'ids': 'U16', 'counts': 'U8'}
    """
    if signal == "full":
        return {"logits": {"float32": "F32", "float16": "F16"}[dtype]}
    small = "U8" if entries <= 255 else "U16"
    ids = "U16" if classes <= 2**16 else "I32"
    return {"widths": small, "ids": ids, **({"counts": small} if signal == "sampled" else {"probabilities": "F16"})}


def sample_entries(logits: Tensor, entries: int, generator: torch.Generator) -> Row:
    """N draws from softmax(z) with replacement per position: the different ids and how often each came.

    Count / N is an unbiased estimate of the probability (Random Sampling KD, Anshumann et al. 2025, arXiv:2503.16870).
    Drawn by inversion of the distribution function in float64, which float32 would bias for large vocabularies.

    Args:
        logits: Of shape (positions, classes).
        entries: N.
        generator: Of the draws.

    Returns:
        `widths` (positions,): number of different ids; `ids` and `counts` (Σ widths,), ids rising in each position.

    Example:
        >>> row = sample_entries(torch.tensor([[0.0, 99.0]]), 50, torch.Generator().manual_seed(0))
        >>> row["ids"].tolist(), row["counts"].tolist()
        ([1], [50])
    """
    positions, classes = logits.shape
    draws = torch.rand(positions, entries, generator=generator, dtype=torch.float64)
    for start in range(0, positions, CHUNK):
        steps = torch.softmax(logits[start : start + CHUNK].double(), dim=-1).cumsum(-1)
        below = draws[start : start + CHUNK] * steps[:, -1:]
        found = torch.searchsorted(steps, below, right=True)  # right: never an id of probability 0
        draws[start : start + CHUNK] = found.clamp(max=classes - 1)  # whole numbers, exact in float64
    flat = (torch.arange(positions)[:, None] * classes + draws.long()).flatten().numpy()
    unique, counts = np.unique(flat, return_counts=True)
    widths = np.bincount(unique // classes, minlength=positions)
    return {"widths": widths, "ids": unique % classes, "counts": counts}


def top_entries(logits: Tensor, entries: int) -> Row:
    """The k largest probabilities of each position; what they leave over to 1 is for all other classes together.

    Args:
        logits: Of shape (positions, classes).
        entries: k.

    Returns:
        `widths` (positions,), all k; `ids` and `probabilities` (positions · k,), the largest first.

    Example:
        >>> top_entries(torch.tensor([[0.0, 99.0, 0.0]]), 1)["ids"].tolist()
        [1]
    """
    k = min(entries, logits.shape[-1])
    top = torch.softmax(logits.float(), dim=-1).topk(k, dim=-1)
    widths = np.full(len(logits), k)
    return {"widths": widths, "ids": top.indices.flatten().numpy(), "probabilities": top.values.flatten().numpy()}


@dataclass(frozen=True)
class TeacherRun:
    """One pass of a teacher: what it is asked and what is kept."""

    model: nn.Module
    task: str
    signal: str
    entries: int
    seed: int
    classes: int
    parts: dict[str, str]
    batch_size: int
    collator: Callable[[list[dict[str, Any]]], Any] | None
    processor: Any

    @property
    def per_row(self) -> bool:
        return self.task in ROW_TASKS

    def label_names(self) -> set[str]:
        from transformers.utils.generic import find_labels

        return set(find_labels(type(self.model)))

    def input_columns(self, encoded: Dataset) -> list[str]:
        """The columns that the answer depends on; of an encoder-decoder the target is one of them."""
        names = accepted_inputs(self.model) - self.label_names()
        if self.task == "text2text-generation":
            if not {"labels", "decoder_input_ids"} & set(encoded.column_names):
                raise SettingError(
                    "The teacher is an encoder-decoder and answers for each token of the target; the data set has "
                    f"{', '.join(encoded.column_names)}. Add labels, or a second column of text."
                )
            names = names | {"labels"}
        return [name for name in encoded.column_names if name in names]

    def answers(self, encoded: Dataset, keys: list[bytes], wanted: set[bytes]) -> Iterator[tuple[bytes, Row]]:
        """The answers to the wanted keys, each computed once."""
        first: dict[bytes, int] = {}
        for number, key in enumerate(keys):
            if key in wanted:
                first.setdefault(key, number)
        if not first:
            return
        chosen = self._fed(encoded).select(list(first.values()))
        names, portions = list(first), _portions(chosen, self.batch_size)
        with eval_mode(self.model):
            for numbers in progress(portions, "teacher's logits", total=len(portions)):
                logits, starts, lengths = self._ask(_features(chosen, numbers))
                for number, row, start, length in zip(numbers, logits, starts, lengths, strict=True):
                    yield names[number], self._keep(row[start : start + length], names[number])

    def check_collator(self, encoded: Dataset) -> None:
        """Try the data collator on the longest rows, before the teacher runs and though it need not run at all.

        Raises:
            SettingError: It draws at random, or it changes what the teacher reads.
        """
        if self.collator is not None:
            rows = self._fed(encoded)
            features = _features(rows, _portions(rows, self.batch_size)[0])
            _check_repeatable(self.collator, features)
            self._batch(features)

    def _fed(self, encoded: Dataset) -> Dataset:
        fed = accepted_inputs(self.model) | {"label", "label_ids"}  # a collator may ask for labels, the teacher won't
        return encoded.select_columns(
            self.input_columns(encoded) if self.collator is None else [n for n in encoded.column_names if n in fed]
        )

    def _batch(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """What the teacher reads: the rows' own values, whoever put them together."""
        if self.collator is None:
            columns = {name: [row[name] for row in features] for name in features[0]}
            batch: dict[str, Any] = dict(collate(columns, self.model, self.processor))
        else:
            made = dict(self.collator([dict(row) for row in features]))
            batch = {name: value for name, value in made.items() if value is not None}
        if self.task == "text2text-generation" and "decoder_input_ids" not in features[0]:
            make: Any = self.model.prepare_decoder_input_ids_from_labels
            if "labels" not in batch:
                raise SettingError("The data collator drops 'labels', the target that the teacher answers for.")
            batch.setdefault("decoder_input_ids", make(labels=batch["labels"]))
            starts = [make(labels=torch.tensor([row["labels"]]))[0] for row in features]
            features = [{**row, "decoder_input_ids": ids} for row, ids in zip(features, starts, strict=True)]
        if self.collator is not None:
            tokenizer = getattr(self.processor, "tokenizer", self.processor)
            check_inputs(features, batch, accepted_inputs(self.model) - self.label_names(), tokenizer)
        return batch

    def _ask(self, features: list[dict[str, Any]]) -> tuple[Tensor, list[int], list[int]]:
        """Logits (batch, positions, classes), and where each row's own positions begin and how many they are."""
        batch = self._batch(features)
        outputs = ask_teacher(self.model, batch, accepted_inputs(self.model), self.label_names())
        if self.task == "question-answering":
            logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1)
        else:
            logits = outputs.logits
        logits = logits.float().cpu()
        starts, lengths, width = self._positions(features, batch)
        logits = logits[:, None] if self.per_row else logits
        if logits.shape != (len(features), width, self.classes):
            raise SettingError(
                f"The teacher's logits have shape {tuple(logits.shape)}; expected {len(features)} rows, {width} "
                f"positions and {self.classes} classes, as its inputs and its config say."
            )
        return logits, starts, lengths

    def _positions(self, features: list[dict[str, Any]], batch: dict[str, Any]) -> tuple[list[int], list[int], int]:
        """Where each row's answer begins in the logits, how many positions it has, and how many the batch has."""
        if self.per_row:
            return [0] * len(features), [1] * len(features), 1
        name = "input_ids"
        if self.task == "text2text-generation":
            name = "labels" if "labels" in features[0] else "decoder_input_ids"
        only = [{name: row[name]} for row in features]
        lengths = [len(row[name]) for row in features]
        width, starts = find_positions(only, batch, lengths, getattr(self.processor, "tokenizer", self.processor))
        return starts, lengths, width

    def _keep(self, logits: Tensor, key: bytes) -> Row:
        check_finite(logits, "The teacher's logits")
        if self.signal == "full":
            if self.parts["logits"] == "F16":
                check_finite(logits.half(), "The teacher's logits in float16 (give dtype='float32')")
            row: Row = {"logits": logits.numpy()}
        elif self.signal == "top_k":
            row = top_entries(logits, self.entries)
        else:
            digest = hashlib.blake2b(key + str(self.seed).encode(), digest_size=7).digest()
            row = sample_entries(logits, self.entries, torch.Generator().manual_seed(int.from_bytes(digest)))
        return {name: np.array(part, DTYPES[self.parts[name]]) for name, part in row.items()}


def _portions(rows: Dataset, batch_size: int) -> list[list[int]]:
    """Row numbers, those of like length together and the longest first."""
    order = list(range(len(rows)))
    if "input_ids" in rows.column_names:
        lengths = row_lengths(rows)
        order.sort(key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _features(rows: Dataset, numbers: list[int]) -> list[dict[str, Any]]:
    columns = rows.with_format(None)[numbers]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_repeatable(collator: Callable[[list[dict[str, Any]]], Any], features: list[dict[str, Any]]) -> None:
    one, two = (dict(collator([dict(row) for row in features])) for _ in range(2))
    for name, value in one.items():
        if isinstance(value, Tensor) and not torch.equal(value, two[name]):
            raise SettingError(
                f"The data collator makes another {name!r} of the same rows each time; a cached teacher answers for "
                "one choice. Make the choice once in the data set, or let the teacher run in training."
            )
