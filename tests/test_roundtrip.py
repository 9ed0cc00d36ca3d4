"""Every layer kind in every tiny model: save, load, save and load again; and what a load without hfshrink does."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import cuts
import thin_layers
import tiny
from hfshrink.checkpoint import layer_map, set_layers, to_dense
from hfshrink.errors import SettingError
from hfshrink.layers import LAYER_KINDS, QuantizedLinear
from hfshrink.loading import load

KINDS = ("low_rank", "resized", "quantized")
CASES = [(family, kind) for kind in KINDS for family in tiny.CONFIGS] + [("gpt2", "resized_conv1d")]
FACTORED = [("gpt2", "low_rank_conv1d")]
FACTORED += [(family, "low_rank_embedding") for family in ("bert", "electra", "distilbert", "llama", "gpt2")]
FACTORED += [("resnet", kind) for kind in thin_layers.KINDS if "conv2d" in kind]
CASES += FACTORED
UNTIED = {"gpt2": {"tie_word_embeddings": False}, "resnet": {"num_labels": 4}}


def quantized(network: nn.Module, family: str) -> dict[str, QuantizedLinear]:
    """Random codes of 8, 4, 3 and 2 bits and of NF4, for rows and groups of 5, with and without zero points."""
    names = list(cuts.kept_indices(family)) if family in cuts.FAMILIES else [cuts.head(network)]
    generator, layers = torch.Generator().manual_seed(2), {}
    for number, name in enumerate(names):
        linear, bits = network.get_submodule(name), (4, 8, 3, 2)[number % 4]
        shape, size = linear.weight.shape, (None, 5)[number % 2]
        codes = torch.randint(2**bits, shape, generator=generator)
        scale = torch.rand(shape[0], 1 if size is None else -(-shape[1] // size), generator=generator) / 2**bits
        if number % 8 == 0:
            layers[name] = QuantizedLinear.from_dense(linear, codes, scale, bits=4, codebook="nf4")
            continue
        zeros = torch.randint(2**bits, scale.shape, generator=generator) if number % 3 else None
        layers[name] = QuantizedLinear.from_dense(linear, codes, scale, zeros, bits=bits, group_size=size)
    return layers


MAKERS: dict[str, Any] = {**cuts.MAKERS, "quantized": quantized}
MAKERS |= {
    kind: functools.partial(lambda network, _, kind: thin_layers.layers(network, kind), kind=kind)
    for _, kind in FACTORED
}


def compressed(family: str, kind: str) -> nn.Module:
    network = tiny.model(family, **UNTIED.get(family, {}))
    set_layers(network, MAKERS[kind](network, family))
    return network


def is_inside(family: str, kind: str) -> bool:
    """Whether layers of a kind stand in a family's base model, not only in its head."""
    return family in cuts.FAMILIES or (family, kind) in FACTORED or kind == "resized_conv1d"


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    for name, tensor in one.state_dict().items():
        assert tensor.dtype == other.state_dict()[name].dtype, name
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_every_kind_is_made_here() -> None:
    """Convolutions and batch norms go on the same trips in `tests/layers/test_resized_conv.py`."""
    assert {*MAKERS, "resized_conv2d", "resized_batch_norm2d"} == set(LAYER_KINDS)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_two_round_trips(family: str, kind: str, tmp_path: Path) -> None:
    network = compressed(family, kind)
    batch = tiny.inputs(family)
    expected = tiny.logits(network, batch)
    for trip in ("first", "second"):
        network.save_pretrained(tmp_path / trip)
        loaded, _ = load(tmp_path / trip)
        assert type(loaded) is type(network)
        assert layer_map(loaded) == layer_map(network) != {}
        assert_same_state(network, loaded)
        assert torch.equal(tiny.logits(loaded, batch), expected)
        network = loaded
    first, second = (json.loads((tmp_path / trip / "config.json").read_text()) for trip in ("first", "second"))
    assert first["quantization_config"] == second["quantization_config"]


@pytest.mark.parametrize(("family", "kind"), [case for case in CASES if case[0] in ("bert", "llama", "vit", "gpt2")])
def test_load_in_bfloat16(family: str, kind: str, tmp_path: Path) -> None:
    network = compressed(family, kind)
    network.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path, dtype=torch.bfloat16)
    assert_same_state(copy.deepcopy(network).to(torch.bfloat16), loaded)
    assert loaded.dtype == torch.bfloat16
    indices = [buffer for name, buffer in loaded.named_buffers() if ".kept_" in name]
    assert all(buffer.dtype == torch.int32 for buffer in indices)
    assert bool(indices) == kind.startswith("resized")
    codes = [b for name, b in loaded.named_buffers() if name.endswith((".weight", ".zero_point"))]
    assert all(buffer.dtype == torch.uint8 for buffer in codes)
    assert bool(codes) == (kind == "quantized")
    to_dense(network), to_dense(loaded)
    if kind.startswith("resized"):  # the products of the others are rounded once more
        assert_same_state(network.to(torch.bfloat16), loaded)


