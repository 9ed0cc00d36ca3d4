"""A smaller vocabulary: the corpus has the same tokens and the same logits, and both survive being saved."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import datasets
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
from hfshrink import load, report
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.vocabulary.trimming import trim_vocabulary

TRAINING = [
    "the quick brown fox jumps over the lazy dog",
    "she sells sea shells by the sea shore",
    "a naïve café owner sold seventeen quixotic jukeboxes",
    "lower lowest slower slowest newer newest wider widest",
    "thinking, singing and ringing: nothing but long evenings!",
    "the shores and the shells of seventeen seas",
]
CORPUS = ["the lowest shore", "singing by the sea, slower", "a fox sold the dog"]
OTHERS = ["quixotic evenings café!", "jukeboxes brown", "zzz naïve widest"]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def wrapped(backend: Tokenizer, special: Sequence[str] = SPECIAL, **keywords: Any) -> PreTrainedTokenizerFast:
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    roles = dict(zip(names, special, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=30, **roles, **keywords)


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT's own class, which builds its backend anew from the vocabulary when it is loaded."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        TRAINING, trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    )
    return transformers.BertTokenizer(vocab=backend.get_vocab(), model_max_length=30)


def byte_pairs() -> PreTrainedTokenizerFast:
    """Byte-level, with an added token, a chat template and a post-processor of RoBERTa's kind."""
    special = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    backend.add_tokens([AddedToken("<|tool|>", normalized=False)])
    backend.post_processor = processors.RobertaProcessing(("</s>", 3), ("<s>", 2))
    return wrapped(
        backend,
        special,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}the {{ m['role'] }} newest: {{ m['content'] }}{% endfor %}",
    )


def fallback_pairs() -> PreTrainedTokenizerFast:
    """Sentencepiece-like byte-pair encoding, with bytes for what it does not know."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are no special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigrams() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=list(SPECIAL), unk_token="[UNK]", show_progress=False
    )
    backend.train_from_iterator(TRAINING, trainer)
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    template = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=None, special_tokens=ends)
    backend.post_processor = processors.Sequence([template])
    return wrapped(backend)


def ending_pairs() -> PreTrainedTokenizerFast:
    """Byte-pair encoding that marks the end of a word, as CLIP's does."""
    backend = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=150, special_tokens=list(SPECIAL), end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(TRAINING, trainer)
    return wrapped(backend)


