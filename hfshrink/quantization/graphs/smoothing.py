"""SmoothQuant (Xiao et al., arXiv:2211.10438): the spread of activations moves into the weights, where it costs less.

With s_j = max|X_j|^α / max|W_j|^(1−α) for input channel j, a layer computes (W · diag(s)) · (diag(s)⁻¹ · x): the same
numbers, but with an x that fits one scale. diag(s)⁻¹ goes into the normalization that makes x where nothing else reads
it; elsewhere it is a multiplication.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hfshrink.blocks import input_axis, layer_blocks
from hfshrink.calibration import collect
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.modules import layer_stack
from hfshrink.terminal import progress


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """The scale s = max|X|^α / max|W|^(1−α) per input channel (arXiv:2211.10438, equation 4); 1 where either is 0.

    Args:
        inputs: max|X_j| on calibration data; shape (in,).
        weights: max|W_j| over the outputs of all layers that read the input; shape (in,).
        alpha: α in [0, 1]: 0.5 splits the spread evenly; more moves more of it into the weights.

    Returns:
        Shape (in,), float32.

    Example:
        >>> smoothing_scale(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5)
        tensor([4.0000, 0.5000])
    """
    x, w = inputs.double(), weights.double()
    scale = (x**alpha / w ** (1 - alpha)).float()
    usable = (x > 0) & (w > 0) & torch.isfinite(scale) & (scale > torch.finfo(torch.float32).tiny)
    return torch.where(usable, scale, torch.ones_like(scale))


def smooth_model(
    model: Any, feed: Iterable[Mapping[str, Tensor]], alpha: float, kept_float: Sequence[str] = ()
) -> tuple[Any, dict[str, Any]]:
    """A copy of a model whose attention and feed-forward inputs are smoothed; its outputs are the same in float.

    Args:
        model: A transformer with a row in `hfshrink.blocks.BLOCKS`; left as it was.
        feed: Calibration batches.
        alpha: α, see `smoothing_scale`.
        kept_float: Modules that will stay float; groups with one of them are left alone.

    Returns:
        The copy, and a dict of `alpha`, `folded` (norms that took the scale in: exact and free) and `multiplied`
        (first modules of groups whose input is multiplied, since something else reads it too).

    Raises:
        UnsupportedModelError: The family has no row.
        SettingError: The data has NaN or infinite values.
    """
    groups = [group for group in _groups(model) if not set(group) & set(kept_float)]
    names = [name for group in groups for name in group]
    if not groups:
        raise SettingError("There is nothing to smooth: every attention and feed-forward block stays in float.")
    with torch.no_grad(), eval_mode(model):
        sources = _sole_sources(model, next(iter(feed)), groups)
        with collect(model, "input_absmax", include=names) as stats:
            for batch in progress(feed, "smoothing"):
                model(**batch)
    smoothed = copy.deepcopy(model)
    results: dict[str, Any] = {"alpha": alpha, "folded": [], "multiplied": []}
    for group in (group for group in groups if group[0] in stats):
        modules = [smoothed.get_submodule(name) for name in group]
        largest = torch.stack([_input_maxima(module) for module in modules]).amax(dim=0)
        inputs: Any = stats[group[0]].input_absmax
        scale = smoothing_scale(inputs, largest, alpha)
        _scale_weights(modules, scale)
        norm = sources.get(group[0])
        if norm is not None and _fold(smoothed.get_submodule(norm), scale):
            results["folded"].append(norm)
        else:
            _multiply_inputs(modules, 1 / scale)
            results["multiplied"].append(group[0])
    return smoothed, results


def _groups(model: Any) -> list[list[str]]:
    """Names of modules that read one tensor: query, key and value, and what leads into the neurons, of each layer."""
    try:
        attention, feed_forward = layer_blocks(model)
    except UnsupportedModelError:
        family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"smooth needs a transformer of a family that hfshrink.blocks.BLOCKS knows, got {family!r}. Leave smooth "
            "out, or use ranges='mse'."
        ) from None
    stack, layers = layer_stack(model)
    inside = [tuple(dict.fromkeys((attention.q, attention.k, attention.v))), feed_forward.ups]
    return [[f"{stack}.{layer}.{name}" for name in group] for layer in range(len(layers)) for group in inside]


def _sole_sources(model: Any, batch: Mapping[str, Tensor], groups: Sequence[Sequence[str]]) -> dict[str, str]:
    """First module of a group -> the norm whose output this group reads and nothing else does."""
    owners = {model.get_submodule(name): group[0] for group in groups for name in group}
    watch = _ReaderWatch()
    handles = []
    for name, module in model.named_modules():
        if module in owners:
            handles += [module.register_forward_pre_hook(watch.enter(owners[module]))]
            handles += [module.register_forward_hook(watch.leave)]
        elif _is_norm(module):
            handles += [module.register_forward_hook(watch.made(name))]
    try:
        with watch:
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    for norm, readers in watch.readers.items():
        if len(readers) == 1 and None not in readers:
            found[str(next(iter(readers)))] = norm
    return found


class _ReaderWatch(TorchFunctionMode):
    """Sees which group of modules, or other code (None), computes with the output of each norm."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, tuple[Tensor, str]] = {}  # the tensor is kept, so that its id stays its own
        self.readers: dict[str, set[str | None]] = {}
        self.inside: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | tuple) and not isinstance(result, torch.Size):  # a shape is no use of values
            for value in tree_leaves((args, kwargs)):  # also in lists, as `torch.cat` takes them
                if isinstance(value, Tensor) and id(value) in self.outputs:
                    self.readers[self.outputs[id(value)][1]].add(self.inside)
        return result

    def made(self, name: str) -> Any:
        def see(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.outputs[id(output)] = (output, name)
                self.readers.setdefault(name, set())

        return see

    def enter(self, group: str) -> Any:
        def see(*_: Any) -> None:
            self.inside = group

        return see

    def leave(self, *_: Any) -> None:
        self.inside = None


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm or RMSNorm of any family: a weight of one axis, and no other module inside."""
    weight = getattr(module, "weight", None)
    return "Norm" in type(module).__name__ and isinstance(weight, Tensor) and weight.ndim == 1


def _fold(norm: nn.Module, scale: Tensor) -> bool:
    """Divide the norm's output by `scale`; False where its weight does not act as a plain factor."""
    weight: Any = norm.weight
    width = len(weight)
    probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = norm(probe) / scale.to(weight)
        before = {name: parameter.detach().clone() for name, parameter in norm.named_parameters()}
        for parameter in norm.parameters():
            parameter.div_(scale.to(parameter))
        if torch.allclose(norm(probe), expected, rtol=1e-4, atol=1e-6):
            return True
        for name, parameter in norm.named_parameters():  # Gemma's norms multiply by 1 + weight
            parameter.copy_(before[name])
    return False


def _input_maxima(module: nn.Module) -> Tensor:
    """max|W_j| per input channel; shape (in,)."""
    weight: Any = module.weight
    return weight.detach().abs().amax(dim=1 - input_axis(module))


def _scale_weights(modules: Sequence[nn.Module], scale: Tensor) -> None:
    with torch.no_grad():
        for module in modules:
            weight: Any = module.weight
            weight.mul_(scale.to(weight) if input_axis(module) == 1 else scale.to(weight)[:, None])


def _multiply_inputs(modules: Sequence[nn.Module], factor: Tensor) -> None:
    """Multiply what the modules read, once for all of them."""
    last: list[tuple[Tensor, Tensor]] = []

    def scaled(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if not last or last[0][0] is not x:
            last[:] = [(x, x * factor.to(x))]
        return (last[0][1], *args[1:])

    for module in modules:
        module.register_forward_pre_hook(scaled)
