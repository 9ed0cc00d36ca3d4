"""The words that a masked language model may replace: where they stand in a text, and what may stand there instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfshrink.data import collate
from hfshrink.distillation.teachers.alignment import check_finite
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import model_inputs
from hfshrink.loading import infer_task, load
from hfshrink.modules import max_positions
from hfshrink.record import config_of

APOSTROPHES = ("'", "’")


@dataclass(frozen=True)
class Slot:
    """A word of one piece: its token is `ids[position]`, its characters are `text[start:end]`."""

    position: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class MaskedWords:
    """A masked language model and the entries of its vocabulary that are whole words.

    Attributes:
        model: The masked language model.
        tokenizer: Its tokenizer.
        word_ids: Token ids of the whole words, (words,) int64.
        words: The same as text.
    """

    model: Any
    tokenizer: Any
    word_ids: Tensor
    words: list[str]

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        limits = (max_positions(self.model), self.tokenizer.model_max_length, 2**20)
        return min(limit for limit in limits if limit is not None)


def find_slots(words: MaskedWords, texts: Sequence[str]) -> tuple[list[list[int]], list[list[Slot]]]:
    """Token ids per text, cut to the model's longest input, and the words of one piece that may be replaced."""
    encoded = words.tokenizer(
        list(texts), truncation=True, max_length=words.max_length, return_offsets_mapping=True, padding=False
    )
    special, slots = set(words.tokenizer.all_special_ids), []
    for number, text in enumerate(texts):
        word_ids, tokens = encoded.word_ids(number), encoded["input_ids"][number]
        pieces = Counter(word_ids)
        row = []
        for position, (word, token) in enumerate(zip(word_ids, tokens, strict=True)):
            if word is not None and pieces[word] == 1 and token not in special:
                slot = _trimmed(text, position, *encoded["offset_mapping"][number][position])
                row += [slot] if _is_free(text, slot) else []
        slots.append(row)
    return encoded["input_ids"], slots


def word_logits(words: MaskedWords, rows: Sequence[list[int]], places: Sequence[tuple[int, int]]) -> Tensor:
    """Logits of the whole words at some places, (places, words) float32 on the CPU.

    Args:
        words: The masked language model and its words.
        rows: Token ids of each text, with mask tokens in them.
        places: (row, position) of each mask token.

    Raises:
        SettingError: A logit is NaN or infinite.
    """
    inputs = collate({"input_ids": rows}, words.model)
    with torch.inference_mode():
        logits = words.model(**model_inputs(words.model, inputs)).logits
    index = torch.tensor(places, device=logits.device)
    chosen = logits[index[:, 0], index[:, 1]].float().cpu()
    check_finite(chosen, "The masked language model's logits")
    return chosen[:, words.word_ids]


def masked_ids(words: MaskedWords, ids: list[int], slots: Sequence[Slot]) -> list[int]:
    """A copy of the token ids with the mask token in the slots."""
    masked = list(ids)
    for slot in slots:
        masked[slot.position] = words.tokenizer.mask_token_id
    return masked


def replace_words(text: str, changes: Sequence[tuple[Slot, str]]) -> str:
    """The text with new words in some slots, which are in the text's order.

    Example:
        >>> replace_words("A bad film.", [(Slot(2, 2, 5), "dull")])
        'A dull film.'
    """
    parts, last = [], 0
    for slot, word in changes:
        parts += [text[last : slot.start], word]
        last = slot.end
    return "".join((*parts, text[last:]))


def read_masked_words(masked_lm: Any, tokenizer: Any = None) -> MaskedWords:
    """Load a masked language model with its tokenizer and find the whole words of its vocabulary.

    Raises:
        SettingError: No tokenizer, a slow one, one without mask token or of another model.
        UnsupportedModelError: The model is no masked language model.
    """
    model, found = _load_masked_lm(masked_lm)
    if infer_task(model) != "fill-mask":
        raise UnsupportedModelError(
            f"Expected a masked language model (fill-mask), got {type(model).__name__} for {infer_task(model)}."
        )
    tokenizer = tokenizer or found
    if tokenizer is None:
        raise SettingError("There is no tokenizer beside the masked language model. Pass tokenizer=.")
    if not getattr(tokenizer, "is_fast", False):
        raise SettingError(
            f"Expected a fast tokenizer, which knows each token's place, got {type(tokenizer).__name__}."
        )
    if tokenizer.mask_token_id is None:
        raise SettingError(
            f"The tokenizer ({type(tokenizer).__name__}) has no mask token. Pass the one of the masked language model."
        )
    known, size = len(tokenizer), config_of(model).get_text_config().vocab_size
    if known > size:
        raise SettingError(
            f"The tokenizer has {known} entries, the masked language model predicts {size}: not a pair."
        )
    entries = whole_words(tokenizer)
    if len(entries) < 2:
        raise SettingError(
            f"Expected whole words in the tokenizer's vocabulary of {known} entries, found {len(entries)}."
        )
    return MaskedWords(model, tokenizer, torch.tensor(list(entries)), list(entries.values()))


def whole_words(tokenizer: Any) -> dict[int, str]:
    """Token id -> text of the entries that are whole words of letters: no special tokens, no pieces of words.

    Found by decoding each entry between two known words, whatever marks the family uses: a whole word stands there
    between spaces, a piece sticks to a neighbour.
    """
    once, twice = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
    anchor = twice[len(once) :]  # a word with the mark of its begin: "Ġa", "▁a"
    special = set(tokenizer.all_special_ids)
    numbers = [number for number in range(len(tokenizer)) if number not in special]
    settings = {"clean_up_tokenization_spaces": False}
    between = f"{tokenizer.decode(anchor, **settings).strip()} "
    decoded = tokenizer.batch_decode([[*anchor, number, *anchor] for number in numbers], **settings)
    found = {}
    for number, text in zip(numbers, decoded, strict=True):
        text = text.strip()
        word = text[len(between) : -len(between)]
        if word.isalpha() and text == f"{between}{word} {between.strip()}":
            found[number] = word
    return found


def _trimmed(text: str, position: int, start: int, end: int) -> Slot:
    """Byte-level tokenizers may count the space before a word in."""
    word = text[start:end]
    return Slot(position, end - len(word.lstrip()), start + len(word.rstrip()))


def _is_free(text: str, slot: Slot) -> bool:
    """Whether the slot holds a word of letters that is no part of a contraction."""
    around = text[max(slot.start - 1, 0) : slot.start] + text[slot.end : slot.end + 1]
    return text[slot.start : slot.end].isalpha() and not any(mark in around for mark in APOSTROPHES)


def _load_masked_lm(masked_lm: Any) -> tuple[Any, Any]:
    if not isinstance(masked_lm, str | Path):
        return load(masked_lm)
    try:
        return load(masked_lm)  # not as "fill-mask": a classifier would get a random head
    except UnsupportedModelError:  # BertForPreTraining and its like have the head, and others besides
        return load(masked_lm, task="fill-mask")
