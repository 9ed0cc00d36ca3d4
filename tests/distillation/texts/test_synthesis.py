"""Made texts follow the model's distribution, are different, and the same for the same seed."""

import pytest
import torch
from datasets import ClassLabel

import tiny
from hfshrink.distillation.texts import synthesis
from hfshrink.distillation.texts.synthesis import generate_texts, mutate_texts
from hfshrink.errors import SettingError, UnsupportedModelError

SEEDS = ["the cat eats a fish", "a very long, boring movie!"]

OWN_SETTINGS = [
    {"min_p": 0.9},
    {"typical_p": 0.1},
    {"suppress_tokens": list(range(5, 30))},
    {"num_return_sequences": 2},
    {"return_dict_in_generate": True},
    {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
    {"stop_strings": ["a"]},
    {"num_beams": 2},
    {"max_length": 3},
]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(synthesis, "PATIENCE", 3)


def causal(family="llama", **settings):
    return tiny.model(family, **settings)


def favouring(biases):
    """A masked language model whose logits are these numbers for these words and very low for all others."""
    model, vocabulary = tiny.model("bert", "fill-mask"), tiny.tokenizer().get_vocab()
    with torch.no_grad():
        model.cls.predictions.transform.LayerNorm.weight.zero_()
        model.cls.predictions.transform.LayerNorm.bias.zero_()  # the hidden state is 0: logits are the bias
        model.cls.predictions.bias.fill_(-1e4)
        for word, bias in biases.items():
            model.cls.predictions.bias[vocabulary[word]] = bias
    return model


def greedy(model, start, steps):
    ids = list(start)
    for _ in range(steps):
        ids.append(int(tiny.logits(model, {"input_ids": torch.tensor([ids])})[0, -1].argmax()))
        if ids[-1] == model.config.eos_token_id:
            break
    return tiny.tokenizer().decode(ids[len(start) :], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cold_texts_are_the_greedy_ones(family, caplog):
    model, tokenizer = causal(family), tiny.tokenizer()
    prompts = ["", "the cat", "a very long boring movie"]  # of different lengths: padded on the left
    starts = [[2], *(tokenizer(prompt)["input_ids"][:-1] for prompt in prompts[1:])]  # 2 begins, the end token goes
    found = generate_texts(model, 9, tokenizer, prompts=prompts, max_new_tokens=6, temperature=1e-4, batch_size=2)
    expected = {
        greedy(model, start, 6): prompt for start, prompt in zip(reversed(starts), reversed(prompts), strict=True)
    }
    names = found.features["prompt"].int2str(found["prompt"][:])
    assert dict(zip(found["text"], names, strict=True)) == expected
    assert f"Found {len(expected)} different texts, not 9" in caplog.text


def test_texts_are_different_clean_and_as_many_as_asked():
    found = generate_texts(causal(), 50, tiny.tokenizer(), prompts=["the cat", "no"], max_new_tokens=5)
    texts = found["text"][:]
    assert len(texts) == len(set(texts)) == 50
    assert found.features["prompt"] == ClassLabel(names=["the cat", "no"])
    assert set(found["prompt"]) == {0, 1}
    assert all(text and not set(text.split()) & set(tiny.SPECIAL) for text in texts)
    assert max(len(text.split()) for text in texts) <= 5


def test_tokens_follow_the_models_distribution():
    model, vocabulary = causal(), tiny.tokenizer().get_vocab()
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all tokens alike
    texts = generate_texts(model, 300, tiny.tokenizer(), prompts=["the"], max_new_tokens=8, top_p=1.0, batch_size=64)
    counts = torch.zeros(tiny.VOCABULARY)
    for text in texts["text"]:
        for word in text.split():
            counts[vocabulary[word]] += 1
    shares = counts[len(tiny.SPECIAL) :] / counts.sum()
    assert shares.max() < 2 / len(tiny.WORDS)
    assert shares.min() > 0.5 / len(tiny.WORDS)


def test_the_same_seed_gives_the_same_texts_and_leaves_the_random_state():
    before = torch.random.get_rng_state()
    first, again, other = (
        generate_texts(causal(), 5, tiny.tokenizer(), max_new_tokens=5, seed=seed)["text"][:] for seed in (3, 3, 4)
    )
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_model_and_its_settings_stay_as_they_were():
    model = causal().train()
    before = model.generation_config.to_dict()
    generate_texts(model, 2, tiny.tokenizer(), max_new_tokens=3)
    assert all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("settings", OWN_SETTINGS, ids=str)
def test_the_models_own_generation_settings_change_nothing(settings):
    model = causal()
    expected = generate_texts(model, 6, tiny.tokenizer(), max_new_tokens=5)["text"][:]
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert generate_texts(model, 6, tiny.tokenizer(), max_new_tokens=5)["text"][:] == expected
    assert model.generation_config is own


def test_patience_counts_batches_without_a_new_text(monkeypatch):
    asked = []
    monkeypatch.setattr(synthesis, "sample", lambda *_, **__: [asked.append(0), torch.tensor([7, 8])][1:])
    found = generate_texts(causal(), 5, tiny.tokenizer(), max_new_tokens=2, batch_size=1)
    assert len(found) == 1
    assert len(asked) == 1 + synthesis.PATIENCE


def test_a_folder_generates(tmp_path):
    causal().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(generate_texts(tmp_path, 3, max_new_tokens=4)) == 3


def test_a_model_that_says_nothing_is_an_error():
    model = causal()
    model.lm_head.bias = torch.nn.Parameter(1e4 * torch.eye(tiny.VOCABULARY)[model.config.eos_token_id])
    with pytest.raises(SettingError, match="3 batches brought no new text"):
        generate_texts(model, 3, tiny.tokenizer(), batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_texts": 0}, "num_texts must be a whole number from 1 on, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"batch_size": True}, "batch_size must be"),
        ({"temperature": 0}, "temperature must be a number above 0"),
        ({"temperature": float("nan")}, "temperature must be a number above 0, got nan"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"prompts": []}, "prompts must be a list of texts, one at least"),
        ({"prompts": "the cat"}, "prompts must be a list of texts, one at least, got 'the cat'"),
        ({"prompts": ["no", "no"]}, "prompts must be different texts"),
        ({"max_new_tokens": 40}, "has 1 tokens and max_new_tokens is 40, but the model reads at most 34"),
    ],
)
def test_bad_settings_of_generation_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        generate_texts(causal(), **{"num_texts": 2, "tokenizer": tiny.tokenizer(), **settings})


