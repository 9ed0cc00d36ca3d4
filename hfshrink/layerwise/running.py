"""One layer at a time: what it is called with and what it returns, without a cache and without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hfshrink.modules import accepted_inputs


def without_cache(model: nn.Module) -> dict[str, bool]:
    """The keyword that keeps a decoder from collecting keys and values, for models that have it."""
    return {"use_cache": False} if "use_cache" in accepted_inputs(model) else {}


def run_layer(layer: nn.Module, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """The hidden state that a layer makes of another one, both (batch, sequence, hidden)."""
    args, kwargs = call
    return hidden_of(layer(hidden, *args, **kwargs))


def hidden_of(output: Any) -> Tensor:
    """A layer's hidden state, where it hands out more than that."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model asks for a gradient while the block runs."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
