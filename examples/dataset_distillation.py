"""The 30 % of movie reviews worth training on: picked, proved against all and random rows, carded, and taught.

`.venv/bin/python examples/dataset_distillation.py` fine-tunes MiniLM-L6 fifteen times, in about half an hour on
2 cores, and goes on where it was stopped; `--quick` shows the calls in about a minute. The measured comparisons are
benchmarks/selection.py and its neighbours.
"""

import argparse
from pathlib import Path

import datasets
import transformers

import assets
import hfshrink

NAMES = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
TRAINING = {"per_device_train_batch_size": 32, "learning_rate": 5e-5, "dataloader_pin_memory": False}


def new_model():
    """MiniLM-L6 with a new head."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **NAMES)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows, one seed: shows that it works, not how well")
    parser.add_argument("--output", type=Path, default=Path("runs/dataset_distillation"))
    options = parser.parse_args()
    quick = options.quick
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    reviews = assets.movie_reviews(train=3000)
    rows = reviews["train"].select(range(160)) if quick else reviews["train"]
    test = reviews["test"].select(range(100)) if quick else reviews["test"]
    elsewhere = assets.editorials(100 if quick else 1000)  # the same labels, another source
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.minilm())

    how = {"model": assets.minilm(), "held_out": test, "cache_dir": options.output / "embeddings"}
    subset = hfshrink.select(rows, 0.3, **how)
    print(f"{subset}\n", flush=True)

    epochs = {"num_train_epochs": 1 if quick else 2, "seeds": [0] if quick else [0, 1, 2]}
    kept = options.output / f"runs-{len(rows)}"
    sides = {"test": test, "out_of_distribution": elsewhere}
    proof = hfshrink.evaluate_subset(
        subset, rows, new_model, **sides, processor=tokenizer, max_length=64, output_dir=kept, **epochs, **TRAINING
    )
    print(f"{proof}\n", flush=True)

    subset = proof.attach(subset)
    subset.save(options.output / "subset", overwrite=True)
    hfshrink.dataset_card(subset, license="mit", language="en").save(options.output / "subset" / "README.md")

    few = hfshrink.synthesize(rows, 10, model=assets.minilm(), cache_dir=options.output / "embeddings")
    print("\n".join(f"one of ten: {text}" for text in few.dataset["text"][:2]))
    taught = hfshrink.add_soft_labels(subset, new_model(), tokenizer)  # any teacher: here one that knows nothing yet
    print(f"for DistillationTrainer: {len(taught)} rows with {', '.join(taught.dataset.column_names)}")
    print(f"The subset and its card are in {options.output}/subset/")


if __name__ == "__main__":
    main()
