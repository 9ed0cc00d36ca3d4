"""Channels of convolutional nets: which filters, batch norms and reading layers must be cut together.

The groups come from torch-pruning's dependency graph, which follows autograd through one run. It takes every operation
that it does not know for element-wise, so each group is then proven on the model itself: with NaN written to some of
its channels and zeros put where the group says that they are read, every output must stay finite. What is read
elsewhere (by a softmax over channels, a pixel shuffle, the model's own output) lets the NaN through, and the group is
left whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError, UnsupportedModelError, require
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.layers.resized_conv import check_conv
from hfshrink.layers.resized_norm import check_norm
from hfshrink.pruning.units.cutting import cut_units
from hfshrink.pruning.units.groups import UnitAxis, UnitGroup, mask_units, named_groups

PROBES = 3
"""Random halves of its channels on which each group is proven."""

Batch = dict[str, Tensor] | Tensor
_Axis = tuple[str | None, str, list[int], list[int]]
"""Module name, side, feature numbers, and the unit that each of them belongs to."""

logger = logging.getLogger(__name__)


def channel_groups(
    model: nn.Module,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    *,
    inputs: Tensor | Mapping[str, Tensor] | None = None,
) -> list[UnitGroup]:
    """Sets of conv output channels that must be cut together, each with all that writes and reads them.

    Depthwise convolutions, batch norms and squeeze-excite gates belong to what writes a channel; all convolutions
    whose outputs are added (residual connections) form one group. Left whole are the model's outputs and inputs,
    grouped convolutions other than depthwise, and channels that pass a layer of another kind, such as a GroupNorm.
    Every group was tried: a copy of the model that lost half of its channels gives what the masked model gives.

    Args:
        model: A convolutional net, of transformers or any other; its values and modes stay.
        include: Wildcards of group names.
        exclude: Wildcards of names to leave out.
        inputs: One batch as the model takes it; needed for a model without a transformers config. Nets that flatten
            their feature maps are bound to its image size.

    Returns:
        Groups of structure "channels" in the model's order, each named after the first convolution that writes it.

    Raises:
        MissingDependencyError: torch-pruning is not installed.
        SettingError: `inputs` are needed, the model gives no finite output for them, or a wildcard matches no group.
        UnsupportedModelError: No channels can be cut: the model is no convolutional net.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 2))
        >>> [group] = channel_groups(model, inputs=torch.ones(1, 3, 5, 5))
        >>> group.name, group.units, group.writes[0].module, group.reads[0].module
        ('0.channels', 4, '0', '3')
        >>> group.reads[0].positions[1].tolist()
        [9, 10, 11, 12, 13, 14, 15, 16, 17]
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise UnsupportedModelError(_no_channels(model))
    batch = _example(model, inputs)
    with eval_mode(model):
        found = _graph_groups(model, batch)
        if found:
            found = named_groups(found, [include] if isinstance(include, str) else include, exclude)
        proven = _proven(model, found, batch)
    if not proven:
        raise UnsupportedModelError(_no_channels(model))
    whole = [group.name for group in found if all(group is not other for other in proven)]
    if whole:
        logger.info("Left whole, as more depends on their number or reads them: %s", ", ".join(whole))
    return proven


def _no_channels(model: Any) -> str:
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return (
        f"The family {family!r} ({type(model).__name__}) has no channels that can be cut; convolutional nets such as "
        "ResNet, MobileNetV2, EfficientNet and VGG have. For transformers use structure='heads', 'neurons' or "
        "'heads+neurons'; 'unstructured' works for all."
    )


def _example(model: Any, inputs: Tensor | Mapping[str, Tensor] | None) -> Batch:
    if isinstance(inputs, Tensor):
        return inputs
    if inputs is not None:
        return dict(inputs)
    if not hasattr(model, "config"):
        raise SettingError(
            f"{type(model).__name__} has no transformers config that tells its image size. "
            "Give one batch as it takes it: inputs=torch.randn(2, 3, height, width)."
        )
    dtype = next(module.weight.dtype for module in model.modules() if isinstance(module, nn.Conv2d))
    made = random_inputs(model, batch_size=1, sequence_length=1)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def _graph_groups(model: nn.Module, batch: Batch) -> list[UnitGroup]:
    """The groups of torch-pruning's dependency graph that consist of layers that can be cut."""
    torch_pruning = require("torch_pruning", extra="conv")
    twin = copy.deepcopy(model)  # autograd must see every parameter, and models may cache what they compute
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(twin, batch, forward_fn=_traced, verbose=False)
    names = {module: name for name, module in twin.named_modules()}
    groups, seen = [], set()
    for conv in twin.modules():
        if not isinstance(conv, nn.Conv2d) or conv not in graph.module2node or conv in seen or _is_depthwise(conv):
            continue
        cut_filters = graph.get_pruner_of_module(conv).prune_out_channels
        items = graph.get_pruning_group(conv, cut_filters, list(range(conv.out_channels)))
        seen |= {item.dep.target.module for item in items if graph.is_out_channel_pruning_fn(item.dep.handler)}
        group = _as_group(model, f"{names[conv]}.channels", conv.out_channels, _axes(graph, items, names))
        if group is not None:
            groups.append(group)
    return groups


def _axes(
    graph: Any, items: Any, names: dict[nn.Module, str]
) -> Iterator[tuple[str | None, str, list[int], list[int]]]:
    """(module name, side, features, the unit of each feature) of a group of torch-pruning's; no name for parameters.

    Its own markers for operations without weights are passed over.
    """
    for item in items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            yield None, "out", item.idxs, item.root_idxs
        elif module in names and next(module.parameters(), None) is not None:
            writes = graph.is_out_channel_pruning_fn(item.dep.handler)
            yield names[module], "out" if writes else "in", item.idxs, item.root_idxs


