"""`compare`: identities, laws, slow recomputation and its errors."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

import tiny
from hfshrink.errors import SettingError
from hfshrink.evaluation import WorstClass, compare, evaluate


@pytest.fixture
def pair(sentences, tokenizer, varied):
    return [evaluate(varied(seed), sentences, processor=tokenizer) for seed in (5, 0)]


def test_a_model_equals_itself(sentences, tokenizer, varied):
    model = varied()
    same = compare(model, model, sentences, processor=tokenizer)
    assert (same.difference, same.low, same.high, same.mcnemar_p, same.agreement) == (0, 0, 0, 1, 1)
    assert (same.right_to_wrong, same.wrong_to_right, same.worst_class) == (0, 0, None)
    assert same.calibration_error_a == same.calibration_error_b


def test_everything_equals_a_recomputation(pair):
    a, b = pair
    found = compare(a, b, resamples=500, seed=3)
    right_a, right_b = (side.predictions == side.references for side in pair)
    assert found.difference == pytest.approx(right_b.mean() - right_a.mean())
    generator = np.random.default_rng(3)
    draws = [generator.integers(0, 40, 40) for _ in range(500)]
    differences = [right_b[d].mean() - right_a[d].mean() for d in draws]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))))
    fell, rose = (right_a & ~right_b).sum(), (~right_a & right_b).sum()
    assert (found.right_to_wrong, found.wrong_to_right) == (fell, rose)
    assert found.mcnemar_p == pytest.approx(stats.binomtest(fell, fell + rose).pvalue)
    assert found.agreement == (a.predictions == b.predictions).mean()
    recalls = [sk.recall_score(side.references, side.predictions, average=None) for side in pair]
    worst = int(np.argmin(recalls[1] - recalls[0]))
    assert found.worst_class == WorstClass(
        f"LABEL_{worst}", pytest.approx(recalls[0][worst]), pytest.approx(recalls[1][worst])
    )


def test_swapping_the_models_swaps_the_signs(pair):
    there, back = compare(*pair), compare(*pair[::-1])
    assert back.difference == -there.difference
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert (back.mcnemar_p, back.agreement) == (there.mcnemar_p, there.agreement)


def test_pairing_narrows_the_interval(sentences, tokenizer, varied):
    model, other = varied(), varied()
    other.classifier.bias.data[0] += 0.002  # nearly the same model
    found = compare(model, other, sentences, processor=tokenizer)
    widths = [scores[0].high - scores[0].low for scores in (found.scores_a, found.scores_b)]
    assert found.high - found.low < 0.6 * np.hypot(*widths)  # what independent samples would give


def test_printed_and_json(pair):
    found = compare(*pair)
    assert json.loads(json.dumps(found.to_dict()))["metric"] == "accuracy"
    assert "| accuracy" in str(found)
    assert "McNemar's exact p" in str(found)


def test_a_users_metric_is_recomputed(sentences, tokenizer, pair, varied):
    models = [varied(seed) for seed in (5, 0)]
    own = compare(*models, sentences, sk.accuracy_score, processor=tokenizer, resamples=100)
    fast = compare(*pair, resamples=100)
    assert (own.metric, own.low, own.high) == ("accuracy_score", pytest.approx(fast.low), pytest.approx(fast.high))


def test_undefined_is_none(sentences, token_rows, tokenizer):
    data = sentences.remove_columns("label").add_column("label", np.arange(40.0))
    numbers = compare(*(tiny.model("bert", num_labels=1, seed=s) for s in (0, 1)), data, processor=tokenizer)
    assert (numbers.mcnemar_p, numbers.agreement, numbers.worst_class, numbers.calibration_error_a) == (None,) * 4
    assert numbers.low <= numbers.difference <= numbers.high
    language = compare(*(tiny.model("gpt2", seed=s) for s in (0, 1)), token_rows)
    assert (language.metric, language.agreement) == ("perplexity", None)
    assert "undefined" not in str(language)


def test_answers_are_compared(questions, tokenizer):
    models = [tiny.model("bert", "question-answering", seed=s) for s in (0, 1)]
    found = compare(*models, questions, processor=tokenizer)
    assert found.metric == "exact_match"
    assert found.mcnemar_p is not None
    assert compare(models[0], models[0], questions, processor=tokenizer).agreement == 1


def test_what_can_not_be_compared(pair, sentences, token_rows, tokenizer):
    a, b = pair
    model = tiny.model("bert")
    with pytest.raises(SettingError, match="got no data set"):
        compare(model, model)
    with pytest.raises(SettingError, match="got one evaluation and one model"):
        compare(a, model, sentences)
    with pytest.raises(SettingError, match="resamples must be at least 1"):
        compare(a, b, resamples=0)
    with pytest.raises(SettingError, match="different numbers of rows: 40 and 10"):
        compare(a, evaluate(model, sentences.select(range(10)), processor=tokenizer))
    with pytest.raises(SettingError, match="different references.*label2label|different references.*id2label"):
        compare(a, evaluate(model, sentences.map(lambda r: {"label": 1 - r["label"]}), processor=tokenizer))
    with pytest.raises(SettingError, match="different main metrics: accuracy and f1"):
        compare(a, evaluate(model, sentences, "f1", processor=tokenizer))
    with pytest.raises(SettingError, match="different kinds of output"):
        compare(a, evaluate(tiny.model("gpt2"), token_rows))
    language = evaluate(tiny.model("gpt2"), token_rows)
    shorter = dataclasses.replace(
        language, output=dataclasses.replace(language.output, references=language.references - 1)
    )
    with pytest.raises(SettingError, match="different tokenizers"):
        compare(language, shorter)
