"""From a model's answer to one vector per row: mean, first token, or what the head reads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import UnsupportedModelError
from hfshrink.inputs import model_inputs
from hfshrink.modules import accepted_inputs, head_names
from hfshrink.record import config_of

POOLINGS = ("auto", "mean", "cls", "features")


def pool(state: Tensor, mask: Tensor | None = None, how: str = "mean") -> Tensor:
    """One vector per row of hidden states: their mean over the positions of `mask`, or the first.

    Args:
        state: (batch, d), (batch, tokens, d), or (batch, d, height, width).
        mask: (batch, tokens), 0 on padding; None is no padding.
        how: "mean" or "cls".

    Returns:
        (batch, d) float32.

    Raises:
        UnsupportedModelError: "cls" of an image's feature map, which has no first token.

    Example:
        >>> pool(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
        [[3.0]]
    """
    state = state.float()
    if state.ndim == 2:
        return state
    if state.ndim == 4:
        if how == "cls":
            raise UnsupportedModelError("A convolutional model has no first token. Give pooling='mean'.")
        return state.mean(dim=(2, 3))
    if how == "cls":
        return state[:, 0]
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(dim=1)
    kept = mask[..., None].bool()
    return state.masked_fill(~kept, 0).sum(dim=1) / kept.sum(dim=1)  # not ×0: what lies on padding may be infinite


@dataclass(frozen=True, eq=False)
class Reader:
    """A network and how its answer becomes one vector per row."""

    network: Any
    pooling: str
    heads: tuple[nn.Module, ...] = ()

    @classmethod
    def of(cls, model: Any, pooling: str) -> Reader:
        """The part of a model that has to run."""
        model = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # adapters
        heads = tuple(model.get_submodule(name) for name in head_names(model))
        if pooling == "auto":
            pooling = "features" if heads and "pixel_values" in accepted_inputs(model) else "mean"
        if pooling == "features":
            if not heads:
                raise UnsupportedModelError(
                    f"pooling='features' is what the head reads, and {type(model).__name__} has no head. Give 'mean'."
                )
            return cls(model, pooling, heads)
        config: Any = config_of(model)
        is_double = getattr(config, "is_encoder_decoder", False)
        network = model.get_encoder() if is_double else getattr(model, "base_model", model)
        is_causal = type(model).__name__.endswith("ForCausalLM") or getattr(config, "is_decoder", False)
        if pooling == "cls" and is_causal and not is_double:
            raise UnsupportedModelError("The first token of a causal model knows no other. Give pooling='mean'.")
        return cls(network, pooling)

    def vectors(self, batch: dict[str, Tensor]) -> Tensor:
        """(batch, d) float32 on the CPU."""
        inputs, mask = model_inputs(self.network, batch), batch.get("attention_mask")
        if "use_cache" in accepted_inputs(self.network):
            inputs["use_cache"] = False  # type: ignore[assignment] # of a decoder: nothing is generated
        seen: list[Tensor] = []
        with contextlib.ExitStack() as hooks:
            for head in self.heads:
                hooks.callback(head.register_forward_pre_hook(lambda _, args: seen.append(args[0])).remove)
            outputs = self.network(**inputs)
        state = seen[-1] if seen else getattr(outputs, "last_hidden_state", None)
        if state is None:
            raise UnsupportedModelError(f"{type(self.network).__name__} gives no last_hidden_state to be pooled.")
        mask = None if mask is None else mask.to(state.device)
        logits = getattr(outputs, "logits", None)
        if seen and state.ndim == 3 and mask is not None and logits is not None and logits.ndim == 2:
            last = mask.sum(dim=1) - 1  # each token was read, one answer was taken: a causal model's last token
            state = state[torch.arange(len(state), device=state.device), last]
        return pool(state, mask, "cls" if self.pooling == "cls" else "mean").cpu()
