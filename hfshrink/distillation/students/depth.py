"""Shallower students: which layers stay, the config for them, and the weights under their new numbers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from hfshrink.blocks import set_depth, spread_layers
from hfshrink.distillation.students.width import Widths, set_widths
from hfshrink.errors import SettingError, UnsupportedModelError

SEED = 0
"""Of fresh weights. Two students of the same settings are equal, bit for bit."""


def kept_layers(depth: int, number: int, keep: str, influence: Sequence[float] = ()) -> list[int]:
    """The numbers of the layers that stay, in rising order.

    Example:
        >>> kept_layers(4, 2, "last"), kept_layers(4, 2, "influence", [0.5, 0.1, 0.2, 0.4])
        ([2, 3], [0, 3])
    """
    if keep == "influence":
        ranked = sorted(range(depth), key=lambda layer: -influence[layer])
        return sorted(ranked[:number])
    return {"first": list(range(number)), "last": list(range(depth - number, depth))}.get(
        keep, spread_layers(depth, number)
    )


def smaller_config(config: Any, kept: list[int], widths: Widths | None) -> Any:
    """A deep copy for fewer layers; lists with one entry per layer (`layer_types`, …) are trimmed to the kept ones."""
    smaller = copy.deepcopy(config)
    set_depth(smaller, kept)
    if widths is not None:
        set_widths(smaller, widths)
    _check_config(smaller)
    return smaller


def _check_config(config: Any) -> None:
    """Raise `SettingError` where the family would refuse the config when the saved student is loaded."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        type(config).from_dict(config.to_dict())
    except (ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(f"The family {config.model_type!r} refuses these sizes: {reason}") from error


def fresh_model(model_class: Any, config: Any, teacher: Any) -> Any:
    """A model with seeded weights (`SEED`) in the teacher's dtype and on its device; no random state changes."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        student = model_class._from_config(config, dtype=teacher.dtype)
    on_meta = any(weight.is_meta for weight in student.parameters())  # a sketch that only shapes are read from
    return student if on_meta else student.to(teacher.device)


def keep_dtypes(student: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Give each tensor of the student the type that it has in the teacher's `state`, such as a float32 head's."""
    for name, tensor in chain(student.named_parameters(), student.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)


def check_layers(state: Mapping[str, Any], student: Any, stack: str, kept: Sequence[int]) -> None:
    """Raise `UnsupportedModelError` where a layer has other weights than the student has in its place.

    Args:
        state: The teacher's weights under the student's names.
        student: The shallower model.
        stack: Name of its layers.
        kept: The numbers that they have in the teacher.
    """
    odd = sorted(name for name in set(state) ^ set(student.state_dict()) if name.startswith(f"{stack}."))
    if odd:
        new = int(odd[0].removeprefix(f"{stack}.").partition(".")[0])
        raise UnsupportedModelError(
            f"The layers of the family {student.config.model_type!r} differ: layer {kept[new]} of the teacher can't "
            f"be layer {new} of the student, {'it has' if odd[0] in state else 'which needs'} {odd[0]} there. Keep "
            "layers whose places agree, such as the first ones (layers=), or start fresh with architecture=."
        )


def renumbered(named: Mapping[str, Any], stack: str, kept: list[int]) -> dict[str, Any]:
    """Names inside the stack of layers with the student's numbers; those of dropped layers are left out.

    Example:
        >>> renumbered({"layer.0.w": 0, "layer.1.w": 1, "layer.2.w": 2, "head": 3}, "layer", [0, 2])
        {'layer.0.w': 0, 'layer.1.w': 2, 'head': 3}
    """
    new_number = {old: new for new, old in enumerate(kept)}
    found = {}
    for key, value in named.items():
        if not key.startswith(f"{stack}."):
            found[key] = value
            continue
        number, _, rest = key.removeprefix(f"{stack}.").partition(".")
        if int(number) in new_number:
            found[f"{stack}.{new_number[int(number)]}.{rest}"] = value
    return found


def refuse_compressed(teacher: Any) -> None:
    """Raise `UnsupportedModelError` for a teacher whose weights can't be copied as they are."""
    if getattr(teacher.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "The teacher has compressed or quantized layers. Make it dense first: to_dense(teacher)."
        )
