"""What modules are fed in whole passes of a model, each position counted by the mask that belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.labels import IGNORED
from hfshrink.layerwise.counting import InputCounter
from hfshrink.layerwise.running import without_cache

Batch = Mapping[str, Tensor]


def whole_statistics(
    model: Any,
    modules: Mapping[str, nn.Module],
    what: str,
    batches: Sequence[Batch],
    *,
    sampled: bool = False,
    around: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> dict[str, ModuleStatistics]:
    """Statistics of the inputs of modules in passes of the whole model; all matrices are in memory at once.

    Args:
        model: In eval mode; call under `torch.no_grad`.
        modules: Name -> Linear, Conv1D or Conv2d.
        what: Field of the statistics that is filled.
        batches: Model inputs.
        sampled: As in `walk`.
        around: Number of a batch -> what its pass runs in.
    """
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    read = _modules_of_decoder(model, modules, batches[0]) if is_pair else set()
    sides = [
        ({name: m for name, m in modules.items() if name not in read}, [_mask(batch) for batch in batches]),
        ({name: m for name, m in modules.items() if name in read}, [_decoder_mask(batch) for batch in batches]),
    ]
    with ExitStack() as stack:
        counters = []
        for some, masks in sides:
            known = [int(mask.sum()) for mask in masks if mask is not None]
            tokens = sum(known) if sampled and len(known) == len(masks) else None
            counters.append((stack.enter_context(InputCounter(some, what, tokens)), masks))
        for number, batch in enumerate(batches):
            for counter, masks in counters:
                counter.start(masks[number])
            with around(number):
                model(**batch, **without_cache(model))
    found = {name: stats for counter, _ in counters for name, stats in counter.stats.items()}
    return {name: found[name] for name in modules}


def valid_positions(mask: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Booleans of `shape`: where `mask` is not 0, all where it is none of that shape."""
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.to(device) != 0
    return torch.ones(shape, dtype=torch.bool, device=device)


def _mask(batch: Batch) -> Tensor | None:
    """Valid positions (batch, sequence) of a text; None for other inputs."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return valid_positions(mask, ids.shape, ids.device)
    return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _decoder_mask(batch: Batch) -> Tensor | None:
    """Valid positions (batch, target) of a decoder: its mask, else where there is something to predict."""
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor):
        return mask != 0
    if isinstance(labels, Tensor) and labels.ndim == 2:
        return labels != IGNORED
    ids = batch.get("decoder_input_ids")
    return None if ids is None else torch.ones_like(ids, dtype=torch.bool)


def _modules_of_decoder(model: Any, modules: Mapping[str, nn.Module], batch: Batch) -> set[str]:
    """The modules outside an encoder that are fed something else than its output (batch, source, hidden)."""
    encoder = model.get_encoder()
    inside, output = set(encoder.modules()), list[Tensor]()
    found: set[str] = set()

    def see(x: Tensor, name: str) -> None:
        if not any(x is known for known in output):
            found.add(name)

    with ExitStack() as hooks:
        keep = lambda _, __, out: output.append(out[0])  # noqa: E731
        hooks.callback(encoder.register_forward_hook(keep).remove)
        for name, module in modules.items():
            if module not in inside:
                hook = lambda _, args, kw, name=name: see((args or tuple(kw.values()))[0], name)  # noqa: E731
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        model(**batch, **without_cache(model))
    return found
