"""Cutting units for real: the cut model computes what the masked one does, saves, loads, generates and exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

import convnets
import cuts
import tiny
from hfshrink.checkpoint import layer_map, to_dense
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers import ResizedConv1D, ResizedLinear
from hfshrink.loading import load
from hfshrink.modules import count_parameters
from hfshrink.pruning.units.cutting import check_optimizer, cut_masked, cut_units
from hfshrink.pruning.units.groups import find_units

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "vit")
STATED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def assert_same(one: Any, other: Any, family: str) -> None:
    batch = tiny.inputs(family)
    torch.testing.assert_close(tiny.logits(one, batch), tiny.logits(other, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_masked(family: str, attention: str) -> None:
    network = tiny.model(family)
    network.set_attn_implementation(attention)
    kept = cuts.uneven_units(network)
    assert_same(cuts.cut(network, "heads+neurons", kept), cuts.masked(network, "heads+neurons", kept), family)
    kept = cuts.even_units(network, "heads+neurons")
    assert_same(cuts.cut(network, "heads+neurons", kept), cuts.masked(network, "heads+neurons", kept), family)


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_model_is_cut_by_its_zeros(family: str, tmp_path: Path) -> None:
    network = tiny.model(family)
    kept = cuts.uneven_units(network)
    small = cuts.masked(network, "heads+neurons", kept)
    expected, dense_size = tiny.logits(small, tiny.inputs(family)), count_parameters(network)[0]
    names = cut_masked(small)
    assert names == [name for name, _ in small.named_modules() if name in set(names)] != []
    assert count_parameters(small)[0] < dense_size
    assert cut_masked(small) == []
    torch.testing.assert_close(tiny.logits(small, tiny.inputs(family)), expected, atol=1e-6, rtol=1e-6)
    for trip in ("first", "second"):
        small.save_pretrained(tmp_path / trip)
        loaded, _ = load(tmp_path / trip)
        assert layer_map(loaded) == layer_map(small) != {}
        assert list(loaded.state_dict()) == list(small.state_dict())
        assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(tiny.logits(loaded, tiny.inputs(family)), tiny.logits(small, tiny.inputs(family)))
        small = loaded
    assert_same(to_dense(small), cuts.masked(network, "heads+neurons", kept), family)


def test_of_a_group_without_use_one_unit_stays() -> None:
    network = tiny.model("bert")
    nn.init.zeros_(network.bert.encoder.layer[0].output.dense.weight)
    expected = tiny.logits(network, tiny.inputs("bert"))
    cut_masked(network)
    assert network.bert.encoder.layer[0].intermediate.dense.out_features == 1
    torch.testing.assert_close(tiny.logits(network, tiny.inputs("bert")), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generate(family: str, cache: str | None) -> None:
    network = tiny.model(family)
    ids = torch.randint(5, tiny.VOCABULARY, (2, 5))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    settings |= {"cache_implementation": cache} if cache else {"use_cache": False}
    for kept in (cuts.uneven_units(network), cuts.even_units(network, "heads+neurons")):
        expected = cuts.masked(network, "heads+neurons", kept).generate(ids, **settings)
        assert torch.equal(cuts.cut(network, "heads+neurons", kept).generate(ids, **settings), expected)
        assert expected.shape == (2, 13)


@pytest.mark.parametrize("model_type", ["opt", "deberta-v2", "qwen3", "dinov2", "mistral", "deit"])
def test_families_that_count_their_heads(model_type: str, tmp_path: Path) -> None:
    """They reshape by the number of heads, norm each head, spell their widths otherwise, or are cousins of others."""
    settings = {name: value for name, value in tiny.ENCODER.items() if name != "intermediate_size"}
    special = {
        "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
        "deberta-v2": {
            "intermediate_size": 24, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True,
        },
        "qwen3": {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4},
        "dinov2": {"mlp_ratio": 2, "image_size": 8, "patch_size": 4},
        "mistral": {"intermediate_size": 24, "num_key_value_heads": 2, "head_dim": 4},
        "deit": {"intermediate_size": 24, "image_size": 8, "patch_size": 4},
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(model_type, **settings, **special[model_type])
    network = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    batch = tiny.inputs("vit" if "image_size" in special[model_type] else "llama")
    kept = cuts.uneven_units(network)
    small = cuts.cut(network, "heads+neurons", kept)
    with torch.no_grad():
        expected = cuts.masked(network, "heads+neurons", kept)(**batch).last_hidden_state
        torch.testing.assert_close(small(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        small.save_pretrained(tmp_path)
        loaded = transformers.AutoModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(**batch).last_hidden_state, small(**batch).last_hidden_state)
        dense = to_dense(loaded)
        torch.testing.assert_close(dense(**batch).last_hidden_state, expected, atol=1e-5, rtol=1e-5)


def test_a_norm_over_all_heads_stops_the_cut() -> None:
    config = transformers.AutoConfig.for_model("olmo2", **tiny.ENCODER)
    network = transformers.AutoModel.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"q_norm of the family 'olmo2' is a norm over all heads"):
        cuts.cut(network, "heads", cuts.even_units(network, "heads"))
    assert cuts.cut(network, "neurons", cuts.even_units(network, "neurons")).config.intermediate_size == 12


class TestAgain:
    def test_twice_is_once(self) -> None:
        network = tiny.model("bert")
        once, twice = copy.deepcopy(network), copy.deepcopy(network)
        [group, *_] = find_units(network, "neurons")
        cut_units(twice, find_units(twice, "neurons"), {group.name: torch.arange(24) < 20})
        cut_units(twice, find_units(twice, "neurons"), {group.name: torch.arange(20) != 3})
        cut_units(once, find_units(once, "neurons"), {group.name: (torch.arange(24) < 20) & (torch.arange(24) != 3)})
        assert layer_map(once) == layer_map(twice)
        assert all(torch.equal(tensor, twice.state_dict()[name]) for name, tensor in once.state_dict().items())

    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
    def test_after_a_load(self, family: str, tmp_path: Path) -> None:
        network = tiny.model(family)
        cut_units(network, find_units(network, "heads+neurons"), cuts.uneven_units(network))
        network.save_pretrained(tmp_path / "first")
        network, _ = load(tmp_path / "first")
        kept = {group.name: torch.arange(group.units) != 0 for group in find_units(network, "neurons")}
        small = cuts.cut(network, "neurons", kept)
        assert_same(small, cuts.masked(network, "neurons", kept), family)
        small.save_pretrained(tmp_path / "second")
        loaded, _ = load(tmp_path / "second")
        assert layer_map(loaded) == layer_map(small)
        assert torch.equal(tiny.logits(loaded, tiny.inputs(family)), tiny.logits(small, tiny.inputs(family)))

    def test_even_then_uneven(self, tmp_path: Path) -> None:
        """A map over a config that was changed before: the dense size is the config's."""
        network = tiny.model("bert")
        network = cuts.cut(network, "neurons", cuts.even_units(network, "neurons"))
        assert network.config.intermediate_size == 12
        small = cuts.cut(network, "heads+neurons", cuts.uneven_units(network))
        small.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        assert torch.equal(tiny.logits(loaded, tiny.inputs("bert")), tiny.logits(small, tiny.inputs("bert")))

    def test_keeping_all_changes_nothing(self) -> None:
        network = tiny.model("bert")
        before = dict(network.named_parameters())
        groups = find_units(network, "heads+neurons")
        assert cut_units(network, groups, {group.name: torch.ones(group.units).bool() for group in groups}) == []
        assert cut_units(network, groups, {}) == []
        assert all(parameter is before[name] for name, parameter in network.named_parameters())
        assert layer_map(network) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    network = tiny.model("gpt2").to(dtype)
    small = cuts.cut(network, "heads+neurons", cuts.uneven_units(network))
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    small.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, dtype="auto")
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_modes_and_frozen_weights_stay() -> None:
    network = tiny.model("bert").train()
    network.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    for structure in ("neurons", "heads"):
        small = cuts.cut(network, structure, cuts.even_units(network, structure))
        assert all(module.training for module in small.modules())
        frozen = [name for name, parameter in small.named_parameters() if not parameter.requires_grad]
        assert frozen == ["bert.encoder.layer.0.intermediate.dense.weight"]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_trainer_step(family: str, tmp_path: Path) -> None:
    network = tiny.model(family)
    small = cuts.cut(network, "heads+neurons", cuts.uneven_units(network))
    layers, before = layer_map(small), {name: tensor.clone() for name, tensor in small.state_dict().items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True,
        learning_rate=0.1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    batch = tiny.inputs(family)
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(3)]
    rows = [row | {"labels": row["input_ids"] if family == "gpt2" else number % 2} for number, row in enumerate(rows)]
    Trainer(small, arguments, train_dataset=rows).train()
    assert layer_map(small) == layers
    assert not torch.equal(before[f"{next(iter(layers))}.weight"], small.state_dict()[f"{next(iter(layers))}.weight"])


