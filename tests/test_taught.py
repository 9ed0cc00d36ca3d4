import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from tokenizers.processors import TemplateProcessing
from transformers import DataCollatorWithPadding, TrainingArguments

from hfshrink.distillation import DistillationTrainer
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.run import select
from hfshrink.selection.subset import Subset
from hfshrink.selection.synthesis import synthesize
from hfshrink.taught import add_soft_labels, load_soft_labels, save_soft_labels
from tests import tiny

FEATURES = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
WORDS = [tiny.WORDS[i : i + 2 + i % 3] for i in range(12)]
FULL = Dataset.from_dict(
    {"text": [" ".join(words) for words in WORDS], "label": [i % 2 for i in range(12)]}, features=FEATURES
)
POINTS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)


def named(model, names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    return model.eval()


@pytest.fixture(scope="module")
def teacher():
    return named(tiny.model("bert", num_labels=2), ["bad", "good"])


@pytest.fixture
def taught(teacher):
    return add_soft_labels(select(FULL, 0.5, "random"), teacher, tiny.tokenizer())


def settings(folder):
    names = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(folder, max_steps=1, per_device_train_batch_size=3, dataloader_pin_memory=False, **names)


def test_rows_keep_their_text_and_get_the_teachers_own_logits(taught, teacher):
    assert taught.dataset.column_names[0] == "text"
    assert {"input_ids", "labels", "teacher_logits"} < set(taught.dataset.column_names)
    assert taught.dataset["text"][:] == FULL.select(taught.indices)["text"][:]
    assert taught.dataset["labels"][:] == FULL.select(taught.indices)["label"][:]
    for row in taught.dataset:
        with torch.no_grad():
            logits = teacher(**tiny.tokenizer()(row["text"], return_tensors="pt")).logits[0]
        assert torch.allclose(logits, torch.tensor(row["teacher_logits"]), atol=1e-5)


def test_report_says_who_taught(taught):
    details = taught.report.details["teacher"]
    assert (details["classes"], details["labels"], details["rows"]) == (2, ["bad", "good"], 6)
    assert (details["task"], details["signal"]) == ("text-classification", "full")
    assert details["name"]
    plain = select(FULL, 0.5, "random")
    assert taught.indices.tolist() == plain.indices.tolist()
    assert taught.scores is None
    assert taught.report.balance == plain.report.balance
    json.dumps(taught.report.to_dict(), allow_nan=False)


def test_distillation_trainer_takes_the_rows_as_they_are(taught, tmp_path):
    student = named(tiny.model("bert", num_labels=2, seed=1, num_hidden_layers=1), ["bad", "good"]).train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    trainer = DistillationTrainer(
        student,
        settings(tmp_path),
        train_dataset=taught.dataset,
        data_collator=DataCollatorWithPadding(tiny.tokenizer()),
    )
    assert np.isfinite(trainer.train().training_loss)
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert student.config.hfshrink["history"][-1]["technique"] == "distill"


def test_students_whose_classes_are_in_another_order_are_refused(taught, tmp_path):
    student = named(tiny.model("bert", num_labels=2), ["good", "bad"])
    with pytest.raises(SettingError, match=r"'labels' has the classes \['bad', 'good'\], in this order"):
        DistillationTrainer(student, settings(tmp_path), train_dataset=taught.dataset)


def test_student_with_another_tokenizer_encodes_the_text_anew(taught, tmp_path):
    rows = taught.dataset.select_columns(["text", "labels", "teacher_logits"])
    rows = rows.map(lambda row: {"input_ids": [5 + len(word) for word in row["text"].split()]})
    student = named(tiny.model("distilbert", num_labels=2), ["bad", "good"])
    trainer = DistillationTrainer(
        student, settings(tmp_path), train_dataset=rows, data_collator=DataCollatorWithPadding(tiny.tokenizer())
    )
    assert np.isfinite(trainer.train().training_loss)


def test_logits_follow_the_data_sets_class_names(teacher):
    subset = select(FULL, 0.5, "random")
    turned = named(tiny.model("bert", num_labels=2), ["GOOD", "Bad"])
    turned.load_state_dict(teacher.state_dict())
    ours, theirs = (
        np.array(add_soft_labels(subset, model, tiny.tokenizer()).dataset["teacher_logits"][:])
        for model in (teacher, turned)
    )
    assert np.allclose(ours, theirs[:, ::-1], atol=1e-6)


def test_other_class_names_are_taken_in_order_and_said(caplog, teacher):
    model = named(tiny.model("bert", num_labels=2), ["LABEL_0", "LABEL_1"])
    add_soft_labels(select(FULL, 0.5, "random"), model, tiny.tokenizer())
    assert "taken to be in the same order" in caplog.text


def test_another_number_of_classes_is_refused():
    model = tiny.model("bert", num_labels=3)
    with pytest.raises(SettingError, match=r"2 classes \(bad, good\) in 'label', the teacher 3"):
        add_soft_labels(select(FULL, 0.5, "random"), model, tiny.tokenizer())


def test_a_second_teacher_replaces_the_first(taught):
    other = named(tiny.model("bert", num_labels=2, seed=7), ["bad", "good"])
    again = add_soft_labels(taught, other, tiny.tokenizer())
    fresh = add_soft_labels(select(FULL, 0.5, "random"), other, tiny.tokenizer())
    assert again.dataset["teacher_logits"][:] == fresh.dataset["teacher_logits"][:]
    assert again.dataset.column_names.count("input_ids") == 1


def test_encoded_rows_stay_trainable(teacher):
    encoded = FULL.map(lambda row: dict(tiny.tokenizer()(row["text"])), remove_columns="text")
    taught = add_soft_labels(select(encoded, 0.5, "random"), teacher)
    assert "label" not in taught.dataset.column_names
    assert {"input_ids", "labels", "teacher_logits"} <= set(taught.dataset.column_names)


def test_language_models_answer_with_a_sample_of_each_position():
    subset = select(FULL, 0.5, "random")
    taught = add_soft_labels(subset, tiny.model("llama").eval(), tiny.tokenizer(), entries=4)
    details = taught.report.details["teacher"]
    assert (details["signal"], details["classes"], details["labels"]) == ("sampled", None, None)
    assert "label" not in taught.dataset.column_names  # a class is nothing to generate
    for row in taught.dataset:
        assert len(row["teacher_counts"]) == len(row["input_ids"])
        assert all(sum(counts) == 4 for counts in row["teacher_counts"])


def test_rows_without_tokens_are_refused():
    rows = Dataset.from_dict({"text": ["a cat", "", "", ""]})
    tokenizer = tiny.tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A")
    with pytest.raises(SettingError, match="have no tokens"):
        add_soft_labels(select(rows, 1.0, "random"), tiny.model("llama").eval(), tokenizer)


def test_learned_images_are_taught_too():
    images = [Pictures.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)) for i in range(12)]
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "light"])})
    rows = Dataset.from_dict({"image": images, "label": [0] * 6 + [1] * 6}, features=features)
    synthetic = synthesize(rows, 2, steps=2, width=4, batch_rows=4)
    model = named(tiny.model("resnet", num_labels=2), ["dark", "light"])
    encoded = synthetic.dataset.map(lambda row: {"pixel_values": np.asarray(row["image"]).transpose(2, 0, 1) / 255.0})
    taught = add_soft_labels(dataclasses.replace(synthetic, dataset=encoded), model)
    assert np.array(taught.dataset["teacher_logits"][:]).shape == (4, 2)
    assert taught.report.details["teacher"]["labels"] == ["dark", "light"]
    assert taught.report.details["synthesis"]["space"] == "images"


