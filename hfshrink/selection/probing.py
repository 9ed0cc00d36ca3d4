"""`train_probes`: small heads on frozen embeddings, whose training tells in seconds how hard each row is."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from hfshrink.digests import digest_of
from hfshrink.errors import SettingError
from hfshrink.selection.blockwise import Rows, check_embeddings
from hfshrink.selection.budgets import check_labels
from hfshrink.selection.caching import array_digest, check_rows, column_digests
from hfshrink.selection.datamap_measures import PARTS, RunningMeasures, row_measures
from hfshrink.terminal import progress

KEPT_NUMBERS = 2**25  # logits that are kept, 128 MB in float32; of more only the sums are
EARLY = 0.2  # share of the epochs after which EL2N and GraNd are read: later most errors are small
BATCH_ROWS, LEAST_STEPS = 64, 16  # rows of a batch; fewer where an epoch would have less than so many steps
LEARNING_RATE, WEIGHT_DECAY = 0.05, 0.01  # the rate is divided by √d: a step of AdamW moves each of d weights by it


@dataclass(frozen=True, eq=False)
class Dynamics:
    """How several probes saw each row over their epochs; means over the runs.

    Attributes:
        confidence: Mean of p_y (cartography, arXiv:2009.10795), (n,).
        variability: Standard deviation of p_y over the epochs, (n,).
        correctness: Share of all passes in which the row is right, (n,).
        aum: Mean margin (arXiv:2001.10528), (n,); below 0 the label is likely wrong.
        forgetting: Forgetting events (arXiv:1812.05159), (n,); a row that a run never learns counts as forgotten in
            every epoch, so that the scores are finite.
        errors: ‖p − onehot(y)‖₂ (arXiv:2107.07075), (epochs, n).
        gradients: Norm of the last layer's gradient (same paper), (epochs, n).
        labels: Class numbers, (n,).
        classes: The labels as they were given, by class number.
        runs: Number of probes.
        digests: Of the embeddings and the labels that the probes were trained on.
        columns: Column -> digest of its content, where the data set was given.
        logits: (runs, epochs, n, classes) float32; None where they were too many to be kept.
        seconds: Time of the training.
    """

    confidence: NDArray[np.float64]
    variability: NDArray[np.float64]
    correctness: NDArray[np.float64]
    aum: NDArray[np.float64]
    forgetting: NDArray[np.float64]
    errors: NDArray[np.float32]
    gradients: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[Any, ...]
    runs: int
    digests: Mapping[str, str]
    columns: Mapping[str, str] = field(default_factory=dict)
    logits: NDArray[np.float32] | None = None
    seconds: float | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def early(self) -> int:
        """The epoch, counted from 1, at which `el2n` and `grand` are read: after a fifth of the training."""
        return max(1, round(EARLY * len(self.errors)))

    @property
    def el2n(self) -> NDArray[np.float64]:
        """(n,) errors at the early epoch."""
        return self.errors[self.early - 1].astype(np.float64)

    @property
    def grand(self) -> NDArray[np.float64]:
        """(n,) norms of the last layer's gradient at the early epoch."""
        return self.gradients[self.early - 1].astype(np.float64)

    @property
    def h_score(self) -> NDArray[np.float64]:
        """(n,) success rate over runs and epochs (arXiv:2407.08887): the correctness."""
        return self.correctness

    @property
    def fingerprint(self) -> str:
        """Digest of the embeddings, the labels and the columns that the probes were made on."""
        return digest_of([self.digests, self.columns])

    def check_rows(self, dataset: Any) -> None:
        """Refuse a data set that the probes were not made on; only its length is known without `columns`.

        Raises:
            SettingError: Another number of rows, or another content of a column that both have.
        """
        check_rows(dataset, len(self), self.columns, "record of these probes")

    def check_data(self, embeddings: NDArray[Any] | None = None, labels: ArrayLike | None = None) -> None:
        """Refuse embeddings or labels that the probes were not made on.

        Raises:
            SettingError: Another number of rows, or another content.
        """
        given = {
            "embeddings": None if embeddings is None else _digest(embeddings),
            "labels": None if labels is None else array_digest(_class_numbers(labels)[0]),
        }
        for name, digest in given.items():
            if digest not in (None, self.digests[name]):
                raise SettingError(
                    f"The scores of these probes were made on other {name}: the data set, its order or the model has "
                    "changed. Train the probes again on what you select from."
                )


