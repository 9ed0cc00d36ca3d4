"""What in a teacher matters: the influence of its layers, and scores of its channels, heads and neurons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.blocks import block_influence, layer_blocks
from hfshrink.calibration import batches
from hfshrink.distillation.students.slicing import HIDDEN, Axis
from hfshrink.distillation.students.width import block_boxes, widths_of
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.modules import layer_stack

SAMPLES = 1024
"""Rows of the calibration data that are run, as many as Minitron takes."""


@dataclass(frozen=True)
class Importance:
    """What calibration data says about a model.

    Attributes:
        influence: One number per layer, see `block_influence`.
        units: Unit -> one score per unit of it (channel, neuron, head or group of heads); empty for families whose
            layers are not known.
    """

    influence: list[float]
    units: dict[str, Tensor]


def head_norms(x: Tensor, heads: int) -> Tensor:
    """L2 norm of each head's output per token: x (tokens, heads · size) -> (tokens, heads).

    Example:
        >>> head_norms(torch.tensor([[3.0, 4.0, 0.0, 1.0]]), heads=2).tolist()
        [[5.0, 1.0]]
    """
    return x.double().reshape(len(x), heads, -1).norm(dim=-1)


def measure_importance(model: Any, calibration: Any) -> Importance:
    """Run calibration data through a model, and score its layers and units by what they do to it.

    Layers by `block_influence`; neurons by the mean of their absolute activations, heads by the mean L2 norm of their
    outputs, channels by the mean absolute outputs of the norms, summed over the norms (Minitron, arXiv:2407.14679).
    Padding does not count. At most `SAMPLES` rows are run.

    Args:
        model: The teacher.
        calibration: As `hfshrink.calibration.batches` takes it.

    Returns:
        The importance; scores are float64 and on the CPU.

    Raises:
        SettingError: Data that the model can't read, or NaN and infinite values in it.
        UnsupportedModelError: A family that never calls its layers.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> found = measure_importance(BertModel(BertConfig(**sizes)), [{"input_ids": torch.ones(1, 3).long()}])
        >>> {name: len(scores) for name, scores in found.units.items()}
        {'encoder.layer.0.heads': 2, 'encoder.layer.0.neurons': 6, 'hidden': 8}
    """
    means: dict[str, _Mean] = {}
    mask: list[Any] = [None]
    watched = _watched(model)
    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for name, (module, score) in watched.items():
            means[name] = _Mean()
            hook = partial(_see, mask=mask, mean=means[name], score=score)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in batches(calibration, model, samples=SAMPLES):
            mask[0] = batch.get("attention_mask")
            model(**{name: value for name, value in batch.items() if name != "labels"})
    values = {name: mean.value(name) for name, mean in means.items() if mean.count}
    influence = [values.get(f"layer:{number}") for number in range(len(layer_stack(model)[1]))]
    if any(value is None or value.ndim for value in influence):
        raise UnsupportedModelError(
            f"The layers of the family {model.config.model_type!r} are not called with hidden states, so that nothing "
            'can be measured on data. Leave out calibration=, and use keep="spread", "first" or "last".'
        )
    units = {name: value for name, value in values.items() if name.endswith((".heads", ".neurons"))}
    norms = [value for name, value in values.items() if name.startswith("norm:")]
    if units:
        units[HIDDEN] = torch.stack(norms).sum(dim=0)
    return Importance([float(value) for value in influence if value is not None], units)


def magnitude_scores(
    state: Mapping[str, Tensor], axes: Sequence[Axis], counts: Mapping[str, int]
) -> dict[str, Tensor]:
    """Unit -> L2 norm of all weights that a unit has on the given axes, the scores where there is no data.

    A weight that two names share, such as tied embeddings, counts once.

    Example:
        >>> axes = [Axis("w", 0, "hidden"), Axis("w", 1, "hidden")]
        >>> magnitude_scores({"w": torch.tensor([[0.0, 3.0], [0.0, 0.0]])}, axes, {"hidden": 2})["hidden"].tolist()
        [3.0, 3.0]
    """
    squares: dict[str, Tensor] = {}
    seen = set()
    for axis in axes:
        place = (state[axis.weight].data_ptr(), state[axis.weight].shape, axis.dim)
        if place in seen:
            continue
        seen.add(place)
        weight = state[axis.weight].detach().double().cpu().movedim(axis.dim, 0)
        per_unit = weight.square().reshape(axis.parts, counts[axis.unit], -1).sum(dim=(0, 2))
        squares[axis.unit] = squares.get(axis.unit, torch.zeros_like(per_unit)) + per_unit
    return {unit: square.sqrt() for unit, square in squares.items()}


class _Mean:
    """A running mean over tokens."""

    def __init__(self) -> None:
        self.sum: Tensor | float = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.sum = self.sum + values.sum(dim=0).cpu()
        self.count += len(values)

    def value(self, name: str) -> Tensor:
        mean = torch.as_tensor(self.sum) / self.count
        if not bool(torch.isfinite(mean).all()):
            raise SettingError(
                f"The calibration data gives NaN or infinite values in {name}. Check the data, or load in float32."
            )
        return mean


def _watched(model: Any) -> dict[str, tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]]:
    """Name -> the module to watch, and what to make of its input and output, both (tokens, size)."""
    stack, layers = layer_stack(model)
    found: dict[str, Any] = {f"layer:{number}": (layer, block_influence) for number, layer in enumerate(layers)}
    try:
        attention, feed_forward = layer_blocks(model)
    except UnsupportedModelError:
        return found
    widths, boxes = widths_of(model), block_boxes(model)
    heads = widths.num_key_value_heads
    for number, layer in enumerate(layers):
        output = layer.get_submodule(attention.o)
        found[f"{stack}.{number}.heads"] = (output, lambda x, _: head_norms(x, heads))
        found[f"{stack}.{number}.neurons"] = (layer.get_submodule(feed_forward.down), lambda x, _: x.double().abs())
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_norm = type(module).__name__.endswith("Norm") and not name.startswith(boxes)
        if is_norm and getattr(weight, "shape", None) == (widths.hidden_size,):
            found[f"norm:{name}"] = (module, lambda _, y: y.double().abs())
    return found


def _see(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    *,
    mask: list[Any],
    mean: _Mean,
    score: Callable[[Tensor, Tensor], Tensor],
) -> None:
    before = (args or tuple(kwargs.values()))[0]
    after = output[0] if isinstance(output, tuple) else output
    mean.add(score(_tokens(before, mask[0]), _tokens(after, mask[0])))


def _tokens(x: Tensor, mask: Any) -> Tensor:
    """States (batch, sequence, size) or (batch · sequence, size) as (tokens, size), without those masked by 0."""
    x = x.flatten(end_dim=-2)
    if isinstance(mask, Tensor) and mask.numel() == len(x):
        return x[mask.flatten().to(x.device) != 0]
    return x
