"""Compressed layers for tiny models: low-rank ones anywhere, and weights cut so that heads and FFN neurons go."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.layers import CompressedLayer, LowRankLinear, ResizedConv1D, ResizedLinear
from hfshrink.pruning.units.cutting import cut_units
from hfshrink.pruning.units.groups import find_units, mask_units

HEAD_DIM = 4
"""hidden 16 / 4 heads in all of `tiny.CONFIGS`."""

BERT = {
    "stack": "{family}.encoder.layer",
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "o": "attention.output.dense",
    "ups": ("intermediate.dense",),
    "down": "output.dense",
}
FAMILIES: dict[str, dict] = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "distilbert": {
        "stack": "distilbert.transformer.layer",
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "o": "attention.out_lin",
        "ups": ("ffn.lin1",),
        "down": "ffn.lin2",
    },
    "llama": {
        "stack": "model.layers",
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": "self_attn.o_proj",
        "ups": ("mlp.gate_proj", "mlp.up_proj"),
        "down": "mlp.down_proj",
    },
    "vit": {
        "stack": "vit.layers",
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "o": "attention.o_proj",
        "ups": ("mlp.fc1",),
        "down": "mlp.fc2",
    },
}


def units(kept: list[int], size: int) -> Tensor:
    """The indices of whole blocks of `size` neighbours."""
    return torch.cat([torch.arange(size) + unit * size for unit in kept])


def kept_indices(family: str) -> dict[str, dict[str, Tensor]]:
    """Module name -> the rows or columns kept when each layer loses other heads and neurons.

    Layer 0 keeps two of four heads (in Llama: one of two whole groups) and 14 of 24 neurons, layer 1 keeps 23 neurons.
    """
    table = FAMILIES[family]
    stack = table["stack"].format(family=family)
    heads = units([2, 3], HEAD_DIM) if family == "llama" else units([0, 3], HEAD_DIM)
    found = {f"{stack}.0.{name}": {"rows": heads} for name in table["qkv"]}
    if family == "llama":  # heads 2 and 3 share the second of two key-value heads
        found |= {f"{stack}.0.{name}": {"rows": units([1], HEAD_DIM)} for name in table["qkv"][1:]}
    found[f"{stack}.0.{table['o']}"] = {"columns": heads}
    for layer, neurons in ((0, torch.arange(1, 24, 2)[:11]), (1, torch.arange(23))):
        found |= {f"{stack}.{layer}.{name}": {"rows": neurons} for name in table["ups"]}
        found[f"{stack}.{layer}.{table['down']}"] = {"columns": neurons}
    return found


def resized(network: nn.Module, family: str) -> dict[str, CompressedLayer]:
    """Heads and neurons cut; in models without such Linears the head loses rows."""
    kept = kept_indices(family) if family in FAMILIES else {head(network): {"rows": torch.tensor([0, 2])}}
    return {name: ResizedLinear.from_dense(network.get_submodule(name), **index) for name, index in kept.items()}


def low_rank(network: nn.Module, family: str) -> dict[str, CompressedLayer]:
    """Random factors of the first layer's Linears, ranks 1, 2, 3, …, or of the head."""
    names = list(kept_indices(family)) if family in FAMILIES else [head(network)]
    generator = torch.Generator().manual_seed(1)
    layers: dict[str, CompressedLayer] = {}
    for rank, name in enumerate(names, start=1):
        linear = network.get_submodule(name)
        rank = min(rank, linear.out_features - 1)
        up = torch.randn(linear.out_features, rank, generator=generator) / 4
        down = torch.randn(rank, linear.in_features, generator=generator) / 4
        layers[name] = LowRankLinear.from_dense(linear, up, down)
    return layers


def mixed(network: nn.Module, family: str) -> dict[str, CompressedLayer]:
    """Both kinds: FFN and heads cut, and the last Linear of the model factorized."""
    both = resized(network, family)
    name = [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and n not in both][-1]
    linear = network.get_submodule(name)
    return both | {name: LowRankLinear.from_dense(linear, torch.ones(linear.out_features, 1), linear.weight[:1])}


def head(network: nn.Module) -> str:
    """The name of the model's last Linear."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]


def resized_conv1d(network: nn.Module, family: str = "gpt2") -> dict[str, CompressedLayer]:
    """GPT-2 without two of four heads and 13 of 64 neurons in layer 0, and one neuron less in layer 1."""
    assert family == "gpt2"
    stack = "transformer.h"
    heads = units([0, 3], HEAD_DIM)
    fused = torch.cat([heads + 16 * part for part in range(3)])
    kept = {f"{stack}.0.attn.c_attn": {"outputs": fused}, f"{stack}.0.attn.c_proj": {"inputs": heads}}
    for layer, neurons in ((0, torch.arange(13, 64)), (1, torch.arange(63))):
        kept[f"{stack}.{layer}.mlp.c_fc"] = {"outputs": neurons}
        kept[f"{stack}.{layer}.mlp.c_proj"] = {"inputs": neurons}
    return {name: ResizedConv1D.from_dense(network.get_submodule(name), **index) for name, index in kept.items()}


MAKERS = {"low_rank": low_rank, "resized": resized, "resized_conv1d": resized_conv1d}


def uneven_units(network: nn.Module, structure: str = "heads+neurons") -> dict[str, Tensor]:
    """Group -> units that stay: other ones, and other numbers, in each layer."""
    kept = {}
    for number, group in enumerate(find_units(network, structure)):
        mask = torch.arange(group.units) % 3 != number % 3
        mask[1] = group.units == 2 or mask[1]
        if group.structure == "heads" and number > 1:
            mask[:] = True
        kept[group.name] = mask
    return kept


def even_units(network: nn.Module, structure: str) -> dict[str, Tensor]:
    """Group -> half of the units, the even or odd ones: as many in each layer."""
    groups = find_units(network, structure)
    return {group.name: torch.arange(group.units) % 2 == number % 2 for number, group in enumerate(groups)}


def masked(network: nn.Module, structure: str, kept: dict[str, Tensor]) -> Any:
    """A copy with zeros where the units that go are read."""
    network = copy.deepcopy(network)
    for group in find_units(network, structure):
        mask_units(network, group, kept[group.name])
    return network


def cut(network: nn.Module, structure: str, kept: dict[str, Tensor]) -> Any:
    """A copy without the units that go."""
    network = copy.deepcopy(network)
    cut_units(network, find_units(network, structure), kept)
    return network
