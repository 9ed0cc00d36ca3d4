"""Rows for the measuring tests: sentences, entities, questions and pictures."""

import datasets
import numpy as np
import pytest
import torch

import tiny


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread of torch: for tiny models two on a busy machine take many times longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def varied(sentences, tokenizer):
    """(seed, labels, **config) -> a classifier whose classes all occur among the predictions for `sentences`."""

    def build(seed=0, labels=2, **config):
        model = tiny.model("bert", seed=seed, num_labels=labels, **config)
        with torch.no_grad():
            model.classifier.weight *= 10
            texts = tokenizer(sentences["text"][:], padding=True, return_tensors="pt")
            model.classifier.bias -= model(**texts).logits.mean(dim=0)
        return model

    return build


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def sentences():
    """40 rows of 1 to 12 words with two classes."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(tiny.WORDS, generator.integers(1, 13))) for _ in range(40)]
    return datasets.Dataset.from_dict({"text": texts, "label": generator.integers(0, 2, 40).tolist()})


@pytest.fixture
def token_rows():
    """30 encoded rows of 2 to 11 tokens, without labels."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(2, 12, 30)
    rows = [generator.integers(5, tiny.VOCABULARY, n).tolist() for n in lengths]
    return datasets.Dataset.from_dict({"input_ids": rows})


@pytest.fixture
def questions():
    """Questions whose contexts fit a window of 32 tokens or take several."""
    contexts = [
        "the cat eats the red fish",
        "a brave dog sings and " * 14 + "the sun is warm",
        "the bird reads a new book",
    ]
    return datasets.Dataset.from_dict(
        {
            "question": ["the cat eats", "is the sun warm", "the bird reads"],
            "context": contexts,
            "answers": [
                {"text": ["red fish", "the red fish"], "answer_start": [17, 13]},
                {"text": ["warm"], "answer_start": [contexts[1].index("warm")]},
                {"text": ["a new book"], "answer_start": [15]},
            ],
        }
    )
