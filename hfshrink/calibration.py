"""Run a model on some data and collect statistics of its modules: Gram matrices, squared gradients, ranges."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink import data
from hfshrink.errors import SettingError
from hfshrink.histograms import Histogram
from hfshrink.loading import find_processor, infer_task
from hfshrink.modules import select_modules

logger = logging.getLogger(__name__)


@dataclass
class ModuleStatistics:
    """What was collected for one module; fields that were not asked for are None.

    Attributes:
        tokens: Number of input vectors that were counted, padding excluded (of gradients: 0).
        backwards: Number of backward passes that were counted (of inputs: 0).
        input_gram: Σ x xᵀ over the inputs x of shape (in,); shape (in, in), float64.
        input_square: Σ x² over the inputs, the diagonal of the Gram matrix; shape (in,), float64. Its root is the norm
            that Wanda multiplies with the weights.
        squared_gradient: Σ g² over the backward passes, g the gradient of the weight; the weight's shape, float32.
        input_range: Smallest and largest input value.
        input_absmax: Largest absolute value of each input feature; shape (in,).
        input_histogram: Of all input values; its size does not depend on their number.
    """

    tokens: int = 0
    backwards: int = 0
    input_gram: Tensor | None = None
    input_square: Tensor | None = None
    squared_gradient: Tensor | None = None
    input_range: tuple[float, float] | None = None
    input_absmax: Tensor | None = None
    input_histogram: Histogram | None = None


def batches(
    calibration: Any, model: Any, processor: Any = None, *, batch_size: int = 8, samples: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Batches of model inputs on the model's device, from any form in which calibration data comes.

    Columns that the model's forward does not name are left out; `labels` stay where there are any.

    Args:
        calibration: A `datasets.Dataset` with raw or encoded rows, a Hub id, a folder that `save_to_disk` wrote, or an
            iterable of batches (mappings of tensors), which keep their size.
        model: The model that will read them.
        processor: Its tokenizer or image processor; None looks beside the model's files where rows are raw.
        batch_size: Rows per batch.
        samples: How many rows to take, spread evenly over the data set (of an iterable the first ones); None takes
            all.

    Raises:
        SettingError: Wrong type, no rows, nothing in a batch that the model reads, or a number below 1.
        CheckpointError: The folder or Hub id can't be read.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = BertModel(config)
        >>> rows = [{"input_ids": torch.ones(3, 5, dtype=torch.long), "title": "left out"}]
        >>> [batch] = batches(rows, model, samples=2)
        >>> {name: tuple(tensor.shape) for name, tensor in batch.items()}
        {'input_ids': (2, 5)}
    """
    for name, number in (("batch_size", batch_size), ("samples", 1 if samples is None else samples)):
        if number < 1:
            raise SettingError(f"{name} must be at least 1, got {number}.")
    if _is_dataset(calibration):
        found = _encoded_batches(calibration, model, processor, batch_size, samples)
    elif isinstance(calibration, Iterable) and not isinstance(calibration, Mapping | Tensor):
        found = _first_rows(calibration, samples)
    else:
        raise SettingError(
            "calibration must be a datasets.Dataset, a Hub id, a folder or an iterable of batches (dicts of tensors), "
            f"got {type(calibration).__name__}. A single batch goes into a list: [batch]."
        )
    return _place(found, model)


