"""Learned examples against random real ones: images of Fashion-MNIST, movie reviews; about 6 minutes on one thread.

Images: a small ConvNet is trained from scratch on 1 and 10 images of each class. Reviews: a linear head is trained on
the MiniLM embeddings of 5, 10 and 20 rows of each class. Settings were chosen on validation rows with other seeds; the
test rows were used once.
"""

import logging
import time

import numpy as np
import torch
from common import be_quiet, paired_interval, save

import assets
from hfshrink.selection import embed, select
from hfshrink.selection.images import read_images
from hfshrink.selection.random_networks import random_convnet
from hfshrink.selection.synthesis import synthesize

SEEDS = (10, 11, 12)
IMAGES, REVIEWS = (1, 10), (5, 10, 20)
STEPS, BATCH = 300, 100  # of the ConvNet that learns from the images
METHODS = ("distribution", "gradient")
GRADIENT_STEPS = 40  # a step of it takes three times as long


def main():
    be_quiet()
    logging.getLogger("hfshrink").setLevel(logging.ERROR)  # what so few rows leave out is no news here
    results = [*reviews(), *images()]
    save("selection_synthesis", {"seeds": SEEDS, "results": [brief(row) for row in results]}, table(results))


def images():
    """Fashion-MNIST, 5,000 training images."""
    parts = assets.fashion_mnist(train=5000, unlabelled=0)
    train = parts["train"]
    known, tested = (read_images(parts[name], "image") for name in ("train", "test"))
    scale = (known.mean, known.deviation)
    rows, labels = normal(tested.pixels, scale), np.array(parts["test"]["label"])
    for per_class in IMAGES:
        found = {"random real images": [], **{f"{method} matching": [] for method in METHODS}}
        seconds = {name: [] for name in found}
        for seed in SEEDS:
            drawn = select(train, size=10 * per_class, method="random", seed=seed).dataset
            made = {"random real images": (drawn, 0.0)}
            for method in METHODS:
                options = {"steps": GRADIENT_STEPS} if method == "gradient" else {}
                started = time.process_time()
                learned = synthesize(train, per_class, method, seed=seed, **options).dataset
                made[f"{method} matching"] = (learned, time.process_time() - started)
            for name, (chosen, spent) in made.items():
                pixels = normal(read_images(chosen, "image").pixels, scale)
                said = train_convnet(pixels, torch.tensor(chosen["label"][:]), rows, seed)
                found[name].append(said == labels)
                seconds[name].append(spent)
        yield from compared("Fashion-MNIST", per_class, found, seconds, "random real images")


def normal(pixels, scale):
    """Pixels with the mean 0 and the deviation 1 of the training images."""
    return torch.from_numpy((pixels - scale[0]) / scale[1])


def train_convnet(pixels, labels, tested, seed):
    """The classes that a ConvNet says, trained from scratch on these images."""
    network = random_convnet((1, 28, 28), 10, 32, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen = torch.randperm(len(pixels), generator=generator)[:BATCH]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return network(tested).argmax(dim=1).numpy()


def reviews():
    """Movie reviews, 3,000 training rows."""
    parts = assets.movie_reviews(train=3000)
    train, folder = parts["train"], assets.CACHE / "embeddings"
    vectors, tested = (embed(parts[name], assets.minilm(), cache_dir=folder) for name in ("train", "test"))
    labels, answers = (np.array(parts[name]["label"]) for name in ("train", "test"))
    for per_class in REVIEWS:
        found, seconds = {}, {}

        def tell(name, said, spent, found=found, seconds=seconds):
            found.setdefault(name, []).append(said == answers)
            seconds.setdefault(name, []).append(spent)

        for seed in SEEDS:
            for method in ("random", "kmeans"):
                started = time.process_time()
                rows = select(train, size=2 * per_class, method=method, embeddings=vectors, seed=seed).indices
                name = "random rows" if method == "random" else "k-means rows"
                tell(name, head(vectors[rows], labels[rows], tested), time.process_time() - started)
            for method in METHODS:
                started = time.process_time()
                learned = synthesize(train, per_class, method, embeddings=vectors, seed=seed)
                spent, rows = time.process_time() - started, learned.indices
                soft = torch.tensor(learned.dataset["teacher_logits"][:]).softmax(dim=1).numpy()
                tell(f"{method} matching, nearest rows", head(vectors[rows], labels[rows], tested), spent)
                tell(f"{method} matching, rows, soft labels", head(vectors[rows], soft, tested), spent)
                tell(f"{method} matching, learned embeddings", head(learned.learnt, labels[rows], tested), spent)
        yield from compared("movie reviews", per_class, found, seconds, "random rows")
    found = {"all 3,000 rows": [head(vectors, labels, tested) == answers]}
    yield from compared("movie reviews", None, found, {"all 3,000 rows": [0.0]}, None)


def head(vectors, targets, tested):
    """The classes that logistic regression says; soft targets count as rows of both classes with weights."""
    from sklearn.linear_model import LogisticRegression

    vectors, tested = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, tested))
    weights = None
    if targets.ndim == 2:
        count, classes = targets.shape
        vectors, weights = np.repeat(vectors, classes, axis=0), targets.reshape(-1)
        targets = np.tile(np.arange(classes), count)
    return LogisticRegression(C=10, max_iter=500).fit(vectors, targets, weights).predict(tested)


def compared(data, per_class, found, seconds, baseline):
    """A row for each way, with the difference from the baseline over the same seeds and test rows."""
    for name, correct in found.items():
        gain = None if name == baseline or baseline is None else paired_interval(found[baseline], correct)
        yield {
            "data": data,
            "per_class": per_class,
            "rows": name,
            "accuracy": [float(row.mean()) for row in correct],
            "gain": gain,
            "cpu_seconds": float(np.mean(seconds[name])),
        }


def brief(row):
    return {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}


def table(results):
    lines = [
        "# Learned examples against random ones\n",
        f"Test accuracy, mean of {len(SEEDS)} seeds, and the difference from random rows in points with a 95 %",
        "interval (resampled seeds and test rows). Time is the processor's of one thread, for the learning.\n",
        "| data | per class | trained on | accuracy | against random | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in results:
        gain = row["gain"]
        shown = "" if gain is None else f"{100 * gain[0]:+.1f} ({100 * gain[1]:+.1f} … {100 * gain[2]:+.1f})"
        accuracy = f"{100 * np.mean(row['accuracy']):.1f} %"
        spent = f"{row['cpu_seconds']:.1f}" if row["cpu_seconds"] else ""
        where = f"{row['data']} | {row['per_class'] or 'all'}"
        lines.append(f"| {where} | {row['rows']} | {accuracy} | {shown} | {spent} |")
    lines.append(
        "\nImages: Fashion-MNIST, 5,000 training images, a ConvNet of three blocks, 32 wide, 300 steps from scratch. "
        "Reviews: 3,000 training rows, logistic regression on MiniLM's embeddings. Learned embeddings serve only a "
        "head on the same embeddings; rows serve any model."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
