"""Students: cut from their teacher in depth and width, sized by a target, or fresh ones of another family."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from hfshrink.blocks import layer_blocks
from hfshrink.data import data_title
from hfshrink.distillation.students import targets as sizes
from hfshrink.distillation.students.cutting import Made, can_cut, cut, sketch
from hfshrink.distillation.students.depth import kept_layers, refuse_compressed
from hfshrink.distillation.students.families import fresh_student
from hfshrink.distillation.students.importance import measure_importance
from hfshrink.distillation.students.width import student_widths, widths_of
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import infer_task, load
from hfshrink.measurement import Measurement
from hfshrink.modules import count_parameters, layer_stack
from hfshrink.record import StepRecord, append_step, model_name

KEEP = ("spread", "first", "last", "influence")
"""Which layers stay."""

SOURCES = {
    "layers": "Sanh et al. 2019, arXiv:1910.01108",
    "influence": "Men et al. 2024, arXiv:2403.03853",
    "activation": "Muralidharan et al. 2024, arXiv:2407.14679",
    "magnitude": "Muralidharan et al. 2024, arXiv:2407.14679",
}
"""Part of the record's method -> where it comes from."""


def make_student(
    teacher: Any,
    num_layers: int | None = None,
    *,
    layers: Sequence[int] | None = None,
    keep: str = "spread",
    calibration: Any = None,
    max_parameters: int | None = None,
    max_size_bytes: int | None = None,
    max_latency_ms: float | None = None,
    architecture: str | None = None,
    **config: Any,
) -> Any:
    """A smaller model for the teacher's task: fewer of its layers, narrower ones, or a fresh model of another family.

    The result is an ordinary model: it saves and reloads with plain transformers. The teacher stays as it was.

    - **Depth** (DistilBERT, arXiv:1910.01108): some layers, everything else copied. `make_student(teacher, 6)` keeps
      0, 2, 4, 7, 9, 11 of 12; `make_student(teacher, layers=[0, 5, 11])` the ones named; `make_student(teacher, 6,
      keep="influence", calibration=rows)` the six with the highest block influence BI = 1 − E[cos(x, y)], x and y a
      layer's input and output per token (ShortGPT, arXiv:2403.03853).
    - **Width** (Minitron, arXiv:2407.14679): `make_student(teacher, hidden_size=384, calibration=rows)` or
      `make_student(teacher, 6, intermediate_size=1536)`. Every weight is sliced to the channels, heads and neurons
      that matter most: by their mean activations over the calibration data, without data by the L2 norm of their
      weights. The record's method says which. A head keeps its size: in BERT the heads follow `hidden_size`, in Llama
      heads can be cut alone, and query heads that share a key-value head go together.
    - **A target**: `make_student(teacher, max_parameters=20_000_000)`, or `max_size_bytes=`, `max_latency_ms=`, or
      several: the largest student that fits them all, depth first, then width (see `targets.ladder`). The record
      holds what was reached.
    - **Another family**: `make_student(teacher, architecture="mobilenet_v2", depth_multiplier=0.5)`: fresh seeded
      weights, with the teacher's head, labels, vocabulary, special tokens and length, or image size and channels.

    Args:
        teacher: A model, a folder or a Hub id. Depth needs a family with one stack of equal layers (BERT, RoBERTa,
            DistilBERT, ELECTRA, Llama, GPT-2, ViT, …), width one whose layers are in `hfshrink.blocks.BLOCKS`.
        num_layers: Layers to keep, from 1 to the teacher's number; with `architecture` the layers of its config.
        layers: The layers to keep by number, in their order in the student, instead of `num_layers`.
        keep: Which layers stay: `"spread"` evenly, the first and the last among them, `"first"`, `"last"` or
            `"influence"`.
        calibration: Data for `keep="influence"` and for the widths: a `datasets.Dataset`, a Hub id, a folder or an
            iterable of batches; at most 1024 rows are run, and no labels are needed.
        max_parameters: Parameters at most, tied ones once.
        max_size_bytes: Bytes of the saved weight files at most, computed from shapes and checked on disk.
        max_latency_ms: Milliseconds at most of one example on this machine and one thread, the median of
            `measure_latencies`: 128 tokens (or as many as the model has positions), or one image of the config's size.
        architecture: A `model_type` of transformers. It must read what the teacher reads.
        **config: Widths in the spelling of the teacher's config (`hidden_size`, `intermediate_size`,
            `num_attention_heads`, `num_key_value_heads`; DistilBERT's `dim`, GPT-2's `n_embd`, …); with
            `architecture` any entry of its config.

    Returns:
        The student, in eval mode, in the teacher's dtype and on its device, with the step in its record, which counts
        the copied and the fresh parameters.

    Raises:
        SettingError: Keywords that do not go together, values that do not fit, or a target that can't be reached.
        UnsupportedModelError: No single stack of equal layers, or widths that can't be cut.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8, vocab_size=9)
        >>> config = BertConfig(**sizes, max_position_embeddings=8)
        >>> teacher = BertForSequenceClassification(config)
        >>> make_student(teacher, num_layers=3).config.num_hidden_layers
        3
        >>> student = make_student(teacher, 3, hidden_size=4, intermediate_size=6)
        >>> student.config.num_attention_heads, student.classifier.weight.shape
        (1, torch.Size([2, 4]))
        >>> make_student(teacher, max_parameters=2500).config.num_hidden_layers
        4
        >>> make_student(teacher, architecture="distilbert", dim=8, n_heads=2, n_layers=1, hidden_dim=8).num_labels
        2
    """
    start = time.perf_counter()
    limits = {"max_parameters": max_parameters, "max_size_bytes": max_size_bytes, "max_latency_ms": max_latency_ms}
    asked = _Asked(
        num_layers, layers, keep, calibration, {n: v for n, v in limits.items() if v is not None}, architecture, config
    )
    _check(asked)
    teacher, _ = load(teacher)
    if architecture is not None:
        made = _fresh(teacher, asked)
    else:
        made = _searched(teacher, asked) if asked.targets else _cut_as_asked(teacher, asked)
    before, after = count_parameters(teacher), count_parameters(made.student)
    step = StepRecord(
        technique="make_student",
        method="+".join(made.method),
        settings=asked.settings(),
        before=Measurement(parameters=before[0], nonzero_parameters=before[1]),
        after=replace(made.measured, parameters=after[0], nonzero_parameters=after[1]),
        modules=made.modules,
        results={
            **made.results,
            "copied_parameters": 0 if made.is_fresh else after[0],
            "fresh_parameters": after[0] if made.is_fresh else 0,
        },
        seconds=time.perf_counter() - start,
        source="; ".join(SOURCES[part] for part in made.method if part in SOURCES),
    )
    append_step(made.student, step, base_model=model_name(teacher), task=infer_task(teacher))
    return made.student.eval()


