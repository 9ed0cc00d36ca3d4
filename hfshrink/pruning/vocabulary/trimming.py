"""The vocabulary cut to a corpus: fewer embedding rows, a smaller tokenizer, the same logits."""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from hfshrink.data import data_title, find_text_columns, read_dataset
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import load
from hfshrink.modules import PADDED_POSITIONS, measure_parameters
from hfshrink.pruning.vocabulary.embedding import check_tables, cut_rows, renumber, token_ids
from hfshrink.pruning.vocabulary.tokens import (
    State,
    most_frequent,
    necessary_pieces,
    piece_parts,
    trim_state,
    with_parts,
)
from hfshrink.record import StepRecord, append_step, model_name

BATCH = 1000  # texts that are tokenized together
CHATS = (("user", "assistant"), ("system", "user", "assistant"))
"""Roles of the conversations that a chat template is tried on: what it adds of its own stays in the vocabulary."""


def trim_vocabulary(
    model: Any,
    corpus: Any,
    processor: Any = None,
    *,
    keep: str | Sequence[str] = (),
    min_count: int = 1,
    max_tokens: int | None = None,
) -> tuple[Any, Any]:
    """Cut a model's vocabulary to the tokens that a corpus needs, in place, and make its tokenizer smaller.

    The embedding loses the rows of all other tokens, and so does the head of a language model, tied or not. Ids keep
    their order and are renumbered in the tokenizer, the config and the generation config. Special and added tokens,
    bytes and single characters stay, so that other texts are still read, in smaller pieces; only a tokenizer of whole
    words reads their words as unknown. Texts whose tokens all stay have the same tokens and the same logits as before
    (of a language model: at the tokens that stay). What a chat template adds stays too. Rows that no token has, such
    as padding to a round number, are cut.

    The trimmed model belongs to the returned tokenizer alone. It forgets the folder that it came from, so that no
    later call takes the old tokenizer from there: pass `processor=`, or save both into one folder.

    Args:
        model: A model, a folder or a Hub id. Make its optimizer afterwards.
        corpus: The texts: a `datasets.Dataset` with one or two columns of text (or of lists of words), a Hub id, a
            folder that `save_to_disk` wrote, or an iterable of strings.
        processor: The model's tokenizer, a fast one; None looks beside the model's files. It is left as it is.
        keep: Tokens or words to keep besides.
        min_count: How often the corpus must have a token for it to stay.
        max_tokens: Largest new vocabulary, in tokens, all that must stay counted; the most frequent ones go first.
            None sets no limit.

    Returns:
        The model, and its new tokenizer.

    Raises:
        SettingError: An empty corpus, something that is no text, a number below 1, no tokenizer or the tokenizer of
            another model, NaN in the embedding, a word to keep that the tokenizer does not know.
        UnsupportedModelError: A slow tokenizer, a tokenizer of an unknown type, or a model without one embedding table
            of tokens.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}, "[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=5)
        >>> model, tokenizer = trim_vocabulary(BertModel(BertConfig(**sizes)), ["good film"], tokenizer)
        >>> tokenizer.get_vocab() == {"[PAD]": 0, "[UNK]": 1, "good": 2, "film": 3}, model.config.vocab_size
        (True, 4)
    """
    start = time.perf_counter()
    keep = [keep] if isinstance(keep, str) else list(keep)
    _check(keep, min_count, max_tokens)
    model, found = load(model)
    rows = check_tables(model)
    texts, plan = _texts(corpus), _Plan(_fast_tokenizer(found if processor is None else processor), rows)
    counts = plan.count(texts)
    kept = plan.choose(counts, _needed(model, plan, keep), min_count, max_tokens)
    smaller = plan.smaller(kept)
    plan.check_same(smaller, texts, set(kept))
    old_ids = [plan.ids[piece] for piece in kept]
    base, before = model_name(model), measure_parameters(model)
    modules = cut_rows(model, torch.tensor(old_ids))
    renumber(model, rows, {old: new for new, old in enumerate(old_ids)})
    after, total = measure_parameters(model), sum(counts.values())
    step = StepRecord(
        technique="trim_vocabulary",
        method="corpus",
        settings={"corpus": data_title(corpus), "keep": keep, "min_count": min_count, "max_tokens": max_tokens},
        before=before,
        after=after,
        modules=modules,
        results={
            "vocabulary_before": rows,
            "vocabulary_after": len(kept),
            "corpus_rows": len(texts),
            "corpus_tokens": total,
            "covered_share": sum(counts[piece] for piece in set(kept) & counts.keys()) / total,
        },
        seconds=time.perf_counter() - start,
    )
    append_step(model, step, base_model=base)
    model.config._name_or_path = ""
    return model, smaller


