"""What goes wrong with training rows: wrong labels, found and removed, and a rare group, kept or lost.

`noise`: one label in ten is replaced by another class. Training dynamics (of probes on frozen embeddings; with `map`
of a model that is trained inside a Trainer with `DataMapCallback`) rank the rows by suspicion; as many as were planted
are taken out, and heads are trained on the others. Validation and test labels are right.

`rare`: sentences of newspaper editorials are planted among movie reviews, one row in a hundred, and subsets are drawn.

Every run keeps its result in runs/selection and is skipped when it is there.
"""

import argparse
import json
import os
import time
from functools import cache, reduce

os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import numpy as np
from common import be_quiet, save
from scipy.special import softmax
from selection_data import DATA, RUNS, logistic, movie, read_texts

import assets
from hfshrink.selection import DataMapCallback, coverage, select
from hfshrink.selection.budgets import random_subset
from hfshrink.selection.probing import train_probes
from hfshrink.terminal import table
from selection import SEEDS, try_heads

NOISE = 0.1
MAPPED = {"movie": 3, "garments": 4}  # data set -> epochs of the model that makes the data map
RARE, FRACTIONS, DRAWS = 60, (0.01, 0.05, 0.1), 2000
WAYS = {
    "random, not stratified": {"method": "random", "stratify": None},
    "random, stratified by class": {"method": "random"},
    "random, stratified by class and source": {"method": "random", "stratify": "group"},
    "k-means": {"method": "kmeans"},
    "auto": {"method": "auto"},
    "auto, stratified by class and source": {"method": "auto", "stratify": "group"},
    "easiest": {"method": "easy"},
    "hardest": {"method": "hard"},
}


def kept(kind, name, seed, make):
    """The result of one run, made if it is not there."""
    path = RUNS / kind / name / f"seed-{seed}.json"
    if not path.is_file():
        start = time.process_time()
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**found, "cpu_seconds": time.process_time() - start}) + "\n")
        print(f"{kind} {name} seed {seed}: {time.process_time() - start:.1f} s of CPU", flush=True)
    return json.loads(path.read_text())


def planted(labels, classes, seed):
    """(labels of which one in ten is another class, where)."""
    generator = np.random.default_rng([seed, 11])
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[generator.permutation(len(labels))[: round(NOISE * len(labels))]] = True
    moved = (labels + generator.integers(1, classes, size=len(labels))) % classes
    return np.where(wrong, moved, labels), wrong


def suspicions(dynamics, labels, single=None):
    """Ranking -> (n,) numbers, the higher the likelier wrong."""
    found = {"AUM": -dynamics.aum, "confidence": -dynamics.confidence, "EL2N": dynamics.el2n}
    if single is not None:
        last = softmax(single.logits[0, -1], axis=-1)
        found["one probe's last probability"] = -last[np.arange(len(labels)), labels]
    return found


def judged(suspicion, wrong, seed):
    """Precision (and recall) where as many rows are taken as are wrong, and shares found at fixed precisions."""
    ties = np.random.default_rng(seed).random(len(wrong))
    hits = wrong[np.lexsort((ties, -suspicion))]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    found = np.cumsum(hits) / wrong.sum()
    least = {f"found_at_{level:.0%}": float(found[precision >= level].max(initial=0)) for level in (0.5, 0.8)}
    return {"at_planted": float(precision[wrong.sum() - 1]), **least}


