"""MiniLM-L6 on movie reviews keeps 70 % of its weights' parameters: plain SVD, fitted to data, and trained after it.

`.venv/bin/python examples/factorization.py` shows the calls, not how well they do, in about five minutes on 2 cores;
`--quick` takes a minute at most. The measured comparisons are benchmarks/factorization.py and its neighbours.
"""

import argparse
import copy

import datasets
import transformers

import assets
import hfshrink
from hfshrink import LogitLoss, factorize
from pruning import show, train


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows: shows that it works, not how well")
    quick = parser.parse_args().quick
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    reviews, number = assets.movie_reviews(), 128 if quick else 1500
    rows, test = reviews["train"].select(range(number)), reviews["test"].select(range(60 if quick else 1000))
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets.minilm())
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(assets.minilm(), **names)
    train(dense, rows, tokenizer, 1 if quick else 2)
    show("dense", dense, test)
    show("plain SVD", factorize(copy.deepcopy(dense), 0.7), test)
    fitted = factorize(copy.deepcopy(dense), 0.7, calibration=rows)
    show("fitted to the rows", fitted, test)
    how = {"teacher": dense, "losses": [LogitLoss(temperature=2.0)], "label_weight": 0.5}
    train(fitted, rows, tokenizer, 1, **how)
    show("then trained, with the dense model as teacher", fitted, test)
    print(hfshrink.report(fitted))


if __name__ == "__main__":
    main()