class _Plan:
    """A tokenizer taken apart: its state, its ids, and a copy that neither truncates nor pads."""

    def __init__(self, tokenizer: Any, rows: int) -> None:
        self.tokenizer = tokenizer
        self.backend = _plain(tokenizer)
        self.state: State = json.loads(tokenizer.backend_tokenizer.to_str())
        self.ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        if max(self.ids.values()) >= rows:
            raise SettingError(
                f"The tokenizer has ids up to {max(self.ids.values())}, the model's embedding {rows} rows: it belongs "
                "to another model. Pass the right one as processor=, or call model.resize_token_embeddings first."
            )

    def count(self, texts: Sequence[Any]) -> Counter[str]:
        """How often the corpus has each piece, without the special tokens around a text."""
        counts: Counter[str] = Counter()
        for pieces in _read(self.backend, texts):
            counts.update(pieces)
        if not counts:
            raise SettingError("The corpus is empty: its texts have no tokens.")
        return counts

    def choose(self, counts: Counter[str], needed: set[str], min_count: int, max_tokens: int | None) -> list[str]:
        """The pieces that stay, in the order of their ids."""
        parts = piece_parts(self.state)
        necessary = with_parts(necessary_pieces(self.state) | needed, parts)
        wanted = {piece: count for piece, count in counts.items() if count >= min_count}
        if max_tokens is None:
            kept = with_parts(necessary | wanted.keys(), parts)
        else:
            kept = most_frequent(wanted, necessary, parts, max_tokens)
        return sorted(kept, key=self.ids.__getitem__)

    def smaller(self, kept: Sequence[str]) -> Any:
        """A copy of the tokenizer with these pieces only.

        The copy keeps its class and all its settings; only the object that does the work is another.
        """
        ids = {piece: number for number, piece in enumerate(kept)}
        backend = Tokenizer.from_str(json.dumps(trim_state(self.state, ids)))
        if backend.get_vocab(with_added_tokens=True) != ids:
            raise UnsupportedModelError(
                "The ids of this tokenizer's added tokens lie between those of its own pieces; it can't be renumbered."
            )
        new = copy.deepcopy(self.tokenizer)
        new._tokenizer = backend
        for name in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file"):
            new.init_kwargs.pop(name, None)
        new.init_kwargs["added_tokens_decoder"] = backend.get_added_tokens_decoder()
        new.name_or_path = new.init_kwargs["name_or_path"] = ""
        return new

    def check_same(self, new: Any, texts: Sequence[Any], kept: set[str]) -> None:
        """Raise where a text whose pieces all stay is not read as before."""
        pairs = zip(_read(self.backend, texts), _read(_plain(new), texts), strict=True)
        for row, (before, after) in enumerate(pairs):
            if before != after and kept.issuperset(before):
                raise UnsupportedModelError(
                    f"The trimmed tokenizer reads row {row} of the corpus as {after[:8]}, before it was {before[:8]}: "
                    "tokenizers of this kind can't be trimmed."
                )


