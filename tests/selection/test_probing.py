"""Probes: their sums equal the formulas on their logits, wrong labels stand out, other data is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hfshrink.errors import SettingError
from hfshrink.selection import blockwise, probing
from hfshrink.selection.probing import train_probes
from tests.selection.formulas import aum, cartography, el2n, forgetting, grand_last_layer, h_score, probabilities_of

ROWS, WIDTH, CLASSES = 60, 6, 3


def clouds(rows=ROWS, seed=0, spread=1.0):
    """Three classes around points far from each other, and features of very different size."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=rows)
    points = 3 * np.eye(WIDTH)[labels] + spread * generator.standard_normal((rows, WIDTH))
    return (points * np.logspace(-3, 3, WIDTH) + 5).astype(np.float32), labels


@pytest.fixture(scope="module")
def probes():
    vectors, labels = clouds()
    return train_probes(vectors, labels, seeds=2, epochs=6), vectors, labels


def test_each_score_is_its_formula_on_the_logits(probes):
    dynamics, vectors, labels = probes
    logits = dynamics.logits.astype(np.float64)
    assert logits.shape == (2, 6, ROWS, CLASSES)
    probabilities, correct = probabilities_of(logits), logits.argmax(axis=-1) == labels
    gold = probabilities[..., np.arange(ROWS), labels]
    maps = np.mean([cartography(*run) for run in zip(gold, correct, strict=True)], axis=0)
    expected = {
        "confidence": maps[0],
        "variability": maps[1],
        "correctness": maps[2],
        "h_score": h_score(correct),
        "aum": np.mean([aum(run, labels) for run in logits], axis=0),
        "forgetting": np.mean([forgetting(run, never=6) for run in correct], axis=0),
        "el2n": el2n(probabilities[:, 0], labels),
    }
    for name, values in expected.items():
        assert getattr(dynamics, name) == pytest.approx(values, abs=1e-5), name
    assert dynamics.early == 1
    for epoch in range(6):
        assert dynamics.errors[epoch] == pytest.approx(el2n(probabilities[:, epoch], labels), abs=1e-5)
    scaled = vectors.astype(np.float64)
    scaled = (scaled - scaled.mean(axis=0)) / scaled.std(axis=0)
    assert dynamics.grand == pytest.approx(grand_last_layer(probabilities[:, 0], labels, scaled), rel=1e-3)
    assert len(dynamics) == ROWS
    assert dynamics.runs == 2


def test_the_formula_of_grand_is_the_norm_of_the_gradient_that_autograd_finds():
    vectors, labels = clouds()
    features, layer = torch.from_numpy(vectors).double(), torch.nn.Linear(WIDTH, CLASSES).double()
    found, answers = [], layer(features)
    for row in range(ROWS):
        loss = torch.nn.functional.cross_entropy(answers[row], torch.tensor(labels[row]))
        gradients = torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True)
        found.append(float(torch.cat([part.flatten() for part in gradients]).norm()))
    probabilities = probabilities_of(answers.detach().numpy()[None])
    assert grand_last_layer(probabilities, labels, features.numpy()) == pytest.approx(found)


@pytest.mark.parametrize("hidden", [None, 8])
def test_sums_without_logits_in_blocks_and_from_a_disk_are_the_same(hidden, tmp_path, monkeypatch):
    vectors, labels = clouds()
    whole = train_probes(vectors, labels, seeds=2, epochs=3, hidden=hidden)
    monkeypatch.setattr(probing, "KEPT_NUMBERS", 2 * 3 * ROWS * CLASSES - 1)
    monkeypatch.setattr(blockwise, "BLOCK_NUMBERS", 100)
    np.save(tmp_path / "vectors.npy", vectors)
    sums = train_probes(np.load(tmp_path / "vectors.npy", mmap_mode="r"), labels, seeds=2, epochs=3, hidden=hidden)
    assert whole.logits is not None
    assert sums.logits is None
    for name in ("confidence", "variability", "correctness", "aum", "forgetting", "errors", "gradients"):
        assert getattr(sums, name) == pytest.approx(getattr(whole, name), abs=2e-3), name
    assert sums.fingerprint == whole.fingerprint


def test_probes_learn_and_find_wrong_labels():
    vectors, labels = clouds(300, spread=0.5)
    wrong = np.arange(0, 300, 20)
    given = labels.copy()
    given[wrong] = (given[wrong] + 1) % CLASSES
    dynamics = train_probes(vectors, given, seeds=2)
    assert np.delete(dynamics.correctness, wrong).mean() > 0.95
    assert set(np.argsort(dynamics.aum)[: len(wrong)]) == set(wrong)
    assert set(np.argsort(-dynamics.el2n)[: len(wrong)]) == set(wrong)
    assert (dynamics.forgetting[wrong] == 20).mean() > 0.7  # never learned: finite, and more than can be forgotten


