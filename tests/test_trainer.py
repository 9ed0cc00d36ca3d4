"""Distillation, pruning and QAT on one Trainer: each off by default, together, and resumed together."""

import pytest
import torch
from transformers import Trainer

import tiny
import training
from hfshrink import CompressionTrainer, DistillationTrainer, Pruning, PruningTrainer, report
from hfshrink.distillation import HiddenLoss, LogitLoss
from hfshrink.errors import SettingError
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import QATTrainer

LEARNED = QAT(4, weight_ranges="lsq", activation_ranges="lsq")


def pair():
    return training.pair("class")


def run(cls, student, resume=None, **kwargs):
    own = ("teacher", "pruning", "quantization", "losses", "label_weight", "ema_decay")
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
    (ours, _), (theirs, _) = pair(), pair()
    run(CompressionTrainer, ours, quantization=LEARNED)
    run(QATTrainer, theirs, quantization=LEARNED)
    assert equal(ours, theirs)
    assert [step.technique for step in report(ours).steps] == ["quantize"]


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


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "heads+neurons"])
@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_all_parts_at_once(method, structure):
    student, teacher = pair()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    how = {"teacher": teacher, "pruning": Pruning(0.5, structure, method), "quantization": LEARNED}
    trainer = run(CompressionTrainer, student, **how)
    assert {"loss_labels", "loss_logits", "sparsity", "quantized"} <= trainer.state.log_history[0].keys()
    # folded, then cut; the teacher's step closes the run
    assert [step.technique for step in report(student).steps] == ["quantize", "prune", "distill"]
    assert learned_ranges(student) is not None  # also after units were cut from the folded weights
    weight = student.bert.encoder.layer[0].output.dense.weight
    if structure == "heads+neurons":
        assert weight.shape[1] < 24
    elif structure == "2:4":
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    else:
        pruned = [student.get_parameter(f"{name}.weight") for name in report(student).steps[1].modules]
        zeros, numbers = (sum(int(count(w)) for w in pruned) for count in (lambda w: (w == 0).sum(), torch.numel))
        assert zeros >= 0.5 * numbers - len(pruned)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    with fake_quantized(student):
        assert torch.isfinite(tiny.logits(student.eval(), tiny.inputs("bert"))).all()


def test_hidden_weights_are_zero_on_the_grid_at_every_step(tmp_path):
    from safetensors.torch import load_file

    student, _ = pair()
    how = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    run(CompressionTrainer, student, pruning=Pruning(0.6, warmup=0.0), quantization=LEARNED, **how)
    for step in range(1, 7):
        folder = tmp_path / f"checkpoint-{step}"
        weights, hidden = load_file(folder / "model.safetensors"), load_file(folder / "pruning_state.safetensors")
        name = "bert.encoder.layer.0.output.dense.weight"
        assert weights[name][hidden[f"hidden.{name}"]].eq(0).all()


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_all_parts_resume_exactly(method, tmp_path):
    (whole, teacher), (again, _) = pair(), pair()
    how = {"teacher": teacher, "pruning": Pruning(0.5, method=method), "quantization": LEARNED}
    how |= {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3}
    run(CompressionTrainer, whole, output_dir=str(tmp_path), **how)
    run(CompressionTrainer, again, resume=str(tmp_path / "checkpoint-3"), output_dir=str(tmp_path / "again"), **how)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert learned_ranges(whole)[0] == learned_ranges(again)[0]


def test_an_average_of_the_student_teaches_in_float():
    student, _ = pair()
    trainer = run(CompressionTrainer, student, ema_decay=0.9, quantization=LEARNED)
    assert "loss_logits" in trainer.state.log_history[0]
    assert learned_ranges(student) is not None


def test_groups_are_not_torn_apart_by_cutting():
    student, _ = pair()
    with pytest.raises(SettingError, match="group_size=8 and cutting neurons don't go together"):
        run(CompressionTrainer, student, pruning=Pruning(0.5, "neurons"), quantization=QAT(4, group_size=8))
