"""Tiny seeded models, a tokenizer and inputs, made from configs without the network."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from hfshrink.loading import TASKS

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    *("a", "and", "bad", "bird", "blue", "book", "boring", "brave", "bright", "cat", "cold", "dark", "dog", "dull"),
    *("eats", "film", "fine", "fish", "good", "great", "green", "happy", "is", "likes", "long", "movie", "new", "no"),
    *("not", "old", "or", "plot", "poor", "reads", "red", "sad", "short", "sings", "slow", "small", "story", "sun"),
    *("the", "very", "warm", "was", "weak"),
)
VOCABULARY = len(SPECIAL) + len(WORDS)

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 34,
    "pad_token_id": 0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "electra": {**ENCODER, "embedding_size": 8},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 24,
        "max_position_embeddings": 34,
        "pad_token_id": 0,
    },
    "llama": {
        **ENCODER,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 34,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "vit": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "image_size": 8,
        "patch_size": 4,
    },
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
}
TASK = {
    **dict.fromkeys(("bert", "roberta", "electra", "distilbert"), "text-classification"),
    **dict.fromkeys(("llama", "gpt2"), "text-generation"),
    **dict.fromkeys(("vit", "resnet"), "image-classification"),
}
"""family -> the task that `model` gives it where none is asked for."""


def model(family: str, task: str | None = None, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A tiny model in eval mode, such as `model("bert", "text-classification", num_labels=3)`.

    Args:
        family: A key of `CONFIGS`.
        task: A key of `hfshrink.loading.TASKS`; "sequence-classification" means text-classification.
        seed: Of the random weights; the global generator is left as it was.
        **config: Entries of the config that differ from `CONFIGS`.
    """
    task = {None: TASK[family], "sequence-classification": "text-classification"}.get(task, task)
    settings = {**CONFIGS[family], **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = getattr(transformers, TASKS[str(task)][0]).from_config(AutoConfig.for_model(family, **settings))
        for parameter in made.parameters():  # biases and norms start at 0 and 1, which hides mistakes
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            elif parameter.ndim == 2:
                parameter.data *= 4
    return made.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, `[CLS] a [SEP] b [SEP]` for pairs, at most 32 tokens."""
    ids = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def inputs(family: str, *, batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images (batch, 3, 8, 8), or token ids (batch, length) whose rows end in 0, 1, 2, … padded positions."""
    generator = torch.Generator().manual_seed(seed)
    if TASK[family] == "image-classification":
        return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
    ids = torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=generator)
    mask = (torch.arange(length) < length - torch.arange(batch)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(network: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a batch, without gradients."""
    with torch.no_grad():
        return network(**batch).logits
