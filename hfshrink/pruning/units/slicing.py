"""Smaller copies of single modules: plain ones, or resized layers that remember what was cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layers import LAYER_KINDS
from hfshrink.layers.common import copied

CUTTABLE: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("out_features", "in_features"),
    Conv1D: ("nf", "nx"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.BatchNorm2d: ("num_features", "num_features"),
}
"""Class of modules that can be cut -> their attributes that count what they write and what they read."""


def width_of(module: Any, side: str) -> int:
    """How many features a module of `CUTTABLE` writes ("out") or reads ("in").

    Example:
        >>> width_of(nn.Linear(2, 3), "out"), width_of(nn.Conv2d(4, 5, kernel_size=1), "in")
        (3, 4)
    """
    return int(getattr(module, CUTTABLE[_kind(module)][side == "in"]))


def sliced(module: Any, kept: Mapping[str, Tensor], plain: bool = True) -> nn.Module:
    """A copy of a module with some of its outputs and inputs.

    A depthwise convolution, and a batch norm, lose what they read together with what they write.

    Args:
        module: Of a class in `CUTTABLE`, or a resized layer of one, which stays resized.
        kept: Side ("out", "in") -> booleans (features,).
        plain: Whether a module of the same class comes back, with its settings and hooks, else a resized layer.

    Example:
        >>> sliced(nn.Linear(2, 3), {"out": torch.tensor([True, False, True])})
        Linear(in_features=2, out_features=2, bias=True)
    """
    index = {side: mask.nonzero().flatten() for side, mask in kept.items() if not mask.all()}
    rows, columns = index.get("out"), index.get("in")
    is_norm = isinstance(module, nn.BatchNorm2d)
    if is_norm or is_depthwise(module):
        rows, columns = columns if rows is None else rows, None
    if plain and not hasattr(module, "replaces"):
        return _same_class(module, rows, columns)
    kind: Any = next(
        k for k in LAYER_KINDS.values() if k.kind.startswith("resized") and isinstance(module, k.replaces)
    )
    return kind.from_dense(module, rows) if is_norm else kind.from_dense(module, rows, columns)


def is_depthwise(module: Any) -> bool:
    """Whether a module is a convolution with one filter for each channel."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels


def has_units(module: Any) -> bool:
    """Whether the rows and columns of a module's weight are features: not in factors or packed codes.

    Example:
        >>> has_units(nn.Linear(2, 3))
        True
    """
    compressed: Any = tuple(LAYER_KINDS.values())
    return not isinstance(module, compressed) or module.kind.startswith("resized")


def check_has_units(module: Any, name: str) -> None:
    """Raise `SettingError` where the weight of the module called `name` lies in factors or codes."""
    if not has_units(module):
        raise SettingError(
            f"{name} is a {type(module).__name__}, which can't be cut. Prune first, and compress then; or leave it "
            "out, or turn it back: hfshrink.to_dense."
        )


def check_sliceable(module: Any, name: str) -> None:
    """Raise an error where `sliced` would not compute what the module called `name` does.

    Raises:
        UnsupportedModelError: Another class, a forward of its own, grouped but not depthwise.
        SettingError: A low-rank, parametrized or offloaded module, or NaN in its weight.
    """
    check_has_units(module, name)
    if "forward" in vars(module) or parametrize.is_parametrized(module):
        raise SettingError(
            f"{name} is wrapped: parametrized, or offloaded by device_map=. Unwrap it first: load the model on one "
            "device, or call torch.nn.utils.parametrize.remove_parametrizations."
        )
    own_forward = _kind(module) is not None and type(module).forward is not _kind(module).forward
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1 and not is_depthwise(module)
    if _kind(module) is None or own_forward or grouped:
        what = f" in {module.groups} groups" if grouped else " with a forward of its own" if own_forward else ""
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}{what}; what can be cut are "
            f"{', '.join(kind.__name__ for kind in CUTTABLE)}, grouped convolutions only where each channel has one "
            "filter. Exclude its units, or mask them (cut=False)."
        )
    tensors = [*module.parameters(), *module.buffers()]
    if not all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors if tensor.is_floating_point()):
        raise SettingError(f"{name} has NaN or infinite weights. Was its training stable?")


def _kind(module: Any) -> Any:
    return next((kind for kind in CUTTABLE if isinstance(module, kind)), None)


def _same_class(module: Any, rows: Tensor | None, columns: Tensor | None) -> nn.Module:
    made: Any = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    flipped = isinstance(module, Conv1D)
    for axis, index in ((int(flipped), rows), (int(not flipped), columns)):
        if index is not None:
            index = index.to(made.weight.device) if made.weight is not None else index
            made.weight = _selected(made.weight, axis, index)
    if rows is not None:
        made.bias = copied(module.bias, rows.to(module.bias.device)) if module.bias is not None else None
        for name in ("running_mean", "running_var"):
            if getattr(module, name, None) is not None:
                setattr(made, name, getattr(module, name)[rows.to(getattr(module, name).device)])
    for attribute, index in zip(CUTTABLE[_kind(module)], (rows, columns), strict=True):
        if index is not None:
            setattr(made, attribute, len(index))
    if is_depthwise(module) and rows is not None:
        made.in_channels = made.groups = len(rows)
    return made


def _selected(parameter: Any, axis: int, index: Tensor) -> nn.Parameter | None:
    """The entries of a parameter at `index` along an axis, trainable as it is; None for none."""
    if parameter is None:
        return None
    values = parameter.detach().index_select(axis, index).contiguous()
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
