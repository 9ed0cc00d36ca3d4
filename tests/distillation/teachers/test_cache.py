"""A cached teacher says what it would say in training, whatever the order of the rows, and is asked once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value, concatenate_datasets
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    T5Config,
    T5ForConditionalGeneration,
    default_data_collator,
)

import tiny
from hfshrink.distillation import LogitLoss
from hfshrink.distillation.teachers import answers as answers_room
from hfshrink.distillation.teachers import cache as cache_room
from hfshrink.distillation.teachers import fingerprints
from hfshrink.distillation.teachers import store as store_room
from hfshrink.distillation.teachers.alignment import ask_teacher
from hfshrink.distillation.teachers.answers import row_parts, sample_entries, top_entries
from hfshrink.distillation.teachers.cache import TeacherCollator, cache_teacher, teacher_outputs
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.modules import accepted_inputs

HERE = Path(__file__).resolve().parent


def rows(count=12, length=None, seed=0, **columns):
    """Random tokens, 2 to 7 a row, or `length`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [length or int(n) for n in torch.randint(2, 8, (count,), generator=generator)]
    ids = [torch.randint(5, tiny.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * n for n in lengths], **columns})


def counted(model):
    """The model, and a list that tells how many rows each of its forward passes had."""
    passes = []
    model.register_forward_pre_hook(lambda m, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    return model, passes


def alone(model, row):
    """The model's outputs on one row without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([row["input_ids"]]))


def test_answers_per_example_are_the_teachers():
    teacher, tokenizer = tiny.model("bert", num_labels=3), tiny.tokenizer()
    data = Dataset.from_dict(
        {"text": ["a good film", "bad", "the very long boring movie was not good"], "label": [0, 1, 2]}
    )
    kept = cache_teacher(data, teacher, tokenizer, batch_size=2)
    assert kept.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels", "teacher_logits"]
    for text, logits in zip(data["text"], kept["teacher_logits"], strict=True):
        expected = tiny.logits(teacher, tokenizer(text, return_tensors="pt"))[0]
        assert torch.allclose(torch.tensor(logits), expected, atol=1e-6)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_labels_stay_as_they_are():
    teacher = tiny.model("bert", id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1})
    data = rows(4, labels=[0, 1, 1, 0]).cast_column("labels", ClassLabel(names=["no", "yes"]))
    kept = cache_teacher(data, teacher)
    assert kept["labels"] == data["labels"]
    assert kept.features["labels"] == data.features["labels"]


def test_images_have_answers():
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    teacher = tiny.model("vit")
    kept = cache_teacher(Dataset.from_dict({"pixel_values": pixels.tolist()}), teacher, batch_size=2)
    expected = tiny.logits(teacher, {"pixel_values": pixels})
    assert torch.allclose(torch.tensor(kept["teacher_logits"]), expected, atol=1e-6)


def test_answers_per_token_are_the_teachers():
    teacher, data = tiny.model("bert", "token-classification", num_labels=3), rows()
    for row in cache_teacher(data, teacher, batch_size=5):
        assert torch.allclose(torch.tensor(row["teacher_logits"]), alone(teacher, row).logits[0], atol=1e-5)


def test_tags_of_words_become_tags_of_tokens():
    """The tokens [CLS] and [SEP] have no tag; the numbers are the data set's, not the teacher's."""
    names = {"id2label": {0: "B", 1: "O"}, "label2id": {"B": 0, "O": 1}}
    features = Features({"words": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "B"]))})
    data = Dataset.from_dict({"words": [["a", "film"], ["bad"]], "tags": [[0, 1], [1]]}, features=features)
    kept = cache_teacher(data, tiny.model("bert", "token-classification", **names), tiny.tokenizer())
    assert kept["labels"] == [[-100, 0, 1, -100], [-100, 1, -100]]
    assert [len(row) for row in kept["teacher_logits"]] == [4, 3]


def test_starts_and_ends_are_kept():
    teacher = tiny.model("bert", "question-answering")
    data = rows(start_positions=[0] * 12, end_positions=[1] * 12)
    kept = cache_teacher(data, teacher, batch_size=5)
    assert {"start_positions", "end_positions"} <= set(kept.column_names)
    for row in kept:
        expected = alone(teacher, row)
        both = torch.stack((expected.start_logits[0], expected.end_logits[0]), -1)
        assert torch.allclose(torch.tensor(row["teacher_logits"]), both, atol=1e-5)


def test_left_padding_is_cut_off():
    teacher, tokenizer = tiny.model("llama"), tiny.tokenizer()
    tokenizer.padding_side = "left"
    for row in cache_teacher(rows(), teacher, tokenizer, signal="full", batch_size=5):
        assert torch.allclose(torch.tensor(row["teacher_logits"]), alone(teacher, row).logits[0], atol=1e-4)


def encoder_decoder():
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=tiny.VOCABULARY, **shape)).eval()


def test_target_positions_of_an_encoder_decoder():
    teacher = encoder_decoder()
    data = rows(4, labels=[[7], [8, 9, 10], [11, 12], [13, 14, 15, 16]])
    kept = cache_teacher(data, teacher, signal="full", batch_size=3)
    for row in kept:
        with torch.no_grad():
            expected = teacher(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
        assert torch.allclose(torch.tensor(row["teacher_logits"]), expected.logits[0], atol=1e-5)
    collator = DataCollatorForSeq2Seq(tiny.tokenizer(), model=teacher)
    assert TeacherCollator(collator)(list(kept))["teacher_logits"].shape == (4, 4, tiny.VOCABULARY)
    again = cache_teacher(data, teacher, signal="full", batch_size=3, data_collator=collator)
    assert np.allclose(again[1]["teacher_logits"], kept[1]["teacher_logits"], atol=1e-5)
    with pytest.raises(SettingError, match="answers for each token of the target; the data set has attention_mask"):
        cache_teacher(rows(2).select_columns(["attention_mask", "input_ids"]), teacher)


@pytest.mark.parametrize(
    ("task", "head", "config"),
    [
        ("text-classification", "single_label", {"num_labels": 3}),
        ("token-classification", "tokens", {"num_labels": 3}),
        ("question-answering", "span", {}),
    ],
)
def test_loss_is_bit_equal_to_the_live_teachers(tmp_path, task, head, config):
    """Rows of one length, batches of one size, another order than when they were cached."""
    teacher, student = tiny.model("bert", task, **config), tiny.model("bert", task, seed=1, **config)
    data = rows(16, length=6)
    kept = cache_teacher(data, teacher, cache_dir=tmp_path, batch_size=4).shuffle(seed=3)
    collator = TeacherCollator(DataCollatorWithPadding(tiny.tokenizer(), padding="max_length", max_length=6))
    for start in range(0, 16, 4):
        batch = collator([kept[i] for i in range(start, start + 4)])
        live = ask_teacher(teacher, dict(batch), accepted_inputs(teacher), set())
        cached = teacher_outputs(batch, head)
        ours = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        mask = batch["attention_mask"].bool() if head == "tokens" else None
        losses = [LogitLoss()(ours, theirs, head=head, mask=mask) for theirs in (live, cached)]
        assert torch.equal(*losses)
        assert losses[0] > 0


@pytest.mark.parametrize("signal", ["full", "sampled", "top_k"])
def test_memory_and_folder_hold_the_same(tmp_path, signal):
    teacher, data = tiny.model("llama"), rows()
    one, two = (cache_teacher(data, teacher, signal=signal, entries=9, cache_dir=d) for d in (None, tmp_path))
    assert one.features == two.features
    assert one.to_dict() == two.to_dict()
    assert any("tables" in file["filename"] for file in two.cache_files)  # mapped from disk, not in memory


def tables(folder):
    return sorted((folder / "tables").iterdir())


def test_the_same_rows_find_their_table_again(tmp_path):
    teacher, data = tiny.model("bert"), rows(4)
    one = cache_teacher(data, teacher, cache_dir=tmp_path)
    (table,) = tables(tmp_path)
    before = table.stat().st_ino, table.stat().st_mtime_ns
    two = cache_teacher(data, teacher, cache_dir=tmp_path)
    assert (table.stat().st_ino, table.stat().st_mtime_ns) == before
    assert one._fingerprint == two._fingerprint
    assert one.to_dict() == two.to_dict()
    whole = table.read_bytes()
    table.unlink()
    table.write_bytes(whole[: len(whole) // 2])
    assert cache_teacher(data, teacher, cache_dir=tmp_path).to_dict() == one.to_dict()  # cut short: made again


def test_a_few_tables_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_room, "KEPT_TABLES", 2)
    teacher, data = tiny.model("bert"), rows(6)
    orders = [data.shuffle(seed=seed) for seed in range(4)]
    kept = [cache_teacher(order, teacher, cache_dir=tmp_path) for order in orders[:2]]
    cache_teacher(orders[0], teacher, cache_dir=tmp_path)  # used again: the second one is the oldest now
    first = next(Path(file["filename"]) for file in kept[0].cache_files if "tables" in file["filename"])
    cache_teacher(orders[2], teacher, cache_dir=tmp_path)
    assert len(tables(tmp_path)) == 2
    assert first in tables(tmp_path)
    assert len(kept[1]["teacher_logits"]) == 6  # deleted, but mapped
    cache_teacher(orders[3], teacher, cache_dir=tmp_path)
    assert len(tables(tmp_path)) == 2


def test_shuffled_rows_make_no_second_copy(tmp_path):
    """datasets copies both sides of a join where one of them is shuffled."""
    cache_teacher(rows(6).shuffle(seed=0), tiny.model("bert"), cache_dir=tmp_path)
    assert len(tables(tmp_path)) == 1


def test_rows_that_no_table_can_hold_are_refused():
    with pytest.raises(SettingError, match="answer has 2,147,483,648 numbers.*Give signal='sampled'"):
        cache_room._lists(pa.array([1.0]), [2**31])


def test_draws_in_portions_are_the_same(monkeypatch):
    logits = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (128, 3):
        monkeypatch.setattr(answers_room, "CHUNK", chunk)
        found.append(sample_entries(logits, 50, torch.Generator().manual_seed(1)))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in ("widths", "ids", "counts"))


def test_draws_need_little_memory(monkeypatch):
    """The float64 copies are of a few positions at a time."""
    largest, softmax = [], torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, dim: largest.append(len(x)) or softmax(x, dim=dim))
    sample_entries(torch.zeros(1000, 5), 3, torch.Generator())
    assert max(largest) == 128
    assert sum(largest) == 1000


def test_draws_follow_the_teacher():
    """Mean of the counts over many draws against the softmax, within 5 standard errors; the sum is always N."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0], [3.0, 0.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    row = sample_entries(logits, 40_000, generator)
    found = np.zeros((2, 4))
    found[np.repeat([0, 1], row["widths"]), row["ids"]] = row["counts"]
    expected = logits.double().softmax(-1).numpy()
    assert found.sum(1).tolist() == [40_000, 40_000]
    assert (np.abs(found / 40_000 - expected) <= 5 * np.sqrt(expected * (1 - expected) / 40_000)).all()


def test_about_twelve_of_fifty_draws_are_different():
    """On a distribution with the long tail of natural text: p of rank r falls as 1/r^1.7."""
    logits = -1.7 * torch.log(torch.arange(1, 30_001).float()).expand(200, -1)
    widths = sample_entries(logits, 50, torch.Generator().manual_seed(0))["widths"]
    assert 10 < widths.mean() < 15


def test_largest_entries_are_the_largest():
    row = top_entries(torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]), 2)
    assert row["ids"].reshape(2, 2)[0].tolist() == [1, 2]
    expected = torch.tensor([0.0, 2.0, 1.0]).softmax(0)
    assert row["probabilities"][:2].tolist() == expected[[1, 2]].tolist()
    assert top_entries(torch.zeros(1, 3), 9)["widths"].tolist() == [3]


