"""Data of the selection benchmarks: rows, frozen embeddings of them, and the small heads that are trained on these.

Test and validation rows are the same for all seeds. Each seed draws its own training rows from the pool, so that
methods without chance differ from seed to seed as well. Embeddings come from models that have seen none of the labels:
MiniLM-L6 for texts, EfficientNet-Lite0 with its ImageNet weights for garments.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import datasets
import numpy as np
import torch
from common import ROOT
from distillation_data import tokenizer_of_minilm
from torch import nn

import assets
from hfshrink.selection import embed

RUNS = ROOT / "runs" / "selection"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of logistic regression
CHECKED = (50, 100, 200)  # steps of the small network after which it is tried on the validation rows
PIXELS, DIMENSIONS = 96, 256


@dataclass(frozen=True, eq=False)
class Data:
    """Rows with a column `label`, and one vector for each.

    Attributes:
        name: In tables and folders.
        title: What the tables say about it.
        rows: Part -> rows; a seed trains on some of the pool.
        vectors: Part -> (n, d) float32, of mean squared length d over the pool.
        drawn: Training rows of a seed.
    """

    name: str
    title: str
    rows: dict[str, datasets.Dataset]
    vectors: dict[str, np.ndarray]
    drawn: int

    @property
    def names(self):
        return self.rows["test"].features["label"].names

    def labels(self, part):
        return np.asarray(self.rows[part]["label"][:])

    def training(self, seed):
        """(rows, vectors, labels) that a seed may learn from."""
        drawn = np.random.default_rng([seed, 7]).permutation(len(self.rows["pool"]))[: self.drawn]
        return self.rows["pool"].select(drawn), self.vectors["pool"][drawn], self.labels("pool")[drawn]


@cache
def movie():
    """Two classes of short sentences."""
    parts = assets.movie_reviews(train=7566, validation=1000, test=2000)
    title = "Movie reviews, 2 classes, 6,000 training rows of 7,566 a seed"
    return _texts("movie", title, parts, length=64, drawn=6000)


@cache
def bbc():
    """Five classes of long texts, deduplicated before they are split."""
    parts = assets.bbc_news(train=887, validation=240, test=1000)
    title = "BBC news, 5 classes, 700 training rows of 887 a seed, the first 128 tokens"
    return _texts("bbc", title, parts, length=128, drawn=700)


@cache
def garments():
    """Ten classes of grey images, by features that no garment was labelled for."""
    parts = assets.fashion_mnist(train=10000, validation=1000, test=2000, unlabelled=0)
    title = "Fashion-MNIST, 10 classes, 8,000 training rows of 10,000 a seed"
    rows = {"pool": parts["train"], "validation": parts["validation"], "test": parts["test"]}
    vectors = _stored("garments", lambda: _seen(rows))
    return Data("garments", title, {name: part.remove_columns("image") for name, part in rows.items()}, vectors, 8000)


DATA: dict[str, Callable[[], Data]] = {"movie": movie, "bbc": bbc, "garments": garments}


def _texts(name, title, parts, length, drawn):
    rows = {"pool": parts["train"], "validation": parts["validation"], "test": parts["test"]}
    return Data(name, title, rows, _stored(name, lambda: read_texts(rows, length)), drawn)


def read_texts(rows, length):
    """Name -> vectors of texts by MiniLM-L6, the mean over their tokens."""
    where = {"cache_dir": RUNS / "embeddings", "max_length": length}
    return {name: embed(part, assets.minilm(), tokenizer_of_minilm(), **where) for name, part in rows.items()}


def _seen(rows):
    """Features of EfficientNet-Lite0, of which the principal components of the pool are kept."""
    from efficientnet_lite import PROCESSOR, lite0
    from transformers import EfficientNetImageProcessorPil

    processor = EfficientNetImageProcessorPil(size={"height": PIXELS, "width": PIXELS}, **PROCESSOR)
    how = {"pooling": "features", "cache_dir": RUNS / "embeddings"}
    found = {name: np.asarray(embed(part, lite0(), processor, **how)) for name, part in rows.items()}
    mean = found["pool"].mean(axis=0)
    _, directions = np.linalg.eigh(np.cov((found["pool"] - mean).T))
    return {name: (part - mean) @ directions[:, : -DIMENSIONS - 1 : -1] for name, part in found.items()}


def _stored(name, make):
    """The vectors of a data set, made once; all are divided by one number, the root mean square over the pool."""
    path = RUNS / "vectors" / f"{name}.npz"
    if not path.is_file():
        found = {part: np.asarray(array, dtype=np.float32) for part, array in make().items()}
        scale = np.sqrt(np.mean(found["pool"].astype(np.float64) ** 2))
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{name}.part.npz")
        np.savez(aside, **{part: (array / scale).astype(np.float32) for part, array in found.items()})
        aside.replace(path)
    with np.load(path) as file:
        return dict(file)


def logistic(vectors, labels, tried):
    """Logistic regression; `tried` is (vectors, labels) of validation rows, which choose its C.

    Returns:
        (predict, C, accuracy on the validation rows).
    """
    from sklearn.linear_model import LogisticRegression

    best = None
    if len(np.unique(labels)) == 1:
        return (lambda rows: np.full(len(rows), labels[0])), None, float((tried[1] == labels[0]).mean())
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may stop before it has converged
            model = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(vectors, labels)
        score = float((model.predict(tried[0]) == tried[1]).mean())
        if best is None or score > best[2]:
            best = (model.predict, strength, score)
    return best


def network(vectors, labels, tried, classes, seed):
    """A network of 64 hidden units; the validation rows choose after how many steps it is taken.

    Returns:
        (predict, steps, accuracy on the validation rows).
    """
    torch.manual_seed(seed)
    width = vectors.shape[1]
    model = nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, classes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator, best = np.random.default_rng(seed), None
    rows, targets = torch.from_numpy(vectors), torch.from_numpy(np.asarray(labels, dtype=np.int64))
    seen = torch.from_numpy(tried[0])
    for step in range(1, CHECKED[-1] + 1):
        batch = torch.from_numpy(generator.integers(len(rows), size=min(64, len(rows))))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(rows[batch]), targets[batch]).backward()
        optimizer.step()
        if step in CHECKED:
            with torch.no_grad():
                score = float((model(seen).argmax(-1).numpy() == tried[1]).mean())
            if best is None or score > best[2]:
                best = ({name: tensor.clone() for name, tensor in model.state_dict().items()}, step, score)
    model.load_state_dict(best[0])

    @torch.no_grad()
    def predict(rows):
        return model(torch.from_numpy(rows)).argmax(-1).numpy()

    return predict, best[1], best[2]
