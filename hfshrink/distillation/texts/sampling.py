"""What a causal language model writes by itself after some prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hfshrink.inputs import eval_mode


def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    ends: Sequence[int] = (),
) -> list[Tensor]:
    """Continuations drawn from softmax(logits / temperature), whatever the model's own generation config says.

    Draws come from the global random state. There are no gradients, and the model's training flags stay.

    Args:
        model: A decoder-only language model, not wrapped.
        prompts: Token ids, one at least in each.
        max_new_tokens: Longest continuation.
        temperature: 0 takes the likeliest token each time.
        top_p: Draws from the smallest set of tokens whose probability exceeds this; 1 draws from all.
        ends: Ids that end a text.

    Returns:
        For each prompt its new tokens, int64 on the model's device, the end with them where it was reached.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None)
        >>> [row.shape for row in sample(GPT2LMHeadModel(config), [[3], [4, 5]], max_new_tokens=5, temperature=1.0)]
        [torch.Size([5]), torch.Size([5])]
    """
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: every continuation starts at the same place
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    asked = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,  # else transformers takes 50
        top_p=top_p,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )
    own, model.generation_config = model.generation_config, GenerationConfig()  # generate fills gaps from it
    try:
        with torch.no_grad(), eval_mode(model):
            made = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=asked)
    finally:
        model.generation_config = own
    return [_until_end(row, ends) for row in made[:, longest:]]


def end_ids(model: Any, tokenizer: Any = None) -> list[int]:
    """The ids that end a text, by the model's two configs and the tokenizer."""
    configs = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
    found = [getattr(config, "eos_token_id", None) for config in configs]
    return sorted(
        {int(end) for ends in found if ends is not None for end in (ends if isinstance(ends, list) else [ends])}
    )


def _until_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device)).nonzero()
    return tokens[: int(stops[0]) + 1] if len(stops) else tokens