def _as_group(model: nn.Module, name: str, units: int, axes: Iterable[_Axis]) -> UnitGroup | None:
    """A group of units, or None where a layer in it can't be cut or its channels don't belong to units evenly."""
    writes: dict[str, UnitAxis] = {}
    reads: dict[str, UnitAxis] = {}
    for module, side, numbers, roots in axes:
        positions = _positions(units, numbers, roots)
        sides = reads if side == "in" else writes
        if module is None or positions is None or module in sides:
            return None
        layer: Any = model.get_submodule(module)
        if not _can_cut(layer) or int(positions.max()) >= layer.weight.shape[side == "in"]:
            return None
        sides[module] = UnitAxis(module, "in" if side == "in" else "out", positions)
    if units < 2 or not reads:
        return None
    return UnitGroup(name, "channels", tuple(_in_order(model, writes)), tuple(_in_order(model, reads)))


def _in_order(model: nn.Module, axes: dict[str, UnitAxis]) -> list[UnitAxis]:
    return [axes[name] for name, _ in model.named_modules() if name in axes]


def _positions(units: int, numbers: Sequence[int], roots: Sequence[int]) -> Tensor | None:
    """Feature numbers (units, k) from each feature's number and unit; None where units have different counts."""
    owners = torch.tensor(roots)
    if len(roots) == 0 or len(roots) != len(numbers) or len(torch.bincount(owners, minlength=units).unique()) != 1:
        return None
    return torch.tensor(numbers)[owners.argsort(stable=True)].view(units, -1).sort(dim=1).values


def _can_cut(module: nn.Module) -> bool:
    try:
        if isinstance(module, nn.Conv2d):
            check_conv(module)
        elif isinstance(module, nn.BatchNorm2d):
            check_norm(module)
        else:
            return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    except SettingError:
        return False
    return True


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.out_channels


def _proven(model: nn.Module, groups: list[UnitGroup], batch: Batch) -> list[UnitGroup]:
    """The groups that can be cut: tried all at once, and in halves where that fails."""
    if not groups:
        return []
    if not _is_finite(model, batch):
        raise SettingError(
            f"{type(model).__name__} gives NaN or infinity in eval mode on the inputs that its channels are traced "
            "with. Check its weights, or give real images: inputs=…"
        )
    return _closed(model, groups, batch)


def _closed(model: nn.Module, groups: list[UnitGroup], batch: Batch) -> list[UnitGroup]:
    if not any(_leaks(model, groups, batch, seed) for seed in range(PROBES)) and _cut_is_mask(model, groups, batch):
        return groups
    if len(groups) == 1:
        return []
    half = len(groups) // 2
    return _closed(model, groups[:half], batch) + _closed(model, groups[half:], batch)


def _cut_is_mask(model: nn.Module, groups: list[UnitGroup], batch: Batch) -> bool:
    """Whether a copy without half of each group's channels runs, and gives what it gave when they were masked.

    Constants with one value per channel stop it, and so does a factor that counts channels.
    """
    trial = copy.deepcopy(model)
    kept = {group.name: torch.arange(group.units) % 2 == 0 for group in groups}
    for group in groups:
        mask_units(trial, group, kept[group.name])
    masked = _outputs(trial, batch)
    cut_units(trial, groups, kept)
    try:
        cut = _outputs(trial, batch)
    except (RuntimeError, IndexError):  # sizes that don't fit each other
        return False
    return all(
        one.shape == other.shape and bool((one - other).abs().max() <= _tolerance(one))
        for one, other in zip(masked, cut, strict=True)
    )


def _tolerance(output: Tensor) -> float:
    """Bound on the difference that the order of sums makes, in units of the output."""
    return max(1e-3, 16 * torch.finfo(output.dtype).eps) * float(output.abs().max())


def _leaks(model: nn.Module, groups: list[UnitGroup], batch: Batch, seed: int) -> bool:
    """Whether NaN in a random half of each group's channels, with zeros at its reads, reaches an output."""
    generator = torch.Generator().manual_seed(seed)
    handles = []
    try:
        for group in groups:
            dropped = torch.randperm(group.units, generator=generator)[: group.units // 2]
            for axis in (*group.writes, *group.reads):
                module: Any = model.get_submodule(axis.module)
                dim = -1 if isinstance(module, nn.Linear) else -3
                index = axis.positions[dropped].flatten().to(module.weight.device)
                handles.append(_fill_hook(module, axis.side, dim, index))
        return not _is_finite(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _fill_hook(module: nn.Module, side: str, dim: int, index: Tensor) -> Any:
    """Make `module` read zeros, or write NaN, at the features `index` of axis `dim`."""
    if side == "in":
        return module.register_forward_pre_hook(lambda _, args: (args[0].index_fill(dim, index, 0), *args[1:]))
    return module.register_forward_hook(lambda _, __, output: output.index_fill(dim, index, float("nan")))


def _is_finite(model: nn.Module, batch: Batch) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in _outputs(model, batch))


def _traced(model: nn.Module, batch: Batch) -> list[Tensor]:
    """All floating tensors that the model gives for a copy of a batch: some layers work in place."""
    if isinstance(batch, Tensor):
        return list(_floats(model(batch.clone())))
    return list(_floats(model(**{name: tensor.clone() for name, tensor in batch.items()})))


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    return _traced(model, batch)


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floats(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _floats(part)
