"""From rows with a cached teacher to batches, and from batches to what the losses call the teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfshrink.distillation.losses.divergences import SparseTargets
from hfshrink.errors import SettingError

TEACHER_COLUMNS = ("teacher_logits", "teacher_ids", "teacher_counts", "teacher_probabilities")
"""What `cache_teacher` adds: dense logits, or ids with the counts of a sample or with the largest probabilities."""

TOKEN_COLUMNS = ("input_ids", "labels", "decoder_input_ids")  # one of them says where a row's positions lie in a batch
TARGET_COLUMNS = ("labels", "decoder_input_ids")  # where an encoder-decoder answers
NO_CHANCE = -1e4  # logit of a padded position: finite, and its probability is 0 in a softmax over positions
MAY_BE_ADDED = ("attention_mask", "position_ids")  # by a collator, from the lengths of the rows
CHANGED = (
    "The data collator {did} {name!r}, which the teacher reads, but answers are kept by the content of the rows. "
    "Do it before caching, in the data set."
)


@dataclass(frozen=True)
class TeacherCollator:
    """Wraps a data collator so that a cached teacher's columns reach the batch.

    The columns are of different lengths, which collators can't stack. They are taken out, the inner collator makes the
    batch, and they are padded to the batch's length, on the side where the batch has its padding: logits with −10⁴
    (in a softmax over positions, as in question answering, nothing), the others with 0. Rows without them pass
    through. A loss must leave the padded positions out: they are no answer.

    Attributes:
        inner: Any data collator that keeps the tokens as they are.
        encoder_decoder: Whether the answers lie at the tokens of the target. They do too where `inner` makes
            `decoder_input_ids`, or has such a model; this says it where rows and targets are of the same length.

    Raises:
        SettingError: The inner collator masks or changes tokens, or the rows' lengths are not those that were cached.

    Example:
        >>> from transformers import default_data_collator
        >>> rows = [{"input_ids": [1], "teacher_logits": [0.5, 1.5]}, {"input_ids": [3], "teacher_logits": [1, 2]}]
        >>> batch = TeacherCollator(default_data_collator)(rows)
        >>> batch["teacher_logits"]
        tensor([[0.5000, 1.5000],
                [1.0000, 2.0000]])
    """

    inner: Callable[[list[dict[str, Any]]], Any]
    encoder_decoder: bool = False

    def __post_init__(self) -> None:
        check_collator(self.inner)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """The inner collator's batch with the teacher's tensors added."""
        rows = [dict(row) for row in features]
        names = [name for name in TEACHER_COLUMNS if any(name in row for row in rows)]
        if any(name not in row for name in names for row in rows):
            raise SettingError(f"Some rows of a batch have {' and '.join(names)}, others not. Cache them all alike.")
        taken = {name: [row.pop(name) for row in rows] for name in names}
        batch = self.inner(rows)
        if taken:
            batch.update(_tensors(taken, lambda lengths: self._find(rows, batch, lengths)))
        return batch

    def _find(self, rows: list[dict[str, Any]], batch: Any, lengths: list[int]) -> tuple[int, list[int]]:
        config = getattr(getattr(self.inner, "model", None), "config", None)
        target = self.encoder_decoder or bool(getattr(config, "is_encoder_decoder", False))
        return find_positions(rows, batch, lengths, getattr(self.inner, "tokenizer", None), target)


def teacher_outputs(batch: Mapping[str, Any], head: str) -> Any:
    """The outputs of a cached teacher on a batch, as a loss reads them; None where the batch holds none.

    Args:
        batch: What `TeacherCollator` made.
        head: Kind of head, see `head_kind`.

    Returns:
        `.logits` (batch, …, classes); `.start_logits` and `.end_logits` (batch, sequence) for head "span", where
        positions that the collator padded get no probability; or `.sparse`, a `SparseTargets`.

    Example:
        >>> teacher_outputs({"teacher_logits": torch.tensor([[1.0, 2.0]])}, head="single_label").logits
        tensor([[1., 2.]])
        >>> drawn = {"teacher_ids": torch.tensor([[[7, 2]]]), "teacher_counts": torch.tensor([[[3, 1]]])}
        >>> teacher_outputs(drawn, head="causal_tokens").sparse.probabilities
        tensor([[[0.7500, 0.2500]]])
    """
    if batch.get("teacher_logits") is not None:
        logits = batch["teacher_logits"].float()
        return _spans(logits) if head == "span" else SimpleNamespace(logits=logits)
    if batch.get("teacher_ids") is None:
        return None
    drawn = batch.get("teacher_counts") is not None
    values = batch["teacher_counts" if drawn else "teacher_probabilities"].float()  # (batch, sequence, k)
    total = values.sum(-1, keepdim=True)
    # Counts become shares. Probabilities were rounded, so that their sum may be a little above 1.
    values = values / total.clamp(min=1.0)
    return SimpleNamespace(sparse=SparseTargets(batch["teacher_ids"].long(), values, tail=not drawn))


def check_collator(collator: Any) -> None:
    """Raise `SettingError` for a collator that masks tokens at random: a teacher's answers would not fit them."""
    if getattr(collator, "mlm", False) or hasattr(collator, "plm_probability"):
        raise SettingError(
            f"{type(collator).__name__} masks other tokens in every epoch, a cached teacher answers for one choice. "
            "Mask the rows once before caching (keep labels -100 where nothing is masked) and collate them with "
            "DataCollatorForTokenClassification, or let the teacher run in training."
        )


