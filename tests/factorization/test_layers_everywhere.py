"""Factored layers met by the rest of the library: counts, generation, pruning, quantization and exports."""

from __future__ import annotations

import collections
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import exports
import thin_layers
import tiny
from hfshrink.checkpoint import layer_map, set_layers, to_dense
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.evaluation.profiling import count_macs
from hfshrink.layers import LowRankConv2d, LowRankEmbedding
from hfshrink.loading import load
from hfshrink.modules import count_parameters, head_names, max_positions
from hfshrink.pruning import prune
from hfshrink.pruning.units.groups import find_units
from hfshrink.quantization import quantize

CONVOLUTIONS = ("low_rank_conv2d", "separable_conv2d", "tucker_conv2d")
GEOMETRY: dict[str, Any] = {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)}
FAMILIES = {
    "bert": ("low_rank", "low_rank_embedding"),
    "llama": ("low_rank", "low_rank_embedding"),
    "gpt2": ("low_rank_conv1d", "low_rank_embedding", "low_rank"),
}
"""family -> all kinds that stand for something in it."""


def model(family: str, *kinds: str, rank: int = 4, **config: Any) -> Any:
    """A tiny model, each module that has a layer of `kinds` factored."""
    network = tiny.model(family, **{"tie_word_embeddings": False, **config} if family in ("gpt2", "llama") else config)
    for kind in kinds:
        set_layers(network, thin_layers.layers(network, kind, rank))
    return network