def find_noise(name, seed):
    """Suspicion of all rows by probes, and what heads gain by the removal of the rows found."""
    data = DATA[name]()
    _, vectors, labels = data.training(seed)
    given, wrong = planted(labels, len(data.names), seed)
    several = train_probes(vectors, given, seed=seed)
    ranked = suspicions(several, given, train_probes(vectors, given, seeds=1, seed=seed))
    ranked["random"] = np.random.default_rng([seed, 13]).random(len(given))
    below = several.aum < 0
    flagged = {"rows": int(below.sum()), "precision": wrong[below].mean(), "recall": below[wrong].mean()}
    count = int(wrong.sum())
    removed = {
        "none": np.zeros(len(given), dtype=bool),
        "random rows": highest(ranked["random"], count),
        "found by AUM, as many as planted": highest(ranked["AUM"], count),
        "AUM below 0": below,
        "the planted rows": wrong,
    }
    truth, accuracy = data.labels("test"), {}
    for way, gone in removed.items():
        accuracy[way] = head_scores(data, vectors[~gone], given[~gone], truth, seed)
    accuracy["no label was changed"] = head_scores(data, vectors, labels, truth, seed)
    rankings = {ranking: judged(suspicion, wrong, seed) for ranking, suspicion in ranked.items()}
    return {"planted": count, "rows": len(given), "rankings": rankings, "below_0": flagged, "accuracy": accuracy}


def head_scores(data, vectors, labels, truth, seed):
    heads = try_heads(data, vectors, labels, seed)
    return {head: float((answers == truth).mean()) for head, (_, _, answers) in heads.items()}


def highest(values, count):
    found = np.zeros(len(values), dtype=bool)
    found[np.argsort(-values, kind="stable")[:count]] = True
    return found


def find_by_map(name, seed):
    """Suspicion of all rows by the data map of a whole model that is trained on them."""
    import transformers
    from distillation_data import encoded_texts, resnet, tokenizer_of_minilm

    data, labels = DATA[name](), DATA[name]().training(seed)[2]
    given, wrong = planted(labels, len(data.names), seed)
    transformers.set_seed(seed)
    if name == "garments":
        rows, collator = images_of(seed), transformers.default_data_collator
        model, rate = resnet(data.names, widths=(24, 48, 96), depth=1), 2e-3
    else:
        rows = encoded_texts(data.training(seed)[0].remove_columns("label"), 64)
        collator, rate = transformers.DataCollatorWithPadding(tokenizer_of_minilm()), 5e-5
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            assets.minilm(), num_labels=len(data.names)
        )
    found = mapped(model, rows.add_column("labels", given), collator, rate, name, seed)
    rankings = {ranking: judged(value, wrong, seed) for ranking, value in suspicions(found, given).items()}
    below = found.aum < 0
    flagged = {"rows": int(below.sum()), "precision": wrong[below].mean(), "recall": below[wrong].mean()}
    return {"planted": int(wrong.sum()), "rows": len(given), "rankings": rankings, "below_0": flagged}


def mapped(model, rows, collator, rate, name, seed):
    """The data map of one training run."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    folder = RUNS / "maps" / name / f"seed-{seed}"
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=MAPPED[name],
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        learning_rate=rate,
        train_sampling_strategy="random" if name == "garments" else "group_by_length",
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    callback = DataMapCallback(output_dir=folder / "data_map")
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return callback.data_map


def images_of(seed):
    """The images of `garments().training(seed)` as the small ResNet reads them, without labels."""
    pool = assets.fashion_mnist(train=10000, validation=1000, test=2000, unlabelled=0)["train"]
    drawn = np.random.default_rng([seed, 7]).permutation(len(pool))[: DATA["garments"]().drawn]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in pool.select(drawn)["image"]]) / 255
    shape = datasets.Features({"pixel_values": datasets.Array3D((1, 28, 28), "float32")})
    return datasets.Dataset.from_dict({"pixel_values": (pixels[:, None] - 0.286) / 0.353}, features=shape)


@cache
def editorials():
    """Sentences of editorials with the mean rating's sign as label: (rows, vectors, labels), scaled as the movies."""
    found = sorted({(text, int(score > 0)) for text, score in assets._rated("nytEditorial") if score != 0})
    chosen = np.random.default_rng(0).permutation(len(found))[: RARE * 5 + 500]
    rows = datasets.Dataset.from_dict(
        {"text": [found[i][0] for i in chosen], "label": [found[i][1] for i in chosen]}
    ).cast_column("label", movie().rows["pool"].features["label"])
    own = read_texts({"pool": movie().rows["pool"]}, 64)["pool"][0], movie().vectors["pool"][0]
    vectors = read_texts({"rare": rows}, 64)["rare"]
    return rows, np.asarray(vectors) * np.float32(own[1][0] / own[0][0]), np.asarray(rows["label"][:])


