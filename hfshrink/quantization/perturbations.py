"""What quantization would do to one place of a model, on trial: for `hfshrink.measure_sensitivity`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.quantization.search.precisions import PRECISIONS, Precision, rounded_weight
from hfshrink.sensitivity import Perturbation, restored

PLACES = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
"""Classes of modules whose weights are rounded on trial."""

SCHEME_LEVELS = {"int": (8, 4, 3, 2), "nf4": (4,), "bf16": (16,), "fp16": (16,)}
"""scheme -> the bits that it has."""


def perturbation(
    scheme: str = "int",
    levels: Sequence[int] | None = None,
    *,
    group_size: int | None = None,
    quantize_inputs: bool = False,
) -> Perturbation:
    """Quantization on trial: the weight of one module at a time, with a bit width as level.

    A place is a Linear, Conv1D, Conv2d or Embedding. Weights are seen as rows, one per output (or per word), and
    rounded group by group, as the layers of `scheme="mixed"` are.

    Args:
        scheme: "int"; "nf4" (4 bits), "bf16" or "fp16" (16 bits).
        levels: Bits: 8, 4, 3 or 2 of integers; None takes all that the scheme has.
        group_size: Neighbours in a row that share a scale; None takes whole rows at 8 bits and 64 below.
        quantize_inputs: Whether the module's inputs are rounded to 8 bits too, in the range of each call, as dynamic
            quantization does.

    Raises:
        SettingError: An unknown scheme, bits that it has not, or a group size below 1.

    Example:
        >>> trial = perturbation("int", levels=(8, 4))
        >>> trial.title, trial.levels
        ('quantize weights to int', (8, 4))
    """
    if scheme not in SCHEME_LEVELS:
        raise SettingError(f"scheme must be one of {', '.join(SCHEME_LEVELS)}, got {scheme!r}.")
    if group_size is not None and (not isinstance(group_size, int) or group_size < 1):
        raise SettingError(f"group_size must be at least 1, or None for the usual one, got {group_size!r}.")
    if levels is not None and not isinstance(levels, Iterable):
        raise SettingError(f"levels must be a list of bits, got {levels!r}.")
    trial = _Rounding(scheme, group_size, quantize_inputs)
    trial.levels = SCHEME_LEVELS[scheme] if levels is None else tuple(levels)
    for level in trial.levels:
        trial.precision(level)
    return trial


class _Rounding:
    """The weight of one module, rounded."""

    def __init__(self, scheme: str, group_size: int | None, quantize_inputs: bool) -> None:
        self.scheme, self.group_size, self.quantize_inputs = scheme, group_size, quantize_inputs
        self.title = f"quantize weights{' and inputs' * quantize_inputs} to {scheme}"
        self.levels: Sequence[float] = ()

    def precision(self, level: Any) -> Precision:
        """The precision of a bit width."""
        if isinstance(level, bool) or level not in SCHEME_LEVELS[self.scheme]:
            bits = ", ".join(map(str, SCHEME_LEVELS[self.scheme]))
            raise SettingError(f"The scheme {self.scheme!r} has the levels {bits} (bits), got {level!r}.")
        return PRECISIONS[f"int{int(level)}" if self.scheme == "int" else self.scheme]

    def places(self, model: nn.Module) -> list[str]:
        """Names of the modules with a float weight."""
        found = [
            name
            for name, module in model.named_modules()
            if name and isinstance(module, PLACES) and module.weight.is_floating_point()
        ]
        if not found:
            raise UnsupportedModelError(f"{type(model).__name__} has no Linear, Conv or Embedding with float weights.")
        return found

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        """Round a weight, and the module's inputs if asked to, while the block runs."""
        module: Any = model.get_submodule(place)
        precision, weight, handles = self.precision(level), module.weight.detach(), []
        if self.quantize_inputs and not isinstance(module, nn.Embedding):
            handles.append(module.register_forward_pre_hook(_round_inputs))
        try:
            with restored(weight):
                rows = _rounded(rows_of(module), precision, self.group_size, place)
                weight.copy_(rows.T if isinstance(module, Conv1D) else rows.reshape(weight.shape))
                yield
        finally:
            for handle in handles:
                handle.remove()


def rows_of(module: Any) -> Tensor:
    """The weight of a module as (out, in): Conv1D transposed, convolutions flattened (a copy if channels-last)."""
    weight: Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def round_dynamically(x: Tensor) -> Tensor:
    """Round x to 8 bits in its own range: s = (max(x, 0) − min(x, 0)) / 255, x̂ = s · (clip(round(x/s) + z) − z).

    That is ONNX's DynamicQuantizeLinear, z = round(−min / s).

    Example:
        >>> round_dynamically(torch.tensor([0.0, 127.3, 255.0])).tolist()
        [0.0, 127.0, 255.0]
    """
    low, high = (bound.float() for bound in torch.aminmax(x))
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / 255
    if float(scale) == 0:
        return x
    zero = (-low / scale).round().clamp(0, 255)
    codes = ((x.float() / scale).round() + zero).clamp(0, 255)
    return ((codes - zero) * scale).to(x.dtype)


def _rounded(weight: Tensor, precision: Precision, group_size: int | None, place: str) -> Tensor:
    try:
        return rounded_weight(weight, precision, group_size)
    except SettingError as error:
        raise SettingError(f"{error} ({place})") from None


def _round_inputs(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (round_dynamically(args[0]), *args[1:])
