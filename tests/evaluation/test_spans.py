"""SQuAD's scores by hand, the best span against a slow loop, windows that lose nothing."""

import datasets
import numpy as np
import pytest

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation import spans


@pytest.mark.parametrize(
    ("predicted", "answers", "expected"),
    [
        ("The Red-Fish!", ["redfish"], (1, 1)),
        ("red fish", ["the fish", "big red fish"], (0, 0.8)),  # 2·1·(2/3)/(5/3)
        ("cat", ["dog"], (0, 0)),
        ("", [], (1, 1)),
        ("cat", [], (0, 0)),
        ("", ["cat"], (0, 0)),
        ("fish fish", ["fish"], (0, 2 / 3)),
        ("anthem a theatre", ["anthem theatre"], (1, 1)),  # articles are whole words
    ],
)
def test_answer_overlap_by_hand(predicted, answers, expected):
    assert spans.answer_overlap(predicted, answers) == pytest.approx(expected)


@pytest.mark.parametrize("longest", [1, 3, 50])
def test_best_span_equals_a_slow_loop(longest):
    generator = np.random.default_rng(longest)
    start, end, allowed = generator.normal(size=12), generator.normal(size=12), np.arange(12) > 4
    found = spans.best_span(start, end, allowed, longest)
    expected = max((start[s] + end[e], s, e) for s in range(5, 12) for e in range(s, min(12, s + longest)))
    assert found == pytest.approx(expected)


def test_no_allowed_token_gives_no_span():
    assert spans.best_span(np.zeros(3), np.zeros(3), np.zeros(3, bool))[0] == -np.inf


def test_windows_cover_every_word_of_the_context(questions, tokenizer):
    model = tiny.model("bert", "question-answering")
    windows, rows, offsets = spans.split_windows(questions, tokenizer, model)
    assert sorted(set(rows)) == [0, 1, 2]
    assert rows.count(1) > 1
    assert all(len(ids) <= 32 for ids in windows["input_ids"])
    for row, context in enumerate(questions["context"]):
        covered = {
            tuple(o)
            for number, found in zip(rows, offsets, strict=True)
            if number == row
            for o in found[found[:, 0] >= 0]
        }
        assert [context[s:e] for s, e in sorted(covered)] == context.split()


def test_question_without_room_is_refused(questions, tokenizer):
    with pytest.raises(SettingError, match="question in row 1 has 4 tokens and leaves no room"):
        spans.split_windows(questions, tokenizer, tiny.model("bert", "question-answering"), max_length=8)


def test_tokenizer_is_needed(questions):
    model = tiny.model("bert", "question-answering")
    with pytest.raises(SettingError, match="Pass processor="):
        spans.split_windows(questions, None, model)
    with pytest.raises(UnsupportedModelError, match="knows no character positions"):
        spans.split_windows(questions, object(), model)


def test_answers_of_another_form_are_refused(questions):
    with pytest.raises(SettingError, match="answers is missing"):
        spans.read_answers(questions.remove_columns("answers"))
    texts = datasets.Dataset.from_dict({"question": ["q"], "context": ["c"], "answers": ["c"]})
    with pytest.raises(SettingError, match="as in SQuAD, got c in row 0"):
        spans.read_answers(texts)


def test_answers_as_a_list_of_dicts():
    rows = datasets.Dataset.from_dict(
        {"question": ["q"], "context": ["c"], "answers": [[{"text": "c", "answer_start": 0}]]}
    )
    assert spans.read_answers(rows) == [["c"]]
