"""Whether a compressed layer may stand where a model has a dense one."""

from __future__ import annotations

from typing import Any

from torch import nn

from hfshrink.errors import SettingError
from hfshrink.layers.attention import check_split
from hfshrink.layers.common import check_forward
from hfshrink.layers.kinds import LAYER_KINDS

FIXED = ("stride", "padding", "dilation", "padding_mode", "padding_idx")
"""Attributes that a layer has in common with the dense one that it stands for."""


def check_place(name: str, old: nn.Module, layer: Any, model: Any, error: type[Exception]) -> None:
    """Raise `error` where `layer` can't stand for the module `old`."""
    compressed: Any = tuple(LAYER_KINDS.values())
    if not isinstance(layer, compressed):
        raise error(f"Expected a layer of kind {', '.join(LAYER_KINDS)} for {name}, got {type(layer).__name__}.")
    if not issubclass(getattr(old, "replaces", type(old)), layer.replaces):
        raise error(
            f"Only a {layer.replaces.__name__} can be replaced by a {type(layer).__name__}, "
            f"got {type(old).__name__} ({name})."
        )
    shape = old.dense_shape if isinstance(old, compressed) else getattr(old.weight, "shape", ())
    if tuple(layer.dense_shape) != tuple(shape):
        raise error(
            f"A {type(layer).__name__} for a weight of shape {tuple(layer.dense_shape)} can't replace one of shape "
            f"{tuple(shape)} ({name}). A layer that was resized before is replaced by way of to_dense."
        )
    bias = getattr(old, "bias", None)
    if (layer.bias is None) != (bias is None):
        raise error(
            f"The {type(layer).__name__} for {name} has {'no' if layer.bias is None else 'a'} bias, the "
            f"{type(old).__name__} there has {'none' if bias is None else 'one'}."
        )
    _check_work(name, old, layer, error)
    check_parts(name, layer, model, error)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if f"{name}.weight" in {*tied, *tied.values()}:
        raise error(
            f"The weight of {name} is tied to another one and must keep its shape. Leave it out: exclude={name!r}."
        )


def _check_work(name: str, old: Any, layer: Any, error: type[Exception]) -> None:
    """Raise `error` where `layer` would not look at its input as the module `old` does."""
    if not isinstance(old, tuple(LAYER_KINDS.values())):
        try:
            check_forward(old, layer.replaces)
        except SettingError as problem:
            raise error(f"{problem} ({name})") from None
    fixed = [*FIXED, *(() if hasattr(layer, "depthwise") else ("groups",))]  # kept channels are its groups
    for attribute in fixed:
        mine, its = getattr(layer, attribute, None), getattr(old, attribute, None)
        if mine != its:
            what = f"{attribute}={mine}, the {type(old).__name__} there has {its}"
            raise error(f"The {type(layer).__name__} for {name} has {what}.")


def check_parts(name: str, layer: Any, model: Any, error: type[Exception]) -> None:
    """Raise `error` where the parts of a fused q, k and v kept different features."""
    parent, _, child = name.rpartition(".")
    try:
        check_split(model.get_submodule(parent), child, layer)
    except SettingError as problem:
        raise error(f"{problem} ({name})") from None
