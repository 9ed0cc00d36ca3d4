"""What a card says may go wrong."""

import pytest

from hfshrink.cards.limits import limit_sentences
from hfshrink.record import CompressionReport, StepRecord


@pytest.mark.parametrize(
    ("metric", "low", "high", "said"),
    [
        ("accuracy", -0.03, -0.01, "accuracy fell beyond chance: the 95 % interval ends at -0.0100."),
        ("accuracy", -0.03, 0.01, "The sample can't rule out a fall of accuracy by 0.0300."),
        ("perplexity", 0.1, 0.9, "perplexity rose beyond chance: the 95 % interval begins at +0.1000."),
        ("perplexity", -0.4, 0.2, "The sample can't rule out a rise of perplexity by 0.2000."),
        ("perplexity", -0.4, -0.2, None),
        ("accuracy", 0.01, 0.02, None),
    ],
)
def test_a_metric_that_got_worse_is_told_in_its_own_direction(metric, low, high, said):
    comparison = {"metric": metric, "low": low, "high": high}
    report = CompressionReport("a/b", (StepRecord("quantize", "int8"),), details={"comparison": comparison})
    told = [text for text in limit_sentences(report) if metric in text]
    assert told == ([said] if said else [])
