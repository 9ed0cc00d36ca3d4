"""Dropping layers in place: what is left computes, saves, loads and generates as a model made that shallow."""

from __future__ import annotations

import copy
import json
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
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import load
from hfshrink.pruning.oneshot.layer_dropping import LAYER_METHODS, choose_layers, drop_layers, layer_influence

FAMILIES = ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "vit")


def deep(family: str, depth: int = 4, **config: Any) -> Any:
    entry = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return tiny.model(family, **{entry: depth}, **config)


def stack_of(network: Any) -> Any:
    return next(module for module in network.modules() if isinstance(module, torch.nn.ModuleList))


class TestChooseLayers:
    def test_by_hand(self) -> None:
        assert choose_layers(12, 4, "top") == [8, 9, 10, 11]
        assert choose_layers(12, 6, "spread") == [1, 3, 5, 6, 8, 10]
        assert choose_layers(5, 4, "spread") == [1, 2, 3, 4]
        assert choose_layers(4, 2, "influence", [0.5, 0.1, 0.4, 0.3]) == [1, 3]
        assert choose_layers(3, 1, "influence", [0.2, 0.2, 0.2]) == [2]

    @pytest.mark.parametrize("method", LAYER_METHODS)
    @pytest.mark.parametrize("depth", [1, 2, 7, 12])
    def test_drops_as_many_as_asked(self, method: str, depth: int) -> None:
        for number in range(depth):
            dropped = choose_layers(depth, number, method, [0.1] * depth)
            assert len(dropped) == len(set(dropped)) == number
            assert dropped == sorted(dropped)
            assert set(dropped) <= set(range(depth))
            if method == "spread" and depth - number > 1:
                assert not {0, depth - 1} & set(dropped)

    def test_random_is_seeded_and_leaves_the_state(self) -> None:
        state = torch.get_rng_state()
        assert choose_layers(12, 4, "random", seed=1) == choose_layers(12, 4, "random", seed=1)
        assert len({tuple(choose_layers(12, 4, "random", seed=seed)) for seed in range(9)}) > 3
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((4, 1, "middle"), "method must be one of influence, top, spread, random for layers, got 'middle'"),
            ((4, 4, "top"), r"0\.\.3 of 4 layers can be dropped, got 4"),
            ((4, -1, "top"), "got -1"),
            ((4, 1, "influence"), "one number for each of 4 layers, got 0"),
        ],
    )
    def test_bad_input(self, arguments: tuple[Any, ...], match: str) -> None:
        with pytest.raises(SettingError, match=match):
            choose_layers(*arguments)


class TestLayerInfluence:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_one_minus_the_cosine_of_hidden_states(self, family: str) -> None:
        network, batch = deep(family, 3), tiny.inputs(family)
        with torch.no_grad():
            states = network(**batch, output_hidden_states=True).hidden_states
        keep = batch.get("attention_mask", torch.ones(states[0].shape[:2])).bool()
        found = layer_influence(network, [batch])
        for layer in range(2):  # after the last one some families norm
            x, y = states[layer][keep].double(), states[layer + 1][keep].double()
            expected = sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)) / len(x)
            assert found[layer] == pytest.approx(expected, abs=1e-6)
        assert len(found) == 3

    def test_batches_weigh_by_their_tokens(self) -> None:
        network = deep("llama")
        batch = tiny.inputs("llama")
        rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(3)]
        assert layer_influence(network, rows) == pytest.approx(layer_influence(network, [batch]), abs=1e-5)

    def test_a_layer_that_does_nothing_goes_first(self) -> None:
        network = deep("llama")
        layer = network.model.layers[2]
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(linear.weight)
        batch = tiny.inputs("llama")
        found = layer_influence(network, [batch])
        assert found[2] == pytest.approx(0, abs=1e-9)
        assert choose_layers(4, 1, "influence", found) == [2]
        expected = tiny.logits(network, batch)
        drop_layers(network, [2])
        assert torch.equal(tiny.logits(network, batch), expected)

    def test_mode_and_hooks_are_put_back(self) -> None:
        network = deep("bert").train()
        layer_influence(network, [tiny.inputs("bert")])
        assert all(module.training for module in network.modules())
        assert not any(layer._forward_hooks for layer in network.bert.encoder.layer)

    def test_bad_data(self) -> None:
        with pytest.raises(SettingError, match="has no tokens, or never ran layer 0"):
            layer_influence(deep("bert"), [])
        network = deep("bert")
        network.bert.encoder.layer[1].output.dense.weight.data.fill_(float("nan"))
        with pytest.raises(SettingError, match="NaN or infinite hidden states"):
            layer_influence(network, [tiny.inputs("bert")])


