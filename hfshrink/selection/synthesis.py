"""`synthesize`: a few learned examples of each class, as images or as the real rows nearest to learned embeddings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hfshrink.data import read_dataset
from hfshrink.errors import SettingError
from hfshrink.evaluation.scoring import dataset_name
from hfshrink.record import model_name
from hfshrink.selection.blockwise import Rows, check_embeddings
from hfshrink.selection.budgets import class_budgets
from hfshrink.selection.caching import column_digests
from hfshrink.selection.contents import is_text, row_texts
from hfshrink.selection.embeddings import embed, without_bars
from hfshrink.selection.images import find_image_column, read_images
from hfshrink.selection.learning import ClassRows, Learning
from hfshrink.selection.nearest_rows import NO_CHANCE, head_logits, matched_rows
from hfshrink.selection.random_networks import random_convnet, random_layer
from hfshrink.selection.request import EMBED_OPTIONS
from hfshrink.selection.row_classes import Classes, read_classes
from hfshrink.selection.run import hub_source
from hfshrink.selection.selection_report import ClassShare, SelectionReport
from hfshrink.selection.subset import Subset
from hfshrink.selection.synthetic import Synthetic

if TYPE_CHECKING:
    from datasets import Dataset

PAPERS = {"distribution": "arXiv:2110.04181", "gradient": "arXiv:2006.05929"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "images": {"steps": 100, "rate": 0.05, "width": 32, "batch_rows": 32},
    "embeddings": {"steps": 100, "rate": 0.02, "width": 256, "batch_rows": 128, "normalize": None},
}
"""space -> its options and their values where none is given."""

BANK_FEATURES = 1024  # random features in which the rows chosen shall be like their class
BANK_SEED = 2**31 - 1  # of their weights
MOST_NUMBERS = 2**28  # pixels that are read, 1 GB in float32; of more images a sample is


def synthesize(  # noqa: PLR0913
    dataset: Any,
    per_class: int = 10,
    method: str = "distribution",
    *,
    model: Any = None,
    embeddings: Any = None,
    processor: Any = None,
    label_column: str | None = None,
    soft_labels: bool = True,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Subset | Synthetic:
    """Learn a few examples of each class that stand for all of it. One seed gives one result.

    `"distribution"` moves synthetic rows until their mean equals the real rows' mean in the features of ever new
    random networks (Zhao & Bilen, arXiv:2110.04181); `"gradient"` until they give networks the same gradients (Zhao,
    Mopuri & Bilen, arXiv:2006.05929), which takes about three times as long a step. They start as real rows.

    Small images (up to 64 × 64 pixels) are learned themselves, in seconds to minutes on one core. With `model` or
    `embeddings` the embeddings are learned, and for each the real row is taken that is near it and together with the
    others matches the class: texts that any architecture can train on. Learned embeddings themselves train only a head
    on the same embeddings, and do that better than the rows; they are in `.learnt`.

    Args:
        dataset: Training rows with one label each: a `datasets.Dataset`, a folder of `save_to_disk`, or a Hub id.
        per_class: Examples of each class.
        method: "distribution" or "gradient".
        model: A model, folder or Hub id whose embeddings serve, as in `embed`.
        embeddings: (n, d) real numbers, in place of `model`.
        processor: The model's tokenizer or image processor; None looks beside the model.
        label_column: Name of the label column; None finds it.
        soft_labels: With embeddings: add the column `teacher_logits`, what a linear classifier fitted on all
            embeddings says, so that `DistillationTrainer` can train on it. `add_soft_labels` puts a real teacher's.
        cache_dir: A folder that keeps the embeddings; None keeps them in memory.
        seed: Of all draws and weights.
        **options: `steps` of learning; `rate` of a step, in standard deviations of a row's numbers; `width` of the
            random networks (channels, or features); `batch_rows` of each class in a step; with embeddings `normalize`
            (whether they count by their angle; as a default for texts) and the options of `embed`: `pooling`,
            `batch_size`, `text_columns`, `max_length`.

    Returns:
        A `Subset` with `.learnt` where embeddings are learned (no scores), else a `Synthetic` with learned images in
        the form of the data set's own. Both have `.dataset` and `.report`.

    Raises:
        SettingError: A streaming data set; no labels, one class only, or a class with fewer rows than `per_class`;
            images of different shapes or too large; neither images nor embeddings; NaN; an unknown setting.
        CheckpointError: A data set or model that can't be read.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 0, 1, 1]})
        >>> points = np.array([[0.0, 1.0], [1.0, 0.0], [5.0, 1.0], [5.5, 0.0]], dtype=np.float32)
        >>> synthesize(rows, 1, embeddings=points, steps=5).dataset.column_names
        ['text', 'label', 'teacher_logits']
    """
    if model is not None and embeddings is not None:
        raise SettingError("Give either model= or embeddings=, got both.")
    space = "images" if model is None and embeddings is None else "embeddings"
    settings = _check_settings(space, per_class, method, seed, options)
    rows = read_dataset(dataset)
    image_column = _image_column(rows) if space == "images" else ""
    source = read_classes(rows, per_class, label_column, dataset_name(dataset, rows))
    task = Synthesis(rows, source, method, per_class, settings, seed)
    if space == "images":
        return task.images(image_column)
    settings["soft_labels"] = soft_labels
    started = time.perf_counter()
    if embeddings is None:
        how = {name: options[name] for name in EMBED_OPTIONS if name in options}
        embeddings = embed(rows, model, processor, cache_dir=cache_dir, **how)
        task.seconds["embeddings"] = time.perf_counter() - started
    return task.embeddings(check_embeddings(embeddings, len(rows)), _model_title(model))


class Synthesis:
    """One call of `synthesize`, checked; keeps the time."""

    def __init__(
        self, rows: Dataset, classes: Classes, method: str, per_class: int, settings: dict[str, Any], seed: int
    ) -> None:
        self.rows, self.classes, self.method, self.per_class = rows, classes, method, per_class
        self.settings, self.seed = settings, seed
        self.seconds: dict[str, float] = {}

    def images(self, column: str) -> Synthetic:
        """Learn images."""
        sample = self._sample(column)
        images = read_images(self.rows if sample is None else self.rows.select(sample), column)
        real = ClassRows(self.classes.members(sample), lambda where: torch.from_numpy(images.normalized(where)))
        count, width = len(self.classes.values), self.settings["width"]
        low, high = map(torch.from_numpy, images.bounds)
        learning = self._learning(
            real, lambda seed: random_convnet(images.pixels.shape[1:], count, width, seed), (low, high)
        )
        points, details = self._learn(learning)
        labels = np.repeat(self.classes.values, self.per_class).tolist()
        rows = self._as_dataset(column, images.values(points.flatten(0, 1).numpy()), labels)
        details = {"space": "images", "shape": list(images.pixels.shape[1:]), **details}
        self.classes.notes.append("The rows are learned images, not rows of the data set.")
        return Synthetic(rows, self._report({"synthesis": details}, None))

    def embeddings(self, embeddings: NDArray[Any], model: str | None) -> Subset:
        """Learn embeddings and take real rows for them."""
        if self.settings["normalize"] is None:
            self.settings["normalize"] = is_text(self.rows, row_texts(self.rows, self.settings.get("text_columns")))
        view = Rows(embeddings, normalize=bool(self.settings["normalize"])).centred()
        scale = float(np.sqrt(view.squared_lengths().mean(dtype=np.float64) / embeddings.shape[1])) or 1.0
        if not np.isfinite(scale):
            raise SettingError("The squares of the embeddings overflow float32. Divide them by their largest number.")
        dimensions, count, width = embeddings.shape[1], len(self.classes.values), self.settings["width"]
        real = ClassRows(self.classes.members(), lambda where: torch.from_numpy(view.take(where) / np.float32(scale)))
        learning = self._learning(real, lambda seed: random_layer(dimensions, count, width, seed))
        points, found = self._learn(learning)
        details = {"synthesis": {"space": "embeddings", "dimensions": dimensions, **found}}
        started = time.perf_counter()
        vectors = points.numpy() * np.float32(scale)
        indices, order = self._take(view, vectors, scale)
        learnt = (vectors.reshape(-1, dimensions) + view.shift)[order]
        self.seconds["selection"] = time.perf_counter() - started
        rows = self.rows.select(indices)
        if self.settings["soft_labels"]:
            logits = head_logits(view, self.classes.numbers, indices, self.seed)
            rows, details["teacher"] = self._with_logits(rows, logits)
        report = self._report(details, model)
        return Subset(rows, indices, None, report, learnt.astype(np.float32))

    def _sample(self, column: str) -> NDArray[np.int64] | None:
        """Row numbers of as many images as fit into memory; None where all do."""
        first = read_images(self.rows.select([0]), column).pixels
        most = max(MOST_NUMBERS // first.size, self.per_class * len(self.classes.values))
        if len(self.rows) <= most:
            return None
        self.classes.notes.append(f"Learned from a sample of {most:,} of the {len(self.rows):,} images.")
        budgets = class_budgets(self.classes.numbers, most, self.per_class)
        generator = np.random.default_rng(self.seed)
        drawn = [generator.choice(rows, budgets[label], False) for label, rows in enumerate(self.classes.members())]
        return np.sort(np.concatenate(drawn))

    def _learning(self, real: ClassRows, make_network: Any, bounds: Any = None) -> Learning:
        settings = self.settings
        how = (settings["steps"], settings["rate"], settings["batch_rows"])
        return Learning(real, make_network, self.method, *how, bounds, self.seed)

    def _learn(self, learning: Learning) -> tuple[torch.Tensor, dict[str, Any]]:
        started = time.perf_counter()
        points, losses = learning.run(self.per_class)
        self.seconds["learning"] = time.perf_counter() - started
        if not torch.isfinite(points).all():
            raise SettingError(f"The learning diverged (rate={self.settings['rate']}). Give a smaller rate.")
        few = max(1, len(losses) // 10)  # single steps are noisy: other rows, another network
        return points, {"first_loss": float(np.mean(losses[:few])), "last_loss": float(np.mean(losses[-few:]))}

    def _take(
        self, view: Rows, vectors: NDArray[np.float32], scale: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rising row numbers, and for each the number of the learned point that it stands for."""
        dimensions = vectors.shape[-1]
        bank = random_layer(dimensions, 2, BANK_FEATURES, BANK_SEED).body

        @torch.no_grad()
        def features(block: NDArray[np.float32]) -> torch.Tensor:
            found: torch.Tensor = bank(torch.from_numpy(block / np.float32(scale)))
            return found

        members = self.classes.members()
        found = [
            rows[matched_rows(view.only(rows), points, features)]
            for rows, points in zip(members, vectors, strict=True)
        ]
        indices = np.concatenate(found)
        order = np.argsort(indices)
        return indices[order], order

    def _with_logits(self, rows: Dataset, logits: NDArray[np.float32]) -> tuple[Dataset, dict[str, Any]]:
        """The rows with a column of logits of all the column's classes."""
        import datasets

        wide = np.full((len(logits), len(self.classes.names)), NO_CHANCE, dtype=np.float32)
        wide[:, self.classes.places] = logits
        feature = datasets.List(datasets.Value("float32"))
        rows = rows.remove_columns([name for name in rows.column_names if name == "teacher_logits"])
        details = {
            "name": "linear classifier on the embeddings",
            "task": "classification",
            "signal": "full",
            "classes": len(self.classes.names),
            "labels": self.classes.names,
            "rows": len(rows),
            "columns": ["teacher_logits"],
        }
        with without_bars():
            return rows.add_column("teacher_logits", wide.tolist(), feature=feature), details

    def _as_dataset(self, column: str, values: list[Any], labels: list[Any]) -> Dataset:
        import datasets

        features = {name: self.rows.features[name] for name in (column, self.classes.column)}
        return datasets.Dataset.from_dict(
            {column: values, self.classes.column: labels}, features=datasets.Features(features)
        )

    def _shares(self) -> tuple[ClassShare, ...]:
        return tuple(
            ClassShare(self.classes.column, self.classes.names[place], int(full), self.per_class)
            for place, full in zip(self.classes.places, self.classes.counts, strict=True)
        )

    def _report(self, details: dict[str, Any], model: str | None) -> SelectionReport:
        name, rows = f"{self.method}-matching", self.rows
        source, revision = hub_source(rows)
        return SelectionReport(
            method=name,
            used=name,
            rows=len(rows),
            size=self.per_class * len(self.classes.values),
            seed=self.seed,
            source=PAPERS[self.method],
            settings={"per_class": self.per_class, **self.settings},
            model=model,
            data=source or self.classes.title,
            split=None if rows.split is None else str(rows.split),
            revision=revision,
            columns=column_digests(rows),
            balance=self._shares(),
            seconds=self.seconds,
            notes=tuple(self.classes.notes),
            details=details,
        )


