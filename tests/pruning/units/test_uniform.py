"""Cuts that are the same in all layers: the config says them, and plain transformers loads the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import cuts
import tiny
from hfshrink.checkpoint import layer_map, set_layers
from hfshrink.layers import LowRankLinear
from hfshrink.loading import load
from hfshrink.pruning.units.uniform import uniform_widths

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "vit")


def assert_same(one: Any, other: Any, family: str) -> None:
    batch = tiny.inputs(family)
    torch.testing.assert_close(tiny.logits(one, batch), tiny.logits(other, batch), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_neurons_need_no_hfshrink(family: str) -> None:
    """Tier A: plain modules, and the family's own config entry."""
    network = tiny.model(family)
    small = cuts.cut(network, "neurons", cuts.even_units(network, "neurons"))
    entry = {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(family, "intermediate_size")
    assert getattr(small.config, entry) == (32 if family == "gpt2" else 12)
    assert layer_map(small) == {}
    assert not hasattr(small.config, "quantization_config")
    assert {type(module) for module in small.modules()} == {type(module) for module in network.modules()}


def test_equal_heads_of_llama_need_no_hfshrink() -> None:
    network = tiny.model("llama")
    small = cuts.cut(network, "heads+neurons", cuts.even_units(network, "heads+neurons"))
    assert layer_map(small) == {}
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 4)
    assert small.config.intermediate_size == small.model.layers[0].mlp.intermediate_size == 12


def test_heads_that_the_config_refuses_get_a_map() -> None:
    """Llama's config wants a hidden size that its heads divide: 3 of 4 heads can't be said."""
    network = tiny.model("llama", num_key_value_heads=4)
    kept = {name: torch.arange(4) != 1 for name in cuts.even_units(network, "heads")}
    small = cuts.cut(network, "heads", kept)
    assert small.config.num_attention_heads == 4
    assert len(layer_map(small)) == 8
    assert_same(small, cuts.masked(network, "heads", kept), "llama")


@pytest.mark.slow
def test_plain_transformers_loads_what_is_equal(tmp_path: Path) -> None:
    code = (
        "import sys, torch, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    config = transformers.AutoConfig.from_pretrained(folder)\n"
        "    model = getattr(transformers, config.architectures[0]).from_pretrained(folder)\n"
        "    state = torch.load(folder + '/state.pt')\n"
        "    print(all(torch.equal(state[n], t) for n, t in model.state_dict().items()) and len(state) > 9)\n"
        "assert 'hfshrink' not in sys.modules\n"
    )
    families = ("bert", "llama", "gpt2")
    for family in families:
        network = tiny.model(family)
        small = cuts.cut(network, "neurons", cuts.even_units(network, "neurons"))
        if family == "llama":
            small = cuts.cut(small, "heads", cuts.even_units(small, "heads"))
        small.save_pretrained(tmp_path / family)
        torch.save(small.state_dict(), tmp_path / family / "state.pt")
    folders = [str(tmp_path / family) for family in families]
    run = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["True"] * len(families), run.stderr[-2000:]


def test_other_compressed_layers_keep_their_map(tmp_path: Path) -> None:
    network = tiny.model("bert")
    dense = network.bert.pooler.dense
    set_layers(network, {"bert.pooler.dense": LowRankLinear.from_dense(dense, dense.weight[:, :3], dense.weight[:3])})
    small = cuts.cut(network, "neurons", cuts.even_units(network, "neurons"))
    assert list(layer_map(small)) == ["bert.pooler.dense"]
    assert small.config.intermediate_size == 12
    small.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert torch.equal(tiny.logits(loaded, tiny.inputs("bert")), tiny.logits(small, tiny.inputs("bert")))


def test_a_config_without_the_entry_gets_a_map() -> None:
    """DINOv2 says its neurons as a whole multiple of the hidden size."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    )
    network = transformers.Dinov2Model(config)
    assert len(layer_map(cuts.cut(network, "neurons", cuts.even_units(network, "neurons")))) == 4


def test_a_class_that_wants_more_than_a_config_gets_a_map() -> None:
    class Own(transformers.BertModel):
        def __init__(self, config: transformers.BertConfig, width: int) -> None:
            super().__init__(config)
            self.width = width

    network = Own(tiny.model("bert").config, 3)
    assert len(layer_map(cuts.cut(network, "neurons", cuts.even_units(network, "neurons")))) == 4
    assert network.config.intermediate_size == 24


def test_the_caller_sees_no_other_random_numbers() -> None:
    network = tiny.model("llama")
    state = torch.get_rng_state()
    cuts.cut(network, "heads+neurons", cuts.even_units(network, "heads+neurons"))
    assert torch.equal(state, torch.get_rng_state())


def test_entries_by_hand() -> None:
    network = tiny.model("gpt2")
    names = [f"transformer.h.{layer}.mlp.{name}" for layer in range(2) for name in ("c_fc", "c_proj")]
    sizes = {name: {"in" if "proj" in name else "out": 40} for name in names}
    assert uniform_widths(network, sizes) == ({"n_inner": 40}, set(names))
    sizes[names[2]], sizes[names[3]] = {"out": 41}, {"in": 41}
    assert uniform_widths(network, sizes) == ({}, set())
    assert uniform_widths(network, {names[0]: {"out": 40}, names[1]: {"in": 40}}) == ({}, set())
    assert uniform_widths(torch.nn.Linear(2, 2), {}) == ({}, set())