def find_positions(
    rows: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Any],
    lengths: Sequence[int],
    tokenizer: Any = None,
    target: bool = False,
) -> tuple[int, list[int]]:
    """Where each row's positions lie in a padded batch.

    Found from the tokens themselves, so that it holds for every collator and padding side.

    Args:
        rows: The rows as they went into the collator.
        batch: What it made of them.
        lengths: Positions of each row's answer.
        tokenizer: Tells the likely side of the padding, for rows that would fit on both.
        target: Prefer the target's tokens, where input and target are of these lengths both.

    Returns:
        The batch's length, and the first position of each row.

    Raises:
        SettingError: No column of tokens has these lengths, or the collator changed the tokens.
    """
    first = TARGET_COLUMNS if target or batch.get("decoder_input_ids") is not None else ()
    fitting = [
        name
        for name in dict.fromkeys((*first, *TOKEN_COLUMNS))
        if name in batch and all(name in row and len(row[name]) == n for row, n in zip(rows, lengths, strict=True))
    ]
    if not fitting:
        known = next((name for name in TOKEN_COLUMNS if name in rows[0]), "input_ids")
        raise SettingError(
            f"The teacher's answers have {list(lengths)[:5]} positions, the rows' {known} "
            f"{[len(row.get(known, ())) for row in rows][:5]}: the rows were cut or encoded anew after caching, or "
            "the collator dropped them. Cache the teacher last."
        )
    padded = torch.as_tensor(batch[fitting[0]])
    width = padded.shape[-1]
    sides = [[0] * len(rows), [width - n for n in lengths]]  # padding on the right, on the left
    if getattr(tokenizer, "padding_side", "right") == "left":
        sides.reverse()
    for starts in sides:
        if len(padded) == len(rows) and all(
            n <= width and torch.equal(padded[i, start : start + n].cpu(), torch.as_tensor(rows[i][fitting[0]]).cpu())
            for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
        ):
            return width, starts
    raise SettingError(
        f"The data collator changed the column {fitting[0]!r} (cut, masked or joined rows), so the cached teacher "
        "answers for other tokens. Do it before caching."
    )


