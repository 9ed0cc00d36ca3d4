"""The tables of a vocabulary: all of them lose the same rows, and what is not understood is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.vocabulary.embedding import check_tables, cut_rows, renumber, token_ids

KEPT = torch.tensor([0, 2, 3, 5, 9, 30, 51])
IDS = {int(old): new for new, old in enumerate(KEPT)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "roberta", "llama", "gpt2"])
def test_tables_lose_rows_and_are_tied_as_before(family, tied):
    task = "text-generation" if family in ("llama", "gpt2") else "fill-mask"
    model = tiny.model(family, task, tie_word_embeddings=tied)
    dense = copy.deepcopy(model)
    assert check_tables(model) == 52
    cut_rows(model, KEPT)
    renumber(model, 52, IDS)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert torch.equal(table.weight, dense.get_input_embeddings().weight[KEPT])
    assert torch.equal(head.weight, dense.get_output_embeddings().weight[KEPT])
    assert (head.weight is table.weight) == tied
    assert table.weight.requires_grad
    assert model.config.vocab_size == table.num_embeddings == head.out_features == 7
    assert all(52 not in parameter.shape for parameter in model.parameters())
    state = type(model)(model.config).state_dict()
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in state.items()}


def test_ids():
    model = tiny.model("llama")
    assert token_ids(model) == {0, 2, 3}
    model.generation_config.bad_words_ids = [[5, 9], [30]]
    model.generation_config.suppress_tokens = [1, 51]
    model.config.bos_token_id, model.config.eos_token_id = 1, [3, 900]
    assert token_ids(model) == {0, 1, 2, 3, 5, 9, 30, 51, 900}
    cut_rows(model, KEPT)
    renumber(model, 52, IDS)
    assert model.generation_config.bad_words_ids == [[3, 4], [5]]
    assert model.generation_config.suppress_tokens == [6]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, [2, 900])
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert model.model.vocab_size == model.vocab_size == 7


def test_sequences_of_ids_stay_whole():
    model = tiny.model("llama")
    model.generation_config.sequence_bias = {(5, 9): -1.0, (2,): 5.0, (7, 9): 2.0}
    model.generation_config.bad_words_ids = [[5, 7], [9, 30]]
    model.generation_config.force_words_ids = [[[5], [9, 51]]]
    assert token_ids(model) == {0, 2, 3, 5, 7, 9, 30, 51}
    cut_rows(model, KEPT)
    renumber(model, 52, IDS)
    assert model.generation_config.sequence_bias == {(3, 4): -1.0, (1,): 5.0}
    assert model.generation_config.bad_words_ids == [[4, 5]]  # without the lost 7 it would forbid 5 everywhere
    assert model.generation_config.force_words_ids == [[[3], [4, 6]]]
    pairs = tiny.model("llama")
    pairs.generation_config.sequence_bias = [[[5, 9], 2.0], [[7], 2.0]]
    renumber(pairs, 52, IDS)
    assert pairs.generation_config.sequence_bias == [[[3, 4], 2.0]]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_shared_tables_of_an_encoder_decoder(family, tmp_path):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_ffn_dim": 8}
    sizes |= {"encoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 1, "decoder_attention_heads": 2}
    sizes |= {"encoder_attention_heads": 2, "max_position_embeddings": 32, "forced_eos_token_id": 3}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    config = transformers.AutoConfig.for_model(family, vocab_size=52, **ids, **sizes)
    dense = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    model = copy.deepcopy(dense)
    assert check_tables(model) == 52
    cut_rows(model, KEPT)
    renumber(model, 52, IDS)
    model.save_pretrained(tmp_path)
    old, new = torch.tensor([[9, 30, 51, 3]]), torch.tensor([[4, 5, 6, 2]])
    expected = tiny.logits(dense, {"input_ids": old, "decoder_input_ids": old})[..., KEPT]
    for cut in (model, type(dense).from_pretrained(tmp_path)):
        assert torch.allclose(tiny.logits(cut, {"input_ids": new, "decoder_input_ids": new}), expected, atol=1e-5)
        assert {m.config.vocab_size for m in cut.modules() if hasattr(m, "config")} == {7}
        assert cut.generate(new, max_new_tokens=3).max() < 7


def test_models_that_do_not_fit():
    with pytest.raises(UnsupportedModelError, match="'vit' .* has no token embedding"):
        check_tables(tiny.model("vit"))
    twice = tiny.model("bert")
    twice.second = nn.Embedding(52, 4)
    with pytest.raises(UnsupportedModelError, match="second has 52 rows, as many as the token embedding"):
        check_tables(twice)
    folded = tiny.model("llama")
    folded.lm_head = nn.Sequential(folded.lm_head)
    with pytest.raises(UnsupportedModelError, match="or one of them is compressed"):
        check_tables(folded)
    parametrized = tiny.model("bert")
    nn.utils.parametrize.register_parametrization(parametrized.get_input_embeddings(), "weight", nn.Identity())
    with pytest.raises(UnsupportedModelError, match="or one of them is compressed"):
        check_tables(parametrized)
    clip = transformers.CLIPConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 52},
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32},
    )
    with pytest.raises(UnsupportedModelError, match="'clip' can't be trimmed, expected a plain text model"):
        check_tables(transformers.CLIPModel(clip))
    broken = tiny.model("bert")
    broken.get_input_embeddings().weight.data[9, 0] = float("nan")
    with pytest.raises(SettingError, match="The token embedding or the head of BertFor.* has NaN"):
        check_tables(broken)