def test_ids_are_stored_as_small_as_the_vocabulary_allows():
    assert row_parts("sampled", 255, "float32", 2**16) == {"widths": "U8", "ids": "U16", "counts": "U8"}
    assert row_parts("sampled", 256, "float32", 2**16 + 1) == {"widths": "U16", "ids": "I32", "counts": "U16"}
    assert row_parts("top_k", 12, "float32", 500) == {"widths": "U8", "ids": "U16", "probabilities": "F16"}
    kept = cache_teacher(rows(2), tiny.model("llama"))
    assert kept.features["teacher_ids"].feature.feature == Value("uint16")
    assert kept.features["teacher_counts"].feature.feature == Value("uint8")


def test_draws_depend_on_the_row_and_the_seed_only():
    teacher, data = tiny.model("llama"), rows(12, length=6)
    kept = cache_teacher(data, teacher, batch_size=4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    torch.manual_seed(99)
    shuffled = cache_teacher(data.select(order), teacher, batch_size=4)
    assert shuffled.to_dict() == kept.select(order).to_dict()
    assert cache_teacher(data, teacher, seed=1)["teacher_ids"] != kept["teacher_ids"]


def test_each_row_is_computed_once(tmp_path):
    teacher, passes = counted(tiny.model("bert", num_labels=3))
    data = rows(8)
    doubled = concatenate_datasets([data, data])
    kept = cache_teacher(doubled, teacher, cache_dir=tmp_path, batch_size=4)
    assert passes == [4, 4]
    assert kept["teacher_logits"][:8] == kept["teacher_logits"][8:]
    mixed = concatenate_datasets([rows(3, seed=5), data.shuffle(seed=2)])  # 3 new rows
    again = cache_teacher(mixed, teacher, cache_dir=tmp_path, batch_size=4)
    assert passes == [4, 4, 3]
    known = {tuple(row["input_ids"]): row["teacher_logits"] for row in kept}
    assert all(row["teacher_logits"] == known[tuple(row["input_ids"])] for row in again.select(range(3, 11)))
    cache_teacher(data.select([5]), teacher, cache_dir=tmp_path)
    assert passes == [4, 4, 3]


def test_the_collator_may_change_but_not_the_tokens(tmp_path):
    """A folder made by hand serves a trainer, which brings a collator of its own; that one may ask for labels."""
    teacher, passes = counted(tiny.model("bert"))
    data = rows(4, labels=[0, 1, 0, 1])

    def padded(features, most=99):
        assert all("labels" in row for row in features)
        rows = [{"input_ids": row["input_ids"][:most]} for row in features]
        return DataCollatorWithPadding(tiny.tokenizer(), padding="max_length", max_length=20)(rows)

    kept = cache_teacher(data, teacher, tiny.tokenizer(), cache_dir=tmp_path / "a")
    again = cache_teacher(data, teacher, tiny.tokenizer(), cache_dir=tmp_path / "a", data_collator=padded)
    assert passes == [4]
    assert again["teacher_logits"] == kept["teacher_logits"]
    other = cache_teacher(data, teacher, cache_dir=tmp_path / "b", data_collator=padded)
    assert np.allclose(other["teacher_logits"], kept["teacher_logits"], atol=1e-5)
    with pytest.raises(SettingError, match="collator changed the column 'input_ids'|positions"):
        cache_teacher(data, teacher, data_collator=lambda features: padded(features, most=1))


def test_collators_that_change_the_inputs_are_refused_though_all_is_cached(tmp_path):
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images, teacher = Dataset.from_dict({"pixel_values": pixels.tolist()}), tiny.model("vit")
    cache_teacher(images, teacher, cache_dir=tmp_path, data_collator=default_data_collator)

    def louder(features):
        return {"pixel_values": 3 * default_data_collator(features)["pixel_values"] + 1}

    for folder in (tmp_path, None):
        with pytest.raises(SettingError, match="collator changes 'pixel_values'"):
            cache_teacher(images, teacher, cache_dir=folder, data_collator=louder)


def test_collators_that_drop_token_types_are_refused():
    data = rows(4, length=3).add_column("token_type_ids", [[0, 1, 1]] * 4)

    def without(features):
        return DataCollatorWithPadding(tiny.tokenizer())([{"input_ids": row["input_ids"]} for row in features])

    with pytest.raises(SettingError, match="collator drops 'token_type_ids'"):
        cache_teacher(data, tiny.model("bert"), data_collator=without)
    kept = cache_teacher(data, tiny.model("bert"), data_collator=DataCollatorWithPadding(tiny.tokenizer()))
    assert np.allclose(kept["teacher_logits"], cache_teacher(data, tiny.model("bert"))["teacher_logits"])


def test_collators_may_make_starts_as_the_teacher_does_only():
    teacher = encoder_decoder()
    data = rows(4, labels=[[7], [8, 9, 10], [11, 12], [13, 14, 15, 16]])

    def other(features):
        batch = DataCollatorForSeq2Seq(tiny.tokenizer())(features)
        return {**batch, "decoder_input_ids": torch.full_like(batch["labels"], 3)}

    with pytest.raises(SettingError, match="collator changes 'decoder_input_ids'"):
        cache_teacher(data, teacher, data_collator=other)
    with pytest.raises(SettingError, match="collator drops 'labels'"):
        cache_teacher(data, teacher, data_collator=lambda rows: {"input_ids": torch.ones(4, 9)})


def test_a_labelled_pass_or_another_dropout_changes_no_cache(tmp_path):
    """transformers sets problem_type at the first pass with labels."""
    teacher, passes = counted(tiny.model("bert", num_labels=3))
    cache_teacher(rows(4), teacher, cache_dir=tmp_path)
    teacher(input_ids=torch.tensor([[5]]), labels=torch.tensor([1]))
    assert teacher.config.problem_type is not None
    teacher.config.update({"hidden_dropout_prob": 0.3, "use_cache": False, "max_length": 9, "hfshrink": {"a": 1}})
    teacher.config.output_hidden_states = True
    cache_teacher(rows(4), teacher, cache_dir=tmp_path)
    assert passes == [4, 1]


def test_inner_configs_are_held_against_each_other():
    run = {"text_config": {"layers": 2, "attention_dropout": 0.1, "hidden_act": "gelu"}, "embd_pdrop": 0.1}
    assert fingerprints._that_count(run) == {"text_config": {"layers": 2, "hidden_act": "gelu"}}


def test_number_types_do_not_change_a_key(tmp_path):
    teacher, passes = counted(tiny.model("bert"))
    data = rows(4)
    cache_teacher(data, teacher, cache_dir=tmp_path)
    cache_teacher(data.cast_column("input_ids", Sequence(Value("int32"))), teacher, cache_dir=tmp_path)
    assert passes == [4]
    cache_teacher(
        data.map(lambda row: {"attention_mask": [1, *row["attention_mask"][1:-1], 0]}), teacher, cache_dir=tmp_path
    )
    assert passes == [4, 4]


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(store_room, "SHARD_BYTES", 1)
    teacher, passes = counted(tiny.model("bert"))
    data = rows(8)

    def stop(module, args, kwargs):
        if len(passes) == 2:
            raise KeyboardInterrupt

    hook = teacher.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(data, teacher, cache_dir=tmp_path, batch_size=4)
    hook.remove()
    kept = cache_teacher(data, teacher, cache_dir=tmp_path, batch_size=4)
    assert passes == [4, 4, 4]  # one half was kept
    assert len(kept) == 8


def test_empty_lines_of_a_text_are_left_out():
    data = Dataset.from_dict({"input_ids": [[5, 6], [], [7]], "labels": [[5, 6], [], [7]]})
    kept = cache_teacher(data, tiny.model("llama"))
    assert kept["labels"] == [[5, 6], [7]]
    assert [len(ids) for ids in kept["teacher_ids"]] == [2, 1]


def test_a_texts_class_is_no_label_of_a_language_model():
    data = Dataset.from_dict({"text": ["a good film", "bad"], "label": [1, 0]})
    assert "labels" not in cache_teacher(data, tiny.model("llama"), tiny.tokenizer()).column_names


def test_half_precision_halves_the_file(tmp_path):
    teacher, data = tiny.model("bert", "token-classification", num_labels=3), rows(4)
    exact = cache_teacher(data, teacher)
    half = cache_teacher(data, teacher, dtype="float16", cache_dir=tmp_path)
    assert half.features["teacher_logits"].feature.feature == Value("float16")
    assert half[0]["teacher_logits"] == np.array(exact[0]["teacher_logits"]).astype(np.float16).tolist()
    batch = TeacherCollator(DataCollatorWithPadding(tiny.tokenizer()))(list(half))
    assert teacher_outputs(batch, "tokens").logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"seed": 1}}, r"teacher.weights is '\w+' there, '\w+' here"),
        ({"teacher": {"hidden_act": "relu"}}, "teacher.config.hidden_act is 'gelu' there, 'relu' here"),
        ({"dtype": "float16"}, "answers.parts.logits is 'F32' there, 'F16' here"),
        ({"padding_side": "left"}, "collator.padding_side is 'right' there, 'left' here"),
        ({"word": "zebra"}, r"tokenizer.vocabulary is '\w+' there, '\w+' here"),
    ],
)
def test_another_teacher_or_setting_is_refused(tmp_path, change, message):
    data, tokenizer = rows(2), tiny.tokenizer()
    cache_teacher(data, tiny.model("bert"), tiny.tokenizer(), cache_dir=tmp_path)
    if "word" in change:
        tokenizer.add_tokens([change.pop("word")])
    tokenizer.padding_side = change.pop("padding_side", "right")
    teacher = tiny.model("bert", **change.pop("teacher", {}))
    with pytest.raises(CheckpointError, match=f"{message}.*Give each teacher, tokenizer and setting a cache_dir"):
        cache_teacher(data, teacher, tokenizer, cache_dir=tmp_path, **change)