class TestDropLayers:
    @pytest.mark.parametrize("dropped", [[0], [1, 3], [3], [0, 1, 2]])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_is_the_shallow_model_of_the_same_layers(self, family: str, dropped: list[int], tmp_path: Path) -> None:
        network = deep(family)
        kept = [layer for layer in range(4) if layer not in dropped]
        shallow = deep(family, len(kept), seed=1)
        states = [layer.state_dict() for layer in stack_of(network)]
        outside = {n: t for n, t in network.state_dict().items() if not any(f".{i}." in n for i in range(4))}
        shallow.load_state_dict(outside, strict=False)
        for layer, old in zip(stack_of(shallow), kept, strict=True):
            layer.load_state_dict(states[old])
        names = drop_layers(network, dropped)
        assert [int(name.rpartition(".")[2]) for name in names] == dropped
        batch = tiny.inputs(family)
        assert torch.equal(tiny.logits(network, batch), tiny.logits(shallow, batch))
        with torch.no_grad():
            assert len(network(**batch, output_hidden_states=True).hidden_states) == len(kept) + 1
        network.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        assert list(loaded.state_dict()) == list(network.state_dict())
        assert all(torch.equal(tensor, network.state_dict()[n]) for n, tensor in loaded.state_dict().items())
        assert torch.equal(tiny.logits(loaded, batch), tiny.logits(network, batch))
        ours, theirs = ({n: _plain(m) for n, m in made.named_modules()} for made in (network, loaded))
        assert ours == theirs

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_generate(self, family: str, cache: str) -> None:
        network = deep(family)
        ids = torch.randint(5, tiny.VOCABULARY, (2, 5))
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
        network.generate(ids, cache_implementation=cache, **settings)  # what it remembers of its depth must not stay
        drop_layers(network, [0, 2])
        found = network.generate(ids, cache_implementation=cache, **settings)
        assert torch.equal(found, network.generate(ids, use_cache=False, **settings))

    def test_lists_of_layers_are_trimmed(self, tmp_path: Path) -> None:
        """Gemma 2 alternates windows: a layer keeps its kind in its new place."""
        config = transformers.AutoConfig.for_model(
            "gemma2", **{**tiny.ENCODER, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=4, sliding_window=3
        )
        network = transformers.AutoModelForCausalLM.from_config(config).eval()
        drop_layers(network, [0, 1, 2])
        assert network.config.layer_types == ["full_attention"]
        assert network.model.layers[0].self_attn.layer_idx == 0
        batch = tiny.inputs("llama")
        network.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        assert torch.equal(tiny.logits(loaded, batch), tiny.logits(network, batch))

    def test_stages_of_a_backbone(self, tmp_path: Path) -> None:
        config = transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
        )
        network = transformers.Dinov2Model(config).eval()
        drop_layers(network, [1])
        assert network.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
        network.save_pretrained(tmp_path)
        batch = tiny.inputs("vit")
        with torch.no_grad():
            expected = network(**batch).last_hidden_state
            assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path)(**batch).last_hidden_state, expected)

    def test_layer_map_follows(self, tmp_path: Path) -> None:
        network = deep("bert", 3)
        set_layers(network, cuts.resized(network, "bert"))
        before = layer_map(network)
        drop_layers(network, [0])
        assert list(layer_map(network)) == [n.replace(".1.", ".0.") for n in before if ".layer.1." in n] != []
        network.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        assert torch.equal(tiny.logits(loaded, tiny.inputs("bert")), tiny.logits(network, tiny.inputs("bert")))
        drop_layers(loaded, [0])
        assert layer_map(loaded) == {}
        loaded.save_pretrained(tmp_path / "again")
        again, _ = load(tmp_path / "again")
        assert torch.equal(tiny.logits(again, tiny.inputs("bert")), tiny.logits(loaded, tiny.inputs("bert")))

    @pytest.mark.slow
    def test_plain_transformers_loads_it(self, tmp_path: Path) -> None:
        network = deep("llama")
        drop_layers(network, [1, 2])
        network.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
        code = (
            "import sys, transformers\n"
            "model, info = transformers.LlamaForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
            "print(len(model.model.layers), [len(found) for found in info.values()])\n"
            "assert 'hfshrink' not in sys.modules\n"
        )
        run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        assert run.stdout.startswith("2 [0, 0, 0"), run.stdout + run.stderr[-1000:]

    def test_trains_on(self) -> None:
        network = deep("bert").train()
        drop_layers(network, [1])
        network(**tiny.inputs("bert"), labels=torch.tensor([0, 1, 0])).loss.backward()
        assert all(parameter.grad is not None for parameter in network.parameters())

    def test_nothing_dropped(self) -> None:
        network = deep("bert")
        assert drop_layers(network, []) == []
        assert network.config.num_hidden_layers == 4

    @pytest.mark.parametrize(
        ("dropped", "match"),
        [
            ([4], r"different numbers in 0\.\.3, got \[4\]"),
            ([-1], r"got \[-1\]"),
            ([1, 1], r"got \[1, 1\]"),
            ([True], r"got \[True\]"),
            ([0, 1, 2, 3], "All 4 layers would be dropped"),
        ],
    )
    def test_numbers(self, dropped: list[int], match: str) -> None:
        network = deep("bert")
        with pytest.raises(SettingError, match=match):
            drop_layers(network, dropped)
        assert network.config.num_hidden_layers == len(network.bert.encoder.layer) == 4

    def test_places_that_differ(self) -> None:
        """ModernBERT's first layer has no norm; a GPT-2 may scale by the layer's number."""
        sizes = {**tiny.ENCODER, "num_hidden_layers": 4, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2}
        config = transformers.AutoConfig.for_model("modernbert", **sizes, eos_token_id=3)
        modern = transformers.AutoModel.from_config(config)
        with pytest.raises(
            UnsupportedModelError, match=r"'modernbert' layers differ: layer 1 can't take place 0, which has no"
        ):
            drop_layers(modern, [0])
        assert len(modern.layers) == modern.config.num_hidden_layers == 4
        types = list(modern.config.layer_types)
        assert drop_layers(modern, [1, 2]) == ["layers.1", "layers.2"]
        assert modern.config.layer_types == [types[0], types[3]]
        gpt = deep("gpt2", scale_attn_by_inverse_layer_idx=True)
        with pytest.raises(UnsupportedModelError, match="layer 1 can't take place 0, where attn has scaling="):
            drop_layers(gpt, [0])
        before = copy.deepcopy(gpt.config.to_dict())
        assert drop_layers(gpt, [3]) == ["transformer.h.3"]
        assert gpt.config.to_dict() == {**before, "n_layer": 3}

    def test_families(self) -> None:
        config = transformers.T5Config(
            vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(UnsupportedModelError, match=r"encoder-decoder 't5' .*structure='unstructured'"):
            drop_layers(transformers.T5ForConditionalGeneration(config), [0])
        with pytest.raises(UnsupportedModelError, match="'resnet'"):
            drop_layers(tiny.model("resnet"), [0])
        sizes = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_conv_pos_embeddings": 4}
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        config = transformers.Wav2Vec2Config(**sizes, num_conv_pos_embedding_groups=2, use_weighted_layer_sum=True)
        with pytest.raises(UnsupportedModelError, match=r"the shape of layer_weights goes by the number of layers"):
            drop_layers(transformers.Wav2Vec2ForSequenceClassification(config), [0])


def _plain(module: torch.nn.Module) -> dict[str, Any]:
    plain = (bool, int, float)
    skipped = ("training", "is_quantized")
    named = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in skipped}
    return {name: value for name, value in named.items() if isinstance(value, plain)}