def _plain(tokenizer: Any) -> Tokenizer:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read(backend: Tokenizer, texts: Sequence[Any]) -> Iterator[list[str]]:
    """The pieces of each text, without the special tokens around it."""
    pieces = {number: piece for piece, number in backend.get_vocab(with_added_tokens=True).items()}
    words = bool(texts) and isinstance(texts[0], list)
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]  # the fast call knows ids only
        for encoding in backend.encode_batch_fast(batch, is_pretokenized=words, add_special_tokens=False):
            yield [pieces[number] for number in encoding.ids]


def _needed(model: Any, plan: _Plan, keep: Sequence[str]) -> set[str]:
    """The pieces that the config, the chat template and the caller ask for."""
    pieces = {number: piece for piece, number in plan.ids.items()}
    numbers = token_ids(model)
    if model.config.model_type in PADDED_POSITIONS:  # positions start behind the padding id, which must not move
        numbers |= set(range(model.config.pad_token_id or 0))
    found = {pieces[number] for number in numbers if number in pieces}
    found |= {token for token in plan.tokenizer.all_special_tokens if token in plan.ids}
    for pieces_of_chat in _read(plan.backend, _chats(plan.tokenizer)):
        found.update(pieces_of_chat)
    for word in keep:
        spelled = {piece for written in _read(plan.backend, [word, f" {word}"]) for piece in written}
        if word not in plan.ids and not spelled - {plan.tokenizer.unk_token}:
            raise SettingError(f"keep has {word!r}, which the tokenizer does not know.")
        found |= spelled | ({word} & plan.ids.keys())
    return found


def _chats(tokenizer: Any) -> list[str]:
    """Conversations of the letter a, as the chat template writes them, as far as it accepts them."""
    if not tokenizer.chat_template:
        return []
    from jinja2 import TemplateError

    texts = []
    for roles in CHATS:
        messages = [{"role": role, "content": "a"} for role in roles]
        for prompt in (False, True):
            with suppress(TemplateError, TypeError, ValueError):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                texts.append(text)
    return texts


def _check(keep: Sequence[Any], min_count: Any, max_tokens: Any) -> None:
    for name, number in (("min_count", min_count), ("max_tokens", 1 if max_tokens is None else max_tokens)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {number!r}.")
    wrong = [word for word in keep if not isinstance(word, str) or not word]
    if wrong:
        raise SettingError(f"keep must hold tokens or words, got {wrong[0]!r}.")


def _fast_tokenizer(processor: Any) -> Any:
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer is None:
        raise SettingError("The model has no tokenizer beside its files. Pass processor=.")
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} is no fast tokenizer, and its vocabulary can't be trimmed: it needs the "
            "library tokenizers behind it. Load it with AutoTokenizer."
        )
    return tokenizer


def _texts(corpus: Any) -> list[Any]:
    """All texts of the corpus: strings, or lists of words."""
    import datasets

    kinds = (str, Path, datasets.Dataset, datasets.DatasetDict, datasets.IterableDataset)
    if isinstance(corpus, kinds):
        dataset = read_dataset(corpus)
        try:
            columns = find_text_columns(dataset)
        except SettingError as error:
            reason = str(error).partition(" Name them")[0]
            raise SettingError(f"{reason} Keep only them: dataset.select_columns([…]).") from None
        texts = [text for column in columns for text in dataset.with_format(None)[column]]
    elif isinstance(corpus, Iterable):
        texts = list(corpus)
    else:
        raise SettingError(
            "corpus must be a datasets.Dataset, a Hub id, a folder or an iterable of strings, got "
            f"{type(corpus).__name__}."
        )
    if not texts:
        raise SettingError("The corpus is empty: it has no texts.")
    kind = type(texts[0]) if isinstance(texts[0], list) else str
    for row, text in enumerate(texts):
        if not isinstance(text, kind) or (kind is list and not all(isinstance(word, str) for word in text)):
            raise SettingError(f"Row {row} of the corpus must be text, got {text!r} ({type(text).__name__}).")
    return texts
