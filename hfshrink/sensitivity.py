"""How much the loss rises when one place of a model is damaged: the same table for every technique."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hfshrink.calibration import batches
from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import SettingError, UnsupportedModelError, require
from hfshrink.inputs import eval_mode
from hfshrink.labels import IGNORED, next_token_labels
from hfshrink.loading import infer_task, load
from hfshrink.terminal import progress, table

PLOT_SUFFIXES = (".png", ".svg")
MEASURES = ("loss", "divergence")
LABELS = {
    "loss": "loss rise",
    "divergence": "divergence from the model as it is",
    "error": "share of squared norm lost",
}
"""measure -> what a table and a plot call it; an error is computed from weights, without running the model."""


class Perturbation(Protocol):
    """What a technique does to one place of a model, on trial. Each technique brings its own.

    Attributes:
        title: Names technique and method, such as "prune neurons by magnitude".
        levels: How strongly the places are damaged where the caller does not say, such as sparsities or bits.
    """

    title: str
    levels: Sequence[float]

    def places(self, model: nn.Module) -> list[str]:
        """The names of all places that can be damaged, in the model's order: modules, groups of units, layers."""

    def apply(self, model: nn.Module, place: str, level: float) -> AbstractContextManager[None]:
        """Damage a place while the block runs, and restore it bitwise afterwards, also after an exception."""


@dataclass(frozen=True)
class SensitivityRow:
    """One place at one level: the loss, and how far it lies above that of the dense model. None: not a number."""

    place: str
    level: float
    loss: float | None
    rise: float | None


@dataclass(frozen=True)
class Sensitivity:
    """Loss rises of all places and levels; `print` shows the table.

    Attributes:
        title: Of the perturbation.
        dense_loss: Loss of the unchanged model on the same sample, the mean over rows or label tokens.
        examples: Rows in the sample; 0 where none were needed.
        rows: Place after place, each at all levels.
        measure: What rises: "loss", "divergence", or "error", the share of a module's squared norm that is lost.

    Example:
        >>> rows = [SensitivityRow("a", 0.5, 0.75, 0.25), SensitivityRow("b", 0.5, 0.625, 0.125)]
        >>> found = Sensitivity("prune", 0.5, 256, tuple(rows))
        >>> print(found)
        loss rise over 0.5000, prune, 256 examples
        | place | 0.5     |
        |-------|---------|
        | a     | +0.2500 |
        | b     | +0.1250 |
        >>> found.best_first()
        ['b', 'a']
    """

    title: str
    dense_loss: float
    examples: int
    rows: tuple[SensitivityRow, ...]
    measure: str = "loss"

    @property
    def places(self) -> list[str]:
        """The places, in the model's order."""
        return list(dict.fromkeys(row.place for row in self.rows))

    @property
    def levels(self) -> list[float]:
        """The levels, in the order in which they were asked for."""
        return list(dict.fromkeys(row.level for row in self.rows))

    def rise(self, place: str, level: float) -> float | None:
        """The loss rise of a place at a level; None where the loss was no number.

        Raises:
            SettingError: That was not measured.
        """
        for row in self.rows:
            if row.place == place and row.level == level:
                return row.rise
        raise SettingError(f"{place!r} at {level!r} was not measured; levels: {', '.join(map(str, self.levels))}.")

    def best_first(self, level: float | None = None) -> list[str]:
        """The places in the order in which to compress them: the smallest loss rise first.

        Args:
            level: The level to go by; None takes the mean over all levels.
        """
        levels = self.levels if level is None else [level]

        def cost(place: str) -> float:
            rises = [self.rise(place, level) for level in levels]
            return sum(math.inf if rise is None else rise for rise in rises) / len(levels)

        return sorted(self.places, key=cost)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        over = f" over {self.dense_loss:.4f}" if self.measure == "loss" else ""
        counted = f", {self.examples:,} examples" if self.examples else ""
        head = f"{LABELS[self.measure]}{over}, {self.title}{counted}"
        sign = "" if self.measure == "error" else "+"  # a share has none
        lines = [[place, *(_shown(self.rise(place, level), sign) for level in self.levels)] for place in self.places]
        return f"{head}\n" + table(("place", *(f"{level:g}" for level in self.levels)), lines)

    def plot(self, path: str | Path) -> None:
        """Write a heat-map, places down and levels across; the suffix says whether PNG or SVG.

        Raises:
            SettingError: Another suffix.
            MissingDependencyError: matplotlib is not installed.
        """
        if Path(path).suffix.lower() not in PLOT_SUFFIXES:
            raise SettingError(f"The plot's name must end in {' or '.join(PLOT_SUFFIXES)}, got {str(path)!r}.")
        figure = require("matplotlib.figure", extra="plots").Figure(
            figsize=(4 + 0.7 * len(self.levels), 1.5 + 0.25 * len(self.places)), layout="constrained"
        )
        axes = figure.subplots()
        rises = [[self.rise(place, level) for level in self.levels] for place in self.places]
        values = [[math.nan if rise is None else rise for rise in row] for row in rises]
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(self.places)), self.places, fontsize=7)
        axes.set_xticks(range(len(self.levels)), [f"{level:g}" for level in self.levels])
        axes.set_xlabel("level")
        axes.set_title(self.title, fontsize=9)
        figure.colorbar(image, ax=axes, label=LABELS[self.measure])
        figure.savefig(path)


