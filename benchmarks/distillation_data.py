"""Subjects of the distillation benchmark: their rows, their teachers, and how they are scored."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import numpy as np
from common import ROOT  # noqa: F401  finds the examples
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    ResNetConfig,
    ResNetForImageClassification,
    default_data_collator,
)

import assets
from hfshrink.labels import IGNORED, first_piece_labels


@dataclass(frozen=True)
class Subject:
    """What is learned, and by which teacher.

    Attributes:
        name: In tables and folders.
        title: What the table says about the data.
        kind: Form of the output, as `hfshrink.evaluation` names it.
        metrics: Names of the metrics, the one that chooses first.
        rows: Encoded rows: train, validation, test, and unlabelled where there are any.
        collator: Makes batches of them.
        names: The classes.
        new_teacher: () -> a teacher that has not been trained.
        teacher_rate: Its learning rate.
        teacher_steps: Its optimizer steps; 0 takes it as it comes.
        batch: Rows per step, of teachers and students.
    """

    name: str
    title: str
    kind: str
    metrics: tuple[str, ...]
    rows: dict[str, datasets.Dataset]
    collator: Any
    names: list[str]
    new_teacher: Callable[[], Any]
    teacher_rate: float
    teacher_steps: int
    batch: int = 32

    @property
    def has_text(self) -> bool:
        return "input_ids" in self.rows["train"].column_names


@cache
def movie() -> Subject:
    """Two classes of short sentences; 3,000 labelled rows and as many more without labels as there are."""
    parts = assets.movie_reviews(train=3000)
    title = "Movie reviews, 2 classes, 3,000 labelled rows, up to 64 tokens"
    return _texts("movie", title, parts, length=64, steps=188, batch=32)


@cache
def bbc() -> Subject:
    """Five classes of long texts, few labelled."""
    parts = assets.bbc_news(train=240)
    title = "BBC news, 5 classes, 240 labelled rows, the first 128 tokens"
    return _texts("bbc", title, parts, length=128, steps=90, batch=16)


@cache
def tagged_addresses() -> Subject:
    """A tag per word."""
    parts, tokenizer = assets.addresses(), tokenizer_of_minilm()
    names = parts["train"].features["tags"].feature.names

    def encode(rows):
        encoded = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=64)
        pairs = ((encoded.word_ids(i), tags) for i, tags in enumerate(rows["tags"]))
        return {**encoded, "labels": [first_piece_labels(words, tags) for words, tags in pairs]}

    rows = {name: part.map(encode, batched=True, remove_columns=part.column_names) for name, part in parts.items()}
    return Subject(
        name="addresses",
        title="US addresses, 29 tags, 788 labelled rows",
        kind="tokens",
        metrics=("token_accuracy", "f1"),
        rows=rows,
        collator=DataCollatorForTokenClassification(tokenizer),
        names=names,
        new_teacher=lambda: AutoModelForTokenClassification.from_pretrained(assets.minilm(), **_labels(names)),
        teacher_rate=1e-4,
        teacher_steps=250,
    )


@cache
def garments() -> Subject:
    """Ten classes of small grey images; the teacher is a ResNet trained here."""
    parts = assets.fashion_mnist()
    names = parts["train"].features["label"].names
    features = {"pixel_values": datasets.Array3D((1, 28, 28), "float32")}

    def encode(rows):
        images = np.stack([np.asarray(image, dtype=np.float32) for image in rows["image"]]) / 255
        return {"pixel_values": (images[:, None] - 0.286) / 0.353}  # mean and deviation of the training pixels

    rows = {}
    for name, part in parts.items():
        part = part.rename_column("label", "labels") if "label" in part.column_names else part
        kept = {column: part.features[column] for column in part.column_names if column != "image"}
        encoded = part.map(
            encode, batched=True, remove_columns=["image"], features=datasets.Features({**features, **kept})
        )
        rows[name] = encoded.with_format("torch")
    return Subject(
        name="garments",
        title="Fashion-MNIST, 10 classes, 2,000 labelled images",
        kind="single_label",
        metrics=("accuracy",),
        rows=rows,
        collator=default_data_collator,
        names=names,
        new_teacher=lambda: resnet(names, widths=(64, 128, 256), depth=2),
        teacher_rate=2e-3,
        teacher_steps=600,
    )


@cache
def language() -> Subject:
    """The first 128 tokens of news articles that are as long, continued by SmolLM2."""
    parts = assets.bbc_news(train=1000, validation=40, test=200)
    tokenizer = AutoTokenizer.from_pretrained(assets.smollm2())

    def encode(rows):
        ids = tokenizer(rows["text"], truncation=True, max_length=128)["input_ids"]
        ids = [row for row in ids if len(row) == 128]
        return {"input_ids": ids, "labels": ids}

    rows = {name: part.map(encode, batched=True, remove_columns=part.column_names) for name, part in parts.items()}
    return Subject(
        name="smollm2",
        title="SmolLM2-135M on BBC news, 128 tokens",
        kind="language",
        metrics=("perplexity",),
        rows=rows,
        collator=default_data_collator,
        names=[],
        new_teacher=lambda: AutoModelForCausalLM.from_pretrained(assets.smollm2()),
        teacher_rate=0.0,
        teacher_steps=0,
        batch=1,
    )


def join(labelled, unlabelled):
    """Both, the label of what has none being -100."""
    missing = unlabelled.add_column("labels", [IGNORED] * len(unlabelled))
    known = labelled.cast_column("labels", datasets.Value("int64"))
    return datasets.concatenate_datasets([known, missing.select_columns(known.column_names)])


def resnet(names, widths, depth):
    """A small ResNet of three stages for grey images, fresh weights."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=widths[0],
        hidden_sizes=list(widths),
        depths=[depth] * len(widths),
        layer_type="basic",
        **_labels(names),
    )
    return ResNetForImageClassification(config)


@cache
def tokenizer_of_minilm():
    return AutoTokenizer.from_pretrained(assets.minilm())


def encoded_texts(rows, length):
    """Texts of the column `text` as tokens for MiniLM."""
    tokenizer = tokenizer_of_minilm()
    return rows.map(
        lambda part: dict(tokenizer(part["text"], truncation=True, max_length=length)),
        batched=True,
        remove_columns="text",
    )


def _texts(name, title, parts, length, steps, batch):
    names, rows = parts["train"].features["label"].names, {}
    for split, part in parts.items():
        encoded = encoded_texts(part, length)
        rows[split] = encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded
    return Subject(
        name=name,
        title=title,
        kind="single_label",
        metrics=("accuracy",),
        rows=rows,
        collator=DataCollatorWithPadding(tokenizer_of_minilm()),
        names=names,
        new_teacher=lambda: AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **_labels(names)),
        teacher_rate=5e-5,
        teacher_steps=steps,
        batch=batch,
    )


def _labels(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
