"""On-policy distillation: the student writes the continuations that the teacher then corrects."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.checks import check_counts, check_number
from hfshrink.distillation.texts.sampling import end_ids, sample
from hfshrink.errors import SettingError
from hfshrink.labels import IGNORED
from hfshrink.modules import max_positions

STALE = ("teacher_logits", "teacher_ids", "teacher_probabilities", "position_ids", "cu_seq_lens_q", "seq_idx")
"""Columns that belong to the rows as they were: cached answers, and the marks of packed rows."""


@dataclass(frozen=True)
class OnPolicy:
    """How often and how the student continues the prompts by itself (GKD, arXiv:2306.13649).

    A teacher-forced student never sees its own mistakes in training, but has to go on from them later. Here it does.
    No gradient flows through the sampling.

    Attributes:
        share: Share of the training steps, in [0, 1], that use the student's own continuations.
        max_new_tokens: Longest continuation, in tokens.
        temperature: Of the sampling; 0 takes the likeliest token each time.

    Example:
        >>> OnPolicy(share=1.0).temperature
        0.9
    """

    share: float = 0.5
    max_new_tokens: int = 128
    temperature: float = 0.9

    def __post_init__(self) -> None:
        check_number("share", self.share, "in [0, 1]", lambda value: 0 <= value <= 1)
        check_number("temperature", self.temperature, "of at least 0", lambda value: value >= 0)
        check_counts(max_new_tokens=self.max_new_tokens)


def is_on_policy_step(step: int, share: float, seed: int = 0) -> bool:
    """Whether a step uses the student's own continuations: a coin that falls alike on all processes and in a resume.

    Args:
        step: Number of the step or batch, the same on every process.
        share: Chance, in [0, 1].
        seed: Of the run.

    Example:
        >>> [is_on_policy_step(step, 0.5) for step in range(4)]
        [False, True, True, True]
        >>> is_on_policy_step(7, 1.0), is_on_policy_step(7, 0.0)
        (True, False)
    """
    return random.Random(f"{seed}:{step}").random() < share  # a string seed is hashed alike on every machine


def generate_batch(
    model: Any, inputs: dict[str, Any], settings: OnPolicy, tokenizer: Any = None, seed: int | None = None
) -> dict[str, Tensor]:
    """The batch with the student's own continuations in place of the given ones.

    A row's prompt is what stands before its first label that counts; where the labels start at once, the first
    half of the row. The student samples from its plain distribution, whatever its generation config says.

    Args:
        model: The student, a decoder-only language model, not wrapped. Its training flags stay as they are.
        inputs: A batch: `input_ids`, and where there are any `attention_mask` and `labels`, each (batch, sequence).
        settings: How to sample.
        tokenizer: Gives the end-of-text id beside those of the model.
        seed: Of the sampling, to be different on every process; None goes on with the global random state.

    Returns:
        `input_ids`, `attention_mask` and `labels` of shape (batch, longest row), padded on the right. Labels are the
        continuation, the end-of-text token with it; -100 elsewhere.

    Raises:
        SettingError: Cached teacher outputs or packed rows in the batch, a row without tokens, or a prompt that
            leaves no room in the model's positions.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None)
        >>> rows = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "labels": torch.tensor([[-100, 4, 5, 6]])}
        >>> made = generate_batch(GPT2LMHeadModel(config), rows, OnPolicy(max_new_tokens=5), seed=0)
        >>> made["input_ids"].shape, made["labels"][0, 0].item()
        (torch.Size([1, 6]), -100)
    """
    stale = [name for name in STALE if inputs.get(name) is not None]
    if stale:
        raise SettingError(
            f"The batch holds {', '.join(stale)}, which belongs to its rows as they were and not to what the student "
            "writes. On-policy distillation needs rows that are not packed, and a teacher that runs."
        )
    prompts = _prompts(inputs)
    longest = max(map(len, prompts))
    limit = max_positions(model)
    room = settings.max_new_tokens if limit is None else min(settings.max_new_tokens, limit - longest)
    if room < 1:
        raise SettingError(
            f"The longest prompt has {longest} tokens, and the student reads at most {limit}: nothing can follow. "
            "Shorten the prompts."
        )
    ends, device = end_ids(model, tokenizer), model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        starts = [prompt.tolist() for prompt in prompts]
        made = sample(model, starts, max_new_tokens=room, temperature=settings.temperature, ends=ends)
    return _as_batch(prompts, made, inputs["input_ids"])


def _prompts(inputs: dict[str, Any]) -> list[Tensor]:
    ids, labels = inputs["input_ids"], inputs.get("labels")
    mask = inputs.get("attention_mask")
    prompts = []
    for row in range(len(ids)):
        real = torch.ones_like(ids[row], dtype=torch.bool) if mask is None else mask[row].bool()
        tokens = ids[row][real]
        counted = torch.ones_like(real) if labels is None else labels[row] != IGNORED
        starts = counted[real].nonzero()
        if not len(tokens):
            raise SettingError(f"Row {row} of the batch has no tokens, so there is nothing to continue.")
        first = int(starts[0]) if len(starts) else len(tokens)  # without labels the row is all prompt
        prompts.append(tokens[: first or max(1, len(tokens) // 2)])
    return prompts


def _as_batch(prompts: list[Tensor], continued: list[Tensor], like: Tensor) -> dict[str, Tensor]:
    width = max(len(prompt) + len(rest) for prompt, rest in zip(prompts, continued, strict=True))
    ids = like.new_zeros(len(prompts), width)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, (prompt, rest) in enumerate(zip(prompts, continued, strict=True)):
        start, end = len(prompt), len(prompt) + len(rest)
        ids[row, :start], ids[row, start:end] = prompt, rest
        labels[row, start:end], mask[row, :end] = rest, 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
