"""`evaluate_subset`: a subset held against all rows and against random ones, by training on each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.evaluation.machine import processor_name
from hfshrink.evaluation.prediction import Source, predict_classes
from hfshrink.proof.request import Given, HeldOut, Request, Settings, read_request
from hfshrink.proof.results import Proof
from hfshrink.proof.store import Key, Outcome, RunStore, open_store
from hfshrink.proof.summary import summarize
from hfshrink.proof.training import Training, read_training, train
from hfshrink.record import versions
from hfshrink.selection import Subset
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.caching import array_digest, model_digest, processor_digest
from hfshrink.terminal import progress

logger = logging.getLogger(__name__)


def evaluate_subset(  # noqa: PLR0913
    subset: Any,
    full: Any,
    model_init: Any,
    test: Any,
    *,
    out_of_distribution: Any = None,
    args: Any = None,
    trainer: Any = None,
    processor: Any = None,
    seeds: Sequence[int] = (0, 1, 2),
    equal: str | Sequence[str] = ("epochs", "steps"),
    random_subsets: bool = True,
    remove_overlap: bool = False,
    train_rows: int = 1000,
    resamples: int = 2000,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> Proof:
    """Train on the subset, on all rows and on random rows, and say how surely the models differ.

    Each seed makes the model's head, the order of the rows, and a random subset of its own, which keeps the share of
    each class. Two comparisons answer two questions: with equal **epochs** a subset saves steps; with equal **steps**
    (those of the full run) only the rows differ. Which method wins can depend on it.

    Intervals are 95 % percentile intervals of the bootstrap (Efron 1979) that draws both seeds and test rows anew, the
    same ones on both sides. With three seeds they are rather too narrow than too wide; of one seed they say nothing
    about others.

    Args:
        subset: A `Subset`, row numbers of `full`, or a `Dataset` of rows of its own, such as synthetic ones. A subset
            whose rows carry a teacher's answers (`cache_teacher`) is trained on them with `DistillationTrainer`.
        full: The full training data that it was picked from: a `Dataset` (raw or encoded), a folder or a Hub id.
        model_init: A folder or Hub id (a model without a classifier gets one), or a function that makes a fresh model.
            It is called for every run, after the seed is set.
        test: Held-out rows with the same labels, which chose nothing.
        out_of_distribution: Rows of another source with the same labels.
        args: `TrainingArguments` of every run; None takes transformers' defaults and the settings given by name.
            Saving, evaluation and reports to trackers are off.
        trainer: A Trainer class; None takes the plain one, and `DistillationTrainer` for rows with a teacher's answers
            or with `teacher=`.
        processor: The model's tokenizer or image processor; None looks beside the model.
        seeds: Of the runs, three or more for a claim.
        equal: "epochs", "steps", or both.
        random_subsets: Whether random rows are trained on too; without them nothing says what the choice is worth.
        remove_overlap: Whether held-out rows that are among the training rows are left out of the testing; else they
            are an error.
        train_rows: Training rows of each arm, at most, that the gap between training and test is measured on.
        resamples: Of the intervals.
        text_columns: Columns of text of raw rows; None finds one or two of them.
        label_column: Column of labels; None finds it.
        max_length: Longest input in tokens; None takes what the model can read.
        output_dir: A folder that keeps finished runs; a killed proof goes on there. None keeps none.
        **settings: Of `TrainingArguments` (`num_train_epochs`, `learning_rate`, …) or of the Trainer (`teacher`,
            `losses`, `data_collator`, …).

    Returns:
        The proof; `print` shows its tables, `proof.attach(subset)` puts it into the subset's report and data card.

    Raises:
        SettingError: Other rows than the subset was picked from; an empty subset; streaming data; held-out rows that
            are training rows, or that the subset's scores were made on; labels that the training rows or the model
            lack; no seed; unknown settings; `output_dir` holds runs of something else; a loss that is not finite.
        UnsupportedModelError: Not one label a row.
        CheckpointError: A model, data set or kept run can't be read.

    Example:
        >>> from datasets import Dataset
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> rows = Dataset.from_dict({"input_ids": [[1, 2], [3, 4], [5, 6], [7, 8]], "labels": [0, 1, 0, 1]})
        >>> test = Dataset.from_dict({"input_ids": [[1, 3], [2, 4]], "labels": [0, 1]})
        >>> make = lambda: BertForSequenceClassification(BertConfig(**sizes))
        >>> how = {"seeds": [0], "num_train_epochs": 1, "use_cpu": True, "dataloader_pin_memory": False}
        >>> proof = evaluate_subset([0, 1], rows, make, test, **how)
        >>> [arm.title for arm in proof.arms][:3]
        ['full', 'subset, equal epochs', 'random, equal epochs']
    """
    equal = (equal,) if isinstance(equal, str) else tuple(equal)
    seeds = tuple(seeds)
    rules = (seeds, equal, random_subsets, remove_overlap, train_rows, resamples, text_columns, label_column)
    given = Given(subset, full, model_init, test, out_of_distribution, processor)
    request = read_request(given, Settings(*rules, max_length))
    training = read_training(trainer, args, settings, [request.full, request.subset])
    sizes = {name: len(side.references) for name, side in request.held_out.items()}
    _check_batches(request, training)
    with open_store(output_dir, _fingerprint(request, training), sizes, request.classes) as store:
        outcomes = Runs(request, training, store).run()
    return summarize(
        request,
        outcomes,
        training,
        trainer="+".join(_trainer_names(request, training)),
        selection_seconds=sum(subset.report.seconds.values()) if isinstance(subset, Subset) else None,
        machine=_machine(training),
    )


def plan(settings: Settings) -> list[Key]:
    """The runs in their order: the full ones first, whose steps the others need."""
    keys = [Key("full", None, int(seed)) for seed in settings.seeds]
    arms = ("subset", "random") if settings.random_subsets else ("subset",)
    keys += [Key(data, equal, int(seed)) for equal in settings.equal for data in arms for seed in settings.seeds]
    return keys


@dataclass(frozen=True, eq=False)
class Runs:
    """All runs of a proof, of which those in the store are done."""

    request: Request
    training: Training
    store: RunStore

    def run(self) -> dict[Key, Outcome]:
        """Train what is not done yet.

        Raises:
            SettingError: A loss that is not finite, or models that differ for the same seed.
        """
        done: dict[Key, Outcome] = {}
        keys = plan(self.request.settings)
        for key in progress(keys, "proof", total=len(keys)):
            found = self.store.find(key)
            if found is None:
                found = self._train(key, done)
                self.store.keep(key, found)
            first = done.get(Key("full", None, key.seed), found)
            if first.initial != found.initial:
                raise SettingError(
                    f"model_init made other weights for {key} than for the full run of this seed. It must give a "
                    "fresh model that depends on the seed alone (torch.manual_seed), not one that was trained before."
                )
            done[key] = found
        return done

    def _train(self, key: Key, done: dict[Key, Outcome]) -> Outcome:
        request = self.request
        rows, labels = self._rows(key)
        model = request.networks.fresh(key.seed)
        initial = model_digest(model)
        how = {"seed": key.seed, "task": request.networks.task, "processor": request.processor}
        try:
            model, state, seconds = train(self.training, model, rows, self._length(key, done), **how)
            predicted = {name: self._predict(model, side) for name, side in request.held_out.items()}
        except SettingError as error:
            raise SettingError(f"In {key}: {error}") from error
        return Outcome(
            rows=len(rows),
            steps=state.global_step,
            epochs=float(state.epoch),
            seconds=seconds,
            train_accuracy=None if labels is None else self._train_accuracy(model, rows, labels, key.seed),
            initial=initial,
            **predicted,
        )

    def _rows(self, key: Key) -> tuple[Any, NDArray[np.int64] | None]:
        request = self.request
        if key.data == "full":
            return request.full, request.labels
        if key.data == "subset":
            return request.subset, request.subset_labels
        drawn = random_rows(len(request.full), len(request.subset), key.seed, request.labels)
        return request.full.select(drawn), None if request.labels is None else request.labels[drawn]

    def _length(self, key: Key, done: dict[Key, Outcome]) -> dict[str, Any]:
        """Steps or epochs of a run: as given for the full one, and as many as that had for the others."""
        arguments = self.training.arguments
        if key.data == "full":
            return {}
        full = done[Key("full", None, key.seed)]
        if key.equal == "steps":
            return {"max_steps": full.steps}
        epochs = full.epochs if arguments.max_steps > 0 else arguments.num_train_epochs
        return {"max_steps": -1, "num_train_epochs": epochs}

    def _predict(self, model: Any, side: HeldOut) -> NDArray[np.int64]:
        source = Source(model, side.rows, self.training.arguments.per_device_eval_batch_size)
        found: NDArray[np.int64] = predict_classes(source, side.references, None).predictions
        return found

    def _train_accuracy(self, model: Any, rows: Any, labels: NDArray[np.int64], seed: int) -> float:
        """On a sample of the rows that the model was trained on."""
        size = min(self.request.settings.train_rows, len(rows))
        drawn = np.sort(np.random.default_rng(seed).choice(len(rows), size, replace=False))
        side = HeldOut(rows.select(drawn), labels[drawn], {})
        return float((self._predict(model, side) == side.references).mean())


def _check_batches(request: Request, training: Training) -> None:
    arguments, fewest = training.arguments, min(len(request.full), len(request.subset))
    if arguments.dataloader_drop_last and fewest < arguments.train_batch_size:
        raise SettingError(
            f"dataloader_drop_last=True leaves no batch of {fewest} rows, a batch has {arguments.train_batch_size}. "
            "Leave it out, or lower per_device_train_batch_size."
        )


def random_rows(n: int, size: int, seed: int, labels: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Random rows in which each class keeps its share, where it has a row to give and they are enough.

    Args:
        n: Rows to draw from.
        size: Rows to draw, at most n.
        seed: Of the draw.
        labels: (n,) classes; None takes all rows alike.

    Example:
        >>> random_rows(4, 2, 0, np.array([0, 0, 1, 1])).size
        2
    """
    enough = labels is not None and size >= len(np.unique(labels))
    # draws of their own: with the seed of `select` they would be the very rows of a random subset
    return random_subset(n, min(size, n), seed=seed + 10**6, labels=labels if enough else None)


def _fingerprint(request: Request, training: Training) -> dict[str, Any]:
    """What every run depends on, but for its seed and arm."""
    settings = request.settings
    encoding = [settings.text_columns, settings.label_column, settings.max_length]
    return {
        "data": request.digests,
        "subset": None if request.indices is None else array_digest(request.indices),
        "model": model_digest(request.networks.first),
        "processor": processor_digest(request.processor),
        "encoding": encoding,
        "trainer": list(_trainer_names(request, training)),
        "settings": training.settings(),
        "train_rows": settings.train_rows,
        "versions": versions(),
    }


def _trainer_names(request: Request, training: Training) -> list[str]:
    return list(dict.fromkeys(training.trainer_for(rows).__name__ for rows in (request.full, request.subset)))


def _machine(training: Training) -> dict[str, Any]:
    device = str(training.arguments.device)
    return {"processor": processor_name(), "device": device, "threads": torch.get_num_threads()}