def test_the_settings_lie_beside_the_shards(tmp_path):
    cache_teacher(rows(2), tiny.model("llama"), tiny.tokenizer(), cache_dir=tmp_path, entries=20, seed=3)
    found = json.loads((tmp_path / "cache.json").read_text())
    assert found["format_version"] == 1
    assert found["answers"] == {
        "signal": "sampled",
        "entries": 20,
        "seed": 3,
        "classes": tiny.VOCABULARY,
        "parts": {"widths": "U8", "ids": "U16", "counts": "U8"},
    }
    assert found["teacher"]["class"] == "LlamaForCausalLM"
    assert found["tokenizer"]["max_length"] == 32
    assert found["collator"] == {"class": "default", "padding_side": "right", "pad_id": 0}


def test_broken_shard_is_named(tmp_path):
    teacher, data = tiny.model("bert"), rows(4)
    cache_teacher(data, teacher, cache_dir=tmp_path)
    (path,) = tmp_path.glob("shard-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name} is truncated or corrupt"):
        cache_teacher(data, teacher, cache_dir=tmp_path)
    path.unlink()
    assert len(cache_teacher(data, teacher, cache_dir=tmp_path)) == 4


def test_table_that_can_not_be_written(tmp_path):
    teacher = tiny.model("bert")
    cache_teacher(rows(2), teacher, cache_dir=tmp_path)
    for file in (tmp_path / "tables").iterdir():
        file.unlink()
    (tmp_path / "tables").rmdir()
    (tmp_path / "tables").write_text("in the way")
    with pytest.raises(CheckpointError, match="Can't write .*arrow.*The answers themselves are kept"):
        cache_teacher(rows(2), teacher, cache_dir=tmp_path)