def test_saved_soft_labels_come_back(taught, tmp_path):
    save_soft_labels(taught, tmp_path / "s")
    loaded = load_soft_labels(tmp_path / "s", FULL)
    assert loaded.dataset[:] == taught.dataset[:]
    assert loaded.dataset.features == taught.dataset.features
    assert loaded.report == taught.report
    assert loaded.indices.tolist() == taught.indices.tolist()
    assert Subset.load(tmp_path / "s", FULL).dataset.column_names == ["text", "label"]  # without soft labels


def test_soft_labels_of_synthesis_come_back(tmp_path):
    subset = synthesize(FULL, 2, embeddings=POINTS, steps=3)
    save_soft_labels(subset, tmp_path / "s")
    loaded = load_soft_labels(tmp_path / "s", FULL)
    assert loaded.dataset[:] == subset.dataset[:]
    assert (tmp_path / "s" / "learnt.npy").exists()


def test_subset_without_soft_labels_is_not_saved_with_them(tmp_path):
    with pytest.raises(SettingError, match=r"no soft labels \(its columns: text, label\).*add_soft_labels"):
        save_soft_labels(select(FULL, 0.5, "random"), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def change(folder, **values):
    path = folder / "soft_labels.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def append(folder):
    with (folder / "soft_labels.parquet").open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (append, "its sha256 differs. It is corrupt or changed"),
        (lambda folder: (folder / "soft_labels.parquet").unlink(), "Can't read .*soft_labels.parquet"),
        (lambda folder: (folder / "soft_labels.json").unlink(), "Can't read .*soft_labels.json"),
        (lambda folder: (folder / "soft_labels.json").write_text("{"), "Can't read .*soft_labels.json"),
        (lambda folder: change(folder, format_version=9), "must be of format 1. Upgrade"),
        (lambda folder: change(folder, sha256=None), "lacks the digests"),
        (lambda folder: change(folder, indices="0"), "was made for other rows"),
    ],
)
def test_spoilt_folder_is_refused(taught, tmp_path, spoil, match):
    save_soft_labels(taught, tmp_path / "s")
    spoil(tmp_path / "s")
    with pytest.raises(CheckpointError, match=match):
        load_soft_labels(tmp_path / "s", FULL)


def test_folder_with_files_is_not_overwritten_unasked(taught, tmp_path):
    save_soft_labels(taught, tmp_path / "s")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_soft_labels(taught, tmp_path / "s")
    save_soft_labels(taught, tmp_path / "s", overwrite=True)