def partly(family: str, kind: str, part: str) -> Any:
    """A tiny model in which the modules with `part` in their name are factored."""
    network = tiny.model(family)
    layers = thin_layers.layers(network, kind, 4)
    set_layers(network, {name: layer for name, layer in layers.items() if part in name})
    assert layer_map(network)
    return network


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TestCounts:
    """MACs and parameters by hand, at rank 2."""

    images, ids = torch.ones(1, 4, 8, 10), torch.ones(1, 5, dtype=torch.long)
    out, middle = 4 * 10, 4 * 10  # pixels behind both strides, and behind that of the height alone

    @pytest.mark.parametrize(
        ("kind", "dense", "x", "macs", "parameters"),
        [
            ("low_rank", nn.Linear(6, 8), torch.ones(1, 5, 6), 5 * 2 * (6 + 8), 2 * (6 + 8) + 8),
            ("low_rank_embedding", nn.Embedding(9, 6), ids, 5 * 2 * 6, 2 * (9 + 6)),
            (
                "low_rank_conv2d",
                nn.Conv2d(4, 6, **GEOMETRY),
                images,
                out * (2 * 4 * 15 + 6 * 2),
                2 * 4 * 15 + 6 * 2 + 6,
            ),
            (
                "separable_conv2d",
                nn.Conv2d(4, 6, **GEOMETRY),
                images,
                middle * 2 * 4 * 3 + out * 6 * 2 * 5,
                2 * 4 * 3 + 6 * 2 * 5 + 6,
            ),
            (
                "tucker_conv2d",
                nn.Conv2d(4, 6, **GEOMETRY),
                images,
                8 * 10 * 2 * 4 + out * (2 * 2 * 15 + 6 * 2),
                2 * 4 + 2 * 2 * 15 + 6 * 2 + 6,
            ),
        ],
    )
    def test_by_hand(self, kind: str, dense: nn.Module, x: Tensor, macs: int, parameters: int) -> None:
        one = One(thin_layers.layer(dense, kind, 2))
        assert count_macs(one, {"x": x}) == macs
        assert count_parameters(one)[0] == parameters

    @pytest.mark.parametrize(("family", "kind"), [("bert", "low_rank"), ("gpt2", "low_rank_conv1d")])
    def test_in_a_model(self, family: str, kind: str) -> None:
        """What one weight (m, n) saves: tokens · (mn − r(m + n)) MACs, mn − r(m + n) parameters."""
        dense, batch = model(family), tiny.inputs(family, batch=1, length=6)
        name = {"bert": "bert.encoder.layer.0.intermediate.dense", "gpt2": "transformer.h.0.attn.c_attn"}[family]
        network = copy.deepcopy(dense)
        module = network.get_submodule(name)
        m, n = module.weight.shape
        set_layers(network, {name: thin_layers.layer(module, kind, 3)})
        saved = m * n - 3 * (m + n)
        assert count_parameters(dense)[0] - count_parameters(network)[0] == saved
        assert count_macs(dense, batch) - count_macs(network, batch) == 6 * saved


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_equals_that_of_the_dense_weights(family: str) -> None:
    """With the cache and without, in a batch with padding on the left."""
    network = model(family, *FAMILIES[family])
    dense = to_dense(copy.deepcopy(network))
    ids = torch.tensor([[0, 7, 8, 9], [5, 6, 7, 8]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = [net.generate(**batch, **how, use_cache=cache) for net in (network, dense) for cache in (True, False)]
    for other in found[1:]:
        assert torch.equal(found[0].sequences, other.sequences)
        torch.testing.assert_close(torch.stack(found[0].logits), torch.stack(other.logits), atol=1e-5, rtol=1e-4)
    assert found[0].past_key_values is not None
    assert type(dense.get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_runs(family: str, tmp_path: Path) -> None:
    network, batch = model(family, *FAMILIES[family]), tiny.inputs(family)
    expected = tiny.logits(network, batch)
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(network).to(dtype)
        torch.testing.assert_close(tiny.logits(cast, batch).float(), expected, atol=0.1, rtol=0.1)
        cast.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path, dtype="auto")
        assert all(torch.equal(tensor, cast.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        torch.testing.assert_close(tiny.logits(loaded, batch).float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_in_bfloat16_and_dense_again(kind: str, tmp_path: Path) -> None:
    network, batch = model("resnet", kind), tiny.inputs("resnet")
    network.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(network).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, cast[name]) for name, tensor in loaded.state_dict().items())
    expected = tiny.logits(network, batch)
    assert layer_map(to_dense(network)) == {}
    torch.testing.assert_close(tiny.logits(network, batch), expected, atol=1e-5, rtol=1e-4)


def test_names_and_limits_see_through_factors() -> None:
    network = model("bert", *FAMILIES["bert"])
    assert head_names(network) == ["classifier"]
    assert max_positions(network) == max_positions(tiny.model("bert")) == 34


class TestPlaces:
    """A map from elsewhere must not change what a layer looks at."""

    def test_stride(self) -> None:
        network, name = tiny.model("resnet"), "resnet.embedder.embedder.convolution"
        conv = network.get_submodule(name)
        other = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, bias=False)
        with pytest.raises(SettingError, match=r"has stride=\(1, 1\), the Conv2d there has \(2, 2\)"):
            set_layers(network, {name: thin_layers.layer(other, "low_rank_conv2d", 2)})

    def test_groups(self) -> None:
        network = tiny.model("resnet")
        holder = network.resnet.embedder.embedder
        holder.convolution = nn.Conv2d(4, 6, 3, groups=2)
        layer = LowRankConv2d.from_dense(nn.Conv2d(2, 6, 3), torch.ones(6, 1), torch.ones(1, 2, 3, 3))
        with pytest.raises(SettingError, match="has groups=1, the Conv2d there has 2"):
            set_layers(network, {"resnet.embedder.embedder.convolution": layer})

    def test_padding_idx(self, tmp_path: Path) -> None:
        network, name = tiny.model("bert"), "bert.embeddings.word_embeddings"
        set_layers(network, {name: thin_layers.layer(network.get_submodule(name), "low_rank_embedding", 4)})
        network.config.pad_token_id = 3
        network.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=rf"for {name} has padding_idx=0, the Embedding there has 3"):
            load(tmp_path)

    def test_scaled_tables(self) -> None:
        class Scaled(nn.Embedding):
            def forward(self, ids: Tensor) -> Tensor:
                return 4 * super().forward(ids)

        network, name = tiny.model("bert"), "bert.embeddings.word_embeddings"
        layer = thin_layers.layer(network.get_submodule(name), "low_rank_embedding", 4)
        assert isinstance(layer, LowRankEmbedding)
        network.bert.embeddings.word_embeddings = Scaled(layer.num_embeddings, 16, padding_idx=0)
        with pytest.raises(SettingError, match=rf"Scaled is computed in a way of its own; .* \({name}\)"):
            set_layers(network, {name: layer})

    def test_tied_tables(self) -> None:
        network = tiny.model("gpt2")
        layer = thin_layers.layer(network.transformer.wte, "low_rank_embedding", 4)
        with pytest.raises(SettingError, match=r"transformer\.wte is tied to another one"):
            set_layers(network, {"transformer.wte": layer})


class TestPruning:
    @pytest.mark.parametrize(
        ("family", "kind", "part", "structure"),
        [
            ("bert", "low_rank", "layer.0.attention.self.query", "heads"),
            ("bert", "low_rank", "layer.1.intermediate", "heads+neurons"),
            ("gpt2", "low_rank_conv1d", "h.0.attn.c_attn", "heads"),
            ("gpt2", "low_rank_conv1d", "h.1.mlp.c_proj", "neurons"),
        ],
    )
    def test_factors_have_no_units(self, family: str, kind: str, part: str, structure: str) -> None:
        network = partly(family, kind, part)
        before = copy.deepcopy(network.state_dict())
        with pytest.raises(SettingError, match=rf"{part}.* is a LowRank.*, which can't be cut. Prune first, and"):
            prune(network, 0.5, structure)
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        left = find_units(network, structure, exclude=f"*.{part.split('.')[1]}.{structure.split('+')[-1]}")
        assert left

    def test_everything_factored_leaves_nothing(self) -> None:
        with pytest.raises(SettingError, match="has no weights to prune"):
            prune(model("bert", "low_rank"), 0.5)

    def test_layers_drop_with_their_map(self, tmp_path: Path) -> None:
        network = prune(model("bert", "low_rank"), 0.5, "layers")
        assert {name.split(".")[3] for name in layer_map(network) if "layer." in name} == {"0"}
        network.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        batch = tiny.inputs("bert")
        assert torch.equal(tiny.logits(loaded, batch), tiny.logits(network, batch))


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_one_slot_for_a_quantization(scheme: str) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SettingError, match="holds compressed layers, and a config has one place"):
        quantize(model("bert", "low_rank"), scheme)