@dataclass(frozen=True)
class _Asked:
    """The keywords of `make_student`."""

    num_layers: int | None
    layers: Sequence[int] | None
    keep: str
    calibration: Any
    targets: Mapping[str, Any]
    architecture: str | None
    config: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """For the record: what was given. Data sets are named, without the machine's folders."""
        layers = None if self.layers is None else [int(layer) for layer in self.layers]
        given: dict[str, Any] = {"num_layers": self.num_layers, "layers": layers}
        if self.keep != "spread":
            given["keep"] = self.keep
        if self.calibration is not None:
            given["calibration"] = data_title(self.calibration)
        if self.architecture is not None:
            given["architecture"] = self.architecture
        return {**given, **self.targets, **self.config}


def _check(asked: _Asked) -> None:
    """Raise `SettingError` for keywords that make no sense together."""
    targets, config = ", ".join(asked.targets), ", ".join(asked.config)
    sized = asked.num_layers is not None or asked.layers is not None
    fresh = asked.architecture is not None
    if asked.keep not in KEEP:
        raise SettingError(f"keep must be one of {', '.join(KEEP)}, got {asked.keep!r}.")
    if (asked.num_layers is not None and asked.layers is not None) or not (sized or config or targets or fresh):
        raise SettingError(
            f"Give one of num_layers and layers, got num_layers={asked.num_layers} and layers={asked.layers}; or "
            "widths such as hidden_size=, a target such as max_parameters=, or architecture=."
        )
    for wrong, message in _problems(asked, targets, config, sized):
        if wrong:
            raise SettingError(message)
    sizes.check_targets(asked.targets)