def rare_rows(seed):
    """(rows with a column `source` and `group`, vectors, labels) of which 60 in 6,000 are editorials."""
    rows, vectors, labels = movie().training(seed)
    few, their, signs = editorials()
    chosen = np.random.default_rng([seed, 17]).permutation(RARE * 5)[:RARE]
    common = len(rows) - RARE
    together = datasets.concatenate_datasets([rows.select(range(common)), few.select(chosen)])
    source = ["movie"] * common + ["editorial"] * RARE
    answers = np.concatenate([labels[:common], signs[chosen]])
    group = [f"{name}, {answer}" for name, answer in zip(source, answers, strict=True)]
    together = together.add_column("source", source).add_column("group", group)
    return together, np.concatenate([vectors[:common], their[chosen]]), answers


def keep_rare(seed):
    """Rare rows kept by each way, whether the coverage warns, and the heads' accuracy by source."""
    data, (rows, vectors, labels) = movie(), rare_rows(seed)
    _, their, signs = editorials()
    probes, found = train_probes(vectors, labels, dataset=rows, seed=seed), {}
    tried = data.vectors["validation"], data.labels("validation")
    for fraction in FRACTIONS:
        for way, how in WAYS.items():
            judge = {"embeddings": vectors} if how["method"] in ("kmeans", "auto") else {}
            judge |= {"data_map": probes} if how["method"] in ("easy", "hard", "auto") else {}
            indices = select(rows, fraction, **how, **judge, seed=seed, coverage=False).indices
            warned = coverage(rows, indices, columns=["source"], seed=seed).warnings
            predict = logistic(vectors[indices], labels[indices], tried)[0]
            found[f"{fraction:.0%}/{way}"] = {
                "rare": int((indices >= len(rows) - RARE).sum()),
                "warned": any(text.startswith("by source:") for text in warned),
                "movie": float((predict(data.vectors["test"]) == data.labels("test")).mean()),
                "editorial": float((predict(their[RARE * 5 :]) == signs[RARE * 5 :]).mean()),
            }
    return {"cells": found}


def chance_of_loss():
    """Share of random subsets without any of the 60 rare rows, by fraction."""
    drawn = movie().drawn
    return {
        f"{fraction:.0%}": float(
            np.mean([random_subset(drawn, round(fraction * drawn), seed)[-1] < drawn - RARE for seed in range(DRAWS)])
        )
        for fraction in FRACTIONS
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("noise", "map", "rare")
    parser.add_argument("--only", nargs="+", choices=parts, default=["noise", "rare"], help="these parts")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="data sets of noise and map")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--render", action="store_true", help="run nothing: write the tables of what is there")
    options = parser.parse_args()
    be_quiet()
    for seed in range(0 if options.render else options.seeds):
        if "noise" in options.only:
            for name in options.data:
                kept("noise", name, seed, lambda name=name, seed=seed: find_noise(name, seed))
        if "map" in options.only:
            for name in set(options.data) & set(MAPPED):
                kept("map", name, seed, lambda name=name, seed=seed: find_by_map(name, seed))
        if "rare" in options.only:
            kept("rare", "movie", seed, lambda seed=seed: keep_rare(seed))
    render()


def results_of(kind, name):
    """What each seed found."""
    return [json.loads(path.read_text()) for path in sorted((RUNS / kind / name).glob("seed-*.json"))]


