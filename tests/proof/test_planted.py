"""A whole proof of a subset that lacks a class: all arms, three seeds, kept on disk."""

import json
import shutil

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.proof import Proof, evaluate_subset
from hfshrink.selection import select

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"vocab_size": 40, "max_position_embeddings": 12}
QUICK = {"use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 15}
LONG = {**QUICK, "num_train_epochs": 5, "learning_rate": 0.02, "resamples": 300}


def rows(count, seed, classes=3):
    """Class c says words 10 c … 10 c + 9 alone."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return Dataset.from_dict(
        {"input_ids": (10 * labels[:, None] + generator.integers(0, 10, (count, 6))).tolist()}
        | {"label": labels.tolist()}
    )


FULL, TEST, OUTSIDE = rows(90, 1), rows(60, 2), rows(30, 3)
WITHOUT_2 = [row for row in range(90) if row % 3 < 2][:30]
CALLS = []
pytestmark = pytest.mark.slow


def make(**config):
    CALLS.append(1)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **config}))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A subset that lacks a class, and where its runs are kept."""
    folder = tmp_path_factory.mktemp("proof") / "runs"
    CALLS.clear()
    proof = evaluate_subset(WITHOUT_2, FULL, make, TEST, out_of_distribution=OUTSIDE, output_dir=folder, **LONG)
    return proof, folder, len(CALLS)


def arms_of(proof):
    return {arm.title: arm for arm in proof.arms}


def test_subset_that_lacks_a_class_is_worse_with_an_interval_below_zero(planted):
    proof, _, calls = planted
    assert calls == 2 + 15  # two for the checks
    found = {(d.against, d.equal, d.data, d.metric): d for d in proof.differences}
    assert len(found) == 16
    for against in ("random", "full"):
        for data in ("test", "out_of_distribution"):
            assert found[against, "steps", data, "accuracy"].difference.high < 0
            assert found[against, "steps", data, "accuracy"].verdict == "worse"
    arm = arms_of(proof)["subset, equal steps"]
    assert (arm.test.worst_class, arm.test.worst_recall) == ("LABEL_2", 0.0)
    assert arm.gap > 0.2
    assert "worse" in str(proof)


def test_steps_are_those_of_the_full_run_or_its_epochs(planted):
    arms = arms_of(planted[0])
    assert [(arm.rows, arm.steps, arm.epochs) for arm in arms.values()] == [
        (90, 30, 5.0),
        (30, 10, 5.0),
        (30, 10, 5.0),
        (30, 30, 15.0),
        (30, 30, 15.0),
    ]
    assert [arm.steps_saved for arm in arms.values()] == [None, 20, 20, 0, 0]
    full, subset = arms["full"], arms["subset, equal epochs"]
    assert subset.seconds_saved == pytest.approx(full.seconds - subset.seconds)
    assert f"| {subset.steps_saved:,} steps, {subset.seconds_saved:.1f} s" in str(planted[0])
    assert all(run["steps"] == arm.steps for arm in arms.values() for run in arm.runs)


def test_scores_are_those_of_the_kept_predictions(planted):
    proof, folder, _ = planted
    kept = [np.load(folder / "runs" / f"random-steps-{seed}" / "test.npy") for seed in proof.seeds]
    right = [(run == TEST["label"][:]).mean() for run in kept]
    arm = arms_of(proof)["random, equal steps"]
    assert arm.test.accuracy.value == pytest.approx(np.mean(right))
    assert [run["accuracy"] for run in arm.runs] == pytest.approx(right)


def test_finished_runs_are_not_trained_again(planted):
    proof, folder, _ = planted
    CALLS.clear()
    shutil.rmtree(folder / "runs" / "subset-steps-1")
    how = {"out_of_distribution": OUTSIDE, "output_dir": folder, **LONG}
    again = evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)
    assert len(CALLS) == 2 + 1
    assert again.differences == proof.differences
    one = evaluate_subset(WITHOUT_2, FULL, make, TEST, **{**how, "seeds": [2], "equal": "steps"})
    assert [arm.title for arm in one.arms] == ["full", "subset, equal steps", "random, equal steps"]
    assert len(CALLS) == 2 + 1 + 2
    assert any("One seed" in note for note in one.notes)
    assert all(d.verdict in ("not told apart", "worse, with this seed") for d in one.differences)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.01}, r"settings.learning_rate \(was 0.02, is 0.01\)"),
        ({"subset": WITHOUT_2[:-1]}, r"other settings: subset \(was"),
        ({"test": rows(60, 9)}, "test.input_ids"),
        ({"out_of_distribution": None}, "out_of_distribution.input_ids"),
        ({"model_init": lambda: make(hidden_act="relu")}, r"model \(was"),
    ],
)
def test_runs_of_something_else_are_refused(planted, changes, message):
    how = {"subset": WITHOUT_2, "full": FULL, "model_init": make, "test": TEST, "out_of_distribution": OUTSIDE}
    with pytest.raises(SettingError, match=message):
        evaluate_subset(**{**how, **LONG, "output_dir": planted[1], **changes})


def test_damaged_runs_and_foreign_folders_are_refused(planted, tmp_path):
    shutil.copytree(planted[1], tmp_path / "copy")
    broken = tmp_path / "copy" / "runs" / "full-all-0"
    how = {"out_of_distribution": OUTSIDE, "output_dir": tmp_path / "copy", **LONG}
    np.save(broken / "test.npy", np.full(60, 9))
    with pytest.raises(CheckpointError, match="must hold 60 class numbers"):
        evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)
    (broken / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)
    (tmp_path / "copy" / "proof.json").unlink()
    with pytest.raises(CheckpointError, match="holds files and no proof.json"):
        evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)


def test_proof_survives_json_and_stands_in_the_data_card(planted):
    proof = planted[0]
    read = Proof.from_dict(json.loads(json.dumps(proof.to_dict(), allow_nan=False)))
    assert read == proof
    with pytest.raises(SettingError, match="of another subset: 30 of 90 rows, got 30 of 90 others"):
        proof.attach(select(FULL, 1 / 3, "random"))