def measure_sensitivity(  # noqa: PLR0913
    model: Any,
    data: Any,
    perturbation: Perturbation,
    *,
    measure: str = "loss",
    levels: Sequence[float] | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    samples: int = 256,
    batch_size: int = 32,
    processor: Any = None,
) -> Sensitivity:
    """Damage one place of a model after the other, and measure how far its loss rises on a small sample.

    The model is in eval mode meanwhile and bitwise the same afterwards, also after an exception; the caller's random
    state stays as it was. A language model without labels is asked for its own input: the next token, or in a masked
    one the tokens that it sees.

    Args:
        model: A model, a folder or a Hub id.
        data: Rows with labels, in any form that calibration data may have.
        perturbation: What to do to each place, such as `hfshrink.pruning.perturbation("neurons")`.
        measure: "loss", or "divergence": KL(p, q) of the classes' probabilities p of the model as it is and q of the
            damaged one, the mean over rows or real tokens. It needs no labels, is never below 0 but for rounding, and
            tells small damage on few rows better; the model as it is answers all rows first, which are kept.
        levels: How strongly; None takes those of the perturbation.
        include: Wildcards of names of places.
        exclude: Wildcards of names to leave out.
        samples: Rows of the sample, spread evenly over the data set.
        batch_size: Rows per batch.
        processor: The model's tokenizer or image processor; None looks beside the model's files.

    Raises:
        SettingError: No labels, a wildcard without match, no levels, or a loss that is no number before any change.
        UnsupportedModelError: The model computes no loss.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from hfshrink.pruning.perturbations import perturbation
        >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1])}
        >>> found = measure_sensitivity(model, [batch], perturbation("heads", levels=(0.0, 0.5)))
        >>> found.places, found.rise("bert.encoder.layer.1.heads", 0.0)
        (['bert.encoder.layer.0.heads', 'bert.encoder.layer.1.heads'], 0.0)
    """
    given = perturbation.levels if levels is None else levels
    strengths = list(dict.fromkeys(given)) if isinstance(given, Iterable) else []
    if not strengths or not all(isinstance(level, int | float) and math.isfinite(level) for level in strengths):
        raise SettingError(f"levels must be one or more numbers, got {levels!r}.")
    if measure not in MEASURES:
        raise SettingError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}.")
    model, found = load(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError("An export can't be damaged in places. Measure the model that it was made from.")
    places = _chosen(perturbation.places(model), include, exclude)
    read = batches(data, model, processor or found, batch_size=batch_size, samples=samples)
    sample = [_with_labels(batch, model) if measure == "loss" else dict(batch) for batch in read]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    rows = []
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad(), eval_mode(model):
        answers = [_log_probabilities(model, batch) for batch in sample] if measure == "divergence" else []
        dense = _damage(model, sample, answers)
        if not math.isfinite(dense):
            raise SettingError(f"The loss is {dense} before any change. Check the labels, or load in float32.")
        pairs = [(place, level) for place in places for level in strengths]
        for place, level in progress(pairs, "sensitivity"):
            with perturbation.apply(model, place, level):
                loss = _damage(model, sample, answers)
            known = math.isfinite(loss)
            rows.append(SensitivityRow(place, level, loss if known else None, loss - dense if known else None))
    examples = sum(len(next(iter(batch.values()))) for batch in sample)
    return Sensitivity(perturbation.title, dense, examples, tuple(rows), measure)


@contextmanager
def restored(*tensors: Tensor) -> Iterator[None]:
    """Put the values of tensors back when the block ends, bitwise, also after an exception. For perturbations.

    Example:
        >>> weight = torch.ones(2)
        >>> with restored(weight):
        ...     _ = weight.zero_()
        >>> weight.tolist()
        [1.0, 1.0]
    """
    with torch.no_grad():
        saved = [tensor.detach().clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, values in zip(tensors, saved, strict=True):
                tensor.copy_(values)


def _shown(rise: float | None, sign: str) -> str:
    return "no number" if rise is None else f"{rise:{sign}.4f}"


def _chosen(places: list[str], include: str | Sequence[str], exclude: str | Sequence[str]) -> list[str]:
    include = [include] if isinstance(include, str) else list(include)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for pattern in (*include, *exclude):
        if pattern != "*" and not any(fnmatchcase(place, pattern) for place in places):
            raise SettingError(
                f"The wildcard {pattern!r} matches none of {len(places)} places: {', '.join(places[:6])}, …"
            )
    chosen = [
        place
        for place in places
        if any(fnmatchcase(place, p) for p in include) and not any(fnmatchcase(place, p) for p in exclude)
    ]
    if not chosen:
        raise SettingError(f"No place is left of {len(places)}: exclude takes all.")
    return chosen


def _with_labels(batch: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """A batch with labels; those of a language model are its own inputs, padding left out."""
    if "labels" in batch or "start_positions" in batch:
        return batch
    task = infer_task(model)
    if task not in LANGUAGE_TASKS or model.config.is_encoder_decoder or "input_ids" not in batch:
        raise SettingError(
            f"The loss needs labels, and the data has only {', '.join(batch)} for the task {task!r}. Give rows with a "
            "column 'labels' or 'label' to a model with a head that has a loss."
        )
    return next_token_labels(batch)


def _damage(model: Any, sample: Sequence[Mapping[str, Tensor]], answers: Sequence[Tensor]) -> float:
    """The loss of a sample, or its divergence from answers (positions, classes) of each batch, where there are any."""
    if not answers:
        return _loss(model, sample)
    total = 0.0
    for batch, expected in zip(sample, answers, strict=True):
        total += float((expected.exp() * (expected - _log_probabilities(model, batch))).sum())
    return total / sum(map(len, answers))


def _log_probabilities(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Of all classes, shape (rows or real tokens, classes)."""
    logits = getattr(model(**{name: value for name, value in batch.items() if name != "labels"}), "logits", None)
    if logits is None or logits.shape[-1] < 2:
        raise UnsupportedModelError(f"{type(model).__name__} has no classes to compare. Take measure='loss'.")
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]
    return logits.flatten(0, -2).double().log_softmax(-1)  # small divergences are differences of equal digits


def _loss(model: Any, sample: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean loss of a sample, over rows, or over label tokens where each token has a label."""
    total, count = 0.0, 0
    for batch in sample:
        loss = getattr(model(**batch), "loss", None)
        if loss is None:
            raise UnsupportedModelError(f"{type(model).__name__} computes no loss from {', '.join(batch)}.")
        weight = _labels_counted(batch, model)
        if weight:  # the mean over no label is no number
            total += float(loss) * weight
            count += weight
    return total / count if count else math.nan


def _labels_counted(batch: Mapping[str, Tensor], model: Any) -> int:
    labels = batch.get("labels")
    if labels is None or labels.ndim < 2 or labels.is_floating_point():
        return len(next(iter(batch.values())))
    shifted = labels[:, 1:] if infer_task(model) == "text-generation" else labels
    return int((shifted != IGNORED).sum())