class TestOptimizer:
    def test_of_a_cut_model(self) -> None:
        network = tiny.model("bert")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        check_optimizer(optimizer, network)
        cut_units(network, find_units(network, "neurons"), cuts.even_units(network, "neurons"))
        with pytest.raises(SettingError, match=r"^6 of \d+ parameters of the SGD .* new optimizer from model.param"):
            check_optimizer(optimizer, network)  # of 2 layers: 2 weights and a bias; the down bias is a new one too
        check_optimizer(torch.optim.SGD(network.parameters(), lr=0.1), network)


class TestBadInput:
    @pytest.fixture
    def network(self) -> Any:
        return tiny.model("bert")

    @pytest.mark.parametrize(
        ("mask", "match"),
        [
            (
                torch.zeros(24, dtype=torch.bool),
                r"0.neurons would lose all of its 24 units, and bert.*output.dense wo",
            ),
            (torch.ones(24), r"must be booleans of shape \(24,\), got torch.float32 of shape \(24,\)"),
            (torch.ones(4, dtype=torch.bool), r"booleans of shape \(24,\), got torch.bool of shape \(4,\)"),
            ([True] * 24, "got list"),
        ],
    )
    def test_masks(self, network: Any, mask: Any, match: str) -> None:
        with pytest.raises(SettingError, match=match):
            cut_units(network, find_units(network, "neurons"), {"bert.encoder.layer.0.neurons": mask})

    def test_unknown_group(self, network: Any) -> None:
        with pytest.raises(SettingError, match="No group of units is called 'neurons'; there are 2"):
            cut_units(network, find_units(network, "neurons"), {"neurons": torch.ones(24).bool()})

    def test_stale_groups(self, network: Any) -> None:
        groups, kept = find_units(network, "neurons"), cuts.even_units(network, "neurons")
        cut_units(network, groups, kept)
        with pytest.raises(SettingError, match=r"has 12 features \(out\).* names number 23: the model was cut after"):
            cut_units(network, groups, kept)

    def test_quantized(self, network: Any) -> None:
        network.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
        with pytest.raises(SettingError, match="quantized by bitsandbytes"):
            cut_units(network, find_units(network, "neurons"), cuts.even_units(network, "neurons"))

    def test_tied(self, network: Any) -> None:
        first, second = network.bert.encoder.layer
        second.output.dense.weight = first.output.dense.weight
        with pytest.raises(SettingError, match=r"weight of bert.encoder.layer.0.output.dense is tied"):
            cut_units(network, find_units(network, "neurons"), cuts.even_units(network, "neurons"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit", "resnet"])
def test_onnx(family: str) -> None:
    """Each export is checked against the model by hfshrink itself."""
    pytest.importorskip("onnxruntime")
    from hfshrink.quantization import quantize

    if family == "resnet":
        pytest.importorskip("torch_pruning")
        network, structure = convnets.model("resnet"), "channels"
    else:
        network, structure = tiny.model(family), "heads+neurons"
    small = cuts.cut(network, structure, cuts.uneven_units(network, structure))
    parity = quantize(small, "onnx-fp32").config.hfshrink["history"][-1]["results"]["parity"]
    assert parity["max_difference"] < 1e-4, parity


def test_kinds() -> None:
    network = tiny.model("gpt2")
    small = cuts.cut(network, "heads+neurons", cuts.uneven_units(network))
    attention = small.transformer.h[0].attn
    assert isinstance(attention.c_attn, ResizedConv1D)
    assert attention.split_size == attention.num_heads * 4 == attention.c_attn.nf // 3 < 16
    small = cuts.cut(tiny.model("bert"), "heads", cuts.even_units(tiny.model("bert"), "heads"))
    assert {type(layer) for name, layer in small.named_modules() if name in layer_map(small)} == {ResizedLinear}
