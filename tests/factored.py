"""What the tests of `factorize` share: calibration batches, and the slow way to a factored model."""

from __future__ import annotations

import copy

import torch
from torch import nn

import tiny
from hfshrink.calibration import collect
from hfshrink.factorization.factors import low_rank_factors
from hfshrink.factorization.sites import matrix

FAMILIES = ("bert", "llama", "gpt2", "vit", "resnet")


def batches(family, count=7):  # 126 tokens of text, fewer than 8 a feature: all of them count
    size = {"batch": 24} if family == "resnet" else {}
    return [tiny.inputs(family, seed=seed, **size) for seed in range(count)]


def labelled(count=8):
    return [tiny.inputs("bert", seed=seed) | {"labels": torch.tensor([0, 1, 1])} for seed in range(count)]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_unchanged(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def with_products(dense, ranks, grams=None):
    """The slow way: each weight of a copy replaced by the product of its factors."""
    slow = copy.deepcopy(dense)
    for name, rank in ranks.items():
        module = slow.get_submodule(name)
        gram = None if grams is None else grams[name]
        up, down = low_rank_factors(matrix(module), rank, input_gram=gram)
        product = up.double() @ down.double()
        module.weight.data = (
            product.T if type(module).__name__ == "Conv1D" else product.reshape(module.weight.shape)
        ).float()
    return slow


def gram_matrices(model, names, data):
    """Of whole forward passes; patches of convolutions by an independent unfold."""
    linears = [name for name in names if not isinstance(model.get_submodule(name), nn.Conv2d)]
    found = {}
    hooks = []
    for name in set(names) - set(linears):
        conv = model.get_submodule(name)

        def see(conv, args, name=name):
            patches = nn.Unfold(conv.kernel_size, conv.dilation, conv.padding, conv.stride)(args[0].double())
            rows = patches.transpose(1, 2).flatten(0, 1)
            found[name] = found.get(name, 0) + rows.T @ rows

        hooks.append(conv.register_forward_pre_hook(see))
    with torch.no_grad():
        if linears:
            with collect(model, "input_gram", include=linears) as stats:
                for batch in data:
                    model(**batch)
            found |= {name: stat.input_gram for name, stat in stats.items()}
        else:
            for batch in data:
                model(**batch)
    for hook in hooks:
        hook.remove()
    return found
