"""Extractive question answering: windows over long contexts, the best span, SQuAD's scores (Rajpurkar et al. 2016).

Pure functions, and the encoding of rows with the columns `question`, `context` and `answers`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import max_positions

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = ("question", "context", "answers")
WINDOW_TOKENS = 384
OVERLAP_TOKENS = 128
MAX_ANSWER_TOKENS = 30
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, without the articles a, an, the, and with single spaces.

    Example:
        >>> normalize_answer(" The  Eiffel-Tower, Paris!")
        'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_overlap(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1 over words) of a predicted answer, each the best over the accepted answers, in 0..1.

    No accepted answer means that the question has none: then the empty prediction is right. F1 = 2·P·R / (P + R) over
    the multisets of normalized words.

    Example:
        >>> answer_overlap("the red car", ["red car", "a blue red car"])
        (1.0, 1.0)
        >>> answer_overlap("", [])
        (1.0, 1.0)
    """
    ours = normalize_answer(predicted)
    accepted = [text for text in map(normalize_answer, answers) if text] or [""]
    return max(float(ours == text) for text in accepted), max(_word_f1(ours, text) for text in accepted)


def best_span(
    start: np.ndarray, end: np.ndarray, allowed: np.ndarray, longest: int = MAX_ANSWER_TOKENS
) -> tuple[float, int, int]:
    """The span (s, e) of allowed tokens with the largest startₛ + endₑ, s ≤ e < s + longest; all such pairs are tried.

    Args:
        start: Start logits, (tokens,).
        end: End logits, (tokens,).
        allowed: Whether a token belongs to the context, (tokens,).
        longest: Longest answer in tokens.

    Returns:
        (score, first token, last token); the score is -inf where no token is allowed.

    Example:
        >>> best_span(np.array([0.0, 3.0, 1.0]), np.array([5.0, 0.0, 2.0]), np.array([True, True, True]))
        (5.0, 0, 0)
    """
    start, end = np.where(allowed, start, -np.inf), np.where(allowed, end, -np.inf)
    scores = np.full((min(longest, len(start)), len(start)), -np.inf)  # (extra tokens, first token)
    for extra in range(len(scores)):
        scores[extra, : len(start) - extra] = start[: len(start) - extra] + end[extra:]
    more, first = divmod(int(np.argmax(scores)), scores.shape[1])
    return float(scores[more, first]), first, first + more


def read_answers(dataset: Dataset) -> list[list[str]]:
    """The accepted answers of each row; an empty list where the question has none (SQuAD 2).

    Raises:
        SettingError: A column is missing, or `answers` is not of SQuAD's form.
    """
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise SettingError(
            "Question answering needs the columns question, context and answers "
            f"({{'text': […], 'answer_start': […]}}); {', '.join(missing)} is missing, "
            f"the data set has {', '.join(dataset.column_names)}. Rename with rename_column."
        )
    return [_texts(row, answers) for row, answers in enumerate(dataset.with_format(None)["answers"])]


def split_windows(
    dataset: Dataset, tokenizer: Any, model: Any, max_length: int | None = None
) -> tuple[Dataset, list[int], list[np.ndarray]]:
    """Encode question and context; a context that does not fit becomes several overlapping windows.

    Returns:
        The windows; the row of each; and the characters of the context that each token covers, (tokens, 2), -1 outside
        the context.

    Raises:
        SettingError: No tokenizer, or a question that leaves no room for its context.
        UnsupportedModelError: The tokenizer knows no character positions.
    """
    if tokenizer is None:
        raise SettingError(
            "Question answering needs the model's tokenizer, and there is none beside it. Pass processor=."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} knows no character positions. Use the fast tokenizer of this model."
        )
    plain = dataset.with_format(None)
    limits = (max_length or WINDOW_TOKENS, max_positions(model), tokenizer.model_max_length)
    longest = min(limit for limit in limits if limit is not None)
    question_lengths = [len(ids) for ids in tokenizer(list(plain["question"]), add_special_tokens=False)["input_ids"]]
    room = longest - max(question_lengths) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 2:
        raise SettingError(
            f"The question in row {int(np.argmax(question_lengths))} has {max(question_lengths)} tokens "
            f"and leaves no room for its context in {longest}. Raise max_length, or shorten the question."
        )
    windows, rows, spans = [], [], []
    for row, (question, context) in enumerate(zip(plain["question"], plain["context"], strict=True)):
        encoded = tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=longest,
            stride=min(OVERLAP_TOKENS, room // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in tokenizer.model_input_names if name in encoded]
        for window in range(len(encoded["input_ids"])):
            windows.append({name: encoded[name][window] for name in names})
            rows.append(row)
            inside = np.array([number == 1 for number in encoded.sequence_ids(window)])
            spans.append(np.where(inside[:, None], np.array(encoded["offset_mapping"][window]), -1))
    return _as_dataset(windows), rows, spans


def _as_dataset(windows: list[dict[str, list[int]]]) -> Dataset:
    import datasets

    return datasets.Dataset.from_list(windows)


def _texts(row: int, answers: Any) -> list[str]:
    if isinstance(answers, dict) and isinstance(answers.get("text"), list):
        return list(answers["text"])
    if isinstance(answers, list) and all(isinstance(answer, dict) and "text" in answer for answer in answers):
        return [answer["text"] for answer in answers]
    raise SettingError(
        f"answers must be {{'text': […], 'answer_start': […]}} as in SQuAD, got {str(answers)[:80]} in row {row}."
    )


def _word_f1(ours: str, theirs: str) -> float:
    ours_words, their_words = ours.split(), theirs.split()
    if not ours_words or not their_words:
        return float(ours_words == their_words)
    common = sum((Counter(ours_words) & Counter(their_words)).values())
    return 2 * common / (len(ours_words) + len(their_words))
