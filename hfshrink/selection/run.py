"""`select`: the rows of a data set worth training on."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.labels import class_names
from hfshrink.record import model_name
from hfshrink.selection.blockwise import BLOCK_NUMBERS, Rows
from hfshrink.selection.budgets import budgets_left
from hfshrink.selection.contents import is_text
from hfshrink.selection.dangers import measure_coverage
from hfshrink.selection.embeddings import embed
from hfshrink.selection.methods import MEASURES, METHODS, Choice, choose_method
from hfshrink.selection.removal import overlap_with, remove_duplicates, without_hardest
from hfshrink.selection.request import EMBED_OPTIONS, Request, Settings, Sources, read_request
from hfshrink.selection.scoring import measure_name, read_scores
from hfshrink.selection.selection_report import ClassShare, SelectionReport, class_shares
from hfshrink.selection.subset import Subset

if TYPE_CHECKING:
    from datasets import Dataset


def select(  # noqa: PLR0913
    dataset: Any,
    fraction: float | None = None,
    method: str = "auto",
    *,
    size: int | None = None,
    model: Any = None,
    embeddings: Any = None,
    scores: Any = None,
    data_map: Any = None,
    stratify: str | None = "label",
    deduplicate: bool | float | None = None,
    held_out: Any = None,
    processor: Any = None,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    **options: Any,
) -> Subset:
    """Pick the rows of a data set that are worth training on. One seed gives one subset.

    `"random"` needs nothing; `"kmeans" "herding" "k-center" "facility" "moderate"` need embeddings; `"el2n" "grand"
    "forgetting" "aum" "hard"` (the hardest rows), `"easy"`, `"ambiguous"`, `"h-score"` (neither always right nor
    never) and `"ccs"` (all degrees of hardness but the hardest) rank by scores. `"auto"` chooses by the share that is
    kept and says why in the report. The hardest rows alone lose to random ones where little is kept
    (arXiv:2210.15809).

    Scores are taken from `scores=` or `data_map=`, else from small probes trained on embeddings and labels. Give
    training rows only: nothing here may see test rows.

    Args:
        dataset: A `datasets.Dataset` of texts, words with tags, images or token ids; a folder of `save_to_disk`, or a
            Hub id.
        fraction: Share of the rows to keep, in (0, 1]; or `size`, their number.
        method: A key of `hfshrink.selection.methods.METHODS`, or "auto".
        size: Rows to keep; the other way to say `fraction`.
        model: A model, folder or Hub id whose embeddings serve (`hfshrink.selection.embeddings.embed`). Nothing is
            downloaded where it is not named.
        embeddings: (n, d) real numbers, in memory or memory-mapped, in place of `model`.
        scores: (n,) of the measure that the method is named after, with its paper's sign (of AUM the lower is the
            harder); of "ccs", "easy", "hard" and "auto" the higher is the harder, or what the option `score` names.
            Or an earlier `Subset`, whose scores serve.
        data_map: A `DataMap`, or its folder. It must be of these rows.
        stratify: A column of which each value keeps its share, at least one row. "label" is the label column whatever
            its name (of lists of tags each row's rarest tag counts); where there is none all rows are taken alike, as
            with None.
        deduplicate: True removes rows that say the same before the picking: equal ones, and with embeddings those of a
            cosine above 0.95, or above the number given. None counts the equal ones; "auto" may then remove as many as
            can be missed. False removes none.
        held_out: Test rows. Training rows among them are reported, and scores made on them refused.
        processor: The model's tokenizer or image processor; None looks beside the model.
        cache_dir: A folder that keeps the embeddings; None keeps them in memory.
        seed: Of all draws.
        **options: Of the methods: `clusters` (kmeans), `outliers` (k-center), `references` (facility), `value`
            (h-score), `cutoff` (share of hardest rows left out), `strata` (ccs); `score` (the measure of "ccs",
            "easy", "hard", "auto", such as "aum"); `normalize` (whether embeddings count by their angle; as a default
            for texts); `label_column`; `split` (of a data set given by its name); of `embed`: `pooling`, `batch_size`,
            `text_columns`, `max_length`; of `train_probes`: `seeds`, `epochs`, `hidden`; of the coverage: `columns`
            (metadata, such as the source), `thresholds` (of its warnings: `Thresholds` or a mapping), `coverage`
            (False leaves it out, True measures distances however many rows there are).

    Returns:
        The subset: `.dataset`, `.indices`, `.scores` and `.report`; `print(subset)` shows a table. What it leaves out
        (`hfshrink.selection.coverage`) stands in `.report.details["coverage"]`, and its warnings are logged.

    Raises:
        SettingError: A streaming data set; a fraction, size, method or option out of range; what the method needs is
            missing; fewer rows than classes; a column that is missing; NaN, another length, or other rows in
            embeddings, scores or the data map; test rows given for training rows.
        CheckpointError: A data set, model or data map that can't be read.
        MissingDependencyError: k-means needs scikit-learn.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"text": ["a", "b", "c", "d"], "label": [0, 0, 1, 1]})
        >>> points = np.array([[0.0], [1.0], [5.0], [5.5]], dtype=np.float32)
        >>> select(rows, 0.5, "herding", embeddings=points).dataset["label"][:]
        [0, 1]
    """
    seed = int(seed) if isinstance(seed, np.integer) else seed
    settings = Settings(method, fraction, size, stratify, deduplicate, seed, dict(options))
    sources = Sources(model, processor, embeddings, scores, data_map, held_out, cache_dir)
    return Selection(read_request(dataset, settings, sources)).run()


class Selection:
    """One call of `select`: embeds where it is needed, and keeps the time."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.seconds: dict[str, float] = {}
        self._vectors = request.sources.embeddings

    def run(self) -> Subset:
        """All stages."""
        request = self.request
        choice = self._choose()
        name = measure_name(request, choice)
        with self._timed("duplicates"):
            held_out = overlap_with(request, self.vectors)
            candidates, duplicates = remove_duplicates(request, choice, self.vectors)
        with self._timed("scores"):
            scores, origin = read_scores(request, name, self.vectors)
        size = min(request.size, len(candidates))
        harder = None if name is None or scores is None else MEASURES[name].towards_harder(scores)
        if choice.cutoff and harder is not None:
            candidates = without_hardest(request, candidates, harder, choice.cutoff)
        options = self._options(choice)
        with self._timed("selection"):
            indices = candidates[self._pick(choice, candidates, size, harder, options)]
        found = {"duplicates": duplicates, "held_out": held_out, "score": name, "scored_by": origin}
        with self._timed("coverage"):
            covered = measure_coverage(request, indices, self._vectors)
        found["details"] = {} if covered is None else {"coverage": covered}
        report = self._report(choice, indices, options, found)
        return Subset(request.rows.select(indices), indices, scores, report)

    def vectors(self) -> NDArray[Any]:
        """(n, d) embeddings of all rows: given, or made when they are first asked for."""
        source = self.request.sources
        if self._vectors is None:
            with self._timed("embeddings"):
                self._vectors = embed(
                    self.request.content(self.request.rows),
                    source.model,
                    source.processor,
                    cache_dir=source.cache_dir,
                    **self.request.settings.given(*EMBED_OPTIONS),
                )
        return self._vectors

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started, inner = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[stage] = time.perf_counter() - started - (sum(self.seconds.values()) - inner)

    def _choose(self) -> Choice:
        request = self.request
        if request.settings.method != "auto":
            return Choice(request.settings.method)
        source, strata = request.sources, request.labels.strata
        classes = 1 if strata is None else len(np.unique(strata))
        return choose_method(
            request.size / len(request.rows),
            request.size / classes,
            has_scores=source.has_scores or (source.has_embeddings and request.labels.can_be_learnt),
            has_embeddings=source.has_embeddings,
        )

    def _options(self, choice: Choice) -> dict[str, Any]:
        """The keywords of the pure function, but for labels."""
        request, method = self.request, METHODS[choice.method]
        options = request.settings.given(*method.takes)
        if method.seeded:
            options["seed"] = request.settings.seed
        if method.normalized:
            options["normalize"] = request.settings.options.get("normalize", is_text(request.rows, request.texts))
        return options

    def _pick(
        self,
        choice: Choice,
        candidates: NDArray[np.int64],
        size: int,
        harder: NDArray[np.float64] | None,
        options: dict[str, Any],
    ) -> NDArray[np.int64]:
        """Positions in `candidates`, rising; each class keeps its share of all rows, whatever has left before."""
        strata = self.request.labels.strata
        if strata is None or len(candidates) == len(strata):
            return self._pick_from(choice, candidates, size, strata, harder, options)
        parts = []
        for stratum, budget in budgets_left(strata, candidates, size).items():
            rows = np.flatnonzero(strata[candidates] == stratum)
            if 0 < budget < len(rows):
                rows = rows[self._pick_from(choice, candidates[rows], budget, None, harder, options)]
            parts.append(rows if budget else rows[:0])
        return np.sort(np.concatenate(parts))

    def _pick_from(
        self,
        choice: Choice,
        candidates: NDArray[np.int64],
        size: int,
        labels: NDArray[Any] | None,
        harder: NDArray[np.float64] | None,
        options: dict[str, Any],
    ) -> NDArray[np.int64]:
        method = METHODS[choice.method]
        if method.measure is not None and harder is not None:
            return method.pick(harder[candidates], size, labels=labels, **options)
        if not method.embeddings:
            return method.pick(len(candidates), size, labels=labels, **options)
        with tempfile.TemporaryDirectory(prefix="hfshrink-", ignore_cleanup_errors=True) as folder:
            return method.pick(only_rows(self.vectors(), candidates, folder), size, labels=labels, **options)

    def _report(
        self, choice: Choice, indices: NDArray[np.int64], options: dict[str, Any], found: dict[str, Any]
    ) -> SelectionReport:
        request, settings = self.request, self.request.settings
        asked = {"fraction": settings.fraction, "size": settings.size, "stratify": settings.stratify}
        if choice.cutoff:
            options = {**options, "cutoff": choice.cutoff}
        rows = request.rows
        source, revision = hub_source(rows)
        return SelectionReport(
            method=settings.method,
            used=choice.method,
            rows=len(rows),
            size=len(indices),
            seed=settings.seed,
            why=choice.why,
            source=METHODS[choice.method].source,
            settings={**asked, "deduplicate": settings.deduplicate, **settings.options, **options},
            model=self._model(found["scored_by"]),
            data=source or request.title,
            split=None if rows.split is None else str(rows.split),
            revision=revision,
            columns=request.columns,
            balance=self._balance(indices),
            seconds=self.seconds,
            notes=tuple(request.notes),
            **found,
        )

    def _model(self, origin: str | None) -> str | None:
        """Name of the model that the rows were judged by, without the machine's folders."""
        source = self.request.sources
        if origin == "data map":
            return getattr(source.data_map, "model", None)
        if origin == "given" and isinstance(source.scores, Subset):
            return source.scores.report.model
        if "embeddings" not in self.seconds:
            return None
        if isinstance(source.model, str | Path):
            return Path(source.model).name if Path(source.model).exists() else str(source.model)
        return model_name(source.model) or type(source.model).__name__

    def _balance(self, indices: NDArray[np.int64]) -> tuple[ClassShare, ...]:
        labels, rows = self.request.labels, self.request.rows
        shares: tuple[ClassShare, ...] = ()
        if labels.values is not None and labels.column is not None:
            shares = class_shares(labels.column, labels.values, indices, class_names(rows, labels.column))
        if labels.strata is None or labels.strata_column is None or labels.strata is labels.values:
            return shares
        tags = labels.strata_column == labels.column
        title = f"{labels.strata_column} (rarest of a row)" if tags else labels.strata_column
        return shares + class_shares(title, labels.strata, indices, class_names(rows, labels.strata_column))


def only_rows(embeddings: NDArray[Any], rows: NDArray[np.int64], folder: str) -> NDArray[Any]:
    """Some rows of an array; where they are many, in a file in `folder` and not in memory."""
    if len(rows) == len(embeddings):
        return embeddings
    if len(rows) * embeddings.shape[1] <= 16 * BLOCK_NUMBERS:
        return embeddings[rows]
    shape = (len(rows), embeddings.shape[1])
    copy = np.lib.format.open_memmap(Path(folder) / "rows.npy", "w+", dtype=np.float32, shape=shape)
    for where, block in Rows(embeddings, rows).blocks():
        copy[where] = block
    return copy


def hub_source(rows: Dataset) -> tuple[str | None, str | None]:
    """The Hub id and the commit that the rows were read from, as the addresses of their files tell; else None."""
    addresses = map(str, rows.info.download_checksums or ())
    found = (re.match(r"hf://datasets/([\w./-]+)@([0-9a-f]{40})(/|$)", address) for address in addresses)
    return next(((match[1], match[2]) for match in found if match), (None, None))