def test_models_that_do_not_generate_are_refused():
    with pytest.raises(UnsupportedModelError, match="Expected a causal language model .* for fill-mask"):
        generate_texts(tiny.model("bert", "fill-mask"), 2, tiny.tokenizer())
    with pytest.raises(SettingError, match="no tokenizer beside the language model"):
        generate_texts(causal(), 2)
    broken = causal()
    broken.lm_head.weight.data[3] = float("inf")
    with pytest.raises(SettingError, match="language model's logits hold NaN"):
        generate_texts(broken, 2, tiny.tokenizer(), max_new_tokens=3)


def test_an_empty_prompt_needs_a_begin_token():
    model = causal(bos_token_id=None)
    with pytest.raises(SettingError, match="prompt '' has no tokens to begin with"):
        generate_texts(model, 2, tiny.tokenizer(), max_new_tokens=3)
    assert len(generate_texts(model, 2, tiny.tokenizer(), prompts=["the"], max_new_tokens=3)) == 2


def test_a_foreign_tokenizer_is_named():
    with pytest.raises(SettingError, match="tokenizer made the id 40, but the model has 30 tokens"):
        generate_texts(causal(vocab_size=30), 2, tiny.tokenizer(), prompts=["sad"], max_new_tokens=3)


def test_mutated_words_are_the_models():
    model = favouring({"sun": 0.0})
    found = mutate_texts(SEEDS, model, 2, tiny.tokenizer(), replace=1.0, rounds=1, batch_size=2)
    assert found[:] == {"text": ["sun sun sun sun sun", "sun sun sun, sun sun!"]}


def test_mutated_words_follow_the_models_distribution():
    model = favouring({"sun": 1.0, "fish": 0.0, "cat": 0.0})
    seed = " ".join(["the"] * 25)
    texts = mutate_texts([seed], model, 200, tiny.tokenizer(), replace=1.0, rounds=1, temperature=0.5)["text"]
    words = [word for text in texts for word in text.split()]
    expected = torch.tensor([1.0, 0.0, 0.0]).div(0.5).softmax(0)
    shares = [words.count(word) / len(words) for word in ("sun", "fish", "cat")]
    assert shares == pytest.approx(expected.tolist(), abs=0.02)  # 5000 draws


@pytest.mark.parametrize("rounds", [1, 3])
def test_share_of_mutated_words_grows_with_the_rounds(rounds):
    seed = " ".join(["the"] * 25)
    model = favouring(dict.fromkeys(("cat", "fish", "sun", "dog"), 0.0))
    texts = mutate_texts([seed], model, 100, tiny.tokenizer(), replace=0.3, rounds=rounds)["text"]
    share = sum(word != "the" for text in texts for word in text.split()) / (100 * 25)
    assert share == pytest.approx(1 - 0.7**rounds, abs=0.03)  # 2500 words


def test_mutants_are_different_and_no_seeds():
    found = mutate_texts(SEEDS, tiny.model("bert", "fill-mask"), 60, tiny.tokenizer(), replace=0.2)["text"][:]
    assert len(set(found)) == 60
    assert not set(found) & set(SEEDS)


def test_mutation_with_one_outcome_ends(caplog):
    found = mutate_texts(["the cat"], favouring({"sun": 0.0}), 5, tiny.tokenizer(), replace=1.0)
    assert found["text"][:] == ["sun sun"]
    assert "Found 1 different texts, not 5" in caplog.text


def test_same_seed_same_mutants_and_the_random_state_stays():
    before, model = torch.random.get_rng_state(), tiny.model("bert", "fill-mask").train()
    first, again, other = (mutate_texts(SEEDS, model, 4, tiny.tokenizer(), seed=seed)["text"][:] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": "the cat"}, "seeds must be a list of texts"),
        ({"seeds": ["the cat", ""]}, "seeds has an empty text in row 1"),
        ({"seeds": ["zebra!"]}, "None of the 1 seeds has a word that is one piece .* such as 'zebra!'"),
        ({"num_texts": -1}, "num_texts must be"),
        ({"rounds": 0}, "rounds must be"),
        ({"replace": 2}, "replace must be a number above 0 and at most 1, got 2"),
        ({"temperature": float("inf")}, "temperature must be a number above 0"),
    ],
)
def test_bad_settings_of_mutation_are_refused(settings, message):
    base = {
        "seeds": SEEDS,
        "masked_lm": tiny.model("bert", "fill-mask"),
        "num_texts": 2,
        "tokenizer": tiny.tokenizer(),
    }
    with pytest.raises(SettingError, match=message):
        mutate_texts(**{**base, **settings})


def test_a_causal_model_does_not_mutate():
    with pytest.raises(UnsupportedModelError, match="Expected a masked language model .* for text-generation"):
        mutate_texts(SEEDS, causal(), 2, tiny.tokenizer())
