"""Through a model layer by layer: what the modules of a layer are fed, once the layers before it are compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layerwise.counting import InputCounter
from hfshrink.layerwise.running import hidden_of, run_layer, without_cache
from hfshrink.layerwise.whole import valid_positions, whole_statistics
from hfshrink.modules import layer_stack

Batch = Mapping[str, Tensor]


def walk(
    model: Any,
    modules: Mapping[str, nn.Module],
    what: str,
    batches: Sequence[Batch],
    *,
    rerun: bool = True,
    sampled: bool = False,
) -> Iterator[dict[str, ModuleStatistics]]:
    """Statistics of the inputs of some modules, one layer at a time; change a layer's modules before asking for more.

    All batches wait in front of a layer as hidden states: the layer runs once to count, and, when the caller comes
    back, once more as it then is, for the next layer's inputs (`rerun`). Products are float32 over some thousand
    tokens, whose sums are added in float64. Modules outside the layers (poolers, embedding projections) come last,
    all at once, fed what the changed layers make. A model without one stack of layers (convolutional,
    encoder-decoder) is counted as a whole, unchanged. Padding does not count: of a decoder's inputs made of labels,
    positions whose label is none; of an encoder's output that a decoder reads, that of the encoder.

    Args:
        model: In eval mode; call under `torch.no_grad`.
        modules: Name -> Linear, Conv1D or Conv2d.
        what: `"input_gram"` or `"input_square"`, the field of the statistics that is filled. The inputs of a Conv2d
            are the patches that its kernel sees, flattened to (in·height·width).
        batches: Model inputs on the model's device; labels are left out, but for an encoder-decoder, whose decoder's
            inputs and padding they tell.
        rerun: False where the caller changes nothing, or where later layers shall be fed what the unchanged ones
            make: each layer runs once then.
        sampled: Whether an even sample of tokens will do, see `InputCounter`: a Gram matrix of all costs more than
            the forward pass itself.

    Yields:
        Module name -> statistics; every module once.

    Raises:
        SettingError: No batches, a module that saw no input, or NaN or infinite inputs.
        UnsupportedModelError: Layers that can't be run one by one.
    """
    given = [_inputs(model, batch) for batch in batches]
    if not given:
        raise SettingError("The calibration data is empty: it has no batch.")
    try:
        stack, layers = ("", nn.ModuleList()) if _is_pair(model) else layer_stack(model)
    except UnsupportedModelError:
        stack = ""
    if not stack:
        yield _complete(whole_statistics(model, modules, what, given, sampled=sampled))
        return
    chosen = [{name: m for name, m in modules.items() if name.startswith(f"{stack}.{i}.")} for i in range(len(layers))]
    outside = {name: module for name, module in modules.items() if not name.startswith(f"{stack}.")}
    waiting: list[_Calls] = []
    if len(outside) < len(modules):
        fed = _fed(model, outside, _first_row(given[0]))  # told before a layer is changed
        _complete({name: ModuleStatistics(tokens=len(inputs)) for name, inputs in fed.items()})
        waiting = _record_all(model, layers, given)
        to_end = bool(outside) and waiting[0].plain
        last = len(layers) - 1 if to_end else max(number for number, some in enumerate(chosen) if some)
        tokens = sum(int(calls.valid.sum()) for calls in waiting) if sampled else None
        for number in range(last + 1):
            counted = bool(chosen[number])
            if counted:
                with InputCounter(chosen[number], what, tokens) as counter:
                    _run(layers[number], number, waiting, counter, keeps=not rerun)
                yield _complete(counter.stats)
            if (rerun or not counted) and (number < last or to_end):
                _run(layers[number], number, waiting)
    if outside:
        yield _complete(_outside(model, layers, (outside, what, sampled), given, waiting))


def _run(
    layer: nn.Module,
    number: int,
    waiting: Sequence[_Calls],
    counter: InputCounter | None = None,
    *,
    keeps: bool = True,
) -> None:
    """Run a layer on all batches; what it makes waits in front of the next one, if `keeps`."""
    for calls in waiting:
        if counter is not None:
            counter.start(calls.valid)
        hidden = run_layer(layer, calls.hidden, calls.others[number])
        calls.hidden = hidden if keeps else calls.hidden


def _outside(
    model: Any,
    layers: nn.ModuleList,
    what: tuple[Mapping[str, nn.Module], str, bool],
    given: Sequence[Batch],
    waiting: Sequence[_Calls],
) -> dict[str, ModuleStatistics]:
    """Statistics of modules outside the layers, which run again only where the others need more than their result."""
    modules, field, sampled = what
    if waiting and waiting[0].plain and _is_enough(model, layers, modules, _first_row(given[0])):
        results = [calls.hidden for calls in waiting]
        return whole_statistics(
            model, modules, field, given, sampled=sampled, around=lambda i: _passed_through(layers, results[i])
        )
    return whole_statistics(model, modules, field, given, sampled=sampled)


def _is_enough(model: Any, layers: nn.ModuleList, modules: Mapping[str, nn.Module], row: Batch) -> bool:
    """Whether the last layer's output alone makes what modules outside the layers are fed."""
    outputs: list[Any] = []
    handle = layers[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        whole = _fed(model, modules, row)
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        return False
    with _passed_through(layers, outputs[0]):
        return _is_same(_fed(model, modules, row), whole)


def _is_pair(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """A batch without labels, where the model runs without."""
    if _is_pair(model):
        return dict(batch)
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _first_row(batch: Batch) -> Batch:
    """One row to try things on, of a batch whose tensors all have rows."""
    lengths = {len(values) if values.ndim else 0 for values in batch.values()}
    return {name: values[:1] for name, values in batch.items()} if len(lengths) == 1 and lengths != {0} else batch


def _fed(model: Any, modules: Mapping[str, nn.Module], batch: Batch) -> dict[str, list[Tensor]]:
    """What each module is fed with one batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    with ExitStack() as hooks:
        for name, module in modules.items():
            see = lambda _, args, kw, name=name: found[name].append((args or tuple(kw.values()))[0].clone())  # noqa: E731
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        if modules:
            model(**batch, **without_cache(model))
    return found


@dataclass
class _Calls:
    """One batch on its way: the hidden state (batch, sequence, hidden), and what else each layer is given."""

    valid: Tensor = field(default_factory=lambda: torch.empty(0))
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    plain: bool = True  # whether all layers return the hidden state and nothing else


class _Stop(Exception):  # noqa: N818  no error: ends a forward pass whose rest is of no use
    pass


def _record_all(model: Any, layers: nn.ModuleList, given: Sequence[Batch]) -> list[_Calls]:
    """Record all batches; the layers run for one row only, where they are called alike without."""
    row = _first_row(given[0])
    first = _record(model, layers, row)
    if first.plain:
        with _passed_through(layers):
            if _is_same(_record(model, layers, row).others, first.others):
                return [_record(model, layers, batch) for batch in given]
    return [_record(model, layers, batch) for batch in given]


@contextmanager
def _passed_through(layers: nn.ModuleList, result: Tensor | None = None) -> Iterator[None]:
    """Layers that return the hidden state that they are given, the last one `result` if that is given."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = lambda hidden, *_, **__: hidden
        if result is not None:
            layers[-1].forward = lambda *_, **__: result
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
    calls = _Calls()
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
            calls.valid = valid_positions(batch.get("attention_mask"), args[0].shape[:-1], args[0].device)
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


def _complete(stats: dict[str, ModuleStatistics]) -> dict[str, ModuleStatistics]:
    silent = [name for name, found in stats.items() if not found.tokens]
    if silent:
        raise SettingError(
            f"{len(silent)} modules saw no input: {', '.join(silent[:6])}. Exclude them or give more calibration data."
        )
    return stats