def check_inputs(
    rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any], accepted: set[str], tokenizer: Any = None
) -> None:
    """Hold a batch against its rows: a collator may pad and make masks of lengths, and nothing else.

    Answers are kept by the content of the rows. A collator that scales pixels or drops token types makes others.

    Args:
        rows: The rows as they went into the collator.
        batch: What it made of them; values that are None are not there.
        accepted: What the teacher reads, without labels.
        tokenizer: Tells the likely side of the padding, for rows that would fit on both.

    Raises:
        SettingError: A column that the teacher reads was changed, dropped or added.

    Example:
        >>> check_inputs([{"input_ids": [5]}], {"input_ids": torch.tensor([[5]])}, {"input_ids", "attention_mask"})
    """
    width, starts, lengths = 0, [0] * len(rows), [0] * len(rows)
    if "input_ids" in accepted and "input_ids" in rows[0]:
        lengths = [len(row["input_ids"]) for row in rows]
        only = [{"input_ids": row["input_ids"]} for row in rows]
        width, starts = find_positions(only, batch, lengths, tokenizer)
        if "attention_mask" in accepted:
            rows = [{"attention_mask": [1] * n, **row} for row, n in zip(rows, lengths, strict=True)]
            batch = {"attention_mask": torch.ones(len(rows), width), **batch}  # a model reads all without a mask
    for name in sorted(accepted & {*rows[0], *batch} - {"input_ids"}):
        if name not in batch:
            raise SettingError(CHANGED.format(did="drops", name=name))
        if name in rows[0]:
            made = torch.as_tensor(batch[name]).cpu()
            fits = len(made) == len(rows) and all(
                _holds(made[i], row[name], start, -1 if name.startswith("decoder_") else n, name == "attention_mask")
                for i, (row, start, n) in enumerate(zip(rows, starts, lengths, strict=True))
            )
            if not fits:
                raise SettingError(CHANGED.format(did="changes", name=name))
        elif name not in MAY_BE_ADDED and isinstance(batch[name], Tensor | np.ndarray | list):
            raise SettingError(CHANGED.format(did="adds", name=name))


def _holds(made: Tensor, value: Any, start: int, length: int, alone: bool) -> bool:
    """Whether a batch's row holds a row's values, at its tokens or, for other lengths, on one side of the padding."""
    wanted = torch.as_tensor(value).cpu()
    wanted = wanted.to(made.dtype) if made.is_floating_point() else wanted
    if made.ndim != wanted.ndim or made.shape[1:] != wanted.shape[1:]:
        return False
    if made.shape == wanted.shape:
        return bool((made == wanted).all())
    n = len(wanted)
    sides = [start] if n == length else [0, len(made) - n]
    found = any(n <= len(made) and bool((made[s : s + n] == wanted).all()) for s in sides)
    return found and (not alone or bool(made.sum() == wanted.sum()))  # a mask is 0 around the row


def _tensors(taken: Mapping[str, list[Any]], find: Callable[[list[int]], tuple[int, list[int]]]) -> dict[str, Tensor]:
    if "teacher_logits" in taken:
        values = [np.asarray(value, np.float32) for value in taken["teacher_logits"]]
        if values[0].ndim == 1:
            return {"teacher_logits": torch.from_numpy(np.stack(values))}
        width, starts = find([len(value) for value in values])
        padded = np.full((len(values), width, values[0].shape[-1]), NO_CHANCE, np.float32)
        for row, start, value in zip(padded, starts, values, strict=True):
            row[start : start + len(value)] = value
        return {"teacher_logits": torch.from_numpy(padded)}
    width, starts = find([len(value) for value in taken["teacher_ids"]])
    found = {name: _pad_ragged(values, width, starts) for name, values in taken.items()}
    kinds = {name: np.float32 if value.dtype.kind == "f" else np.int64 for name, value in found.items()}
    return {name: torch.from_numpy(value.astype(kinds[name])) for name, value in found.items()}


def _pad_ragged(rows: list[Any], width: int, starts: list[int]) -> NDArray[Any]:
    """Lists of different lengths per position -> (batch, width, longest), filled with 0 behind and around."""
    widths = np.zeros((len(rows), width), np.int64)
    for filled, start, row in zip(widths, starts, rows, strict=True):
        filled[start : start + len(row)] = [len(position) for position in row]
    flat = np.concatenate([np.asarray(position) for row in rows for position in row])
    padded = np.zeros((*widths.shape, int(widths.max())), flat.dtype)
    padded[np.arange(padded.shape[-1]) < widths[..., None]] = flat
    return padded


def _spans(logits: Tensor) -> Any:
    from transformers.modeling_outputs import QuestionAnsweringModelOutput

    return QuestionAnsweringModelOutput(start_logits=logits[..., 0], end_logits=logits[..., 1])