def pairs_of(backend: PreTrainedTokenizerFast) -> dict[str, Any]:
    model = json.loads(backend.backend_tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def roberta() -> PreTrainedTokenizerFast:
    return transformers.RobertaTokenizer(**pairs_of(byte_pairs()))


def llama() -> PreTrainedTokenizerFast:
    return transformers.LlamaTokenizer(**pairs_of(fallback_pairs()))


def t5() -> PreTrainedTokenizerFast:
    pieces = json.loads(unigrams().backend_tokenizer.to_str())["model"]["vocab"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return transformers.T5Tokenizer(vocab=special + [tuple(p) for p in pieces if p[0] not in SPECIAL], extra_ids=3)


KINDS = {f.__name__: f for f in (word_pieces, byte_pairs, fallback_pairs, unigrams, ending_pairs, roberta, llama, t5)}
FAMILIES = {
    "bert": "fill-mask",
    "roberta": "text-classification",
    "distilbert": "fill-mask",
    "electra": "fill-mask",
    "llama": "text-generation",
    "gpt2": "text-generation",
}


def network(tokenizer: Any, family: str = "bert", task: str | None = None, **config: Any) -> Any:
    ids = {
        f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
        for role in ("pad", "bos", "eos")
        if getattr(tokenizer, f"{role}_token", None) is not None
    }
    return tiny.model(family, task, **{"vocab_size": len(tokenizer), **ids, **config})


def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.base_model(input_ids=batch["input_ids"])[0]


def tokens(tokenizer: Any, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_the_corpus_have_the_same_tokens(kind, tmp_path):
    old = KINDS[kind]()
    before = old.backend_tokenizer.to_str()
    model, new = trim_vocabulary(network(old), CORPUS, old)
    assert old.backend_tokenizer.to_str() == before
    assert len(new) == model.config.vocab_size == len(model.bert.embeddings.word_embeddings.weight) < len(old)
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    new.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(reloaded) is type(old)
    for text in CORPUS:
        assert tokens(old, text) == tokens(new, text) == tokens(reloaded, text)
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    assert (new.special_tokens_map, new.model_max_length, new.padding_side, new.model_input_names) == (
        old.special_tokens_map,
        old.model_max_length,
        old.padding_side,
        old.model_input_names,
    )
    assert reloaded.special_tokens_map == old.special_tokens_map


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_still_read(kind):
    """No unknown token where there was none: single characters or bytes stay."""
    old = KINDS[kind]()
    _, new = trim_vocabulary(network(old), CORPUS, old)
    for text in (*TRAINING, *OTHERS):
        known = tokens(old, text).count(old.unk_token) == 0
        assert not known or old.unk_token not in tokens(new, text)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_the_corpus_needs_all(kind):
    old = KINDS[kind]()
    model, new = trim_vocabulary(network(old), CORPUS, old, keep=list(old.get_vocab()))
    assert new.get_vocab() == old.get_vocab()
    assert report(model).steps[-1].results["vocabulary_before"] == len(old)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal(family, tied, tmp_path):
    old = byte_pairs()
    dense = network(old, family, FAMILIES[family], tie_word_embeddings=tied)
    model, new = trim_vocabulary(copy.deepcopy(dense), CORPUS, old)
    model.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    reloaded, loaded_tokenizer = load(tmp_path)
    assert report(reloaded).steps[-1].technique == "trim_vocabulary"
    assert loaded_tokenizer.get_vocab() == new.get_vocab()
    kept = torch.tensor([old.get_vocab()[piece] for piece in sorted(new.get_vocab(), key=new.get_vocab().get)])
    is_tied = dense.get_output_embeddings() is not None and tied
    for text in CORPUS:
        batch = {"input_ids": new(text, return_tensors="pt")["input_ids"]}
        expected = tiny.logits(dense, {"input_ids": old(text, return_tensors="pt")["input_ids"]})
        expected = expected[..., kept] if FAMILIES[family] != "text-classification" else expected
        assert torch.equal(hidden(model, batch), hidden(dense, old(text, return_tensors="pt")))
        # the head's product has fewer columns, and blocks of another size round otherwise in the last bit
        assert torch.allclose(tiny.logits(model, batch), expected, atol=1e-6)
        assert torch.equal(tiny.logits(reloaded, batch), tiny.logits(model, batch))
    for trimmed in (model, reloaded):
        head = trimmed.get_output_embeddings()
        assert (head is not None and head.weight is trimmed.get_input_embeddings().weight) == is_tied
        assert head is None or head.out_features == len(new)


def test_ids_in_configs_follow():
    old = byte_pairs()
    model = network(old, "llama")
    far = len(old) - 1  # <|tool|>, an added token
    model.generation_config.eos_token_id = [3, far]
    model.generation_config.suppress_tokens = [old.get_vocab()["Ġthe"], old.get_vocab()["Ġquick"]]
    model.config.eos_token_id = far
    model, new = trim_vocabulary(model, CORPUS, old)
    assert new.get_vocab()["<|tool|>"] == len(new) - 1 < far
    assert model.generation_config.eos_token_id == [3, len(new) - 1]
    assert model.generation_config.suppress_tokens == [new.get_vocab()["Ġthe"], new.get_vocab()["Ġquick"]]
    assert model.config.eos_token_id == len(new) - 1
    made = model.generate(**new("the sea", return_tensors="pt"), max_new_tokens=4)
    assert int(made.max()) < len(new)


def test_the_padding_id_moves_along():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "[UNK]": 3, "[PAD]": 4}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_padding(pad_id=4, pad_token="[PAD]")
    old = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    model, new = trim_vocabulary(network(old), ["b", "b b"], old)
    assert new.get_vocab() == {"b": 0, "[UNK]": 1, "[PAD]": 2}
    assert model.config.pad_token_id == model.bert.embeddings.word_embeddings.padding_idx == new.pad_token_id == 2
    assert new(["b", "b b"], padding=True)["input_ids"] == [[0, 2], [0, 0]]
    # RoBERTa's positions start behind the padding id: all that lies before it stays
    model, new = trim_vocabulary(network(old, "roberta"), ["b"], old)
    assert new.pad_token_id == 4


def test_rows_without_a_token_go():
    old = word_pieces()
    model, new = trim_vocabulary(network(old, vocab_size=len(old) + 7), TRAINING, old)
    assert len(model.bert.embeddings.word_embeddings.weight) == len(new) <= len(old)


def test_counts_and_limits():
    old = byte_pairs()
    model, new = trim_vocabulary(network(old), [" sea sea shore"], old, min_count=2)
    assert "Ġsea" in new.get_vocab()
    assert "Ġshore" not in new.get_vocab()
    step = report(model).steps[-1]
    assert step.results["covered_share"] < 1
    assert step.after.parameters == step.before.parameters - 16 * (len(old) - len(new))
    assert step.modules == ["bert.embeddings.word_embeddings"]
    least = len(trim_vocabulary(network(old), ["a"], old, min_count=9)[1])
    _, limited = trim_vocabulary(network(old), CORPUS, old, max_tokens=least + 5)
    assert least < len(limited) <= least + 5
    with pytest.raises(SettingError, match=f"max_tokens must be at least {least} for this tokenizer, got 20"):
        trim_vocabulary(network(old), CORPUS, old, max_tokens=20)


def test_words_to_keep_and_the_chat_template():
    old = byte_pairs()
    _, new = trim_vocabulary(network(old), ["a"], old, keep=["seventeen"])
    assert tokens(new, "the seventeen") == tokens(old, "the seventeen")
    chat = [{"role": "user", "content": "a"}]
    assert "Ġnewest" in tokens(new, new.apply_chat_template(chat, tokenize=False))
    with pytest.raises(SettingError, match="keep has '雨', which the tokenizer does not know"):
        trim_vocabulary(network(tiny.tokenizer()), ["the dog"], tiny.tokenizer(), keep="雨")


def test_every_form_of_corpus(tmp_path):
    old = tiny.tokenizer()
    texts = ["the dog is good", "a cat reads"]
    rows = datasets.Dataset.from_dict({"text": texts, "label": [0, 1]})
    rows.save_to_disk(tmp_path)
    words = datasets.Dataset.from_dict({"tokens": [text.split() for text in texts]})
    expected = trim_vocabulary(network(old), texts, old)[1].get_vocab()
    assert set(expected) == {*tiny.SPECIAL, *" ".join(texts).split()}
    for corpus in (rows, str(tmp_path), words, (text for text in texts)):
        model, new = trim_vocabulary(network(old), corpus, old)
        assert new.get_vocab() == expected
    assert report(model).steps[-1].settings["corpus"] == "generator"


def test_folders_and_the_old_tokenizer_is_forgotten(tmp_path):
    old = word_pieces()
    network(old, "bert", "text-classification").save_pretrained(tmp_path / "base")
    old.save_pretrained(tmp_path / "base")
    model, new = trim_vocabulary(tmp_path / "base", CORPUS)
    assert load(model)[1] is None
    assert report(model).base_model == "base"
    assert len(new) < len(old)


def test_bad_input():
    old = word_pieces()
    for corpus, keywords, match in (
        ([], {}, "The corpus is empty: it has no texts"),
        ([""], {}, "The corpus is empty: its texts have no tokens"),
        (["a", float("nan")], {}, r"Row 1 of the corpus must be text, got nan \(float\)"),
        ([["a"], ["b", None]], {}, "Row 1 of the corpus must be text"),
        (7, {}, "corpus must be a datasets.Dataset, .* iterable of strings, got int"),
        (datasets.Dataset.from_dict({"x": [1]}), {}, r"Found 0 columns of text .* dataset.select_columns"),
        (CORPUS, {"min_count": 0}, "min_count must be a whole number from 1 on, got 0"),
        (CORPUS, {"max_tokens": True}, "max_tokens must be a whole number from 1 on, got True"),
        (CORPUS, {"keep": [3]}, "keep must hold tokens or words, got 3"),
    ):
        with pytest.raises(SettingError, match=match):
            trim_vocabulary(network(old), corpus, old, **keywords)


def test_tokenizers_that_do_not_fit():
    old = word_pieces()
    with pytest.raises(SettingError, match="The model has no tokenizer beside its files. Pass processor="):
        trim_vocabulary(network(old), CORPUS)
    with pytest.raises(UnsupportedModelError, match="ByT5Tokenizer is no fast tokenizer"):
        trim_vocabulary(network(old), CORPUS, transformers.ByT5Tokenizer())
    with pytest.raises(SettingError, match=f"ids up to {len(old) - 1}, the model's embedding 52 rows"):
        trim_vocabulary(tiny.model("bert"), CORPUS, old)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "[UNK]")))
    with pytest.raises(SettingError, match="knows whole words and no unknown token"):
        trim_vocabulary(tiny.model("bert"), ["a"], words)
