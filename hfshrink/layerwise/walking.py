"""Through a model layer by layer: what the modules of a layer are fed, once the layers before it are compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics, collect
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layerwise.counting import InputCounter
from hfshrink.layerwise.running import hidden_of, run_layer, without_cache
from hfshrink.modules import layer_stack

Batch = Mapping[str, Tensor]
MANY = 3
"""Batches from which on it is worth trying to record them without running the layers."""


def walk(
    model: Any, modules: Mapping[str, nn.Module], what: str, batches: Sequence[Batch], *, rerun: bool = True
) -> Iterator[dict[str, ModuleStatistics]]:
    """Statistics of the inputs of some modules, one layer at a time; change a layer's modules before asking for more.

    All batches wait in front of a layer as hidden states: the layer runs once to count, and, when the caller comes
    back, once more as it then is, for the next layer's inputs (`rerun`). Products are float32 over some thousand
    tokens, whose sums are added in float64. Modules outside the layers (poolers, embedding
    projections) come last, all at once, counted in runs of the whole changed model. A model without one stack of
    layers (convolutional, encoder-decoder) is counted as a whole, unchanged. Padding does not count.

    Args:
        model: In eval mode; call under `torch.no_grad`.
        modules: Name -> Linear, Conv1D or Conv2d.
        what: `"input_gram"` or `"input_square"`, the field of the statistics that is filled. The inputs of a Conv2d
            are the patches that its kernel sees, flattened to (in·height·width).
        batches: Model inputs on the model's device; labels are left out, but for an encoder-decoder that makes its
            decoder's inputs of them.
        rerun: False where the caller changes nothing, or where later layers shall be fed what the unchanged ones
            make: each layer runs once then.

    Yields:
        Module name -> statistics; every module once.

    Raises:
        SettingError: No batches, a module that saw no input, or NaN or infinite inputs.
        UnsupportedModelError: Layers that can't be run one by one.
    """
    given = [_inputs(model, batch) for batch in batches]
    if not given:
        raise SettingError("The calibration data is empty: it has no batch.")
    inside: set[str] = set()
    try:
        stack, layers = layer_stack(model)
    except UnsupportedModelError:
        pass  # counted as a whole below
    else:
        inside = {name for name in modules if name.startswith(f"{stack}.")}
        _check_all_run(model, {name: module for name, module in modules.items() if name not in inside}, given[0])
        chosen = [
            {name: m for name, m in modules.items() if name.startswith(f"{stack}.{i}.")} for i in range(len(layers))
        ]
        for stats in _walk_layers(model, layers, chosen, (what, rerun), given) if inside else ():
            yield _complete(stats)
    outside = {name: module for name, module in modules.items() if name not in inside}
    if outside:
        yield _complete(_whole_statistics(model, outside, what, given))


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """A batch without labels, where the model runs without."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch:
        return dict(batch)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _check_all_run(model: Any, modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Raise for modules outside the layers that nothing calls, before the layers are changed."""
    if modules:
        silent = set(modules)
        with ExitStack() as hooks:
            for name, module in modules.items():
                hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: silent.discard(name)).remove)
            model(**batch, **without_cache(model))
        _complete({name: ModuleStatistics(tokens=name not in silent) for name in modules})


@dataclass
class _Calls:
    """One batch on its way: the hidden state (batch, sequence, hidden), and what else each layer is given."""

    valid: Tensor | None
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    plain: bool = True  # whether all layers return the hidden state and nothing else


class _Stop(Exception):  # noqa: N818  no error: ends a forward pass whose rest is of no use
    pass


def _walk_layers(
    model: Any,
    layers: nn.ModuleList,
    chosen: Sequence[Mapping[str, nn.Module]],
    how: tuple[str, bool],
    given: Sequence[Batch],
) -> Iterator[dict[str, ModuleStatistics]]:
    what, rerun = how
    waiting = _record_all(model, layers, given)
    last = max(number for number, modules in enumerate(chosen) if modules)
    for number in range(last + 1):
        counts = bool(chosen[number])
        if counts:
            with InputCounter(chosen[number], what) as counter:
                for calls in waiting:
                    counter.start(calls.valid)
                    hidden = run_layer(layers[number], calls.hidden, calls.others[number])
                    calls.hidden = calls.hidden if rerun else hidden
            yield counter.stats
        if number < last and (rerun or not counts):
            for calls in waiting:
                calls.hidden = run_layer(layers[number], calls.hidden, calls.others[number])


def _record_all(model: Any, layers: nn.ModuleList, given: Sequence[Batch]) -> list[_Calls]:
    """Record all batches; the layers themselves run for the first only, where they are called alike without."""
    first = _record(model, layers, given[0])
    if len(given) < MANY or not first.plain:
        return [first, *(_record(model, layers, batch) for batch in given[1:])]
    with _passed_through(layers):
        if _is_same(_record(model, layers, given[0]).others, first.others):
            return [first, *(_record(model, layers, batch) for batch in given[1:])]
    return [first, *(_record(model, layers, batch) for batch in given[1:])]


@contextmanager
def _passed_through(layers: nn.ModuleList) -> Iterator[None]:
    """Layers that return the hidden state that they are given."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = lambda hidden, *_, **__: hidden
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _is_same(a: Any, b: Any) -> bool:
    """Whether two structures of tensors and settings are equal."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_is_same(*pair) for pair in zip(a, b, strict=True))
    return a is b or (isinstance(a, bool | int | float | str) and a == b)


def _record(model: Any, layers: nn.ModuleList, batch: Batch) -> _Calls:
    """Run the model up to its last layer, and keep how it calls each layer."""
    calls = _Calls(_valid(batch))
    last_output: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = len(calls.others)
        follows = not number or (bool(args) and args[0] is last_output[0])
        if not args or not isinstance(args[0], Tensor) or not follows:
            raise UnsupportedModelError(
                f"Layer {number} of {type(model).__name__} is not called with the hidden state that the layer before "
                "returned, so it can't be run by itself. Choose a method that goes by weights or gradients only."
            )
        if not number:
            calls.hidden = args[0]
        calls.others.append((args[1:], kwargs))
        if len(calls.others) == len(layers):
            raise _Stop

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last_output[:] = [hidden_of(output)]
        calls.plain &= isinstance(output, Tensor)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        try:
            model(**batch, **without_cache(model))
        except _Stop:
            return calls
    raise UnsupportedModelError(
        f"Only {len(calls.others)} of the {len(layers)} layers of {type(model).__name__} ran. "
        "Choose a method that goes by weights or gradients only."
    )


def _whole_statistics(
    model: Any, modules: Mapping[str, nn.Module], what: str, given: Sequence[Batch]
) -> dict[str, ModuleStatistics]:
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    linears = [name for name in modules if name not in convs]
    with ExitStack() as stack:
        found = stack.enter_context(collect(model, what, include=linears)) if linears else {}
        counter = stack.enter_context(InputCounter(convs, what))
        for batch in given:
            counter.start(None)
            model(**batch, **without_cache(model))
    return {name: found.get(name) or counter.stats.get(name, ModuleStatistics()) for name in modules}


def _valid(batch: Batch) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _complete(stats: dict[str, ModuleStatistics]) -> dict[str, ModuleStatistics]:
    silent = [name for name, found in stats.items() if not found.tokens]
    if silent:
        raise SettingError(
            f"{len(silent)} modules saw no input: {', '.join(silent[:6])}. Exclude them or give more calibration data."
        )
    return stats
