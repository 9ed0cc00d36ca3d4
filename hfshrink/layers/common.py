"""What all compressed layers share: reading a spec that others wrote, and making a plain Linear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError, SettingError

MAX_SIZE = 2**31
"""Largest size in features or rank that a spec may claim."""

MAX_ELEMENTS = 2**40
"""Most weights that a layer of a spec may claim; torch itself fails on far larger ones, with an error of its own."""

INDEX_DTYPE = torch.int32  # casting a model touches floats only, so indices stay exact


def read_spec(spec: Mapping[str, Any], kind: str, sizes: tuple[str, ...]) -> list[int]:
    """The sizes of a spec in the order of `sizes`, after checking that it has just these, `kind` and `bias`.

    Raises:
        CheckpointError: Missing or unknown entries, a size that is no integer in 1..2**31, or sizes whose product is
            beyond any real model.
    """
    expected = {"kind", "bias", *sizes}
    if set(spec) != expected:
        raise CheckpointError(
            f"A layer of kind {kind!r} needs the entries {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(map(str, spec)))[:200]}."
        )
    if spec["kind"] != kind or not isinstance(spec["bias"], bool):
        raise CheckpointError(
            f"Expected kind {kind!r} and a bias that is true or false, got {spec['kind']!r} and {spec['bias']!r}."
        )
    for name in sizes:
        size = spec[name]
        if type(size) is not int or not 1 <= size <= MAX_SIZE:
            raise CheckpointError(f"{name} must be an integer in 1..2**31, got {size!r} in a layer of kind {kind!r}.")
    first, second = sorted(spec[name] for name in sizes)[-2:]
    if first * second > MAX_ELEMENTS:
        raise CheckpointError(
            f"A layer of kind {kind!r} with {first:,} × {second:,} weights is beyond any real model (2**40 at most)."
        )
    return [spec[name] for name in sizes]


def dense_linear(weight: Tensor, bias: Tensor | None, like: nn.Module) -> nn.Linear:
    """A Linear of `weight` (out, in) and `bias` (out,), trainable and in train mode as `like` is; nothing random."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    trainable = like.weight.requires_grad
    linear.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=bool(trainable))
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear.train(like.training)


def empty_parameter(*shape: int) -> nn.Parameter:
    """A parameter on the meta device: a shape without storage."""
    return nn.Parameter(torch.empty(*shape, device="meta"))


def copied(parameter: Tensor | None, index: Tensor | None = None) -> nn.Parameter | None:
    """A copy of a parameter, or of its entries at `index` (k,) along the first axis, trainable as it is."""
    if parameter is None:
        return None
    values = parameter.detach()
    values = values.clone() if index is None else values[index]
    return nn.Parameter(values.contiguous(), requires_grad=parameter.requires_grad)


def placed(values: Tensor, like: Tensor) -> nn.Parameter:
    """A copy of `values` as a parameter in the dtype and on the device of `like`, trainable as it is."""
    copy = values.detach().to(like.device, like.dtype, copy=True).contiguous()
    return nn.Parameter(copy, requires_grad=like.requires_grad)


def check_forward(dense: nn.Module, kind: type[nn.Module]) -> None:
    """Raise `SettingError` where a module does not compute what a plain one of class `kind` does with its weight.

    A subclass may have a forward of its own (embeddings with a scale, convolutions that standardize their weight).
    nn.MultiheadAttention never calls its `out_proj`: it reads the weight.
    """
    if not isinstance(dense, kind):
        raise SettingError(f"Expected {kind.__name__}, got {type(dense).__name__}.")
    read_by_parent = isinstance(dense, nn.modules.linear.NonDynamicallyQuantizableLinear)
    if type(dense).forward is not kind.forward or read_by_parent:
        raise SettingError(
            f"{type(dense).__name__} is computed in a way of its own; only what computes as a plain {kind.__name__} "
            "does can be compressed. Leave it out: exclude=…"
        )


def checked_index(index: Tensor | None, size: int, name: str) -> Tensor:
    """`index` as int64 after checking it; all of 0..size-1 for None."""
    if index is None:
        return torch.arange(size)
    if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        what = f"{index.dtype} of shape {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise SettingError(
            f"{name} must be a 1-D tensor of integers, got {what}. From a mask: mask.nonzero().flatten()."
        )
    index = index.long()
    if len(index) == 0:
        raise SettingError(f"{name} is empty; at least one of {size} must stay.")
    if int(index.min()) < 0 or int(index.max()) >= size:
        raise SettingError(f"{name} must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}.")
    if bool((index.diff() <= 0).any()):
        raise SettingError(f"{name} must rise without repeats, got {index[:8].tolist()}. Use torch.unique(…).")
    return index
