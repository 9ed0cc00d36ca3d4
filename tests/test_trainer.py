"""Distillation and pruning on one Trainer: each off by default, both at once, and resumed together."""

import pytest
import torch
from transformers import Trainer

import tiny
import training
from hfshrink import CompressionTrainer, DistillationTrainer, Pruning, PruningTrainer, report
from hfshrink.distillation import HiddenLoss, LogitLoss


def pair():
    return training.pair("class")


def run(cls, student, resume=None, **kwargs):
    own = ("teacher", "pruning", "losses", "label_weight", "ema_decay")
    how = {name: value for name, value in kwargs.items() if name in own}
    arguments = {name: value for name, value in kwargs.items() if name not in own}
    trainer = cls(
        student,
        training.arguments(**{"max_steps": 6, "logging_steps": 1, **arguments}),
        train_dataset=training.rows(32),
        data_collator=training.collate,
        **how,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def equal(one, other):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_both_parts_off_is_the_trainer():
    (ours, _), (theirs, _) = pair(), pair()
    run(CompressionTrainer, ours)
    run(Trainer, theirs)
    assert equal(ours, theirs)
    assert report(ours).steps == ()


def test_one_part_is_that_parts_trainer():
    (ours, teacher), (theirs, _) = pair(), pair()
    run(CompressionTrainer, ours, teacher=teacher)
    run(DistillationTrainer, theirs, teacher=teacher)
    assert equal(ours, theirs)
    (ours, _), (theirs, _) = pair(), pair()
    run(CompressionTrainer, ours, pruning=Pruning(0.5))
    run(PruningTrainer, theirs, pruning=Pruning(0.5))
    assert equal(ours, theirs)
    assert [step.technique for step in report(ours).steps] == ["prune"]


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_both_parts_do_what_each_does(method):
    student, teacher = pair()
    trainer = run(CompressionTrainer, student, teacher=teacher, pruning=Pruning(0.5, method=method))
    assert {"loss_labels", "loss_logits", "sparsity"} <= trainer.state.log_history[0].keys()
    assert {step.technique for step in report(student).steps} == {"prune", "distill"}
    weight = student.bert.encoder.layer[0].output.dense.weight
    assert (weight == 0).any()


@pytest.mark.parametrize("losses", [None, "hidden"])
def test_both_parts_resume_exactly(losses, tmp_path):
    losses = None if losses is None else [LogitLoss(), HiddenLoss(layers={0: 0})]
    (whole, teacher), (again, _) = pair(), pair()
    how = {"teacher": teacher, "pruning": Pruning(0.5, method="movement"), "losses": losses, "optim": "adamw_torch"}
    how |= {"save_strategy": "steps", "save_steps": 3}
    run(CompressionTrainer, whole, output_dir=str(tmp_path), **how)
    run(CompressionTrainer, again, resume=str(tmp_path / "checkpoint-3"), output_dir=str(tmp_path / "again"), **how)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_student_that_is_cut_was_taught():
    student, teacher = pair()
    run(CompressionTrainer, student, teacher=teacher, pruning=Pruning(0.5, "heads+neurons"))
    assert student.bert.encoder.layer[0].output.dense.in_features < 24
    assert torch.isfinite(tiny.logits(student.eval(), tiny.inputs("bert"))).all()
