"""More texts to learn from: words replaced by what a masked language model expects in their place."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfshrink.data import INPUT_COLUMNS, find_text_columns, read_dataset
from hfshrink.distillation.checks import check_counts, check_number, check_texts
from hfshrink.distillation.texts.masked_words import (
    MaskedWords,
    Slot,
    find_slots,
    masked_ids,
    read_masked_words,
    replace_words,
    word_logits,
)
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.labels import IGNORED, find_label_column
from hfshrink.terminal import progress

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SPARE = 8  # candidates looked at beyond the asked number: some are the word itself in other letter case


def augment(
    dataset: Any,
    masked_lm: Any,
    tokenizer: Any = None,
    *,
    copies: int = 20,
    replace: float = 0.4,
    candidates: int = 15,
    text_columns: Sequence[str] | None = None,
    batch_size: int = 32,
    keep_labels: bool = False,
    seed: int = 0,
) -> Dataset:
    """Add rows whose words are replaced by likely ones (the data augmentation of TinyBERT, arXiv:1909.10351).

    Each word of a text is masked in turn, and the `candidates` words that the masked language model finds most
    probable there are kept. Then `copies` new texts are drawn from each text: each word is replaced with probability
    `replace` by one of its candidates, all equally likely. Spaces, punctuation and letter case around them stay.

    Only words that are one piece of the tokenizer are replaced. Words of several pieces stay (the paper takes their
    neighbours among GloVe vectors), as do numbers, unknown words, parts of contractions (`don't`) and what lies
    beyond the model's longest input. The published code also spares stop words and shows the model the original text
    beside the masked one; the paper's algorithm, and this function, do neither. Of pairs both texts change, each
    without a look at the other.

    A changed word may change the meaning, so new rows have no label: it is -100, which a loss on labels leaves out,
    and they are learned from the teacher alone. `ClassLabel` columns keep their names; columns of label names become
    `ClassLabel`, of booleans and unsigned numbers int64. Other columns are copied from the original row.

    Args:
        dataset: A `datasets.Dataset`, folder or Hub id with raw text.
        masked_lm: A masked language model, folder or Hub id; best one trained on like text.
        tokenizer: Its tokenizer (a fast one); None looks beside the model.
        copies: New texts drawn per row; fewer are left, as repeated ones are dropped. The paper takes 20.
        replace: Probability that a word is replaced, in (0, 1].
        candidates: Words to choose from at each place.
        text_columns: One or two columns of text; None finds them.
        batch_size: Masked texts per forward pass.
        keep_labels: Whether new rows have the label of their original.
        seed: Of the draws; the global random state is not touched.

    Returns:
        The original rows as they were, then the new ones: no new row twice, and none equal to an original.

    Raises:
        SettingError: A number out of range, no column of text, an empty text, rows that are encoded already, labels
            that can't be marked as missing, a tokenizer without mask token.
        UnsupportedModelError: It is no masked language model.

    Example:
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
        >>> vocabulary = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "a": 3, "good": 4, "bad": 5, "film": 6}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(
        ...     tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
        ... )
        >>> sizes = {"vocab_size": 7, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=1))
        >>> rows = Dataset.from_dict({"text": ["a good film!"], "label": [1]})
        >>> augment(rows, model, tokenizer, copies=3, candidates=2)["label"][:2]
        [1, -100]
    """
    check_counts(copies=copies, candidates=candidates, batch_size=batch_size)
    check_number("replace", replace, "above 0 and at most 1", lambda value: 0 < value <= 1)
    rows = read_dataset(dataset).with_format(None)
    columns = find_text_columns(rows, text_columns)
    texts = _raw_texts(rows, columns)
    rows, label = (rows, None) if keep_labels else _labels_can_miss(rows)
    words = read_masked_words(masked_lm, tokenizer)
    unique = list(dict.fromkeys(text for row in texts for text in row))
    choices = dict(zip(unique, candidate_words(words, unique, candidates, batch_size), strict=True))
    sources, drawn = _draw(texts, choices, copies, replace, random.Random(seed))
    if not drawn:
        logger.warning("No text was changed: its words are of several pieces, or copies and replace are too low.")
        return rows
    return _with_new_rows(rows, columns, label, sources, drawn)


def candidate_words(
    words: MaskedWords, texts: Sequence[str], count: int, batch_size: int = 32
) -> list[list[tuple[Slot, list[str]]]]:
    """The `count` most probable other words at each word of one piece, best first, every word masked in turn.

    Args:
        words: The masked language model and its words.
        texts: The texts.
        count: Most candidates per word. There are fewer only where the vocabulary has no more.
        batch_size: Masked texts per forward pass; texts of like length run together.

    Returns:
        Per text its slots, in the text's order, with their candidates.
    """
    ids, slots = find_slots(words, texts)
    found: list[list[tuple[Slot, list[str]]]] = [[] for _ in texts]
    order = sorted(range(len(texts)), key=lambda text: -len(ids[text]))
    places = [(text, slot) for text in order for slot in slots[text]]
    starts = range(0, len(places), batch_size)
    with eval_mode(words.model):
        for start in progress(starts, "candidate words", total=len(starts)):
            batch = places[start : start + batch_size]
            masked = [masked_ids(words, ids[text], [slot]) for text, slot in batch]
            logits = word_logits(words, masked, [(row, slot.position) for row, (_, slot) in enumerate(batch)])
            best = logits.topk(min(count + SPARE, logits.shape[-1]), dim=-1).indices.tolist()
            for (text, slot), numbers in zip(batch, best, strict=True):
                itself = texts[text][slot.start : slot.end].casefold()
                others = [words.words[number] for number in numbers if words.words[number].casefold() != itself]
                found[text].append((slot, others[:count]))
    return found


def _raw_texts(rows: Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    encoded = [name for name in rows.column_names if name in INPUT_COLUMNS or name.startswith("teacher_")]
    if encoded:
        raise SettingError(
            f"The data set has the column {encoded[0]!r}, which belongs to the old texts. Augment raw rows first, "
            "then encode them or ask the teacher."
        )
    values = [list(rows[name]) for name in columns]
    for name, column in zip(columns, values, strict=True):
        check_texts(column, f"The column {name!r}")
    return list(zip(*values, strict=True))


def _labels_can_miss(rows: Dataset) -> tuple[Dataset, str | None]:
    """The rows with a label column that can hold -100, and its name."""
    import datasets

    name = find_label_column(rows)
    if name is None:
        return rows, None
    feature, dtype = rows.features[name], getattr(rows.features[name], "dtype", "")
    if isinstance(feature, datasets.ClassLabel) or dtype.startswith("int"):
        return rows, name
    if dtype.startswith("uint") or dtype == "bool":
        return rows.cast_column(name, datasets.Value("int64")), name
    if dtype.endswith("string"):
        names = sorted({label for label in rows[name] if label is not None})
        return rows.cast_column(name, datasets.ClassLabel(names=names)), name
    raise SettingError(
        f"New rows have no label, but the column {name!r} of {feature} can't hold -100 as 'no label'. "
        "Drop that column (and learn from the teacher alone), or set keep_labels=True."
    )


def _draw(
    texts: Sequence[tuple[str, ...]],
    choices: Mapping[str, list[tuple[Slot, list[str]]]],
    copies: int,
    replace: float,
    generator: random.Random,
) -> tuple[list[int], list[tuple[str, ...]]]:
    """(numbers of the original rows, new texts per column), without repetitions."""

    def changes(text: str) -> Iterator[tuple[Slot, str]]:
        for slot, candidates in choices[text]:
            if candidates and generator.random() < replace:
                yield slot, generator.choice(candidates)

    seen, sources, drawn = set(texts), [], []
    for number, row in enumerate(progress(texts, "new texts", total=len(texts))):
        for _ in range(copies):
            new = tuple(replace_words(text, list(changes(text))) for text in row)
            if new not in seen:
                seen.add(new)
                sources.append(number)
                drawn.append(new)
    return sources, drawn


def _with_new_rows(
    rows: Dataset, columns: Sequence[str], label: str | None, sources: list[int], drawn: list[tuple[str, ...]]
) -> Dataset:
    import datasets

    texts = {name: list(column) for name, column in zip(columns, zip(*drawn, strict=True), strict=True)}
    new = datasets.Dataset.from_dict(
        texts, features=datasets.Features({name: rows.features[name] for name in columns})
    )
    if label is not None:
        new = new.add_column(label, [IGNORED] * len(sources), feature=rows.features[label])
    others = [name for name in rows.column_names if name not in new.column_names]
    if others:
        new = datasets.concatenate_datasets([new, rows.select_columns(others).select(sources)], axis=1)
    return datasets.concatenate_datasets([rows, new.select_columns(rows.column_names)])