@contextmanager
def collect(
    model: nn.Module, what: str, include: str | Sequence[str] = "*", exclude: str | Sequence[str] = ()
) -> Iterator[dict[str, ModuleStatistics]]:
    """Collect statistics of modules while the block calls the model.

    Inputs are counted in calls of `model` itself, not of a part of it. Where such a call has an `attention_mask` of
    shape (batch, sequence), padding is left out of every input of shape (batch, sequence, in); inputs of other shapes
    count in full. In an encoder-decoder the mask serves the encoder, and `decoder_attention_mask` the rest.

    For `"squared_gradient"` the block calls `loss.backward()` itself, once per batch, and clears gradients as it
    likes. Each backward pass adds the square of the gradient of its whole batch. For the sum over examples of squared
    gradients, the empirical Fisher information, run batches of one example.

    Args:
        model: The model; its mode (train, eval) is the caller's.
        what: `"input_gram"`, `"input_square"`, `"input_absmax"`, `"input_range"`, `"input_histogram"` or
            `"squared_gradient"`: the field that is filled.
        include: Wildcards of module names. Linear and GPT-2's Conv1D are looked at, for gradients, ranges and
            histograms Conv2d too.
        exclude: Wildcards of names to leave out.

    Yields:
        Module name -> its statistics, complete when the block has ended. Modules that did not run are taken out then.

    Raises:
        SettingError: Unknown `what`, a wildcard without match, frozen weights where gradients are asked for, NaN or
            infinite values in a module, or nothing was run.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with collect(model, "input_gram") as stats:
        ...     _ = model(torch.tensor([[1.0, 2.0]]))
        >>> stats["0"].input_gram.tolist(), stats["0"].tokens
        ([[1.0, 2.0], [2.0, 4.0]], 1)
    """
    if what not in _UPDATES and what != "squared_gradient":
        raise SettingError(f"what must be one of {', '.join((*_UPDATES, 'squared_gradient'))}, got {what!r}.")
    modules = select_modules(model, _types(what), include, exclude)
    if not modules:
        raise SettingError(f"{type(model).__name__} has no module that {what!r} can be collected for.")
    stats = {name: ModuleStatistics() for name in modules}
    with ExitStack() as hooks:
        if what == "squared_gradient":
            _watch_gradients(modules, stats, hooks)
        else:
            _watch_inputs(model, modules, stats, _UPDATES[what], hooks)
        yield stats
    _drop_unused(stats, what)


def _add_gram(stats: ModuleStatistics, x: Tensor) -> None:
    x = x.double()
    gram = x.T @ x
    stats.input_gram = gram if stats.input_gram is None else stats.input_gram.add_(gram)


def _add_square(stats: ModuleStatistics, x: Tensor) -> None:
    square = x.double().square().sum(dim=0)
    stats.input_square = square if stats.input_square is None else stats.input_square.add_(square)


def _add_range(stats: ModuleStatistics, x: Tensor) -> None:
    low, high = (float(bound) for bound in torch.aminmax(x))
    before = stats.input_range or (low, high)
    stats.input_range = min(low, before[0]), max(high, before[1])


def _add_absmax(stats: ModuleStatistics, x: Tensor) -> None:
    largest = x.abs().amax(dim=0)
    stats.input_absmax = largest if stats.input_absmax is None else torch.maximum(stats.input_absmax, largest)


def _add_histogram(stats: ModuleStatistics, x: Tensor) -> None:
    stats.input_histogram = stats.input_histogram or Histogram()
    stats.input_histogram.add(x)


_UPDATES: dict[str, Callable[[ModuleStatistics, Tensor], None]] = {
    "input_gram": _add_gram,
    "input_square": _add_square,
    "input_absmax": _add_absmax,
    "input_range": _add_range,
    "input_histogram": _add_histogram,
}
_PER_FEATURE = ("input_gram", "input_square", "input_absmax")


def _types(what: str) -> tuple[type[nn.Module], ...]:
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear, Conv1D) if what in _PER_FEATURE else (nn.Linear, Conv1D, nn.Conv2d)


