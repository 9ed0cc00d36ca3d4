"""The table of pruning_oneshot.py."""

import numpy as np
from common import save

from hfshrink.terminal import table

NOTE = (
    "Movie reviews on MiniLM-L6, 2,000 test rows; heads and neurons are scored on 2,048 training rows, layers on 512. "
    "Differences in points; intervals resample seeds and test rows, paired. Methods of heads and neurons are compared "
    "with magnitude, those of layers with random layers. `search-unscaled` leaves out the least squares. MACs are "
    "computed for 128 tokens."
)


def render(found):
    """Write results/pruning_oneshot.json and .md of what `pruning_oneshot.collect` found."""
    dense = found["dense"]
    lines = [("dense", "", _range(dense["test"]), "", "", "1.00", f"{dense['parameters'] / 1e6:.2f} M", "")]
    for name, arm in found["arms"].items():
        results, method = arm["results"], name.split("/")[1]
        label = f"{method}: {results[0]['chosen']}" if "chosen" in results[0] else method
        scores = _range([result["test"] for result in results])
        minus = [_points(arm["minus_dense"]), _points(arm["minus_baseline"])]
        macs = f"{np.mean([result['encoder_macs'] for result in results]) / dense['encoder_macs']:.2f}"
        parameters = f"{np.mean([result['parameters'] for result in results]) / 1e6:.2f} M"
        lines.append((arm["title"], label, scores, *minus, macs, parameters, str(len(arm["seeds"]))))
    header = ("pruned", "method", "accuracy (range)", "− dense [95 %]", "− magnitude, random [95 %]", "encoder MACs")
    parts = [table((*header, "parameters", "seeds"), lines), NOTE]
    if "vocabulary/corpus" in found["arms"]:
        parts.append(_vocabulary(found["arms"]["vocabulary/corpus"]["results"][0], dense))
    save("pruning_oneshot", found, "\n\n".join(parts))


def _range(values):
    return f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def _points(interval):
    return "" if interval is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * value for value in interval))


def _vocabulary(found, dense):
    return (
        f"Vocabulary: {found['vocabulary_before']:,} tokens before, {found['vocabulary_after']:,} after; parameters "
        f"{dense['parameters'] / 1e6:.2f} M before, {found['parameters'] / 1e6:.2f} M after; weights "
        f"{_mb(found['weight_bytes'])}, tokenizer {_mb(found['tokenizer_bytes'])}. The corpus is all texts but "
        f"validation and test; {found['changed_test_tokens']:.2%} of the test tokens, in "
        f"{found['changed_test_rows']:.1%} of the rows, are not in it and are read in smaller pieces."
    )


def _mb(size):
    return f"{size / 1e6:.1f} MB"
