"""Causal language models in the Trainer: chunks, the student's own texts, other tokenizers, sparse caches."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from hfshrink.distillation import (
    CrossTokenizerLoss,
    DistillationTrainer,
    LogitLoss,
    OnPolicy,
    cache_teacher,
)
from hfshrink.errors import SettingError
from training import arguments, collate, pair, rows, trainer


def one_step(chunk_size, data=None, losses=None, **kwargs):
    """Log and gradients of the first step."""
    student, teacher = pair("causal")
    found = {}

    class Spy(DistillationTrainer):
        def _clip_grad_norm(self, model):
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})
            return super()._clip_grad_norm(model)

        def _chunked_parts(self, *args):
            found["chunked"] = True
            return super()._chunked_parts(*args)

    losses = losses or [LogitLoss(chunk_size=chunk_size)]
    settings = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential", **kwargs}
    run = trainer(student, teacher, data or rows(labels="causal"), Spy, losses=losses, **settings)
    run.train()
    return run.state.log_history[0], found


@pytest.mark.parametrize("accumulation", [1, 2])
def test_chunks_change_neither_loss_nor_gradients(accumulation):
    plain, expected = one_step(None, gradient_accumulation_steps=accumulation)
    log, found = one_step(3, gradient_accumulation_steps=accumulation)
    assert found.pop("chunked")
    assert "chunked" not in expected
    for name in ("loss", "loss_labels", "loss_logits"):
        assert log[name] == pytest.approx(plain[name], rel=1e-5)
    assert all(torch.allclose(expected[name], found[name], rtol=1e-4, atol=1e-7) for name in expected)


def test_chunks_are_the_default_of_language_models():
    assert one_step(LogitLoss().chunk_size)[1]["chunked"]


def test_label_smoothing_keeps_the_whole_logits():
    assert "chunked" not in one_step(3, label_smoothing_factor=0.1)[1]


def test_sampled_cache_trains_in_chunks_and_without_alike():
    _, teacher = pair("causal")
    data = cache_teacher(rows(labels="causal"), teacher, entries=20)
    plain, expected = one_step(None, data, [LogitLoss(temperature=1.0, chunk_size=None)])
    log, found = one_step(3, data, [LogitLoss(temperature=1.0, chunk_size=3)])
    assert found.pop("chunked")
    assert log["loss_logits"] == pytest.approx(plain["loss_logits"], rel=1e-5)
    assert all(torch.allclose(expected[name], found[name], rtol=1e-4, atol=1e-7) for name in expected)


def test_student_continues_its_prompts():
    student, teacher = pair("causal")
    seen = []

    class Spy(DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append({name: value.clone() if hasattr(value, "clone") else value for name, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    data = rows(labels="causal")
    run = Spy(
        student,
        arguments(max_steps=6, logging_steps=1),
        teacher=teacher,
        train_dataset=data,
        data_collator=collate,
        processing_class=tiny.tokenizer(),
        on_policy=OnPolicy(share=0.5, max_new_tokens=4),
    )
    run.train()
    written = [bool(batch.get("student_wrote")) for batch in seen]
    assert 0 < sum(written) < 6
    logs = [log for log in run.state.log_history if "loss" in log]
    for wrote, log in zip(written, logs, strict=True):  # nobody's labels stand behind what the student made up
        assert ("loss_labels" in log) != wrote
    known = [tuple(row) for row in data["input_ids"]]
    for wrote, batch in zip(written, seen, strict=True):
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert (tuple(ids[mask.bool()].tolist()) in known) != wrote or wrote
    assert student.config.hfshrink["history"][-1]["settings"]["on_policy"]["share"] == 0.5


def characters(text="abcdefghijklmnopqrstuvwxyz "):
    """A tokenizer whose tokens are characters."""
    letters = Tokenizer(models.WordLevel({"[UNK]": 0, **{c: i + 1 for i, c in enumerate(text)}}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers.decoders import Fuse

    letters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="[UNK]")


def cross(losses, tmp_path, **kwargs):
    tokenizer, other = characters(), characters("zyxwvutsrqponmlkjihgfedcba ")
    student = tiny.model("llama", vocab_size=28, pad_token_id=0, num_hidden_layers=1)
    teacher = tiny.model("llama", vocab_size=28 + 9, pad_token_id=0)
    teacher.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    texts = ["the cat sat", "a dog ran", "the sun is warm", "no"]
    data = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    data = data.add_column("labels", data["input_ids"][:])
    return DistillationTrainer(
        student,
        arguments(max_steps=8, logging_steps=1, optim="adamw_torch"),
        teacher=str(tmp_path),
        train_dataset=data,
        data_collator=collate,
        processing_class=tokenizer,
        losses=losses,
        **kwargs,
    )


def test_another_tokenizers_teacher_teaches(tmp_path):
    run = cross([CrossTokenizerLoss()], tmp_path, label_weight=0.0)
    run.train()
    seen = [log["loss_cross_tokenizer"] for log in run.state.log_history if "loss" in log]
    assert seen[-1] < seen[0]


def test_another_tokenizers_teacher_needs_its_loss(tmp_path):
    with pytest.raises(SettingError, match="CrossTokenizerLoss"):
        cross([LogitLoss()], tmp_path)
    with pytest.raises(SettingError, match="LogitLoss other losses"):
        cross([CrossTokenizerLoss(), LogitLoss()], tmp_path)


def test_on_policy_is_for_language_models():
    student, teacher = pair()
    with pytest.raises(SettingError, match="generates text"):
        DistillationTrainer(
            student, arguments(), teacher=teacher, train_dataset=rows(), on_policy=OnPolicy(), data_collator=collate
        )


@pytest.mark.parametrize(
    ("given", "message"), [(0.5, "on_policy must be an OnPolicy"), (OnPolicy(), "is in no cache")]
)
def test_wrong_on_policy_is_named(given, message):
    student, teacher = pair("causal")
    data = cache_teacher(rows(labels="causal"), teacher)
    with pytest.raises(SettingError, match=message):
        DistillationTrainer(
            student, arguments(), teacher=teacher, train_dataset=data, on_policy=given, data_collator=collate
        )


def test_missing_labels_of_a_language_model_are_named():
    student, teacher = pair("causal")
    with pytest.raises(SettingError, match="The batch has no labels"):
        trainer(student, teacher, rows(labels=None)).train()
