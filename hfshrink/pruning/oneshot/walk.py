"""Through a model layer by layer: what the modules of a layer are fed once all layers before it are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics, collect
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import layer_stack
from hfshrink.pruning.oneshot.replay import hidden_of, run_layer, without_cache

Batch = Mapping[str, Tensor]


def walk(
    model: Any, modules: Mapping[str, nn.Module], what: str, batches: Sequence[Batch]
) -> Iterator[dict[str, ModuleStatistics]]:
    """Statistics of the inputs of some modules, one layer at a time; prune a layer's modules before asking for more.

    All batches wait in front of a layer as hidden states: the layer runs once to count, and, when the caller comes
    back, once more as it then is, for the next layer's inputs. Modules outside the layers (poolers, embedding
    projections) come last, all at once, counted in runs of the whole pruned model. A model without one stack of layers
    (convolutional, encoder-decoder) is counted as a whole, unpruned. Padding does not count.

    Args:
        model: In eval mode; call under `torch.no_grad`.
        modules: Name -> Linear, Conv1D or Conv2d.
        what: `"input_gram"` or `"input_square"`, the field of the statistics that is filled. The inputs of a Conv2d
            are the patches that its kernel sees, flattened to (in·height·width).
        batches: Model inputs on the model's device; labels are left out, but for an encoder-decoder that makes its
            decoder's inputs of them.

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
        for stats in _walk_layers(model, layers, chosen, what, given) if inside else ():
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
    """Raise for modules outside the layers that nothing calls, before the layers are pruned."""
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


class _Stop(Exception):  # noqa: N818  no error: ends a forward pass whose rest is of no use
    pass


def _walk_layers(
    model: Any, layers: nn.ModuleList, chosen: Sequence[Mapping[str, nn.Module]], what: str, given: Sequence[Batch]
) -> Iterator[dict[str, ModuleStatistics]]:
    waiting = [_record(model, layers, batch) for batch in given]
    last = max(number for number, modules in enumerate(chosen) if modules)
    for number in range(last + 1):
        if chosen[number]:
            with _Counter(chosen[number], what) as counter:
                for calls in waiting:
                    counter.start(calls.valid)
                    run_layer(layers[number], calls.hidden, calls.others[number])
            yield counter.stats
        if number < last:
            for calls in waiting:
                calls.hidden = run_layer(layers[number], calls.hidden, calls.others[number])


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
                'returned, so it can\'t be run by itself. Use the method "magnitude", "taylor" or "fisher".'
            )
        if not number:
            calls.hidden = args[0]
        calls.others.append((args[1:], kwargs))
        if len(calls.others) == len(layers):
            raise _Stop

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last_output[:] = [hidden_of(output)]

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
        'Use the method "magnitude", "taylor" or "fisher".'
    )


def _whole_statistics(
    model: Any, modules: Mapping[str, nn.Module], what: str, given: Sequence[Batch]
) -> dict[str, ModuleStatistics]:
    convs = {name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
    linears = [name for name in modules if name not in convs]
    with ExitStack() as stack:
        found = stack.enter_context(collect(model, what, include=linears)) if linears else {}
        counter = stack.enter_context(_Counter(convs, what))
        for batch in given:
            counter.start(None)
            model(**batch, **without_cache(model))
    return {name: found.get(name) or counter.stats.get(name, ModuleStatistics()) for name in modules}


class _Counter:
    """Adds up the inputs of modules while it is open; modules that are fed the same tensor share the product."""

    def __init__(self, modules: Mapping[str, nn.Module], what: str) -> None:
        self.modules, self.what = modules, what
        self.stats = {name: ModuleStatistics() for name in modules}
        self._hooks = ExitStack()
        self.start(None)

    def start(self, valid: Tensor | None) -> None:
        """A batch begins, whose positions count where `valid` (batch, sequence) is true."""
        self._valid = valid
        self._shared: dict[int, tuple[Tensor, int, Tensor]] = {}  # id -> the input, kept alive; tokens; product

    def __enter__(self) -> _Counter:
        for name, module in self.modules.items():
            hook = lambda module, args, name=name: self._see(name, module, args[0])  # noqa: E731
            self._hooks.callback(module.register_forward_pre_hook(hook).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._shared.clear()

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if id(x) not in self._shared or isinstance(module, nn.Conv2d):
            rows = input_rows(module, x, self._valid)
            if not bool(rows.isfinite().all()):
                raise SettingError(
                    f"The input of {name} has NaN or infinite values. Check the data, or load in float32."
                )
            rows = rows.double()
            product = rows.T @ rows if self.what == "input_gram" else rows.square().sum(dim=0)
            self._shared[id(x)] = x, len(rows), product
        _, tokens, product = self._shared[id(x)]
        stats, before = self.stats[name], getattr(self.stats[name], self.what)
        setattr(stats, self.what, product.clone() if before is None else before.add_(product))
        stats.tokens += tokens


def input_rows(module: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The vectors that a module multiplies with its weight (out, in), one per row.

    Args:
        module: A Linear or Conv1D, or a Conv2d without groups and with zeros as padding.
        x: Its input, (…, in) or (batch, channels, height, width).
        valid: Which positions count, booleans (batch, sequence); only for inputs (batch, sequence, in).

    Returns:
        Shape (tokens, in), or (batch·places, channels·kernel height·kernel width).

    Example:
        >>> input_rows(nn.Conv2d(1, 1, 2), torch.arange(6.0).view(1, 1, 2, 3)).tolist()
        [[0.0, 1.0, 3.0, 4.0], [1.0, 2.0, 4.0, 5.0]]
    """
    if isinstance(module, nn.Conv2d):
        padding: Any = module.padding
        x = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride).transpose(1, 2)
    elif valid is not None and x.shape[:-1] == valid.shape:
        return x[valid]
    return x.flatten(end_dim=-2)


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
