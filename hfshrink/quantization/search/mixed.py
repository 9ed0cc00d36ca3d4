"""Mixed precision: few bits where the loss hardly notices, more where it does, within a budget of bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfshrink.checkpoint import check_free_slot, set_layers
from hfshrink.errors import SettingError
from hfshrink.quantization.search.plan import (
    check_plot_path,
    make_plan,
    measure_of,
    measure_plan,
    measure_rises,
    trial_of,
)
from hfshrink.quantization.search.precisions import DTYPES, Precision, check_precision, quantized_layer, weight_bytes
from hfshrink.quantization.weights.casting import cast_weights
from hfshrink.streaming.dtypes import is_kept_float32

WEIGHT_PRECISIONS = ("nf4", "int8", "bf16")


def make_mixed_weights(  # noqa: PLR0913
    model: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    budget_bytes: int | None = None,
    size_ratio: float | None = None,
    budget_ms: float | None = None,
    precisions: Sequence[str] = WEIGHT_PRECISIONS,
    group_size: int | None = None,
    samples: int = 256,
    processor: Any = None,
    plot: str | Path | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `mixed`: each Linear of a PyTorch model at the precision that a budget of bytes allows it.

    The damage of each (module, precision) is measured on calibration rows, one at a time (KL from the float model of
    classifiers, the loss rise of all others), and the choice with the
    least sum of rises within the budget is found by dynamic programming. Coded weights become `QuantizedLinear`; all
    that stays float (embeddings, norms, heads, and the modules for which that was chosen) is cast to the one float
    precision of `precisions`, where there is one. Codes are unpacked in each call: this saves memory, not time.

    Args:
        model: The model, changed in place.
        kept_float: Names of modules that are not quantized.
        calibration: Rows, in any form that calibration data may have; with labels where the model is no classifier.
        budget_bytes: Bytes of all parameters and buffers afterwards.
        size_ratio: The same as a share of the bytes now; one of the two is needed.
        budget_ms: Refused: fewer bits make no call of PyTorch faster.
        precisions: Two or more of int2, int3, int4, nf4, int8 and at most one of fp32, bf16 and fp16.
        group_size: Neighbours in a row that share a scale; None takes whole rows at 8 bits and 64 below.
        samples: Calibration rows to measure on.
        processor: Tokenizer or image processor of raw rows; None looks beside the model's files.
        plot: Where to write a heat-map of the plan, .png or .svg; None writes none.

    Returns:
        The same model, the names of the modules that became codes, and the plan with predicted and measured rise.

    Raises:
        SettingError: No budget or two, one that is too small (the message says the least that is possible), precisions
            that are unknown or can't be mixed, no rows or labels, no Linear left, or a slot in the config that
            another quantization holds.
    """
    if budget_ms is not None:
        raise SettingError(
            "mixed has no budget of milliseconds: codes are unpacked in each call, so fewer bits make none faster. "
            "Give budget_bytes or size_ratio; onnx-mixed takes budget_ms."
        )
    check_free_slot(model)
    chosen = check_precisions(precisions)
    if plot is not None:
        check_plot_path(plot)
    if calibration is None:
        raise SettingError("Mixed precision is chosen by measured damage: give rows, calibration=….")
    trials = {
        name: None if precision.is_float and DTYPES[name] == model.dtype else trial_of(precision, group_size)
        for name, precision in chosen.items()
    }
    linears, dtype = _candidates(model, kept_float), _dtype_of(chosen, model.dtype)
    budget = check_budget(budget_bytes, size_ratio, model_bytes(model))
    rest = _rest_bytes(model, linears, dtype)
    sizes = {
        name: {p.name: weight_bytes(_shape(linear), p, group_size, dtype.itemsize) for p in chosen.values()}
        for name, linear in linears.items()
    }
    check_least(budget, rest, sizes)
    how = {"samples": samples, "processor": processor}
    plan = make_plan(measure_rises(model, calibration, list(linears), trials, **how), sizes, budget - rest)
    picked = {name: trials[option] for name, option in plan.precisions.items()}
    dense_loss, rise = measure_plan(model, calibration, picked, **how)
    plan = dataclasses.replace(plan, measured_rise=rise)
    coded = [name for name, option in plan.precisions.items() if not chosen[option].is_float]
    layers = {name: quantized_layer(linears[name], chosen[plan.precisions[name]], group_size) for name in coded}
    if any(tensor.dtype != dtype for tensor in _cast(model, dtype)):
        cast_weights(model, dtype=dtype)  # it refuses what does not fit before it changes anything
    set_layers(model, {name: layer.to(dtype) for name, layer in layers.items()})
    if plot is not None:
        plan.plot(plot)
    facts = {"budget_bytes": budget, "memory_bytes": model_bytes(model), "measure": measure_of(model)}
    facts |= {"dense_loss": dense_loss, "samples": samples}
    return model, coded, {"plan": plan.to_dict(), **facts}


