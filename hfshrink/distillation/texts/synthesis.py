"""Texts where there are none: sampled from a language model, or mutated from a few seeds."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hfshrink.distillation.checks import check_counts, check_number, check_texts
from hfshrink.distillation.teachers.alignment import check_finite
from hfshrink.distillation.texts.masked_words import (
    MaskedWords,
    find_slots,
    masked_ids,
    read_masked_words,
    replace_words,
    word_logits,
)
from hfshrink.distillation.texts.sampling import end_ids, sample
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.loading import infer_task, load
from hfshrink.modules import max_positions
from hfshrink.record import config_of
from hfshrink.terminal import progress

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PATIENCE = 20  # batches in a row without a new text before the search for more ends


def generate_texts(
    generator: Any,
    num_texts: int,
    tokenizer: Any = None,
    *,
    prompts: Sequence[str] = ("",),
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_p: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
) -> Dataset:
    """Sample different texts from a causal language model, for distillation without data.

    Each token is drawn from the smallest set of tokens whose probability exceeds `top_p` (nucleus sampling,
    arXiv:1904.09751) of softmax(logits / temperature). Text from another domain than the task's teaches less: take
    prompts that lead to the domain, filter with `filter_by_teacher`, and prefer real text without labels where there
    is some.

    Args:
        generator: A causal language model, folder or Hub id.
        num_texts: How many texts to return.
        tokenizer: Its tokenizer; None looks beside the model.
        prompts: What the texts continue, taken in turn; "" starts from nothing.
        max_new_tokens: Longest text in tokens.
        temperature: Above 0; above 1 the texts are more varied, below 1 more ordinary.
        top_p: In (0, 1]; 1 draws from all tokens.
        batch_size: Texts sampled at once; another number draws other texts.
        seed: Of the draws; the global random state stays as it was.

    Returns:
        The columns `text`, the continuation alone with runs of white space made one space, and `prompt`, a
        `ClassLabel` whose names are the prompts. No text is empty or there twice. There are fewer than `num_texts`
        (with a warning) where 20 batches in a row bring nothing new.

    Raises:
        SettingError: A number out of range, equal prompts, an input longer than the model can read, logits that are
            not finite, no tokenizer, or not a single text came out.
        UnsupportedModelError: It is no causal language model.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"<end>": 0, "good": 1, "bad": 2, "film": 3}, unk_token="<end>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        >>> sizes = {"vocab_size": 4, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 16}
        >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
        >>> generate_texts(model, 5, tokenizer, max_new_tokens=4).num_rows
        5
    """
    import datasets

    check_counts(num_texts=num_texts, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_number("temperature", temperature, "above 0", lambda value: value > 0)
    check_number("top_p", top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
    prompts = _checked_prompts(prompts)
    model, tokenizer = _causal_model(generator, tokenizer)
    starts = [_prompt_ids(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    settings = {"temperature": float(temperature), "top_p": float(top_p), "max_new_tokens": max_new_tokens}
    with _own_random_state(seed):
        stream = _sampled(model, tokenizer, starts, batch_size, settings)
        found = _take_new(stream, num_texts, set(), "generated texts")
    columns = {"text": [text for text, _ in found], "prompt": [number for _, number in found]}
    features = datasets.Features({"text": datasets.Value("string"), "prompt": datasets.ClassLabel(names=prompts)})
    return datasets.Dataset.from_dict(columns, features=features)


def mutate_texts(
    seeds: Sequence[str],
    masked_lm: Any,
    num_texts: int,
    tokenizer: Any = None,
    *,
    replace: float = 0.3,
    rounds: int = 3,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> Dataset:
    """Make many texts of a few: words are masked and drawn anew by a masked language model, round after round.

    In each of `rounds` rounds each word of one piece is masked with probability `replace` (one at least), and all
    masked ones are drawn from softmax(logits / temperature) over the whole words of the vocabulary, as when a masked
    language model is taken as a random field (arXiv:1902.04094). `augment`, in contrast, takes each word's few best
    candidates and makes one step from its original. A text keeps its number of words.

    Args:
        seeds: The texts to begin with, used equally often.
        masked_lm: A masked language model, folder or Hub id.
        num_texts: How many new texts to return.
        tokenizer: Its tokenizer (a fast one); None looks beside the model.
        replace: Probability that a word is masked in a round, in (0, 1].
        rounds: Rounds from the seed to the new text.
        temperature: Above 0; above 1 the words are more varied, below 1 more ordinary.
        batch_size: Texts per forward pass.
        seed: Of the draws; the global random state is not touched.

    Returns:
        The column `text`: no text twice, none of the seeds. There are fewer than `num_texts` (with a warning) where
        20 batches in a row bring nothing new.

    Raises:
        SettingError: A number out of range, an empty seed, seeds without a word that can be replaced.
        UnsupportedModelError: It is no masked language model.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"[?]": 0, "[MASK]": 1, "a": 2, "film": 3, "fish": 4}, "[?]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[?]", mask_token="[MASK]")
        >>> sizes = {"vocab_size": 5, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
        >>> model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=1))
        >>> mutate_texts(["a film!"], model, 2, tokenizer).num_rows
        2
    """
    import datasets

    check_counts(num_texts=num_texts, rounds=rounds, batch_size=batch_size)
    check_number("replace", replace, "above 0 and at most 1", lambda value: 0 < value <= 1)
    check_number("temperature", temperature, "above 0", lambda value: value > 0)
    seeds = _as_list(seeds, "seeds")
    check_texts(seeds, "seeds")
    words = read_masked_words(masked_lm, tokenizer)
    usable = [text for text, slots in zip(seeds, find_slots(words, seeds)[1], strict=True) if slots]
    if not usable:
        raise SettingError(
            f"None of the {len(seeds)} seeds has a word that is one piece of the tokenizer, such as {seeds[0][:60]!r}."
        )
    with eval_mode(words.model):
        stream = _mutated(words, usable, batch_size, rounds, _Draw(replace, float(temperature), seed))
        found = _take_new(stream, num_texts, set(seeds), "mutated texts")
    return datasets.Dataset.from_dict({"text": [text for text, _ in found]})


class _Draw:
    """How words are masked and drawn, with random generators of its own."""

    def __init__(self, replace: float, temperature: float, seed: int) -> None:
        self.replace, self.temperature = replace, temperature
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def pick(self, slots: Sequence[Any]) -> list[Any]:
        """Some of the slots, one at least."""
        return [slot for slot in slots if self.chance.random() < self.replace] or [self.chance.choice(slots)]

    def words(self, logits: Tensor) -> list[int]:
        """A word number per row of (places, words)."""
        probabilities = (logits.double() / self.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).flatten().tolist()


def _mutated(
    words: MaskedWords, seeds: Sequence[str], batch_size: int, rounds: int, draw: _Draw
) -> Iterator[list[tuple[str, int]]]:
    """Batches of (new text, number of its seed), without end."""
    first = 0
    while True:
        numbers = [(first + step) % len(seeds) for step in range(batch_size)]
        first = (first + batch_size) % len(seeds)
        texts = [seeds[number] for number in numbers]
        for _ in range(rounds):
            texts = _mutate_once(words, texts, draw)
        yield list(zip(texts, numbers, strict=True))


def _mutate_once(words: MaskedWords, texts: Sequence[str], draw: _Draw) -> list[str]:
    ids, slots = find_slots(words, texts)
    picked = [draw.pick(row) if row else [] for row in slots]  # a drawn word may be of several pieces when read again
    places = [(row, slot.position) for row, chosen in enumerate(picked) for slot in chosen]
    if not places:
        return list(texts)
    logits = word_logits(words, [masked_ids(words, row, some) for row, some in zip(ids, picked, strict=True)], places)
    drawn = iter(draw.words(logits))
    return [
        replace_words(text, [(slot, words.words[next(drawn)]) for slot in chosen])
        for text, chosen in zip(texts, picked, strict=True)
    ]


def _sampled(
    model: Any, tokenizer: Any, starts: Sequence[list[int]], batch_size: int, settings: dict[str, Any]
) -> Iterator[list[tuple[str, int]]]:
    """Batches of (text, number of its prompt), without end."""
    ends, first = end_ids(model, tokenizer), 0
    while True:
        numbers = [(first + step) % len(starts) for step in range(batch_size)]
        first = (first + batch_size) % len(starts)
        made = sample(model, [starts[number] for number in numbers], ends=ends, **settings)
        texts = tokenizer.batch_decode([row.tolist() for row in made], skip_special_tokens=True)
        yield [(" ".join(text.replace("\ufffd", "").split()), n) for text, n in zip(texts, numbers, strict=True)]


def _take_new(
    stream: Iterator[list[tuple[str, int]]], num_texts: int, known: set[str], description: str
) -> list[tuple[str, int]]:
    """The first `num_texts` texts of a stream of batches that are neither empty nor known nor repeated."""

    def new() -> Iterator[tuple[str, int]]:
        fruitless = 0
        for batch in stream:
            fruitless += 1
            for text, number in batch:
                if text and text not in known:
                    known.add(text)
                    fruitless = 0
                    yield text, number
            if fruitless == PATIENCE:
                return

    found = list(progress(islice(new(), num_texts), description, total=num_texts))
    if not found:
        raise SettingError(
            f"{PATIENCE} batches brought no new text, only empty or repeated ones. Raise the temperature or the "
            "length, or give more prompts or seeds."
        )
    if len(found) < num_texts:
        logger.warning("Found %d different texts, not %d: the model repeats itself.", len(found), num_texts)
    return found


@contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    """`generate` draws from the global generators: seeded inside, put back outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _as_list(values: Any, name: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise SettingError(f"{name} must be a list of texts, one at least, got {str(values)[:60]!r}.")
    return list(values)


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    prompts = _as_list(prompts, "prompts")
    if not all(isinstance(prompt, str) for prompt in prompts) or len(set(prompts)) < len(prompts):
        raise SettingError(f"prompts must be different texts, got {str(prompts)[:200]}.")
    return prompts


def _causal_model(generator: Any, tokenizer: Any) -> tuple[Any, Any]:
    model, found = load(generator)
    if infer_task(model) != "text-generation" or not hasattr(model, "generate"):
        raise UnsupportedModelError(
            f"Expected a causal language model (text-generation), got {type(model).__name__} for {infer_task(model)}."
        )
    tokenizer = tokenizer or found
    if tokenizer is None:
        raise SettingError("There is no tokenizer beside the language model. Pass tokenizer=.")
    return model, tokenizer


def _prompt_ids(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """Token ids to go on from: the prompt's without an end token, or a begin token for an empty one."""
    config, ends = config_of(model).get_text_config(), end_ids(model, tokenizer)
    if prompt:
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] in ends:  # some tokenizers close each text
            ids.pop()
    else:
        ids = [n for n in (tokenizer.bos_token_id, config.bos_token_id, tokenizer.eos_token_id) if n is not None][:1]
    if not ids:
        raise SettingError(f"The prompt {prompt!r} has no tokens to begin with. Give a prompt with a word in it.")
    limit = max_positions(model) or getattr(config, "max_position_embeddings", None)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise SettingError(
            f"The prompt {prompt[:40]!r} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}, but the model "
            f"reads at most {limit}."
        )
    if max(ids) >= config.vocab_size:
        raise SettingError(
            f"The tokenizer made the id {max(ids)}, but the model has {config.vocab_size} tokens: they are not a pair."
        )
    with eval_mode(model), torch.inference_mode():
        check_finite(model(torch.tensor([ids], device=model.device)).logits, "The language model's logits")
    return ids
