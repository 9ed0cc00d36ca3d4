"""`evaluate_subset` through the real Trainer, on rows whose class each of their words tells."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import tiny
from hfshrink.cards import dataset_card
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.proof import evaluate_subset
from hfshrink.proof.run import random_rows
from hfshrink.selection import select
from hfshrink.selection.budgets import random_subset
from hfshrink.taught import add_soft_labels

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SIZES |= {"vocab_size": 40, "max_position_embeddings": 12}
QUICK = {"use_cpu": True, "dataloader_pin_memory": False, "per_device_train_batch_size": 15}
SHORT = {**QUICK, "max_steps": 1, "seeds": [0], "resamples": 20}


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


def make(**config):
    CALLS.append(1)
    return BertForSequenceClassification(BertConfig(**{**SIZES, "num_labels": 3, **config}))


def test_finished_runs_are_not_trained_again(tmp_path):
    how = {**SHORT, "equal": "steps", "max_steps": 3, "output_dir": tmp_path / "runs"}
    CALLS.clear()
    first = evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)
    assert len(CALLS) == 2 + 3  # two for the checks
    assert [(arm.rows, arm.steps) for arm in first.arms] == [(90, 3), (30, 3), (30, 3)]
    assert sorted(path.name for path in (tmp_path / "runs" / "runs").iterdir()) == [
        *("full-all-0", "random-steps-0", "subset-steps-0"),
    ]
    again = evaluate_subset(WITHOUT_2, FULL, make, TEST, **how)
    assert len(CALLS) == 2 + 3 + 2
    assert again == first
    with pytest.raises(SettingError, match=r"settings.learning_rate \(was 5e-05, is 0.01\)"):
        evaluate_subset(WITHOUT_2, FULL, make, TEST, learning_rate=0.01, **how)


def test_subset_of_select_gets_its_proof_attached():
    subset = select(FULL, 1 / 3, "random")
    proof = evaluate_subset(subset, FULL, make, TEST, equal="steps", **SHORT)
    done = proof.attach(subset)
    assert "proof" not in subset.report.details
    assert done.report.details["proof"] == proof.to_dict()
    text = dataset_card(done.report).content
    assert "| subset, equal steps | 30 " in text
    assert "subset - random, equal steps" in text
    assert proof.selection_seconds == pytest.approx(sum(subset.report.seconds.values()))


def test_random_subsets_keep_the_share_of_each_class_and_differ_by_seed():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    drawn = [random_rows(100, 20, seed, labels) for seed in range(3)]
    for one in drawn:
        assert np.bincount(labels[one]).tolist() == [12, 6, 2]
    assert len({tuple(one) for one in drawn}) == 3
    assert len(random_rows(100, 2, 0, labels)) == 2  # fewer than classes
    assert set(drawn[0]) != set(random_subset(100, 20, 0, labels))  # the rows of `select` with that seed


def raw(words, labels):
    made = Dataset.from_dict({"text": words, "label": labels})
    return made.cast_column("label", ClassLabel(names=["bad", "good"]))


def test_raw_texts_and_a_folder_without_a_classifier(tmp_path):
    tiny.model("bert", "fill-mask").save_pretrained(tmp_path / "base")  # without a pooler
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    full = raw([f"{word} {noun}" for word in ("good", "bad") for noun in tiny.WORDS[:8]], [1] * 8 + [0] * 8)
    test = raw(["good plot", "bad plot"], [1, 0])
    full, test = (
        part.add_column("by", ["me"] * len(part)).add_column("at", ["x"] * len(part)) for part in (full, test)
    )
    how = {**SHORT, "equal": "steps"}
    with pytest.raises(SettingError, match=r"neither text nor images .* among text, label, by, at.*text_columns="):
        evaluate_subset([0, 1, 8, 9], full, str(tmp_path / "base"), test, **how)
    proof = evaluate_subset([0, 1, 8, 9], full, str(tmp_path / "base"), test, text_columns=["text"], **how)
    assert (proof.model, proof.task, proof.trainer) == ("base", "text-classification", "Trainer")
    assert {arm.test.worst_class for arm in proof.arms} <= {"bad", "good"}
    nothing = full.remove_columns("label").add_column("label", [None] * 16)
    with pytest.raises(SettingError, match="'label' holds no label: all rows are None"):
        evaluate_subset([0, 1], nothing, str(tmp_path / "base"), test, text_columns=["text"], **how)


def test_held_out_rows_of_one_class_and_equal_labels_are_no_training_rows():
    full = raw(
        [f"good {word}" for word in tiny.WORDS[:4]] + [f"bad {word}" for word in tiny.WORDS[:4]], [1] * 4 + [0] * 4
    )
    other = raw([f"{word} plot" for word in tiny.WORDS[2:10]], full["label"][:]).rename_column("text", "sentence")
    how = {**SHORT, "equal": "steps", "random_subsets": False, "processor": tiny.tokenizer()}
    good = raw(["good plot"], [1])
    proof = evaluate_subset([0, 4], full, lambda: tiny.model("bert"), good, out_of_distribution=other, **how)
    assert proof.out_of_distribution["overlap"] is None
    assert any("The test rows have none of 1 classes (LABEL_0)" in note for note in proof.notes)


def test_images():
    generator = np.random.default_rng(0)
    pixels = generator.normal(size=(20, 3, 8, 8)).astype(np.float32)
    data = Dataset.from_dict({"pixel_values": pixels[:16].tolist(), "labels": [0, 1] * 8})
    test = Dataset.from_dict({"pixel_values": pixels[16:].tolist(), "labels": [0, 1] * 2})
    proof = evaluate_subset([0, 1, 2, 3], data, lambda: tiny.model("vit"), test, **{**SHORT, "equal": "steps"})
    assert (proof.task, proof.test["overlap"]) == ("image-classification", 0)


def test_rows_with_a_teachers_answers_are_distilled():
    answers = torch.nn.functional.one_hot(torch.tensor(FULL["label"][:]), 3).float().tolist()
    taught = FULL.add_column("teacher_logits", answers)
    how = {"equal": "steps", "random_subsets": False, **SHORT}
    subset = select(FULL, 1 / 3, "random")
    object.__setattr__(subset, "dataset", taught.select(subset.indices))
    proof = evaluate_subset(subset, FULL, make, TEST, **how)
    assert proof.trainer == "Trainer+DistillationTrainer"
    assert any("of the teacher together" in note for note in proof.notes)
    unlabelled = taught.remove_columns("label")
    blind = evaluate_subset(WITHOUT_2, unlabelled, make, TEST, **how)
    assert blind.trainer == "DistillationTrainer"
    assert all(arm.gap is None for arm in blind.arms)
    assert "not measured" in str(blind)


def test_answers_in_another_order_than_the_models_classes_are_refused():
    full = FULL.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    test = TEST.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    named = [
        {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        for names in ("abc", "cab")
    ]
    taught = add_soft_labels(select(full, 1 / 3, "random"), make(**named[1]))
    assert taught.report.details["teacher"]["labels"] == ["a", "b", "c"]
    how = {**SHORT, "equal": "steps", "random_subsets": False}
    evaluate_subset(taught, full, lambda: make(**named[0]), test, **how)
    with pytest.raises(
        SettingError, match=r"classes \['a', 'b', 'c'\], in this order, and the model's are \['c', 'a', 'b'\]"
    ):
        evaluate_subset(taught, full, lambda: make(**named[1]), test, **how)


def test_rows_of_its_own_are_held_against_random_ones():
    proof = evaluate_subset(rows(9, 4), FULL, make, TEST, **{**SHORT, "equal": "steps"})
    assert (proof.size, proof.subset, proof.arms[1].rows, proof.arms[2].rows) == (9, None, 9, 9)
    with pytest.raises(SettingError, match="3 of the 60 test rows are among the training rows"):
        evaluate_subset(TEST.select(range(3)), FULL, make, TEST, **SHORT)


def test_arguments_of_a_trainer_and_their_settings():
    args = TrainingArguments(
        "unused",
        max_steps=1,
        learning_rate=1e-3,
        warmup_steps=5,
        use_cpu=True,
        dataloader_pin_memory=False,
        eval_strategy="epoch",
    )
    losses = []

    def own_loss(outputs, labels, num_items_in_batch=None):
        losses.append(1)
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    how = {"seeds": [0, 1], "resamples": 20, "equal": "steps", "random_subsets": False}
    proof = evaluate_subset([0, 1, 2], FULL, make, TEST, args=args, compute_loss_func=own_loss, **how)
    assert len(losses) == 4
    assert proof.settings["learning_rate"] == 1e-3
    assert "own_loss" in proof.settings["compute_loss_func"]
    assert [arm.title for arm in proof.arms] == ["full", "subset, equal steps"]
    for text in ("2 seeds: intervals", "No random subsets", "rate was still rising when these runs ended: full"):
        assert any(text in note for note in proof.notes), text


def test_held_out_rows_that_are_training_rows_are_left_out_on_demand():
    from datasets import concatenate_datasets

    test = concatenate_datasets([TEST, FULL.select([5, 6])])
    with pytest.raises(SettingError, match=r"2 of the 62 test rows are among the training rows \(first: \[60, 61\]\)"):
        evaluate_subset(WITHOUT_2, FULL, make, test, **SHORT)
    proof = evaluate_subset(WITHOUT_2, FULL, make, test, remove_overlap=True, **{**SHORT, "equal": "steps"})
    assert proof.test == {"name": None, "rows": 60, "overlap": 2, "removed": 2}
    assert "2 test rows that are training rows too were left out." in proof.notes


def test_loss_that_is_no_number_ends_the_run():
    def broken():
        model = make()
        model.classifier.bias.data[0] = float("nan")
        return model

    with pytest.raises(SettingError, match="In the arm 'full', seed 0: the loss is nan at step 1"):
        evaluate_subset(WITHOUT_2, FULL, broken, TEST, **SHORT)


def test_models_that_do_not_depend_on_the_seed_alone_are_refused():
    counter = iter(range(100))

    def drifting():
        model = make()
        model.classifier.bias.data += next(counter)
        return model

    with pytest.raises(SettingError, match="made other weights for the arm 'subset' with equal epochs, seed 0"):
        evaluate_subset(WITHOUT_2, FULL, drifting, TEST, **SHORT)
    model = make()
    with pytest.raises(SettingError, match="returns the same model again"):
        evaluate_subset(WITHOUT_2, FULL, lambda: model, TEST, **SHORT)


def test_subset_picked_by_scores_of_the_test_rows_is_refused():
    subset = select(TEST, 0.5, "easy", scores=np.linspace(0, 1, 60))
    with pytest.raises(SettingError, match="made on the held-out rows"):
        evaluate_subset(subset, FULL, make, TEST, **SHORT)
    with pytest.raises(SettingError, match="The subset was made of"):
        evaluate_subset(subset, FULL, make, OUTSIDE, **SHORT)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": []}, SettingError, r"seeds must be one or more different whole numbers from 0 on, got \[\]"),
        ({"seeds": [1, 1]}, SettingError, "seeds must be one or more different"),
        ({"equal": "time"}, SettingError, "equal must be one or both of epochs, steps, got .'time'."),
        ({"resamples": 0}, SettingError, "resamples must be a whole number from 1 on, got 0"),
        ({"subset": []}, SettingError, "The subset is empty"),
        ({"subset": [0, 90]}, SettingError, r"must lie in 0..89, each once, got 0..90"),
        ({"subset": [0, 0]}, SettingError, "1 different ones of 2"),
        ({"subset": "org/subset"}, SettingError, "subset must be a Subset, row numbers"),
        ({"full": IterableDataset.from_generator(lambda: iter([{"a": 1}]))}, SettingError, "got a streaming one"),
        ({"test": FULL}, SettingError, "The test rows are the training rows themselves"),
        ({"test": rows(8, 5, classes=4)}, SettingError, "labels must lie in 0..2|Labels must lie in 0..2"),
        ({"full": FULL.filter(lambda row: row["label"] < 2)}, SettingError, "no training row has: LABEL_2"),
        ({"test": TEST.remove_columns("label")}, SettingError, "The data set has no labels"),
        ({"model_init": lambda: make(num_labels=2)}, SettingError, "Labels must lie in 0..1 for this model, got .2."),
        ({"model_init": lambda: make(num_labels=1)}, UnsupportedModelError, "got regression labels"),
        ({"model_init": lambda: tiny.model("bert", "token-classification")}, UnsupportedModelError, "one label a row"),
        ({"model_init": BertForSequenceClassification(BertConfig(**SIZES))}, SettingError, "makes a fresh model"),
        ({"model_init": lambda a, b: None}, SettingError, "it takes 2"),
        ({"model_init": lambda: None}, SettingError, "must return a model, got NoneType"),
        ({"model_init": "./nothing/here"}, CheckpointError, "nothing/here"),
        ({"learning_rat": 1}, SettingError, "no setting 'learning_rat'. Did you mean 'learning_rate'"),
        ({"seed": 1}, SettingError, "seed: a proof decides this itself"),
        ({"dataloader_drop_last": True}, SettingError, "leaves no batch of 4 rows, a batch has 15"),
        ({"load_best_model_at_end": True}, SettingError, "would choose by held-out rows"),
        ({"trainer": "Trainer"}, SettingError, "trainer must be a Trainer class"),
        ({"args": {"learning_rate": 1}}, SettingError, "args must be TrainingArguments, got dict"),
        ({"args": TrainingArguments("unused", use_cpu=True)}, SettingError, "in args= or by name, not both"),
    ],
)
def test_what_can_not_be_proved_is_refused_before_training(changes, error, message):
    how = {"subset": [0, 1, 3, 4], "full": FULL, "model_init": make, "test": TEST}
    with pytest.raises(error, match=message):
        evaluate_subset(**{**how, **SHORT, **changes})
