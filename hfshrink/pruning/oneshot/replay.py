"""How a model calls its layers, recorded once, so that each of them can be run by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import frozen, hidden_of, without_cache


@dataclass
class LayerCalls:
    """How a stack of layers was called, one entry per batch.

    Attributes:
        hidden: Inputs of the first layer, (batch, sequence, hidden).
        others: What else each layer was given: layer -> batch -> (positional, by name). Layers share these tensors.
        read: Which positions of the last layer's output the model's answer depends on and that are no padding,
            booleans (batch, sequence). A classifier may read the first token only.
        valid: Which positions are no padding, booleans (batch, sequence).
    """

    hidden: list[Tensor] = field(default_factory=list)
    others: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    valid: list[Tensor] = field(default_factory=list)


def record_layers(model: Any, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Tensor]]) -> LayerCalls:
    """Run batches through a model, and keep what its layers need to be run again one by one.

    Args:
        model: In any mode; runs in eval mode, without gradients of its weights.
        layers: Its repeated layers, in the order in which they run, each fed with the output of the one before.
        batches: Inputs on the model's device; labels are left out.

    Raises:
        UnsupportedModelError: A layer that is not called once per batch, or not with a hidden state first.
    """
    calls = LayerCalls(others=[[] for _ in layers])
    leaf: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], number: int) -> None:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            raise UnsupportedModelError(
                f"Layer {number} of {type(model).__name__} is not called with a hidden state (batch, sequence, "
                "hidden) as its first argument, so it can't be run by itself. Prune without rescaling."
            )
        if number == 0:
            calls.hidden.append(args[0].detach())
        calls.others[number].append((args[1:], dict(kwargs)))

    def cut_graph(_: nn.Module, __: Any, output: Any) -> Any:
        leaf[:] = [hidden_of(output).detach().requires_grad_()]
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    with ExitStack() as stack, eval_mode(model), frozen(model):
        for number, layer in enumerate(layers):
            hook = partial(keep, number=number)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.callback(layers[-1].register_forward_hook(cut_graph).remove)
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"} | without_cache(model)
            leaf.clear()
            with torch.enable_grad():  # only what follows the last layer has a graph
                answer = model(**inputs)[0]
            if not leaf or any(len(found) != len(calls.hidden) for found in calls.others):
                raise UnsupportedModelError(
                    f"The {len(layers)} layers of {type(model).__name__} do not all run once per batch, so they can't "
                    "be run one by one. Prune without rescaling."
                )
            calls.valid.append(_valid(calls.hidden[-1], batch.get("attention_mask")))
            calls.read.append(_read_positions(answer, leaf[0]) & calls.valid[-1])
    return calls


def _valid(hidden: Tensor, mask: Any) -> Tensor:
    if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
        return mask != 0
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


@torch.enable_grad()
def _read_positions(answer: Tensor, leaf: Tensor) -> Tensor:
    """Where the gradient of the answer is not zero; weights that differ keep logits from cancelling out."""
    weights = torch.linspace(1, 2, answer.numel(), device=answer.device, dtype=answer.dtype).view_as(answer)
    (gradient,) = torch.autograd.grad((answer * weights).sum(), leaf)
    return gradient.abs().amax(dim=-1) != 0
