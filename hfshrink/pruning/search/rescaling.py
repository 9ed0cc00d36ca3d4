"""Least squares multipliers of the kept units, so that each block gives what the dense one gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.blocks import layer_blocks
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import run_layer
from hfshrink.modules import layer_stack
from hfshrink.pruning.criteria.fisher import reader
from hfshrink.pruning.oneshot.replay import record_layers
from hfshrink.pruning.units.groups import UnitGroup, mask_units, weight_axis


@dataclass(frozen=True)
class Rescaling:
    """What least squares did for one group.

    Attributes:
        accepted: Whether the multipliers were folded into the weights.
        error_before: ‖A·1 − b‖² / ‖b‖², masked only.
        error_after: The same with the multipliers, whether accepted or not.
        largest: The largest |x|.
    """

    accepted: bool
    error_before: float
    error_after: float
    largest: float


@dataclass
class _Equations:
    """Sums over tokens of one group's kept features.

    Unit i gives a_i W_i to the output, so AᵀA = (WᵀW) ∘ Σ aaᵀ, summed over each unit's features: the contributions
    (tokens, out, units) are never made.
    """

    weight: Tensor  # W (out, features)
    gram: Tensor  # Σ aaᵀ (features, features)
    cross: Tensor  # Σ a ∘ (Wᵀb) (features,)
    square: float = 0.0  # Σ ‖b‖²

    def add(self, a: Tensor, b: Tensor) -> None:
        """Inputs a (tokens, features) and wanted outputs b (tokens, out)."""
        self.gram += a.T @ a
        self.cross += (a * (b @ self.weight)).sum(dim=0)
        self.square += float(b.square().sum())


def unit_multipliers(gram: Tensor, cross: Tensor, damping: float = 1.0) -> Tensor:
    """argmin_x ‖A x − b‖² + λ‖x − 1‖² from (AᵀA + λI)(x − 1) = Aᵀ(b − A·1) (Kwon 2022, arXiv:2204.09656, eq. 11).

    That is LSMR's solution for x − 1 with damp √λ. The error is never larger than that of x = 1.

    Args:
        gram: AᵀA, shape (units, units); column i of A is what unit i gives to the output.
        cross: Aᵀb, shape (units,).
        damping: λ > 0; the paper has 1.

    Returns:
        x, shape (units,), float64.

    Example:
        >>> contributions, wanted = torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([200.0, 100.0])
        >>> unit_multipliers(contributions.T @ contributions, contributions.T @ wanted).round(decimals=3).tolist()
        [2.0, 1.0]
    """
    gram, cross = gram.double(), cross.double()
    system = gram + damping * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    return 1 + torch.linalg.solve(system, cross - gram.sum(dim=1))


def block_sums(matrix: Tensor, numbers: Tensor, units: int) -> Tensor:
    """Sums of the blocks of a matrix (features, features) whose rows and columns belong to units: (units, units).

    Example:
        >>> block_sums(torch.ones(3, 3), torch.tensor([0, 0, 1]), 2).tolist()
        [[4.0, 2.0], [2.0, 1.0]]
    """
    rows = matrix.new_zeros(units, matrix.shape[1]).index_add_(0, numbers, matrix)
    return matrix.new_zeros(units, units).index_add_(1, numbers, rows)


@torch.no_grad()
def rescale_units(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    kept: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    target: Mapping[str, Tensor] | None = None,
    damping: float = 1.0,
    limit: float = 10.0,
) -> dict[str, Rescaling]:
    """Mask the dropped units, and give the others the multipliers that bring the sum behind each block nearest to b.

    Layer by layer in forward order. b is the dense block's output and what it is added to, less what it is added to
    now: so each block makes up for what the pruned and rescaled ones before it lost. A comes from these as well. Where
    a norm or a factor stands between a block and the sum (Gemma 2), b is the dense block's output alone.
    Padding does not count, nor do positions of the last layer that the model's answer does not depend on. The
    multipliers go into the reading weights, so the model has no new parts. If one of a group exceeds `limit`, that
    group stays masked only and the next ones go on. Memory stays near one layer's activations.

    Args:
        model: The dense model; changed in place.
        groups: Heads and neurons of its layers, all of them in forward order.
        kept: Group name -> booleans (units,).
        batches: Inputs on the model's device; some thousand tokens are enough.
        target: Milder masks whose outputs are b (the paper's half-way constraint); None takes the dense model.
        damping: λ of `unit_multipliers`.
        limit: Largest |x| that is accepted.

    Returns:
        Group name -> what was done, for groups that drop units.

    Raises:
        SettingError: NaN or infinite values in a block.
        UnsupportedModelError: Layers that can't be run one by one.
    """
    stack, layers = layer_stack(model)
    found: dict[str, Rescaling] = {}
    with eval_mode(model):
        calls = record_layers(model, list(layers), batches)
        dense, pruned = list(calls.hidden), list(calls.hidden)
        ups, norms = layer_blocks(model)[1].ups[0], _place_of_norms(model, dense[0], calls.others[0][0])
        for number, layer in enumerate(layers):
            read = calls.read if number == len(layers) - 1 else calls.valid
            here = _Layer(model, layer, calls.others[number], read, ups, norms)
            mine = [group for group in groups if group.name.startswith(f"{stack}.{number}.")]
            with _masked(model, mine, target or {}):
                wanted, dense = here.outputs(mine, dense)
            for group in mine:
                mask_units(model, group, kept[group.name])
                b = wanted.pop(group.name)
                if not bool(kept[group.name].all()):
                    equations = here.equations(group, kept[group.name], pruned, b)
                    found[group.name] = _solve(model, group, kept[group.name], equations, (damping, limit))
            pruned = here.outputs([], pruned)[1]
    return found


@dataclass
class _Layer:
    """One layer, how it is called per batch, and which positions (batch, sequence) count."""

    model: nn.Module
    layer: nn.Module
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    positions: Sequence[Tensor]
    ups: str  # the module that reads what the feed-forward block is added to, where norms stand last
    norms: str  # see `_place_of_norms`

    def outputs(
        self, groups: Sequence[UnitGroup], hidden: Sequence[Tensor]
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """What the reading modules write, biases left out, with what it is added to: group -> batch -> (tokens, out).

        And the hidden states behind the layer.
        """
        found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        after = []
        for index, state in enumerate(hidden):
            seen, new = self._observe(groups, state, index)
            after.append(new)
            for group in groups:
                bias = reader(self.model, group)[0].bias
                _, output, residual = seen[group.name]
                found[group.name].append((output if bias is None else output - bias) + residual)
        return found, after

    def equations(
        self, group: UnitGroup, kept: Tensor, hidden: Sequence[Tensor], wanted: Sequence[Tensor]
    ) -> _Equations:
        """The sums of one group over all batches, its inputs being those of the pruned model."""
        module, axis = reader(self.model, group)
        features = axis.positions[kept].flatten().to(module.weight.device)
        weight = _out_in(module).index_select(1, features).cpu().double()
        count = len(features)
        sums = _Equations(weight, torch.zeros(count, count).double(), torch.zeros(count).double())
        for index, (state, b) in enumerate(zip(hidden, wanted, strict=True)):
            inputs, _, residual = self._observe([group], state, index)[0][group.name]
            sums.add(inputs.index_select(1, features).cpu().double(), (b - residual).cpu().double())
        return sums

    def _observe(
        self, groups: Sequence[UnitGroup], state: Tensor, index: int
    ) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], Tensor]:
        """Inputs and outputs of the reading modules, and what these are added to, while the layer runs on one batch.

        All (tokens, features). Heads are added to the layer's input, neurons to what the norm before them reads or,
        where norms stand last, writes; where norms stand between, nothing counts as added.
        """
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        between: list[Tensor] = []
        rows = self.positions[index].flatten()
        with ExitStack() as hooks:
            for group in groups:

                def see(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = group.name) -> None:
                    seen[name] = (args[0].flatten(end_dim=-2)[rows], output.flatten(end_dim=-2)[rows])

                hooks.callback(reader(self.model, group)[0].register_forward_hook(see).remove)
            up = self.layer.get_submodule(self.ups)
            hooks.callback(
                up.register_forward_pre_hook(lambda _, args: between.append(args[0].flatten(end_dim=-2)[rows])).remove
            )
            after = run_layer(self.layer, state, self.calls[index])
        found = {}
        for group in groups:
            x, y = seen[group.name]
            if self.norms == "between":
                residual = torch.zeros_like(y)
            elif group.structure == "heads":
                residual = state.flatten(end_dim=-2)[rows]
            else:
                residual = between[0] if self.norms == "last" else after.flatten(end_dim=-2)[rows] - y
            found[group.name] = (x, y, residual)
        return found, after


def _place_of_norms(model: Any, state: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> str:
    """How the blocks of a layer meet the residual stream.

    "first": the layer gives the sum of its input and both blocks (Llama, GPT-2, ViT); "last": a norm reads the sum of
    the feed-forward and what this reads (BERT); "between": neither, as with norms on the blocks' outputs (Gemma 2).
    """
    layer = layer_stack(model)[1][0]
    attention, feed_forward = layer_blocks(model)
    written: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}

    def see(_: nn.Module, args: tuple[Any, ...], output: Any, name: str) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == state.numel():
            read[name] = args[0].reshape(state.shape)
        if name in (attention.o, feed_forward.down):
            written[name] = output.reshape(state.shape)

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            hooks.callback(module.register_forward_hook(partial(see, name=name)).remove)
        after = run_layer(layer, state, call)
    if _is_close(after, state + sum(written.values())):
        return "first"
    added = read[feed_forward.ups[0]] + written[feed_forward.down]
    return "last" if any(_is_close(found, added) for found in read.values()) else "between"


def _is_close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding, which in bfloat16 is nearly a percent of each number."""
    tolerance = max(1e-3, 8 * torch.finfo(other.dtype).eps)
    return bool(((one - other).abs() <= tolerance * (other.abs() + other.abs().mean())).all())


def _solve(
    model: nn.Module, group: UnitGroup, kept: Tensor, sums: _Equations, bounds: tuple[float, float]
) -> Rescaling:
    """Solve for the multipliers of one group, and fold them into its reading weights where they are small enough."""
    damping, limit = bounds
    module, axis = reader(model, group)
    units = int(kept.sum())
    numbers = torch.arange(units).repeat_interleave(axis.positions.shape[1])
    gram = block_sums(sums.gram * (sums.weight.T @ sums.weight), numbers, units)
    cross = torch.zeros(units).double().index_add_(0, numbers, sums.cross)
    if not bool(torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise SettingError(f"{axis.module} reads or writes NaN or infinite values. Check weights and data.")
    x = unit_multipliers(gram, cross, damping)
    largest = float(x.abs().max())
    accepted = bool(torch.isfinite(x).all()) and largest <= limit

    def error(x: Tensor) -> float:
        return max(0.0, float(x @ gram @ x - 2 * x @ cross) / sums.square + 1) if sums.square else 0.0

    if accepted:
        factors = torch.ones(axis.positions.numel(), dtype=torch.float64)
        factors[axis.positions[kept]] = x[:, None]
        _out_in(module).mul_(factors.to(module.weight.device, module.weight.dtype))
    return Rescaling(accepted, error(torch.ones(units).double()), error(x), largest)


def _out_in(module: Any) -> Tensor:
    """The weight as (out, in), a view."""
    return module.weight if weight_axis(module, "in") == 1 else module.weight.T


@contextmanager
def _masked(model: nn.Module, groups: Sequence[UnitGroup], target: Mapping[str, Tensor]) -> Iterator[None]:
    """Masks that are taken off afterwards."""
    modules = [(group, reader(model, group)[0]) for group in groups if group.name in target]
    weights = [module.weight.detach().clone() for _, module in modules]
    for group, _ in modules:
        mask_units(model, group, target[group.name])
    try:
        yield
    finally:
        for (_, module), weight in zip(modules, weights, strict=True):
            module.weight.copy_(weight)