@pytest.mark.parametrize("types", [[[0, 1], [0, None]], [[0, 1], None]])
def test_missing_inputs_are_named(types):
    data = Dataset.from_dict({"input_ids": [[5, 6], [7, 8]], "token_type_ids": types})
    with pytest.raises(SettingError, match="Row 1 can't be read in the column 'token_type_ids': it holds None"):
        cache_teacher(data, tiny.model("bert"))


def test_broken_teacher_is_found():
    teacher = tiny.model("bert")
    teacher.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(SettingError, match="teacher's logits hold NaN or infinity in 2 of 2 places"):
        cache_teacher(Dataset.from_dict({"input_ids": [[5, 6]]}), teacher)
    loud = tiny.model("bert")
    loud.classifier.bias.data.fill_(1e6)
    with pytest.raises(SettingError, match=r"in float16 \(give dtype='float32'\) hold NaN or infinity"):
        cache_teacher(rows(1), loud, dtype="float16")


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bert", {"signal": "some"}, "signal must be one of full, sampled, top_k, got 'some'"),
        ("bert", {"signal": "sampled"}, "signal='sampled' is for language models; the teacher does text-class"),
        ("bert", {"dtype": "int8"}, "dtype must be 'float32' or 'float16', got 'int8'"),
        ("llama", {"entries": 0}, r"entries must be a whole number in 1\.\.65535, got 0"),
        ("llama", {"entries": True}, r"entries must be a whole number in 1\.\.65535, got True"),
        ("bert", {"batch_size": 2.5}, "batch_size must be a whole number"),
        (
            "llama",
            {"data_collator": DataCollatorForLanguageModeling(tiny.tokenizer(), mlm=True)},
            "masks other tokens",
        ),
    ],
)
def test_wrong_settings_are_refused(family, settings, message):
    with pytest.raises(SettingError, match=message):
        cache_teacher(rows(2), tiny.model(family), **settings)


