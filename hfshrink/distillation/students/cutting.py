"""Cutting a student out of its teacher: a smaller model, filled with the teacher's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.students.depth import check_layers, fresh_model, keep_dtypes, renumbered, smaller_config
from hfshrink.distillation.students.importance import Importance, magnitude_scores
from hfshrink.distillation.students.slicing import Axis, cut_axes, keep_units, slice_state, unit_counts
from hfshrink.distillation.students.width import Widths, widths_of
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.measurement import Measurement
from hfshrink.modules import layer_stack


@dataclass(frozen=True)
class Made:
    """A student, and what its record says."""

    student: Any
    method: list[str]
    modules: list[str]
    results: dict[str, Any]
    measured: Measurement = field(default_factory=Measurement)
    is_fresh: bool = False


def cut(teacher: Any, kept: list[int], widths: Widths | None, importance: Importance | None, keep: str) -> Made:
    """Build the smaller model afresh (its layers number themselves), and fill it with the teacher's weights.

    Args:
        teacher: The model.
        kept: The numbers of the layers that stay, in their order in the student.
        widths: The student's; None keeps the teacher's.
        importance: What the widths are cut by; None for the magnitudes of the weights.
        keep: How the layers were chosen, for the record.

    Raises:
        UnsupportedModelError: Weights that don't fit the smaller model.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> cut(BertModel(BertConfig(**sizes)), [0, 2], None, None, "spread").modules
        ['encoder.layer.1']
    """
    stack, layers = layer_stack(teacher)
    student = sketch(teacher, kept, widths)
    state, axes, counts = _state_and_axes(teacher, student, kept, widths)
    method: list[str] = []
    results: dict[str, Any] = {"kept_layers": kept}
    if kept != list(range(len(layers))):
        method.append("influence" if keep == "influence" else "layers")
    if keep == "influence" and importance is not None:
        results["influence"] = [round(value, 6) for value in importance.influence]
    if widths is not None:
        scores = None if importance is None else renumbered(importance.units, stack, kept)
        method.append("magnitude" if scores is None else "activation")
        found = magnitude_scores(state, axes, counts) if scores is None else scores
        state = slice_state(state, axes, keep_units(found, counts, unit_counts(student)), counts)
        old, new = widths_of(teacher).to_dict(), widths_of(student).to_dict()
        results["widths"] = {name: [value, new.get(name, value)] for name, value in old.items()}
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(getattr(teacher, "generation_config", None))
    dropped = [f"{stack}.{old}" for old in range(len(layers)) if old not in kept]
    return Made(student, method or ["copy"], dropped, results)


def sketch(teacher: Any, kept: list[int], widths: Widths | None) -> Any:
    """The smaller model with any weights, each in its teacher's dtype; on the meta device in a block that says so."""
    student = fresh_model(type(teacher), smaller_config(teacher.config, kept, widths), teacher)
    keep_dtypes(student, renumbered(teacher.state_dict(), layer_stack(teacher)[0], kept))
    return student


def can_cut(teacher: Any, kept: list[int], widths: Widths | None) -> bool:
    """Whether the teacher's weights fit a student of that size, from names and shapes alone."""
    try:
        with torch.device("meta"):
            student = sketch(teacher, kept, widths)
        _state_and_axes(teacher, student, kept, widths)
    except (SettingError, UnsupportedModelError):
        return False
    return True


def _state_and_axes(
    teacher: Any, student: Any, kept: list[int], widths: Widths | None
) -> tuple[Mapping[str, Tensor], list[Axis], dict[str, int]]:
    """The teacher's weights under the student's names, the axes to cut, and the teacher's units."""
    stack, _ = layer_stack(teacher)
    state = renumbered(teacher.state_dict(), stack, kept)
    check_layers(state, student, stack, kept)
    if widths is None:
        _check_rest(state, student)
        return state, [], {}
    counts = renumbered(unit_counts(teacher), stack, kept)
    return state, cut_axes(state, student, counts), counts


def _check_rest(state: Mapping[str, Tensor], student: Any) -> None:
    target = student.state_dict()
    odd = [*sorted(set(state) ^ set(target)), *(n for n in state if n in target and state[n].shape != target[n].shape)]
    if odd:
        raise UnsupportedModelError(
            f"Layers of the family {student.config.model_type!r} can't be dropped alone: {odd[0]} depends on their "
            "number. Start fresh with architecture=."
        )
