"""Whole passes of encoder-decoders and of layers that share their weights, against rows that have no padding."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hfshrink.calibration import collect
from hfshrink.labels import IGNORED
from hfshrink.layerwise import walk
from hfshrink.modules import select_modules

SIZES = {"vocab_size": 20, "d_model": 8, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
BART = {"encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
T5 = {"d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}


def pair(family: str):
    torch.manual_seed(0)
    if family == "t5":
        return T5ForConditionalGeneration(T5Config(**SIZES, **T5)).eval()
    sizes = {"encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16, "bos_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**SIZES, **BART, **sizes, forced_eos_token_id=None)).eval()


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("width", [4, 6])  # of the targets; sources are 6 wide
def test_padding_of_sources_and_targets_does_not_count(family: str, width: int) -> None:
    network = pair(family)
    sources, targets = torch.randint(3, 20, (3, 6)), torch.randint(3, 20, (3, width))
    long, wide = torch.tensor([6, 3, 2]), torch.tensor([width, 2, 1])
    mask = (torch.arange(6) < long[:, None]).long()
    labels = targets.masked_fill(torch.arange(width) >= wide[:, None], IGNORED)
    padded = [{"input_ids": sources * mask, "attention_mask": mask, "labels": labels}]
    rows = [{"input_ids": sources[i : i + 1, : long[i]], "labels": targets[i : i + 1, : wide[i]]} for i in range(3)]
    modules = select_modules(network)
    with torch.no_grad():
        [found] = walk(network, modules, "input_gram", padded, sampled=True)
        [plain] = walk(network, modules, "input_gram", rows)
    for name, stats in found.items():
        *_, part, last = ("", *name.split("."))
        is_cross = part in {"EncDecAttention", "encoder_attn"} and last in {"k", "v", "k_proj", "v_proj"}
        is_source = "encoder." in name or is_cross
        assert stats.tokens == plain[name].tokens == int((long if is_source else wide).sum()), name
        torch.testing.assert_close(stats.input_gram, plain[name].input_gram, rtol=1e-4, atol=1e-4)


def test_a_layer_that_runs_many_times_counts_each_time() -> None:
    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    network = AlbertModel(AlbertConfig(vocab_size=20, num_hidden_layers=3, **sizes)).eval()
    modules = select_modules(network)
    batches = [{"input_ids": torch.randint(3, 20, (3, 6))} for _ in range(2)]
    with torch.no_grad(), collect(network, "input_gram") as whole:
        for batch in batches:
            network(**batch)
    with torch.no_grad():
        [found] = walk(network, modules, "input_gram", batches)
    for name, stats in found.items():
        assert stats.tokens == whole[name].tokens == (3 * 36 if "layer_groups" in name else stats.tokens)
        torch.testing.assert_close(stats.input_gram, whole[name].input_gram, rtol=1e-5, atol=1e-5)
