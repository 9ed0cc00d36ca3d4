"""Students cut from their teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import infer_task, load
from hfshrink.measurement import Measurement
from hfshrink.modules import count_parameters, layer_stack
from hfshrink.record import StepRecord, append_step, model_name


def make_student(teacher: Any, num_layers: int | None = None, *, layers: Sequence[int] | None = None) -> Any:
    """A student made of some of the teacher's layers, everything else copied (DistilBERT, arXiv:1910.01108).

    The result is an ordinary model of the teacher's class: it saves and reloads with plain transformers. The teacher
    stays as it was. By default the layers are spread evenly, the first and the last among them: 12 -> 6 keeps 0, 2, 4,
    7, 9, 11.

    Args:
        teacher: A model, a folder or a Hub id, of any family with one stack of equal layers (BERT, RoBERTa,
            DistilBERT, ELECTRA, Llama, GPT-2, ViT, …).
        num_layers: Layers to keep, from 1 to the teacher's number.
        layers: The layers to keep by number, in their order in the student, instead of `num_layers`.

    Returns:
        The student, in eval mode, in the teacher's dtype and on its device, with the step in its record.

    Raises:
        SettingError: Neither or both of `num_layers` and `layers`, or numbers out of range.
        UnsupportedModelError: No single stack of equal layers.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=6, num_attention_heads=1, intermediate_size=8)
        >>> student = make_student(BertForSequenceClassification(config), num_layers=3)
        >>> student.config.num_hidden_layers
        3
    """
    start = time.perf_counter()
    teacher, _ = load(teacher)
    stack, modules = layer_stack(teacher)
    kept = _kept_layers(len(modules), num_layers, layers)
    if hasattr(teacher.config, "quantization_config"):
        raise UnsupportedModelError(
            "The teacher has compressed or quantized layers. Make it dense first: to_dense(teacher)."
        )
    student = _build(teacher, _smaller_config(teacher.config, kept))
    student.load_state_dict(_renumbered(teacher.state_dict(), stack, kept))
    student.generation_config = copy.deepcopy(getattr(teacher, "generation_config", None))
    before, after = count_parameters(teacher), count_parameters(student)
    step = StepRecord(
        technique="make_student",
        method="layers",
        settings={"num_layers": num_layers, "layers": None if layers is None else list(layers)},
        before=Measurement(parameters=before[0], nonzero_parameters=before[1]),
        after=Measurement(parameters=after[0], nonzero_parameters=after[1]),
        modules=[f"{stack}.{old}" for old in range(len(modules)) if old not in kept],
        results={"kept_layers": kept},
        seconds=time.perf_counter() - start,
        source="Sanh et al. 2019, arXiv:1910.01108",
    )
    append_step(student, step, base_model=model_name(teacher), task=infer_task(teacher))
    return student.eval()


def spread_layers(depth: int, num_layers: int) -> list[int]:
    """`num_layers` of `depth` layer numbers, spread evenly, first and last among them (only the first for one).

    Example:
        >>> spread_layers(12, 6)
        [0, 2, 4, 7, 9, 11]
    """
    if num_layers == 1:
        return [0]
    return [round(i * (depth - 1) / (num_layers - 1)) for i in range(num_layers)]


def _kept_layers(depth: int, num_layers: int | None, layers: Sequence[int] | None) -> list[int]:
    if (num_layers is None) == (layers is None):
        raise SettingError(f"Give one of num_layers and layers, got num_layers={num_layers} and layers={layers}.")
    if layers is not None:
        kept = [int(layer) for layer in layers]
        if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= depth:
            raise SettingError(f"layers must be different numbers in 0..{depth - 1}, got {list(layers)}.")
        return kept
    if not isinstance(num_layers, int) or not 1 <= num_layers <= depth:
        raise SettingError(f"num_layers must be in 1..{depth} for this teacher, got {num_layers!r}.")
    return spread_layers(depth, num_layers)


def _smaller_config(config: Any, kept: list[int]) -> Any:
    """A deep copy for fewer layers; lists with one entry per layer (`layer_types`, …) are trimmed to the kept ones."""
    depth = config.num_hidden_layers
    smaller = copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if (
            isinstance(value, list)
            and len(value) == depth
            and "layer" in name
            and getattr(config, name, None) == value
        ):
            setattr(smaller, name, [value[layer] for layer in kept])
    smaller.num_hidden_layers = len(kept)
    return smaller


def _build(teacher: Any, config: Any) -> Any:
    """A fresh model; layers number themselves (`layer_idx`), and the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    return student.to(teacher.device)


def _renumbered(state: dict[str, Any], stack: str, kept: list[int]) -> dict[str, Any]:
    new_number = {old: new for new, old in enumerate(kept)}
    renumbered = {}
    for key, value in state.items():
        if not key.startswith(f"{stack}."):
            renumbered[key] = value
            continue
        number, _, rest = key.removeprefix(f"{stack}.").partition(".")
        if int(number) in new_number:
            renumbered[f"{stack}.{new_number[int(number)]}.{rest}"] = value
    return renumbered