def ranged(results, *keys):
    """Mean over seeds in %, and the range."""
    values = 100 * np.asarray([reduce(lambda found, key: found[key], keys, result) for result in results])
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def render():
    """Write results/selection_dangers.json and .md of what is there."""
    noise = {name: results_of("noise", name) for name in DATA}
    maps = {name: results_of("map", name) for name in MAPPED}
    rare, parts = results_of("rare", "movie"), []
    for name, results in noise.items():
        if results:
            parts.append(_noise_tables(name, results, maps.get(name)))
    found = {"noise": noise, "map": maps, "rare": rare}
    if rare:
        found["chance_of_loss"] = chance_of_loss()
        parts.append(_rare_table(rare, found["chance_of_loss"]))
    save("selection_dangers", found, "\n\n".join(parts))


def _noise_tables(name, results, maps):
    title = DATA[name]().title
    lines = [_noise_line("probes", results, ranking) for ranking in results[0]["rankings"]]
    if maps:
        lines += [_noise_line(f"a trained model, {MAPPED[name]} epochs", maps, r) for r in maps[0]["rankings"]]
    header = ("passes of", "ranking", "right of as many as planted, %", "found at precision 50 %", "at 80 %", "seeds")
    first = table(header, lines)
    kinds = [("probes", results), ("trained models", maps)] if maps else [("probes", results)]
    rule = "; ".join(
        f"{kind} find {ranged(about, 'below_0', 'recall')} % of the planted; of the rows below 0 "
        f"{ranged(about, 'below_0', 'precision')} % are planted"
        for kind, about in kinds
    )
    ways = results[0]["accuracy"]
    lines = [(way, *(_regained(results, way, head) for head in ways[way])) for way in ways]
    second = table(("removed", *(f"{head}: accuracy, %, − nothing removed" for head in ways["none"])), lines)
    count = f"{results[0]['planted']:,} of {results[0]['rows']:,} labels are wrong, {len(results)} seeds (range)."
    below = f"AUM below 0: {rule}."
    return f"## Wrong labels, {name}: {title}\n\n{count}\n\n{first}\n\n{below}\n\n{second}"


def _noise_line(kind, results, ranking):
    at = [ranged(results, "rankings", ranking, key) for key in ("at_planted", "found_at_50%", "found_at_80%")]
    return (kind, ranking, *at, len(results))


def _regained(results, way, head):
    """Mean accuracy, and the difference from nothing removed with its range over seeds."""
    gained = [100 * (r["accuracy"][way][head] - r["accuracy"]["none"][head]) for r in results]
    shown = "" if way == "none" else f", {np.mean(gained):+.1f} ({min(gained):+.1f} to {max(gained):+.1f})"
    return f"{100 * np.mean([r['accuracy'][way][head] for r in results]):.1f}{shown}"


def _rare_table(results, chance):
    lines = []
    for cell in results[0]["cells"]:
        fraction, way = cell.split("/")
        rare = [result["cells"][cell]["rare"] for result in results]
        warned = sum(result["cells"][cell]["warned"] for result in results)
        accuracy = [f"{100 * np.mean([r['cells'][cell][s] for r in results]):.1f}" for s in ("movie", "editorial")]
        lost = f"{sum(count == 0 for count in rare)} of {len(rare)}"
        lines.append((fraction, way, f"{np.mean(rare):.1f} ({min(rare)} to {max(rare)})", lost, warned, *accuracy))
    header = ("kept", "method", "rare rows kept", "lost", "warned", "accuracy, movies", "accuracy, editorials")
    losses = ", ".join(f"{fraction} {100 * share:.1f} %" for fraction, share in chance.items())
    text = (
        f"{RARE} editorials among {movie().drawn:,} rows (1 %); {len(results)} seeds. Random subsets, not stratified, "
        f"that lose all of them, of {DRAWS:,} drawn: {losses}. Warned: subsets whose coverage by source warns. "
        "The head is logistic regression; editorials of the test were in no subset."
    )
    return f"## A rare group\n\n{text}\n\n{table(header, lines)}"


if __name__ == "__main__":
    main()
