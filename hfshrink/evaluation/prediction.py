"""Running a model or an export over a data set, and reducing each batch to what the metrics need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from hfshrink.data import batches
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation.spans import best_span
from hfshrink.inputs import eval_mode, model_inputs
from hfshrink.labels import IGNORED, check_class_labels
from hfshrink.record import config_of

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said about each row, in the order of the data set.

    Attributes:
        predictions: The prediction per row; its form depends on the kind of output.
        references: The truth in the same form.
        confidences: Probability of the predicted class, (n,), for single-label classification.
        top: The k most probable classes, best first, (n, k), for image classification.
    """

    predictions: Any
    references: Any
    confidences: np.ndarray | None = None
    top: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """A model with the encoded rows that it reads."""

    model: Any
    encoded: Dataset
    batch_size: int
    decodes: bool = False  # whether the labels are also the decoder's inputs

    def outputs(self) -> Iterator[tuple[list[int], Batch, Any]]:
        """(row numbers, inputs, the model's outputs) batch by batch, in eval mode and without gradients.

        Padding is always on the right: on the left it would shift the positions of GPT-2 and its like.
        """
        stream = batches(self.encoded, self.model, None, self.batch_size, "evaluate")
        with eval_mode(self.model):
            for rows, columns in stream:
                batch = _with_decoder_inputs(self.model, columns) if self.decodes else columns
                with torch.inference_mode():
                    outputs = self.model(**model_inputs(self.model, batch))
                yield rows, batch, outputs


def logits_of(outputs: Any, rows: list[int], name: str = "logits", mask: torch.Tensor | None = None) -> torch.Tensor:
    """A float32 copy of the outputs called `name`, (batch, …), checked to be finite where `mask` says that it matters.

    Raises:
        UnsupportedModelError: There are none.
        SettingError: A value is NaN or infinite.
    """
    logits = getattr(outputs, name, None)
    if logits is None:
        raise UnsupportedModelError(
            f"{type(outputs).__name__} has no {name!r}: the model has no head for this task. Give task=."
        )
    logits = logits.detach().cpu().float()
    broken = ~torch.isfinite(logits)
    if mask is not None:
        broken &= mask.reshape(*mask.shape, *[1] * (logits.ndim - mask.ndim)).bool()
    check_rows(broken.flatten(1).any(dim=1), rows)
    return logits


def check_rows(broken: torch.Tensor, rows: list[int]) -> None:
    """Raise `SettingError` that names the first row marked in `broken`, (batch,)."""
    if bool(broken.any()):
        row = min(row for row, bad in zip(rows, broken.tolist(), strict=True) if bad)
        raise SettingError(
            f"The model's logits for row {row} are NaN or infinite. The weights are broken or overflow: "
            "check them with torch.isfinite, or load the model in float32."
        )


def predict_classes(source: Source, references: np.ndarray, top: int | None) -> Predictions:
    """Class number, its probability, and the `top` best classes per row."""
    size = len(references)
    classes, confidences = np.zeros(size, dtype=np.int64), np.zeros(size)
    best = None if top is None else np.zeros((size, top), dtype=np.int64)
    for rows, _, outputs in source.outputs():
        logits = logits_of(outputs, rows)
        classes[rows] = logits.argmax(dim=-1).numpy()
        confidences[rows] = logits.double().softmax(dim=-1).amax(dim=-1).numpy()
        if best is not None:
            best[rows] = logits.topk(best.shape[1], dim=-1).indices.numpy()
    return Predictions(classes, references, confidences, best)


def predict_labels(source: Source, references: np.ndarray) -> Predictions:
    """0 or 1 per row and label: sigmoid(logit) > 0.5, which is logit > 0."""
    predictions = np.zeros(references.shape, dtype=np.int64)
    for rows, _, outputs in source.outputs():
        predictions[rows] = (logits_of(outputs, rows) > 0).numpy()
    return Predictions(predictions, references)


def predict_numbers(source: Source, references: np.ndarray) -> Predictions:
    """One number per row."""
    predictions = np.zeros(len(references))
    for rows, _, outputs in source.outputs():
        predictions[rows] = logits_of(outputs, rows).reshape(len(rows), -1)[:, 0].numpy()
    return Predictions(predictions, references)


def predict_tags(source: Source) -> Predictions:
    """Names of the predicted and the actual tags of each row, at the positions whose label is not -100."""
    names: Any = config_of(source.model).id2label
    size = len(source.encoded)
    predicted: list[list[str]] = [[] for _ in range(size)]
    actual: list[list[str]] = [[] for _ in range(size)]
    for rows, batch, outputs in source.outputs():
        labelled = batch["labels"] != IGNORED
        classes = logits_of(outputs, rows, mask=labelled).argmax(dim=-1)
        for index, row in enumerate(rows):
            keep = labelled[index]
            predicted[row] = [str(names[number]) for number in classes[index][keep].tolist()]
            actual[row] = [str(names[number]) for number in batch["labels"][index][keep].tolist()]
    return Predictions(predicted, actual)


