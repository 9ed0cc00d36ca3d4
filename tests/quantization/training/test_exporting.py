"""The ONNX graph with learned ranges computes what the fake-quantized PyTorch model computes."""

import numpy as np
import pytest
import torch

import tiny
import training
from hfshrink.errors import SettingError
from hfshrink.modules import head_names
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.training.exporting import apply_learned
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import QATTrainer

INT8, FOUR_BIT = QAT(), QAT(4, weight_ranges="lsq", activation_ranges="lsq")


def trained(family, quantization):
    """A tiny model after a few steps of training."""
    from datasets import Dataset

    network = tiny.model(family, seed=1)
    pixels = {"pixel_values": images(16, 8).tolist(), "labels": [i % 2 for i in range(16)]}
    QATTrainer(
        network,
        training.arguments(max_steps=4, optim="adamw_torch", learning_rate=1e-3),
        quantization=quantization,
        train_dataset=training.rows(16) if family == "bert" else Dataset.from_dict(pixels).with_format("torch"),
        data_collator=training.collate if family == "bert" else None,
    ).train()
    return network.eval()


def images(count, size):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def batch_of(family):
    if family != "bert":
        return {"pixel_values": images(2, 8 if family == "vit" else 224)}  # the sizes that the exporter traces
    batch = tiny.inputs("bert")
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


@pytest.mark.parametrize(
    ("family", "quantization", "tolerance"),
    [
        pytest.param("bert", FOUR_BIT, 1e-4, marks=pytest.mark.slow),
        pytest.param("resnet", FOUR_BIT, 1e-3, marks=pytest.mark.slow),
        pytest.param("bert", INT8, 1e-4, marks=pytest.mark.slow),
        pytest.param("vit", FOUR_BIT, 1e-4, marks=pytest.mark.slow),
        pytest.param("vit", INT8, 1e-4, marks=pytest.mark.slow),
        pytest.param("resnet", INT8, 1e-3, marks=pytest.mark.slow),
    ],
)
def test_the_graph_computes_what_was_trained(family, quantization, tolerance):
    """The same codes of weights; outputs differ by the order of additions, as a share of the largest logit.

    Of the many pixels of a ResNet some lie so near a half that this decides their code.
    """
    pytest.importorskip("onnxruntime")
    network, batch = trained(family, quantization), batch_of(family)
    tables = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Embedding)]
    processor = tiny.tokenizer() if family == "bert" else None
    graph, changed = apply_learned(export_float(network, processor), network, [*tables, *head_names(network)])
    ranges, scales = learned_ranges(network)
    assert set(changed) == set(ranges)
    _check_codes(graph, network, scales)
    with torch.no_grad():
        unquantized = network(**batch).logits
        with fake_quantized(network):
            expected = network(**batch).logits
    difference = (torch.as_tensor(graph(**batch).logits) - expected).abs().max()
    assert difference <= tolerance * expected.abs().max()
    assert difference < 0.2 * (unquantized - expected).abs().max()


def _check_codes(graph, network, scales):
    """Every int8 weight of the graph holds the trained codes, up to the sign that a merged batch norm gives."""
    found = [v.const_value.numpy() for v in graph.components["model"].program.graph.initializers.values()]
    found = [np.sort(np.abs(codes.astype(int)).ravel()).tolist() for codes in found if codes.dtype == np.int8]
    for name, scale in scales.items():
        codes = (network.get_submodule(name).weight.detach().flatten(1) / scale).round().abs().int()
        assert np.sort(codes.flatten().numpy()).tolist() in found, name


def test_what_has_no_int8_nodes_is_refused():
    pytest.importorskip("onnxruntime")
    network = tiny.model("bert")
    with pytest.raises(SettingError, match="no learned ranges of activations"):
        apply_learned(None, network)
    with pytest.raises(SettingError, match="no learned ranges of activations"):
        apply_learned(None, trained("bert", QAT(4, None)))
    with pytest.raises(SettingError, match="groups have no int8 nodes"):
        apply_learned(None, trained("bert", QAT(4, group_size=4)))


@pytest.mark.slow
def test_the_four_bit_graph_computes_what_was_trained():
    """Groups of 16 on both sides, activations in float: the folded weights lie on the grid of `onnx-int4`."""
    pytest.importorskip("onnxruntime")
    from hfshrink.quantization.graphs.four_bit import make_four_bit

    network = tiny.model("bert", seed=1, intermediate_size=32)
    QATTrainer(
        network,
        training.arguments(max_steps=4, optim="adamw_torch", learning_rate=1e-3),
        quantization=QAT(4, None, group_size=16),
        train_dataset=training.rows(16),
        data_collator=training.collate,
    ).train()
    how = {"group_size": 16, "rounding": "rtn", "accuracy_level": 1, "embeddings": "fp32"}
    graph, changed, _ = make_four_bit(network.eval(), tiny.tokenizer(), head_names(network), **how)
    assert set(changed) == set(learned_ranges(network)[1])
    batch = batch_of("bert")
    expected = tiny.logits(network, batch)
    assert (torch.as_tensor(graph(**batch).logits) - expected).abs().max() <= 1e-4 * expected.abs().max()
