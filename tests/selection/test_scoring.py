import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hfshrink.errors import SettingError
from hfshrink.selection.caching import column_digests
from hfshrink.selection.datamap import DataMap
from hfshrink.selection.methods import hardest_rows
from hfshrink.selection.run import select
from hfshrink.selection.strata import ccs

CLASSES = np.repeat([0, 1, 2], [24, 12, 4])
GENERATOR = np.random.default_rng(0)
POINTS = (GENERATOR.normal(size=(40, 5)) + 3 * np.eye(5)[CLASSES]).astype(np.float32)
SCORES = GENERATOR.random(40)
FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
ROWS = Dataset.from_dict({"text": [f"row {i}" for i in range(40)], "label": CLASSES.tolist()}, features=FEATURES)


def data_map(rows=ROWS, **changes):
    parts = dict.fromkeys(("confidence", "variability", "correctness", "aum", "forgetting", "el2n"), SCORES / 2)
    return DataMap(**{**parts, "epochs": (1, 2), "columns": column_digests(rows), "model": "trained", **changes})


def test_given_scores_have_the_sign_of_their_paper():
    assert select(ROWS, 0.5, "aum", scores=SCORES).indices.tolist() == hardest_rows(-SCORES, 20, 0, CLASSES).tolist()
    assert select(ROWS, 0.5, "hard", scores=SCORES).indices.tolist() == hardest_rows(SCORES, 20, 0, CLASSES).tolist()
    assert (
        select(ROWS, 0.5, "hard", scores=SCORES, score="aum").indices.tolist()
        == select(ROWS, 0.5, "aum", scores=SCORES).indices.tolist()
    )


def test_easy_and_hard_rows_of_a_data_map_are_opposite():
    easy, hard = (select(ROWS, 0.5, method, data_map=data_map()) for method in ("easy", "hard"))
    assert set(easy.indices) | set(hard.indices) == set(range(40))
    assert easy.report.scored_by == "data map"
    assert easy.report.model == "trained"
    assert easy.scores[easy.indices].mean() > hard.scores[hard.indices].mean()  # confidence


def test_rows_that_were_never_right_count_as_hardest():
    forgetting = np.where(np.arange(40) % 10 == 0, np.inf, 1.0)
    subset = select(ROWS, 0.25, "forgetting", data_map=data_map(forgetting=forgetting))
    assert {0, 10, 20, 30} <= set(subset.indices.tolist())
    assert np.isinf(subset.scores[0])
    assert len(select(ROWS, 0.25, "ccs", data_map=data_map(forgetting=forgetting), score="forgetting")) == 10


def test_data_map_without_the_measure_is_refused():
    with pytest.raises(SettingError, match="A data map holds el2n, .*, not 'grand'"):
        select(ROWS, 0.25, "grand", data_map=data_map())


def test_scores_of_an_earlier_subset_serve_again():
    first = select(ROWS, 0.25, "aum", scores=SCORES)
    assert select(ROWS, 0.25, "aum", scores=first).indices.tolist() == first.indices.tolist()
    covered = select(ROWS, 0.25, "ccs", scores=first)
    assert covered.report.score == "aum"
    assert covered.indices.tolist() == ccs(-SCORES, 10, labels=CLASSES).tolist()


def test_scores_of_an_earlier_subset_are_checked():
    first = select(ROWS, 0.25, "aum", scores=SCORES)
    with pytest.raises(SettingError, match="holds aum; this call ranks by el2n"):
        select(ROWS, 0.25, "el2n", scores=first)
    with pytest.raises(SettingError, match="made of other rows: the column 'text'"):
        select(ROWS.select([1, 0, *range(2, 40)]), 0.25, "aum", scores=first)
    with pytest.raises(SettingError, match="given as scores= has none"):
        select(ROWS, 0.25, "aum", scores=select(ROWS, 0.25, "random"))
    with pytest.raises(SettingError, match="score='hardness' is what given scores are called"):
        select(ROWS, 0.25, "ccs", embeddings=POINTS, score="hardness")


def test_scores_out_of_a_measures_bounds_are_refused():
    with pytest.raises(SettingError, match="Are they another measure"):
        select(ROWS, 0.25, "el2n", scores=SCORES - 0.5)
