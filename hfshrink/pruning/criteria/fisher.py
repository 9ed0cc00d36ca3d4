"""Fisher information of heads and neurons: gradients of multiplicative masks, one per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import frozen, without_cache
from hfshrink.loading import infer_task
from hfshrink.pruning.units.groups import UnitAxis, UnitGroup


def unit_gradients(
    model: nn.Module, groups: Sequence[UnitGroup], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """∂ℒ/∂m at m = 1, where m multiplies each unit where it is read (Kwon et al. 2022, arXiv:2204.09656).

    One backward pass per batch gives every sample its own gradient, as each has masks of its own; the reference
    implementation squares sums over a batch instead. ℒ is the sum over the sample's labels: one of a classifier, all
    tokens of a language model. Weights get no gradients.

    Args:
        model: A model that computes a loss from labels; runs in eval mode.
        groups: Heads or neurons of it.
        batches: Inputs with labels, on the model's device.

    Returns:
        Group name -> gradients (samples, units), float32, on the CPU: 4 bytes per sample and unit.

    Raises:
        SettingError: No labels, no batch, or gradients that are NaN or infinite.
        UnsupportedModelError: Units that more than one module reads, or that do not run.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfshrink.pruning.units.groups import find_units
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "labels": torch.tensor([0, 1, 1])}
        >>> found = unit_gradients(model, find_units(model, "heads+neurons"), [batch])
        >>> {name.rpartition(".")[2]: tuple(gradients.shape) for name, gradients in found.items()}
        {'heads': (3, 2), 'neurons': (3, 6)}
    """
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    masks: dict[str, Tensor] = {}
    with ExitStack() as hooks, eval_mode(model), frozen(model), torch.enable_grad():
        for group in groups:
            module, axis = reader(model, group)
            hook = _multiply(masks, group.name, unit_numbers(axis).to(module.weight.device))
            hooks.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            rows = next(len(value) for value in batch.values() if value.ndim)
            device = next(iter(batch.values())).device
            masks.update({g.name: torch.ones(rows, g.units, device=device, requires_grad=True) for g in groups})
            loss = _summed_loss(model, batch, rows)
            gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
            for name, gradient in zip(masks, gradients, strict=True):
                found[name].append(_checked(name, gradient))
    if not groups or not found[groups[0].name]:
        raise SettingError(f"Gradients need groups of units and batches, got {len(groups)} groups and no batch.")
    return {name: torch.cat(gradients) for name, gradients in found.items()}


def diagonal_fisher(gradients: Tensor) -> Tensor:
    """Mean of g² over samples: gradients (samples, units) -> importance (units,), float64.

    Half of it is the rise of the loss when the unit goes alone, to second order (arXiv:2204.09656, eq. 7).

    Example:
        >>> diagonal_fisher(torch.tensor([[1.0, 0.0], [3.0, -2.0]])).tolist()
        [5.0, 2.0]
    """
    return gradients.double().square().mean(dim=0)


def reader(model: nn.Module, group: UnitGroup) -> tuple[Any, UnitAxis]:
    """The module that reads a group's units, and the axis of that reading.

    Raises:
        UnsupportedModelError: Several modules read them, or one that is no matrix, as in conv nets.
    """
    module: Any = model.get_submodule(group.reads[0].module)
    if len(group.reads) != 1 or module.weight.ndim != 2:
        raise UnsupportedModelError(
            f"{group.name} has {group.units} {group.structure} that {len(group.reads)} modules read "
            f"({group.reads[0].module}, …). This method serves heads and neurons, which one Linear reads."
        )
    return module, group.reads[0]


def unit_numbers(axis: UnitAxis) -> Tensor:
    """The unit that each feature of an axis belongs to, shape (features,).

    Example:
        >>> unit_numbers(UnitAxis("o", "in", torch.tensor([[0, 1], [2, 3]]))).tolist()
        [0, 0, 1, 1]
    """
    numbers = torch.empty(axis.positions.numel(), dtype=torch.long)
    numbers[axis.positions] = torch.arange(len(axis.positions))[:, None]
    return numbers


def _multiply(masks: Mapping[str, Tensor], name: str, numbers: Tensor) -> Callable[..., tuple[Any, ...]]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, mask = args[0], masks[name]
        per_row = x.reshape(len(mask), -1, x.shape[-1])  # some families flatten (batch, sequence) before a Linear
        masked = per_row * mask[:, numbers].unsqueeze(1).to(x.dtype)
        return masked.reshape(x.shape), *args[1:]

    return hook


def _summed_loss(model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
    """The loss that a model averages over a batch, times the number of terms in the mean."""
    output = model(**batch, **without_cache(model))
    loss = getattr(output, "loss", None)
    if loss is None:
        raise SettingError(
            f"Calibration needs labels for this method: {type(model).__name__} gave no loss for a batch with "
            f"{', '.join(batch)}. Add a column of labels."
        )
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2 or output.logits.ndim != 3:
        return loss * rows
    is_causal = infer_task(model) == "text-generation"  # the first token is predicted by nobody
    return loss * int(((labels[:, 1:] if is_causal else labels) != -100).sum())


def _checked(name: str, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise UnsupportedModelError(f"The loss does not depend on {name}: it did not run. Exclude it.")
    if not bool(torch.isfinite(gradient).all()):
        raise SettingError(
            f"The gradients of {name} are NaN or infinite. Check weights, data and labels, or load in float32."
        )
    return gradient.detach().float().cpu()