def wide(family: str) -> Any:
    """Factored at rank 8, with the sizes that the tests of exports take."""
    kinds = FAMILIES.get(family, ("low_rank_conv2d",))
    sizes = {} if family == "gpt2" else exports.SIZES[family]
    return model(family, *kinds, rank=8, **sizes)


def operators(exported: Any) -> collections.Counter:
    return collections.Counter(node.op_type for node in exported.components["model"].program.graph)


def batch_of(family: str) -> dict[str, Tensor]:
    batch = tiny.inputs(family)
    return batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])} if family == "bert" else batch


@pytest.mark.slow
class TestExports:
    """Each export takes seconds."""

    @pytest.fixture(autouse=True)
    def _runtime(self) -> None:
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")

    @pytest.mark.parametrize("family", ["bert", "gpt2"])
    def test_float_parity(self, family: str) -> None:
        network, batch = wide(family), batch_of(family)
        exported = quantize(network, "onnx-fp32")
        expected = tiny.logits(network, batch)
        torch.testing.assert_close(exported(**batch).logits, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("kind", CONVOLUTIONS)
    def test_convolutions_in_float_and_static_int8(self, kind: str) -> None:
        network, batch = model("resnet", kind, rank=3), tiny.inputs("resnet")
        network.config.image_size = batch["pixel_values"].shape[-1]  # tracing asks for it, and it has no such entry
        expected = tiny.logits(network, batch)
        exported = quantize(network, "onnx-fp32")
        torch.testing.assert_close(exported(**batch).logits, expected, atol=1e-5, rtol=1e-4)
        assert operators(exported)["Conv"] == (3 if kind == "tucker_conv2d" else 2) * len(layer_map(network))
        exported = quantize(network, "onnx-int8-static", calibration=[tiny.inputs("resnet", batch=8)])
        assert (exported(**batch).logits - expected).abs().max() < 0.1 * expected.abs().max()

    def test_both_products_of_bert_become_int8(self) -> None:
        network, batch = wide("bert"), batch_of("bert")
        exported = quantize(network, "onnx-int8")
        linears = [name for name, spec in layer_map(network).items() if spec["kind"] == "low_rank"]
        tables = len(layer_map(network)) - len(linears)
        found = operators(exported)
        assert found["MatMulInteger"] == 2 * (len(linears) - 1) + tables  # the head stays float
        assert found["Attention"] == operators(quantize(to_dense(copy.deepcopy(network)), "onnx-fp32"))["Attention"]
        expected = tiny.logits(network, batch)
        assert (exported(**batch).logits - expected).abs().max() < 0.05 * expected.abs().max()

    def test_both_products_of_gpt2_become_8_bit(self) -> None:
        network, batch = wide("gpt2"), tiny.inputs("gpt2")
        exported = quantize(network, "onnx-int8")
        products = sum(1 if spec["kind"] == "low_rank_embedding" else 2 for spec in layer_map(network).values())
        assert operators(exported)["MatMulNBits"] == products
        expected = tiny.logits(network, batch)
        assert (exported(**batch).logits - expected).abs().max() < 0.05 * expected.abs().max()

    def test_exclude_names_a_factored_module(self) -> None:
        network = wide("bert")
        exported = quantize(network, "onnx-int8", exclude="*.query")
        assert operators(exported)["MatMulInteger"] == operators(quantize(network, "onnx-int8"))["MatMulInteger"] - 2