def _problems(asked: _Asked, targets: str, config: str, sized: bool) -> list[tuple[Any, str]]:
    """Combinations of keywords, whether they were given, and what is wrong with them."""
    fresh = asked.architecture is not None
    cut = asked.layers is not None or asked.keep != "spread" or asked.calibration is not None
    return [
        (
            fresh and (cut or targets),
            "architecture= makes a fresh student, of which no layers are kept and no weights "
            "ranked: layers, keep, calibration and targets do not go with it. Give the sizes of its config instead.",
        ),
        (
            targets and (sized or config),
            f"{targets} chooses the sizes itself. Leave out num_layers, layers and {config or 'widths'}, or the "
            "target.",
        ),
        (
            asked.keep != "spread" and asked.num_layers is None and not targets,
            f"keep={asked.keep!r} says which layers stay, and needs num_layers= to say how many"
            + (f", layers={asked.layers} names them already." if asked.layers is not None else "."),
        ),
        (
            asked.keep == "influence" and asked.calibration is None,
            'keep="influence" measures the layers on data. Give calibration=, a data set or an iterable of batches.',
        ),
        (
            asked.calibration is not None and asked.keep != "influence" and not config and not targets,
            f'calibration= is only read for keep="influence" and for widths; keep={asked.keep!r} needs none. Leave it '
            "out.",
        ),
    ]


def _fresh(teacher: Any, asked: _Asked) -> Made:
    student, taken = fresh_student(teacher, str(asked.architecture), asked.config, asked.num_layers)
    return Made(
        student,
        method=["architecture"],
        modules=[name for name, part in student.named_children() if any(True for _ in part.parameters())],
        results={"from_teacher": taken},
        is_fresh=True,
    )


def _cut_as_asked(teacher: Any, asked: _Asked) -> Made:
    depth = len(layer_stack(teacher)[1])
    _check_layers(depth, asked)
    refuse_compressed(teacher)
    widths = student_widths(teacher, asked.config) if asked.config else None
    importance = None if asked.calibration is None else measure_importance(teacher, asked.calibration)
    influence = importance.influence if importance else []
    kept = (
        list(range(depth)) if asked.num_layers is None else kept_layers(depth, asked.num_layers, asked.keep, influence)
    )
    if asked.layers is not None:
        kept = [int(layer) for layer in asked.layers]
    return cut(teacher, kept, widths, importance, asked.keep)


def _searched(teacher: Any, asked: _Asked) -> Made:
    """The first rung of the ladder that fits; measured again as it is, and the next one where it does not."""
    depth = len(layer_stack(teacher)[1])
    refuse_compressed(teacher)
    try:
        layer_blocks(teacher)
        full = widths_of(teacher)
    except UnsupportedModelError:
        full = None
    importance = None if asked.calibration is None else measure_importance(teacher, asked.calibration)
    influence = importance.influence if importance else []

    def kept_on(rung: sizes.Rung) -> list[int]:
        return kept_layers(depth, rung.num_layers, asked.keep, influence)

    def build(rung: sizes.Rung) -> Any:
        return sketch(teacher, kept_on(rung), rung.widths)

    def possible(rung: sizes.Rung) -> bool:
        return can_cut(teacher, kept_on(rung), rung.widths)

    search = sizes.Search(sizes.ladder(depth, full, possible), build, asked.targets)
    for rung in search.rungs[sizes.find_rung(search) :]:
        made = cut(teacher, kept_on(rung), rung.widths, importance, asked.keep)
        found = sizes.measure(made.student, asked.targets)
        if sizes.fits(found, asked.targets):
            facts = {"target": dict(asked.targets), "reached": sizes.reached(found, asked.targets)}
            return replace(made, results={**made.results, **facts}, measured=found)
    return sizes.refuse(search)


def _check_layers(depth: int, asked: _Asked) -> None:
    layers, number = asked.layers, asked.num_layers
    if layers is not None:
        kept = list(layers) if isinstance(layers, Collection) else []
        whole = all(_is_whole(layer) and 0 <= layer < depth for layer in kept)
        if not kept or not whole or len(set(kept)) < len(kept):
            raise SettingError(f"layers must be a list of different whole numbers in 0..{depth - 1}, got {layers!r}.")
    if number is not None and not (_is_whole(number) and isinstance(number, int) and 1 <= number <= depth):
        raise SettingError(f"num_layers must be in 1..{depth} for this teacher, got {number!r}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