def _watch_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    stats: Mapping[str, ModuleStatistics],
    update: Callable[[ModuleStatistics, Tensor], None],
    hooks: ExitStack,
) -> None:
    """Call `update` with the inputs (tokens, in) of each module in each call of `model`."""
    running: list[dict[str, Any]] = []  # the arguments of the call of `model` that is running; empty between calls
    signature = inspect.signature(model.forward)
    encoder = _encoder_modules(model)

    def start(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = signature.bind_partial(*args, **kwargs).arguments
        running[:] = [{**named, **kwargs}]

    def stop(*_: Any) -> None:
        running.clear()

    def watch(name: str, module: nn.Module) -> Callable[..., None]:
        mask_name = "attention_mask" if encoder is None or module in encoder else "decoder_attention_mask"

        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not running:
                return  # a part called by itself, or a checkpointed layer that runs again in the backward pass
            x = (args or tuple(kwargs.values()))[0].detach()
            x = _without_padding(x, running[0].get(mask_name))
            if not x.numel():
                return
            if not bool(torch.isfinite(x).all()):
                raise SettingError(
                    f"The input of {name} has NaN or infinite values. Check the data, or load in float32."
                )
            stats[name].tokens += x.shape[0]
            update(stats[name], x)

        return see

    handles = [model.register_forward_pre_hook(start, with_kwargs=True)]
    handles += [model.register_forward_hook(stop, always_call=True)]
    handles += [m.register_forward_pre_hook(watch(name, m), with_kwargs=True) for name, m in modules.items()]
    for handle in handles:
        hooks.callback(handle.remove)


def _watch_gradients(
    modules: Mapping[str, nn.Module], stats: Mapping[str, ModuleStatistics], hooks: ExitStack
) -> None:
    """Add the square of each weight's gradient in each backward pass."""

    def watch(name: str) -> Callable[[Tensor], None]:
        def see(gradient: Tensor) -> None:
            if not bool(torch.isfinite(gradient).all()):
                raise SettingError(
                    f"The gradient of {name}.weight has NaN or infinite values. Check the data and the loss."
                )
            found, square = stats[name], gradient.detach().float().square()
            found.backwards += 1
            found.squared_gradient = square if found.squared_gradient is None else found.squared_gradient.add_(square)

        return see

    for name, module in modules.items():
        weight: Any = module.weight
        if not (weight.requires_grad and weight.is_leaf):
            raise SettingError(
                f"{name}.weight gets no gradient: it is frozen or parametrized. Unfreeze or exclude it."
            )
        hooks.callback(weight.register_hook(watch(name)).remove)


def _without_padding(x: Tensor, mask: Any) -> Tensor:
    """Inputs (batch, sequence, in) as (tokens, in) where `mask` (batch, sequence) is not 0; all for other shapes."""
    if isinstance(mask, Tensor) and mask.ndim == 2 and x.ndim == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device) != 0]
    return x.flatten(end_dim=-2) if x.ndim > 1 else x[None]


def _encoder_modules(model: Any) -> set[nn.Module] | None:
    """The modules of an encoder-decoder's encoder; None for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    return set(model.get_encoder().modules())


def _drop_unused(stats: dict[str, ModuleStatistics], what: str) -> None:
    unused = [name for name, found in stats.items() if not found.tokens and not found.backwards]
    if len(unused) == len(stats):
        call = "loss.backward()" if what == "squared_gradient" else "model(**batch)"
        raise SettingError(f"Nothing was collected: the block never called {call} for any of {len(stats)} modules.")
    if unused:
        logger.warning("collect: %d of %d modules did not run: %s", len(unused), len(stats), ", ".join(unused[:6]))
    for name in unused:
        del stats[name]


def _is_dataset(calibration: Any) -> bool:
    if isinstance(calibration, str | Path):
        return True
    import datasets

    return isinstance(calibration, datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset)


def _encoded_batches(
    calibration: Any, model: Any, processor: Any, batch_size: int, samples: int | None
) -> Iterator[Mapping[str, Any]]:
    dataset = data.read_dataset(calibration)
    if samples is not None and samples < len(dataset):
        dataset = dataset.select([row * len(dataset) // samples for row in range(samples)])
    if not any(name in dataset.column_names for name in data.INPUT_COLUMNS):
        processor = processor or find_processor(model)
        encoded = data.encode(dataset, model, processor, infer_task(model))
    else:
        encoded = data.encode(dataset, model, processor, task="")
    return (columns for _, columns in data.batches(encoded, model, processor, batch_size))


def _first_rows(given: Iterable[Any], samples: int | None) -> Iterator[Mapping[str, Any]]:
    left = samples
    for number, batch in enumerate(given):
        if not isinstance(batch, Mapping) or not any(isinstance(value, Tensor) for value in batch.values()):
            raise SettingError(
                f"Batch {number} of the calibration data must be a dict of tensors, got {type(batch).__name__}."
            )
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        if left is not None:
            tensors = {name: value[:left] if value.ndim else value for name, value in tensors.items()}
            left -= max((len(value) for value in tensors.values() if value.ndim), default=1)
        yield tensors
        if left is not None and left <= 0:
            return


def _place(found: Iterator[Mapping[str, Any]], model: Any) -> Iterator[dict[str, Tensor]]:
    parameters = inspect.signature(model.forward).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    device = next(model.parameters()).device
    batch = None
    for columns in found:
        batch = {name: value.to(device) for name, value in columns.items() if not named or name in named}
        if not batch:
            raise SettingError(f"The model reads none of {', '.join(columns)}; it reads {', '.join(sorted(named))}.")
        yield batch
    if batch is None:
        raise SettingError("The calibration data is empty: it has no batch.")