def _check_settings(space: str, per_class: int, method: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    if method not in PAPERS:
        raise SettingError(f"method must be one of {', '.join(PAPERS)}, got {method!r}.")
    known = DEFAULTS[space]
    names = (*known, *(EMBED_OPTIONS if space == "embeddings" else ()))
    wrong = next((name for name in options if name not in names), None)
    if wrong is not None:
        raise SettingError(
            f"synthesize() in the space of {space} does not know {wrong!r}. It takes {', '.join(names)}."
        )
    settings = {**known, **options}
    if settings.get("normalize") not in (None, True, False):
        raise SettingError(f"normalize must be True, False or None, got {settings['normalize']!r}.")
    counts = {"per_class": per_class, **{name: settings[name] for name in ("steps", "width", "batch_rows")}}
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {value!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise SettingError(f"seed must be a whole number from 0 on, got {seed!r}.")
    rate = settings["rate"]
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < 10:
        raise SettingError(f"rate must be a number in (0, 10), such as {known['rate']}, got {rate!r}.")
    return settings


def _image_column(rows: Dataset) -> str:
    column = find_image_column(rows)
    if column is None:
        raise SettingError(
            f"Found no images among {', '.join(rows.column_names)}. For texts and other rows pass model= (whose "
            "embeddings are learned) or embeddings=; a column of images is called 'image' or 'pixel_values'."
        )
    return column


def _model_title(model: Any) -> str | None:
    if isinstance(model, str | Path):
        return Path(model).name if Path(model).exists() else str(model)
    return None if model is None else model_name(model) or type(model).__name__