def _dtype_of(chosen: Mapping[str, Precision], own: torch.dtype) -> torch.dtype:
    """Of all that stays float: that of the one float precision, or the model's own."""
    dtype = next((DTYPES[name] for name, precision in chosen.items() if precision.is_float), own)
    if dtype == torch.float32 != own:
        raise SettingError(f"The model is in {own}: fp32 can't bring back what was rounded. Take another one.")
    return dtype


def check_budget(budget_bytes: Any, size_ratio: Any, total: int) -> int:
    """The budget in bytes, from one of the two ways to say it.

    Raises:
        SettingError: None or both are given, or a number out of range.

    Example:
        >>> check_budget(None, 0.25, 1000)
        250
    """
    if (budget_bytes is None) == (size_ratio is None):
        raise SettingError(
            f"Give one of budget_bytes and size_ratio, got {budget_bytes!r} and {size_ratio!r}. The model has "
            f"{total:,} bytes now: size_ratio=0.25 allows {total // 4:,}."
        )
    if size_ratio is not None:
        if isinstance(size_ratio, bool) or not isinstance(size_ratio, int | float) or not 0 < size_ratio <= 1:
            raise SettingError(
                f"size_ratio is the share of the model's bytes that may stay, in (0, 1], got {size_ratio!r}."
            )
        return math.floor(size_ratio * total)
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 1:
        raise SettingError(f"budget_bytes must be a whole number of at least 1, got {budget_bytes!r}.")
    return budget_bytes


def check_least(budget: int, rest: int, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Raise `SettingError` where a budget in bytes does not hold the rest and the cheapest precision everywhere."""
    least = rest + sum(min(row.values()) for row in sizes.values())
    if budget < least:
        raise SettingError(
            f"A budget of {budget:,} bytes is too small: with the cheapest precision everywhere the model takes "
            f"{least:,} bytes, {rest:,} of them embeddings and all else that is not chosen for."
        )


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_precisions(names: Any) -> dict[str, Precision]:
    """The precisions of some names, after checking that they can be mixed.

    Raises:
        SettingError: Unknown ones, fewer than two, repeats, or two float ones.

    Example:
        >>> list(check_precisions(["nf4", "bf16"]))
        ['nf4', 'bf16']
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise SettingError(f"precisions must be a list such as {list(WEIGHT_PRECISIONS)}, got {names!r}.")
    chosen = {name: check_precision(name) for name in names}
    floats = [name for name, precision in chosen.items() if precision.is_float]
    if len(chosen) != len(names) or len(chosen) < 2 or len(floats) > 1:
        raise SettingError(
            "precisions must be two or more different ones, at most one of them float (what is not coded takes its "
            f"type), got {', '.join(map(str, names))}."
        )
    return chosen


def _candidates(model: Any, kept_float: Sequence[str]) -> dict[str, nn.Linear]:
    """The plain Linears that may become codes: no heads, no tied weights, none that the family keeps in float32."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {*tied, *tied.values()}
    fixed = {*(getattr(model, "_keep_in_fp32_modules", None) or ()), *(model._keep_in_fp32_modules_strict or ())}
    found = {
        name: module
        for name, module in model.named_modules()
        # subclasses have a forward of their own, or parents that read their weight
        if type(module) is nn.Linear
        and name not in kept_float
        and f"{name}.weight" not in tied_names
        and not fixed & set(name.split("."))
    }
    if not found:
        raise SettingError(
            f"{type(model).__name__} has no Linear to quantize: all are heads, tied, excluded or of another class "
            "(GPT-2's Conv1D can't be coded)."
        )
    return found


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.out_features, linear.in_features


def _rest_bytes(model: nn.Module, linears: Mapping[str, nn.Linear], dtype: torch.dtype) -> int:
    """Bytes of everything but the weights of some Linears, after the cast to another dtype."""
    cast = {id(tensor) for tensor in _cast(model, dtype)}
    left = {id(linear.weight) for linear in linears.values()}
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(
        tensor.numel() * (dtype.itemsize if key in cast else tensor.element_size())
        for key, tensor in tensors.items()
        if key not in left
    )


def _cast(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """What `cast_weights` casts: saved floats. Others, such as rotary frequencies, and some of a family, stay."""
    saved = model.state_dict(keep_vars=True).items()
    return [tensor for name, tensor in saved if tensor.is_floating_point() and not is_kept_float32(model, name, dtype)]