def test_sharded(tmp_path: Path) -> None:
    network = compressed("bert", "resized")
    network.save_pretrained(tmp_path, max_shard_size="6KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded, _ = load(tmp_path)
    assert_same_state(network, loaded)
    assert layer_map(loaded) == layer_map(network)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert", "llama", "vit"])
def test_cut_equals_masked(family: str) -> None:
    """Heads and neurons cut from the Linears compute what the dense model with zeros in their place computes."""
    batch = tiny.inputs(family)
    masked = tiny.model(family)
    for name, index in cuts.kept_indices(family).items():
        linear = masked.get_submodule(name)
        gone = torch.ones(linear.weight.shape[0 if "rows" in index else 1], dtype=torch.bool)
        gone[next(iter(index.values()))] = False
        with torch.no_grad():
            if "columns" in index:
                linear.weight[:, gone] = 0
            else:
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
    network = compressed(family, "resized")
    cut = tiny.logits(network, batch)
    assert not torch.allclose(cut, tiny.logits(tiny.model(family), batch), atol=1e-3)
    torch.testing.assert_close(cut, tiny.logits(masked, batch), atol=1e-6, rtol=1e-5)
    dense = to_dense(network)
    assert_same_state(masked, dense)
    assert torch.equal(tiny.logits(dense, batch), tiny.logits(masked, batch))


def test_heads_of_gpt2_cut_equal_masked_and_come_back() -> None:
    """The fused q, k and v are split where they are cut, also after a load and after to_dense."""
    masked, batch = tiny.model("gpt2"), tiny.inputs("gpt2")
    for name, layer in cuts.resized_conv1d(masked).items():
        if "c_proj" in name:
            masked.get_submodule(name).weight.data = layer.to_dense().weight.data
    network = tiny.model("gpt2")
    set_layers(network, cuts.resized_conv1d(network))
    torch.testing.assert_close(tiny.logits(network, batch), tiny.logits(masked, batch), atol=1e-6, rtol=1e-5)
    assert [layer.attn.split_size for layer in network.transformer.h] == [8, 16]
    dense = to_dense(network)
    assert [layer.attn.split_size for layer in dense.transformer.h] == [16, 16]
    torch.testing.assert_close(tiny.logits(dense, batch), tiny.logits(masked, batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dense_again_is_plain(family: str, tmp_path: Path) -> None:
    network = to_dense(compressed(family, "low_rank"))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    loaded, _ = load(tmp_path)
    assert_same_state(network, loaded)
    assert getattr(loaded, "hf_quantizer", None) is None


def test_base_model_and_other_heads(tmp_path: Path) -> None:
    """As with plain weights, the map of a classifier serves the bare model, another head, and the way back."""
    network = tiny.model("bert", num_labels=5)
    set_layers(network, cuts.mixed(network, "bert"))
    assert "classifier" in layer_map(network)
    network.save_pretrained(tmp_path / "classifier")
    base = AutoModel.from_pretrained(tmp_path / "classifier")
    inner = {name.removeprefix("bert."): spec for name, spec in layer_map(network).items() if name != "classifier"}
    assert layer_map(base) == inner
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, network.bert.state_dict()[name])
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    assert layer_map(again) == {f"bert.{name}": spec for name, spec in inner.items()}
    assert_same_state(again.bert, network.bert)


def test_unregistered_load_fails(tmp_path: Path) -> None:
    """Trap 1: a process that never imports hfshrink must not get a model with random layers."""
    folders = [tmp_path / kind / family for family, kind in CASES if is_inside(family, kind)]
    for folder in folders:
        compressed(folder.name, folder.parent.name).save_pretrained(folder)
    code = (
        "import sys\nfrom transformers import AutoModel\nfor folder in sys.argv[1:]:\n"
        "    try:\n        AutoModel.from_pretrained(folder)\n"
        "    except RuntimeError as error:\n        print('size mismatch' if 'ize' in str(error) else error)\n"
        "    else:\n        print('loaded')\n"
        "assert 'hfshrink' not in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:-1] == ["size mismatch"] * len(folders), run.stderr[-2000:]
    assert "Unknown quantization type, got hfshrink" in run.stderr


def test_ignoring_mismatched_sizes_is_refused(tmp_path: Path) -> None:
    """Trap 2."""
    compressed("bert", "low_rank").save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="ignore_mismatched_sizes=True re-initializes"):
        load(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(("family", "kind"), [*(("bert", kind) for kind in KINDS), *FACTORED[:2], *FACTORED[-3:]])
@pytest.mark.parametrize("loaded", [False, True])
def test_train_cast_and_save(family: str, kind: str, loaded: bool, tmp_path: Path) -> None:
    """Trap 3: what plain models can do, before and after a reload."""
    network = compressed(family, kind)
    layers = layer_map(network)
    if loaded:
        network.save_pretrained(tmp_path / "start")
        network, _ = load(tmp_path / "start")
        assert network.hf_quantizer.is_trainable
        assert network.hf_quantizer.is_serializable()
        assert not network.is_quantized
        assert not hasattr(network.config, "_is_quantized")
    before = copy.deepcopy(network.state_dict())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], save_strategy="no", use_cpu=True,
        learning_rate=0.1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    batch = tiny.inputs(family)
    labels = batch["input_ids"] if family == "gpt2" else [row % 2 for row in range(3)]
    rows = [{name: tensor[row] for name, tensor in batch.items()} | {"labels": labels[row]} for row in range(3)]
    Trainer(network, arguments, train_dataset=rows).train()
    after = network.state_dict()
    for name in (name for name in after if name.startswith(f"{next(iter(layers))}.") and ".kept_" not in name):
        is_fixed = kind == "quantized" and not name.endswith("bias")  # codes and scales stay, and the rest trains
        assert torch.equal(before[name], after[name]) == is_fixed, name
    assert all(torch.equal(before[name], after[name]) for name in after if ".kept_" in name)
    assert layer_map(network.half().float()) == layers
    network.half().save_pretrained(tmp_path / "half")
    again, _ = load(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.float16
    assert layer_map(again) == layers
    assert_same_state(network, again)
