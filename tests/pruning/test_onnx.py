"""Every kind of pruned model answers in ONNX Runtime as it does in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import convnets
import cuts
import tiny
from hfshrink import prune, quantize
from hfshrink.checkpoint import layer_map
from hfshrink.modules import count_parameters
from hfshrink.pruning.vocabulary.trimming import trim_vocabulary

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the exporter

CORPUS = ["a good film", "the very old book was not good", "bad"]


def assert_same_answers(small: Any, batch: dict[str, torch.Tensor], processor: Any = None) -> None:
    """Run the export itself; the parity that the record holds is another test's matter."""
    exported = quantize(small, "onnx-fp32", processor=processor)
    expected = tiny.logits(small, batch)
    assert expected.std() > 1e-2
    if "input_ids" in batch:  # encoders fill in what a call leaves out, graphs do not
        batch = {"token_type_ids": torch.zeros_like(batch["input_ids"]), **batch}
    torch.testing.assert_close(exported(**batch).logits, expected, atol=1e-4, rtol=0)


ZEROS: dict[str, Callable[[Any], Any]] = {
    "unstructured": lambda network: prune(network, 0.5),
    "2:4": lambda network: prune(network, structure="2:4"),
}
SMALLER: dict[str, Callable[[Any], Any]] = {
    "layers": lambda network: prune(network, 0.5, "layers"),
    "uniform widths": lambda network: prune(network, 0.5, "neurons", scope="module"),
}


@pytest.mark.parametrize("kind", ZEROS)
def test_zeros(kind: str) -> None:
    small = ZEROS[kind](tiny.model("bert"))
    total, nonzero = count_parameters(small)
    assert nonzero < 0.8 * total
    assert_same_answers(small, tiny.inputs("bert"))


@pytest.mark.parametrize("kind", SMALLER)
def test_what_a_plain_configuration_describes(kind: str) -> None:
    small = SMALLER[kind](tiny.model("bert"))
    assert layer_map(small) == {}
    assert count_parameters(small)[0] < count_parameters(tiny.model("bert"))[0]
    assert_same_answers(small, tiny.inputs("bert"))


def test_a_trimmed_vocabulary() -> None:
    network = tiny.model("bert")
    expected = tiny.logits(network, dict(tiny.tokenizer()(CORPUS, padding=True, return_tensors="pt")))
    small, tokenizer = trim_vocabulary(network, CORPUS, tiny.tokenizer())
    assert small.config.vocab_size == len(tokenizer) < tiny.VOCABULARY
    batch = dict(tokenizer(CORPUS, padding=True, return_tensors="pt"))
    torch.testing.assert_close(tiny.logits(small, batch), expected, atol=1e-6, rtol=0)
    assert_same_answers(small, batch, tokenizer)


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra"])
def test_cut_heads_and_neurons(family: str) -> None:
    network = tiny.model(family)
    small = cuts.cut(network, "heads+neurons", cuts.uneven_units(network))
    assert layer_map(small) != {}
    assert_same_answers(small, tiny.inputs(family))


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet"])
def test_cut_channels(name: str) -> None:
    pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    network = convnets.model(name)
    small = cuts.cut(network, "channels", cuts.uneven_units(network, "channels"))
    assert count_parameters(small)[0] < count_parameters(network)[0]
    assert_same_answers(small, {"pixel_values": convnets.images(3)})