def predict_likelihoods(source: Source, task: str) -> Predictions:
    """Sum of -ln p over the labelled tokens of each row, and their number; no logits are kept."""
    sums, counts = np.zeros(len(source.encoded)), np.zeros(len(source.encoded))
    is_causal = task == "text-generation"
    # a causal model's positions count from the left: padding there would shift them
    for rows, batch, outputs in source.outputs():
        labels = _token_labels(batch) if is_causal else batch["labels"]
        logits = getattr(outputs, "logits", None)
        if logits is None or logits.shape[:2] != labels.shape:
            shape = None if logits is None else tuple(logits.shape)
            raise UnsupportedModelError(
                f"Expected logits of shape {(*labels.shape, 'vocabulary')}, got {shape}. Give task=."
            )
        check_class_labels(torch.unique(labels).tolist(), logits.shape[-1])
        for index, row in enumerate(rows):
            sums[row], counts[row] = row_likelihood(logits[index], labels[index], is_causal=is_causal)
        check_rows(~torch.isfinite(torch.from_numpy(sums[rows])), rows)
    if not counts.any():
        raise SettingError(
            "No token has a label: all are -100, or each row has a single token. There is nothing to predict."
        )
    return Predictions(sums, counts)


def row_likelihood(logits: torch.Tensor, labels: torch.Tensor, *, is_causal: bool) -> tuple[float, int]:
    """(Σ -ln p(label), number of labels) of one row; a causal model's logits at t speak of the token at t + 1.

    Args:
        logits: (tokens, vocabulary).
        labels: (tokens,), -100 where there is none.
        is_causal: Whether to shift.
    """
    if is_causal:
        logits, labels = logits[:-1], labels[1:]
    keep = (labels != IGNORED).to(logits.device)
    losses = nn.functional.cross_entropy(logits[keep].float(), labels.to(logits.device)[keep], reduction="none")
    return float(losses.double().sum()), int(keep.sum())


def predict_features(source: Source, references: Any) -> Predictions:
    """One vector per row, (n, features): the mean of the last hidden state over tokens or positions of an image."""
    found: list[np.ndarray | None] = [None] * len(source.encoded)
    for rows, batch, outputs in source.outputs():
        mask = batch.get("attention_mask")
        state = logits_of(outputs, rows, "last_hidden_state", mask)
        if state.ndim == 4:  # (batch, channels, height, width)
            vectors = state.mean(dim=(2, 3))
        elif mask is None:
            vectors = state.mean(dim=1)
        else:
            weights = mask[..., None].float()
            vectors = (state * weights).sum(dim=1) / weights.sum(dim=1)
        for row, vector in zip(rows, vectors.numpy(), strict=True):
            found[row] = vector
    return Predictions(np.stack([vector for vector in found if vector is not None]), references)


def predict_answers(
    source: Source, window_rows: list[int], spans: list[np.ndarray], contexts: list[str], answers: list[list[str]]
) -> Predictions:
    """The best span of each row over all its windows.

    Where some question of the data set has no answer (SQuAD 2), a row is answered by "" if the first token (`[CLS]`)
    scores better, in each of its windows, than the best span: the lowest such score is compared.

    Args:
        source: The model and the windows.
        window_rows: Row of each window.
        spans: Characters of the context that each token covers, (tokens, 2) per window; -1 outside.
        contexts: Context per row.
        answers: Accepted answers per row.
    """
    best = [(-np.inf, "")] * len(contexts)
    null = np.full(len(contexts), np.inf)
    for windows, batch, outputs in source.outputs():
        numbers = [window_rows[window] for window in windows]
        mask = batch["attention_mask"]
        start, end = (logits_of(outputs, numbers, f"{side}_logits", mask).numpy() for side in ("start", "end"))
        for index, (window, row) in enumerate(zip(windows, numbers, strict=True)):
            real = mask[index].bool().numpy()  # padding may be on the left
            ours = start[index][real], end[index][real]
            span = spans[window]
            score, first, last = best_span(*ours, span[:, 0] >= 0)
            if score > best[row][0]:
                best[row] = score, contexts[row][span[first, 0] : span[last, 1]]
            null[row] = min(null[row], ours[0][0] + ours[1][0])
    may_be_null = any(not texts for texts in answers)
    found = ["" if may_be_null and null[row] > score else text for row, (score, text) in enumerate(best)]
    return Predictions(found, answers)


def _with_decoder_inputs(model: Any, batch: Batch) -> Batch:
    """Add the decoder's inputs: the labels, one place to the right."""
    if "decoder_input_ids" in batch:
        return batch
    labels = batch["labels"]
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted = model.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        config = config_of(model)
        first = labels.new_full((len(labels), 1), config.decoder_start_token_id)
        shifted = torch.cat([first, labels[:, :-1]], dim=1)
        shifted = shifted.masked_fill(shifted == IGNORED, config.pad_token_id or 0)
    return {**batch, "decoder_input_ids": shifted}


def _token_labels(batch: Batch) -> torch.Tensor:
    """Labels of a causal model: the given ones, else the tokens themselves; -100 on padding."""
    labels = batch["labels"] if "labels" in batch else batch["input_ids"]
    return labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