def test_collator_with_chance_in_it_is_refused():
    def noisy(features):
        batch = DataCollatorWithPadding(tiny.tokenizer())(features)
        return {**batch, "token_type_ids": torch.randint(0, 2, (len(features), 99))}

    with pytest.raises(SettingError, match="makes another 'token_type_ids' of the same rows each time"):
        cache_teacher(rows(4), tiny.model("bert"), data_collator=noisy)


def test_teacher_without_head_and_double_caching_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"teacher \(BertModel\) has no head"):
        cache_teacher(rows(2), tiny.model("bert", "feature-extraction"))
    teacher = tiny.model("bert")
    with pytest.raises(SettingError, match="has the column 'teacher_logits' already"):
        cache_teacher(cache_teacher(rows(2), teacher), teacher)
    with pytest.raises(SettingError, match="has no rows"):
        cache_teacher(Dataset.from_dict({"text": []}), teacher, tiny.tokenizer())


def test_large_full_logits_warn(caplog, monkeypatch):
    monkeypatch.setattr("hfshrink.distillation.teachers.cache.LARGE_BYTES", 100)
    cache_teacher(rows(2), tiny.model("llama"), signal="full")
    assert "signal='sampled' takes about" in caplog.text


SCRIPT = """
import sys
import test_cache, tiny
from hfshrink.distillation.teachers.cache import cache_teacher
teacher, passes = test_cache.counted(tiny.model("bert"))
kept = cache_teacher(test_cache.rows(64), teacher, cache_dir=sys.argv[1], batch_size=2)
print(sum(passes), len(kept))
"""


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    paths = os.pathsep.join((str(HERE), str(Path(tiny.__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "cache")]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    found = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], found
    assert sorted(int(out.split()[0]) for out, _ in found) == [0, 64]
    assert {out.split()[1] for out, _ in found} == {"64"}