def test_a_hidden_layer_learns_what_no_linear_probe_can():
    generator = np.random.default_rng(0)
    points = generator.choice([-1.0, 1.0], size=(400, 2)).astype(np.float32)
    labels = (points[:, 0] * points[:, 1] > 0).astype(int)
    points += 0.1 * generator.standard_normal(points.shape).astype(np.float32)
    linear = train_probes(points, labels, seeds=1, epochs=30)
    layered = train_probes(points, labels, seeds=1, epochs=30, hidden=32)
    assert linear.logits[0, -1].argmax(axis=1).tolist() != labels.tolist()
    assert layered.logits[0, -1].argmax(axis=1).tolist() == labels.tolist()


def test_seeds_decide_and_the_callers_random_state_stays():
    vectors, labels = clouds()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    one, two, other = (train_probes(vectors, labels, seeds=2, epochs=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert np.array_equal(one.logits, two.logits)
    runs = [*one.logits, *other.logits]
    assert all(not np.allclose(runs[i], runs[j]) for i in range(4) for j in range(i)), "each probe is another one"


def test_probes_train_inside_no_grad():
    vectors, labels = clouds()
    with torch.inference_mode():
        inside = train_probes(vectors, labels, seeds=1, epochs=2)
    assert np.array_equal(inside.logits, train_probes(vectors, labels, seeds=1, epochs=2).logits)


def test_names_are_labels_and_a_constant_feature_is_harmless():
    vectors, labels = clouds()
    vectors[:, 0] = 7.0
    names = np.array(["a", "b", "c"])[labels]
    dynamics = train_probes(vectors, names, seeds=1, epochs=2)
    assert dynamics.classes == ("a", "b", "c")
    assert dynamics.labels.tolist() == labels.tolist()
    assert np.isfinite(dynamics.logits).all()


def test_scores_of_other_embeddings_or_labels_are_refused(probes):
    dynamics, vectors, labels = probes
    dynamics.check_data(vectors.copy(), labels.tolist())
    dynamics.check_data(labels=labels)
    changed = vectors.copy()
    changed[-1, -1] += 1
    with pytest.raises(
        SettingError, match="made on other embeddings: the data set, its order or the model has changed"
    ):
        dynamics.check_data(changed)
    with pytest.raises(SettingError, match="made on other embeddings"):
        dynamics.check_data(vectors[:-1])
    with pytest.raises(SettingError, match="made on other labels"):
        dynamics.check_data(vectors, np.roll(labels, 1))


def test_a_changed_data_set_is_refused(probes):
    _, vectors, labels = probes
    data = Dataset.from_dict({"text": [f"row {row}" for row in range(ROWS)], "label": labels})
    dynamics = train_probes(vectors, labels, dataset=data, seeds=1, epochs=1)
    dynamics.check_rows(data)
    dynamics.check_rows(data.add_column("source", ["a"] * ROWS))
    with pytest.raises(SettingError, match="record of these probes was made of other rows: the column 'text'"):
        dynamics.check_rows(data.shuffle(seed=0))
    with pytest.raises(SettingError, match="made of 60 rows, the data set has 59"):
        dynamics.check_rows(data.select(range(59)))
    assert dynamics.fingerprint != train_probes(vectors, labels, seeds=1, epochs=1).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be a whole number from 1 on, got 0"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"hidden": 0}, "hidden must be a whole number from 1 on, got 0"),
        ({"labels": [0] * ROWS}, r"labels of two classes or more, got \[0\]"),
        ({"labels": [0, 1]}, "one row for each of the 2 labels"),
        ({"labels": [-100, *[1] * (ROWS - 1)]}, "classes from 0 on, got -100"),
        ({"labels": [None, *[1] * (ROWS - 1)]}, "A label is missing"),
        ({"labels": np.ones((ROWS, 2), dtype=int)}, "one class number or name for each row"),
        ({"embeddings": np.ones(ROWS)}, "real numbers of shape"),
        ({"embeddings": np.full((ROWS, 2), np.nan, dtype=np.float32)}, "embedding of row 0 holds NaN"),
        ({"dataset": Dataset.from_dict({"a": [1]})}, "data set has 1 rows, the embeddings and labels 60"),
    ],
)
def test_bad_input_is_named(probes, change, message):
    given = {"embeddings": probes[1], "labels": probes[2], "seeds": 1, "epochs": 1, **change}
    with pytest.raises(SettingError, match=message):
        train_probes(given.pop("embeddings"), given.pop("labels"), **given)
