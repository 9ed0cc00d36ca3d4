"""MiniLM-L6 on movie reviews loses 40 % of its heads' and neurons' cost: at once, then in training with a teacher.

`.venv/bin/python examples/pruning.py` shows the calls, not how well they do, in about five minutes on 2 cores;
`--quick` takes a minute at most. The measured comparisons are benchmarks/pruning.py and its neighbours.
"""

import argparse
import copy
import tempfile
from pathlib import Path

import datasets
import transformers

import assets
import hfshrink
from hfshrink import CompressionTrainer, HiddenLoss, LogitLoss, Pruning, prune


def train(model, rows, tokenizer, epochs, **how):
    """Without a teacher and without pruning, this Trainer is the one of transformers."""
    encoded = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64), remove_columns="text")
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=1e-4,
            per_device_train_batch_size=16,
            warmup_steps=0.1,
            seed=0,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        )
        collator = transformers.DataCollatorWithPadding(tokenizer)
        common = {"data_collator": collator, "processing_class": tokenizer}
        CompressionTrainer(
            model, args, train_dataset=encoded.rename_column("label", "labels"), **common, **how
        ).train()
    return model.eval()


def show(name, model, test):
    """Accuracy on the test rows, and the size of the saved file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    accuracy = hfshrink.evaluate(model, test, "accuracy").scores[0]
    print(f"{name}: accuracy {accuracy}, {size / 1e6:.1f} MB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: shows that it works, not how well")
    quick = parser.parse_args().quick
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    reviews, number = assets.movie_reviews(), 64 if quick else 1500
    rows, test = reviews["train"].select(range(number)), reviews["test"].select(range(60 if quick else 1000))
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.minilm())
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **names)
    train(dense, rows, tokenizer, 1 if quick else 2)
    show("dense", dense, test)
    few = rows.select(range(32 if quick else 500))
    cut = prune(copy.deepcopy(dense), 0.4, "heads+neurons", calibration=few)
    show("pruned without training", cut, test)
    how = {"losses": [LogitLoss(temperature=2.0), HiddenLoss(layers="nearest")], "label_weight": 0.5}
    pruning = Pruning(0.4, "heads+neurons", method="taylor")
    small = train(copy.deepcopy(dense), rows, tokenizer, 1 if quick else 3, teacher=dense, pruning=pruning, **how)
    show("pruned in training, with the dense model as teacher", small, test)
    print(hfshrink.report(small))


if __name__ == "__main__":
    main()
