"""Calibration data that is read once, with labels for language models, up to a number of tokens."""

import torch

import tiny
from hfshrink.layerwise import CalibrationData, first_tokens


def test_an_iterator_is_read_once():
    given = (tiny.inputs("llama", seed=seed) for seed in range(3))
    data = CalibrationData(tiny.model("llama"), given, None)
    assert len(data.batches(with_labels=True)) == len(data.batches()) == 3


def test_padding_is_no_label_of_a_language_model():
    batch = tiny.inputs("llama")
    [found] = CalibrationData(tiny.model("llama"), [batch], None).batches(with_labels=True)
    assert torch.equal(found["labels"] == -100, batch["attention_mask"] == 0)
    assert "labels" not in CalibrationData(tiny.model("llama"), [batch], None).batches()[0]
    assert "labels" not in CalibrationData(tiny.model("bert"), [batch], None).batches(with_labels=True)[0]


def test_batches_end_when_the_tokens_are_reached():
    batches = [tiny.inputs("bert", seed=seed) for seed in range(4)]  # 3 rows of 7 tokens each
    assert [len(first_tokens(batches, tokens)) for tokens in (1, 21, 22, 10**6)] == [1, 1, 2, 4]
    assert len(first_tokens([tiny.inputs("vit")] * 3, 1)) == 3
    data = CalibrationData(tiny.model("bert"), batches, None)
    assert (len(data.batches(tokens=22)), len(data.batches())) == (2, 4)