def train_probes(
    embeddings: Any,
    labels: ArrayLike,
    *,
    dataset: Any = None,
    seeds: int = 5,
    epochs: int = 20,
    hidden: int | None = None,
    seed: int = 0,
) -> Dynamics:
    """Train linear (or one-hidden-layer) classifiers on frozen embeddings, and record how they see each row.

    Mini-batches of 64 rows (fewer of few rows), AdamW at 0.05 / √d, on features scaled to mean 0 and variance 1; after
    each epoch one pass over all rows in their order. Kept are a few numbers for each row and two for each epoch and
    row; the logits besides, where they are at most 2²⁵ numbers. A memory map of embeddings is read block by block.
    Give training rows only: scores of test rows would leak.

    Args:
        embeddings: (n, d) real numbers, in memory or memory-mapped, as of `embed`.
        labels: (n,) class numbers or names.
        dataset: The rows that the embeddings are of; with it `Dynamics.check_rows` knows the data set by its content.
        seeds: Number of probes; each has its own first weights and order of rows.
        epochs: Passes over the rows that each is trained for.
        hidden: Units of a hidden layer with ReLU; None is a linear probe.
        seed: Of all of them.

    Raises:
        SettingError: Numbers out of range, labels that don't match or are of one class, NaN embeddings.

    Example:
        >>> points = np.array([[0.0], [0.1], [0.9], [1.0]] * 8, dtype=np.float32)
        >>> dynamics = train_probes(points, [0, 0, 1, 1] * 8, seeds=2)
        >>> dynamics.el2n.shape, bool((dynamics.aum > 0).all())
        ((32,), True)
    """
    for name, value in (("seeds", seeds), ("epochs", epochs), ("hidden", 1 if hidden is None else hidden)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be a whole number from 1 on, got {value!r}.")
    started = time.perf_counter()
    numbers, classes = _class_numbers(labels)
    rows = check_embeddings(embeddings, len(numbers))
    columns = {} if dataset is None else _columns_of(dataset, len(numbers))
    inputs = Inputs.of(rows, numbers)
    record = _Record(seeds, epochs, len(numbers), len(classes))
    steps = progress(range(seeds * epochs), "probes", total=seeds * epochs)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False), torch.enable_grad():
        training: Iterator[nn.Sequential] = iter(())
        for step in steps:
            run, epoch = divmod(step, epochs)
            if epoch == 0:
                number = int(np.random.SeedSequence([seed, run]).generate_state(1)[0])
                training = _train(inputs, number, (hidden, len(classes)))
            record.add(run, epoch, next(training), inputs)
    return Dynamics(
        **record.arrays(),
        labels=numbers,
        classes=classes,
        runs=seeds,
        digests={"embeddings": _digest(rows), "labels": array_digest(numbers)},
        columns=columns,
        logits=record.logits,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class Inputs:
    """The rows as a probe reads them: (x − mean) / deviation, float32."""

    rows: Rows
    labels: Tensor
    scale: NDArray[np.float32]

    @classmethod
    def of(cls, embeddings: NDArray[Any], labels: NDArray[np.int64]) -> Inputs:
        """Measure mean and deviation of each feature; one that never changes is left as it is.

        Raises:
            SettingError: A number is NaN or infinite.
        """
        rows = Rows(embeddings).centred()
        squares = np.zeros(embeddings.shape[1])
        for _, block in rows.blocks():
            squares += np.einsum("ij,ij->j", block, block, dtype=np.float64)
        deviation = np.sqrt(squares / len(rows))
        deviation[deviation < 1e-12] = 1
        return cls(rows, torch.from_numpy(labels), deviation.astype(np.float32))

    def take(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Some rows with their labels."""
        return torch.from_numpy(self.rows.take(positions) / self.scale), self.labels[positions]

    def blocks(self, columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(where, rows, labels) of all in order, with room for `columns` numbers beside each row."""
        for where, block in self.rows.blocks(columns):
            yield where, torch.from_numpy(block / self.scale), self.labels[where]


def _train(inputs: Inputs, seed: int, sizes: tuple[int | None, int]) -> Iterator[nn.Sequential]:
    """The probe after each epoch, without end; its last layer is the classifier."""
    hidden, classes = sizes
    width = len(inputs.scale)
    torch.manual_seed(seed)
    inner = [] if hidden is None else [nn.Linear(width, hidden), nn.ReLU()]
    probe = nn.Sequential(*inner, nn.Linear(hidden or width, classes))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE / width**0.5, weight_decay=WEIGHT_DECAY)
    generator, size = np.random.default_rng(seed), max(1, min(BATCH_ROWS, len(inputs.rows) // LEAST_STEPS))
    while True:
        order = generator.permutation(len(inputs.rows))
        for start in range(0, len(order), size):
            vectors, labels = inputs.take(np.sort(order[start : start + size]))  # rising: kinder to a disk
            loss = nn.functional.cross_entropy(probe(vectors), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield probe


class _Record:
    """Sums over runs of what each epoch's pass tells; the runs come one after the other."""

    def __init__(self, runs: int, epochs: int, rows: int, classes: int) -> None:
        self.runs, self.rows = runs, rows
        self.errors, self.gradients = (np.zeros((epochs, rows), dtype=np.float32) for _ in range(2))
        kept = runs * epochs * rows * classes <= KEPT_NUMBERS
        self.logits = np.zeros((runs, epochs, rows, classes), dtype=np.float32) if kept else None
        self._sums = {name: np.zeros(rows) for name in MEANS}
        self._running = RunningMeasures(rows)

    @torch.no_grad()
    def add(self, run: int, epoch: int, probe: nn.Sequential, inputs: Inputs) -> None:
        """One pass over all rows, after `epoch` (from 0) of `run`."""
        parts = {name: np.zeros(self.rows, dtype) for name, dtype in PARTS.items()}
        head: Any = probe[-1]
        for where, vectors, labels in inputs.blocks(4 * head.out_features + head.in_features):
            features = probe[:-1](vectors)
            logits = head(features)
            measured = row_measures(logits, labels)
            for name, values in parts.items():
                values[where] = measured[name].numpy()
            lengths = torch.sqrt((features.double() ** 2).sum(dim=1) + 1)  # ‖[h; 1]‖
            self.gradients[epoch, where] += (measured["error"] * lengths).numpy() / self.runs
            if self.logits is not None:
                self.logits[run, epoch, where] = logits.numpy()
        self.errors[epoch] += parts["error"] / self.runs
        self._running.add(epoch + 1, parts)
        if epoch + 1 == len(self.errors):
            found = self._running.arrays()
            found["forgetting"][np.isinf(found["forgetting"])] = len(self.errors)
            for name, total in self._sums.items():
                total += found[name] / self.runs
            self._running = RunningMeasures(self.rows)

    def arrays(self) -> dict[str, Any]:
        """The measured fields of `Dynamics`."""
        return {**self._sums, "errors": self.errors, "gradients": self.gradients}


MEANS = ("confidence", "variability", "correctness", "aum", "forgetting")


def _class_numbers(labels: ArrayLike) -> tuple[NDArray[np.int64], tuple[Any, ...]]:
    array = check_labels(labels)
    if array.dtype.kind == "i" and len(array) and array.min() < 0:
        raise SettingError(f"labels must be classes from 0 on, got {array.min()}. Leave rows without a label out.")
    classes, numbers = np.unique(array, return_inverse=True)
    if len(classes) < 2:
        raise SettingError(f"Probes need labels of two classes or more, got {classes.tolist()}.")
    return numbers.astype(np.int64), tuple(classes.tolist())


def _columns_of(dataset: Any, rows: int) -> dict[str, str]:
    if len(dataset) != rows:
        raise SettingError(f"The data set has {len(dataset)} rows, the embeddings and labels {rows}.")
    return column_digests(dataset)


def _digest(embeddings: NDArray[Any]) -> str:
    return array_digest(np.asanyarray(embeddings))
