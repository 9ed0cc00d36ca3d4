"""Teachers with another tokenizer: the same text for both, and the positions at which both have read as much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.checks import check_counts
from hfshrink.distillation.losses.logits import loss_mask
from hfshrink.errors import SettingError

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no whole character


@dataclass(frozen=True)
class TeacherView:
    """A batch as the teacher reads it, and where it stands at the same place of the text as the student.

    Attributes:
        inputs: The teacher's `input_ids` and `attention_mask`, of shape (batch, its sequence), padded on the right.
        rows: Row of each pair, of shape (pairs,).
        student_positions: Position in the student's row, of shape (pairs,).
        teacher_positions: Position in the teacher's row, of shape (pairs,).
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    student_positions: Tensor
    teacher_positions: Tensor

    def pick(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The paired rows, (pairs, classes) of each, of logits of shape (batch, sequence, classes).

        Both predict what follows the same text.
        """
        return (
            student[self.rows.to(student.device), self.student_positions.to(student.device)],
            teacher[self.rows.to(teacher.device), self.teacher_positions.to(teacher.device)],
        )


def retokenize(
    inputs: dict[str, Any], student_tokenizer: Any, teacher_tokenizer: Any, max_length: int | None = None
) -> TeacherView:
    """The texts of a batch in the teacher's tokens, and the pairs of positions that have read the same text.

    Distillation between vocabularies (ULD, arXiv:2402.12030) compares position i with position i, though the two may
    stand at different places of the text. Here two positions are paired only where both prefixes end at the same
    character; of several such positions (the bytes of one character) the last on each side.

    A row counts up to its first special token in mid-text that the teacher does not have under the same name. Where
    encoding the student's text does not give back its tokens (normalising tokenizers, sampled tokens), only positions
    whose tokens decode to a beginning of the text are used.

    Args:
        inputs: A batch of a causal language model; `input_ids`, and where there are any `attention_mask` and `labels`,
            of shape (batch, sequence). Only positions whose next token counts in the loss are paired (`loss_mask`).
        student_tokenizer: That made `input_ids`.
        teacher_tokenizer: A fast one: it must tell which characters a token covers.
        max_length: Most tokens per row of the teacher; None has no limit.

    Raises:
        SettingError: The teacher's tokenizer is a slow one, or `max_length` is below 1.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "cat": 2}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
        >>> view = retokenize({"input_ids": torch.tensor([[1, 2, 1]])}, tokenizer, tokenizer)
        >>> view.student_positions, view.teacher_positions  # nothing is predicted at the last position
        (tensor([0, 1]), tensor([0, 1]))
    """
    if not getattr(teacher_tokenizer, "is_fast", False):
        raise SettingError(
            f"The teacher's tokenizer {type(teacher_tokenizer).__name__} can't tell which characters its tokens "
            "cover. Load the fast one."
        )
    if max_length is not None:
        check_counts(max_length=max_length)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    counts: Any = loss_mask(inputs, "causal_tokens")  # (batch, sequence − 1)
    encoded, pairs = [], []
    for row in range(len(ids)):
        real = torch.ones_like(ids[row]) if mask is None else mask[row]
        places = real.bool().nonzero().flatten()
        text, ours = _read_student(ids[row, places].tolist(), student_tokenizer, teacher_tokenizer)
        tokens, theirs = _read_teacher(text, teacher_tokenizer, max_length)
        encoded.append(tokens)
        wanted = set(counts[row].nonzero().flatten().tolist())
        found = [(int(places[ours[end]]), theirs[end]) for end in sorted(ours.keys() & theirs.keys())]
        pairs += [(row, student, teacher) for student, teacher in found if student in wanted]
    indices = torch.tensor(pairs, dtype=torch.int64, device=ids.device).reshape(-1, 3)
    return TeacherView(_padded(encoded, teacher_tokenizer, ids), *indices.unbind(1))


def _read_student(ids: list[int], student: Any, teacher: Any) -> tuple[str, dict[int, int]]:
    """The text of a row, and for each of its beginnings (by length) the position that has read just that much."""
    start, stop = _text_span(ids, student, teacher)
    ids = ids[start:stop]
    text = student.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = student(text, add_special_tokens=False, return_offsets_mapping=True) if student.is_fast else None
    if again is not None and again["input_ids"] == ids:
        found = _ends(text, ids, again["offset_mapping"], student)
    else:
        found = {}
        text = text.partition(BROKEN)[0]
        for number in range(len(ids)):
            read = student.decode(ids[: number + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if read and text.startswith(read):
                found[len(read)] = number
    beginning = {0: start - 1} if start else {}
    return text, beginning | {end: start + number for end, number in found.items()}


def _read_teacher(text: str, teacher: Any, max_length: int | None) -> tuple[list[int], dict[int, int]]:
    """The same for the teacher, with its own special tokens around the text."""
    made = teacher(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, special = made["input_ids"][:max_length], made["special_tokens_mask"]
    start = next((number for number, flag in enumerate(special) if not flag), len(special))
    stop = len(special) - next((number for number, flag in enumerate(reversed(special)) if not flag), 0)
    found = _ends(text, made["input_ids"][start:stop], made["offset_mapping"][start:stop], teacher)
    ends = ({0: start - 1} if start else {}) | {end: start + number for end, number in found.items()}
    return ids, {end: number for end, number in ends.items() if number < len(ids)}


def _ends(text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any) -> dict[int, int]:
    """Character behind each token -> number of the token, the last one where several end there.

    Left out are tokens that have read on, though their offsets do not say so: over the blanks at their end, which
    byte-level tokenizers do not count (`trim_offsets`), or into a character that the next token ends.
    """
    found = {}
    for number, (_, end) in enumerate(offsets):
        blanks = ""
        if text[end : end + 1].isspace():  # where blanks may have been cut off
            read = tokenizer.decode([ids[number]])
            blanks = read[len(read.rstrip()) :]
        start, stop = offsets[number + 1] if number + 1 < len(offsets) else (end, end)
        if end and text[:end].endswith(blanks) and not start < end < stop:
            found[end] = number
    return found


def _text_span(ids: list[int], student: Any, teacher: Any) -> tuple[int, int]:
    """Where the text of a row begins and stops: without the marks at its ends, up to one that the teacher lacks."""
    added = student("a", return_special_tokens_mask=True)
    flags = added["special_tokens_mask"]
    prefix = added["input_ids"][: next((number for number, flag in enumerate(flags) if not flag), len(flags))]
    start = len(prefix) if ids[: len(prefix)] == prefix else 0
    if not start and ids and ids[0] in (student.bos_token_id, student.cls_token_id):
        start = 1
    special, shared = set(student.all_special_ids), teacher.get_added_vocab()
    stop = len(ids)
    while stop > start and ids[stop - 1] in special:
        stop -= 1
    for number in range(start, stop):
        if ids[number] in special and student.convert_ids_to_tokens(ids[number]) not in shared:
            return start, number
    return start, stop


def _padded(rows: list[list[int]], tokenizer: Any, like: Tensor) -> dict[str, Tensor]:
    filler = tokenizer.pad_token_id or 0
    rows = [row or [filler] for row in rows]  # a row without any token would attend to nothing
    ids = like.new_full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = like.new_tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}
