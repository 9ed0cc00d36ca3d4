"""What quantization-aware training left in a model: weights on their grid, and ranges in its record."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.quantization.training import fake
from hfshrink.quantization.training.sites import is_transposed
from hfshrink.record import StepRecord, report

OFF_GRID = 0.01
"""Of a code: folded weights are off their grid by rounding only; weights that changed since are off by up to 0.5."""

logger = logging.getLogger(__name__)


def learned_ranges(model: Any) -> tuple[dict[str, tuple[float, float]], dict[str, Tensor]] | None:
    """The ranges and scales that quantization-aware training found, for an export that needs no calibration.

    The ranges come from the record, and so outlive `save_pretrained` and `push_to_hub`. The weight scales are read off
    the folded weights, of which the largest has the outermost code: max|w| / 127, or max|w| / 2^(bits−1).

    Args:
        model: Trained with `QAT(…)` in this process, or loaded.

    Returns:
        (module -> (low, high) of its input; module -> scales (outputs, groups) of its weight), or None where the model
        was not trained so, or its weights have changed since. Without quantized activations the first is empty.

    Example:
        >>> learned_ranges(nn.Linear(2, 2)) is None
        True
    """
    step = trained_step(model)
    if step is None:
        return None
    names = [name for name in step.modules if _has_module(model, name)]
    scales = {name: weight_scales(model.get_submodule(name), step.settings) for name in names}
    changed = [name for name, scale in scales.items() if scale is None]
    if changed or not names:
        logger.warning(
            "The weights of %s have changed since %s: its learned ranges are left aside.",
            ", ".join(changed[:3]) or "this model",
            step.method,
        )
        return None
    ranges = step.results.get("ranges", {})
    found = {name: (float(ranges[name][0]), float(ranges[name][1])) for name in names if name in ranges}
    return found, {name: scale for name, scale in scales.items() if scale is not None}


def weight_scales(module: Any, settings: Mapping[str, Any]) -> Tensor | None:
    """Scales (outputs, groups) of a folded weight, above 0; None where it is not on that grid.

    Args:
        module: With a weight.
        settings: Of the record: `weight_bits` and `group_size`.
    """
    bits, size, weight = settings["weight_bits"], settings.get("group_size"), module.weight.detach().float()
    inputs = weight.shape[0] if is_transposed(module, size) else weight[0].numel()
    if size is not None and inputs % size:
        return None
    rows = fake.as_rows(weight, size, is_transposed(module, size))
    scale = fake.weight_scale(rows, bits).abs()
    codes = rows / scale
    off = (codes - codes.round()).abs().max()
    return scale.squeeze(-1) if bool(off <= OFF_GRID) else None


@contextmanager
def fake_quantized(model: Any) -> Iterator[Any]:
    """The quantized model in PyTorch: inputs go through their learned ranges as long as the context lasts.

    Raises:
        SettingError: The model was not trained with `QAT`, or its weights have changed since.

    Example:
        >>> with fake_quantized(nn.Linear(2, 2)): ...
        Traceback (most recent call last):
        hfshrink.errors.SettingError: Linear holds no ranges of quantization-aware training. Train it with QAT().
    """
    found = learned_ranges(model)
    if found is None:
        raise SettingError(
            f"{type(model).__name__} holds no ranges of quantization-aware training. Train it with QAT()."
        )
    with ExitStack() as stack:
        for name, limits in found[0].items():
            hook = model.get_submodule(name).register_forward_pre_hook(_quantize_input(*limits), with_kwargs=True)
            stack.callback(hook.remove)
        yield model


def _quantize_input(low: float, high: float) -> Any:
    scale, zero_point = (float(value) for value in fake.affine(torch.tensor(low), torch.tensor(high)))

    def on_grid(values: Tensor) -> Tensor:
        step = torch.tensor(scale, device=values.device)
        return fake.fake_quantize(values, step, -zero_point, fake.UNSIGNED - zero_point)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (on_grid(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": on_grid(kwargs["input"])}

    return hook


def trained_step(model: Any) -> StepRecord | None:
    """The last step of `QAT` in a model's record, others may have followed; None where it was not trained so."""
    if getattr(model, "config", None) is None:
        return None
    steps = [step for step in report(model).steps if step.technique == "quantize" and step.method.startswith("qat-")]
    return steps[-1] if steps else None


def _has_module(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
