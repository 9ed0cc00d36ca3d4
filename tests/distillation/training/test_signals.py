"""What exists only while training: weights over time, projections, recorders, the moving average."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from hfshrink.distillation import (
    AttentionLoss,
    DeepToShallowLoss,
    DistillationTrainer,
    HiddenLoss,
    LogitLoss,
    RelationLoss,
)
from hfshrink.distillation.training.signals import STATE_FILE, between
from hfshrink.errors import CheckpointError, SettingError
from training import HEADS, arguments, collate, pair, rows, trainer


def narrow_pair(**config):
    """A teacher of width 16 and a student of width 8."""
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **config}
    return tiny.model("bert", seed=1, hidden_size=8, num_hidden_layers=1, **quiet), tiny.model("bert", seed=2, **quiet)


def logs_of(run, key):
    return [log[key] for log in run.state.log_history if key in log]


@pytest.mark.parametrize(("end", "progress", "value"), [(None, 0.5, 2.0), (0.0, 0.25, 1.5), (4.0, 1.0, 4.0)])
def test_weights_move_linearly(end, progress, value):
    assert between(2.0, end, progress) == value


def test_teacher_annealing_goes_from_the_teacher_to_the_labels():
    """Step by step against the parts that a run logs: the total is (1 - p) * logits + p * labels."""
    student, teacher = pair()
    run = DistillationTrainer(
        student,
        arguments(max_steps=5, logging_steps=1),
        teacher=teacher,
        losses=[LogitLoss(weight=1.0, final_weight=0.0)],
        label_weight=0.0,
        final_label_weight=1.0,
        train_dataset=rows(),
        data_collator=collate,
    )
    run.train()
    totals, logits, labels = (logs_of(run, key) for key in ("loss", "loss_logits", "loss_labels"))
    assert len(totals) == 5
    assert totals[0] == pytest.approx(logits[0], rel=1e-4)  # the first step has no label part, the last no logit part
    for step in (1, 2, 3):
        p = step / 4
        assert totals[step] == pytest.approx((1 - p) * logits[step] + p * labels[step - 1], rel=1e-3)
    assert totals[4] == pytest.approx(labels[3], rel=1e-3)


@pytest.mark.parametrize("loss", [HiddenLoss(), RelationLoss(), HiddenLoss(first_token=True, normalize=True)])
def test_features_of_a_narrower_student_are_learned(loss):
    student, teacher = narrow_pair()
    run = trainer(
        student, teacher, rows(), losses=[loss], label_weight=0.0, max_steps=30, logging_steps=1, optim="adamw_torch"
    )
    run.train()
    seen = logs_of(run, f"loss_{loss.name}")
    assert sum(seen[-5:]) < 0.9 * sum(seen[:5])


def test_projections_are_trained_and_gone_afterwards(tmp_path):
    student, teacher = narrow_pair()
    names = set(student.state_dict())
    found = {}

    class Spy(DistillationTrainer):
        def create_optimizer(self, model=None):
            optimizer = super().create_optimizer(model)
            found["before"] = [p.detach().clone() for p in self._parts.parameters()]
            found["live"] = list(self._parts.parameters())
            return optimizer

    run = trainer(student, teacher, rows(), Spy, losses=[HiddenLoss()])
    run.train()
    assert found["live"]
    assert all(not torch.equal(a, b) for a, b in zip(found["before"], found["live"], strict=True))
    assert all(p.grad is None for p in found["live"])
    run.save_model(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) <= names
    assert set(student.state_dict()) == names
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_second_run_starts_with_projections_of_its_own():
    student, teacher = narrow_pair()
    run = trainer(student, teacher, rows(), losses=[HiddenLoss()], optim="adamw_torch")
    run.train()
    groups = len(run.optimizer.param_groups)
    run.train()
    assert len(run.optimizer.param_groups) == groups
    assert groups == 2  # with and without weight decay: those of the student


def test_projections_are_clipped():
    student, teacher = narrow_pair()
    found = []

    class Spy(DistillationTrainer):
        def _clip_grad_norm(self, model):
            norm = super()._clip_grad_norm(model)
            found.append(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in self._parts.parameters()])))
            return norm

    trainer(student, teacher, rows(), Spy, losses=[HiddenLoss(weight=100.0)], max_grad_norm=0.01).train()
    assert all(norm <= 0.0101 for norm in found)


def test_attention_implementation_is_restored():
    student, teacher = pair()
    before = student.config._attn_implementation, teacher.config._attn_implementation
    trainer(student, teacher, rows(), losses=[AttentionLoss()]).train()
    assert (student.config._attn_implementation, teacher.config._attn_implementation) == before


@pytest.mark.parametrize("labels", list(HEADS))
def test_features_join_every_head(labels):
    student, teacher = pair(labels)
    run = trainer(
        student, teacher, rows(labels=labels), losses=[LogitLoss(), HiddenLoss(), RelationLoss()], logging_steps=1
    )
    run.train()
    for name in ("labels", "logits", "hidden", "relations"):
        assert all(value >= 0 for value in logs_of(run, f"loss_{name}"))
        assert len(logs_of(run, f"loss_{name}")) == 2


def test_accumulated_feature_losses_equal_one_large_batch():
    """Feature parts are means over a batch's positions; batches of equal rows must add up to the large one's."""
    student, teacher = narrow_pair()
    data = rows(8)
    data = data.map(lambda row: {"input_ids": (row["input_ids"] * 6)[:6], "attention_mask": [1] * 6})

    def gradients(size, steps):
        import copy

        found = {}

        class Spy(DistillationTrainer):
            def _clip_grad_norm(self, model):
                found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                found.update({f"own.{n}": p.grad.clone() for n, p in self._parts.named_parameters()})
                return super()._clip_grad_norm(model)

        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer(
            copy.deepcopy(student),
            teacher,
            data,
            Spy,
            losses=[HiddenLoss()],
            train_sampling_strategy="sequential",
            **sizes,
        ).train()
        return found

    whole, parts = gradients(8, 1), gradients(2, 4)
    assert any(name.startswith("own.") for name in whole)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-6) for name in whole)


def test_own_average_teaches(tmp_path):
    """The teacher is the mean of past weights: recomputed by hand from the weights after each step."""
    student, _ = pair()
    first = {n: p.detach().clone() for n, p in student.named_parameters()}
    steps, averages = [], []

    class Spy(DistillationTrainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            steps.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            averages.append({n: p.clone() for n, p in self._average.model.named_parameters()})
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    run = Spy(student, arguments(max_steps=3), ema_decay=0.9, train_dataset=rows(), data_collator=collate)
    run.train()
    expected = first
    for step, (now, average) in enumerate(zip(steps[:3], averages[:3], strict=True)):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in expected}
        assert all(torch.allclose(expected[n], average[n], atol=1e-6) for n in expected)
    step = student.config.hfshrink["history"][-1]
    assert step["settings"]["ema_decay"] == 0.9
    assert step["settings"].get("teacher") is None


def test_deeper_layers_teach_shallower_ones_without_a_teacher():
    student = tiny.model("bert", num_hidden_layers=4)
    losses = [DeepToShallowLoss()]
    run = DistillationTrainer(
        student, arguments(logging_steps=1), losses=losses, train_dataset=rows(), data_collator=collate
    )
    run.train()
    assert len(logs_of(run, "loss_deep_to_shallow")) == 2
    assert not any("deep" in name for name in student.state_dict())


@pytest.mark.parametrize("how", [{"losses": [LogitLoss(), HiddenLoss()]}, {"ema_decay": 0.5}])
def test_resumed_projections_and_averages_equal_an_uninterrupted_run(tmp_path, how):
    settings = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "max_steps": 4}

    def run(folder):
        student, teacher = narrow_pair()
        extra = dict(how) if "ema_decay" in how else {"teacher": teacher, **how}
        return DistillationTrainer(
            student,
            arguments(output_dir=str(folder), **settings),
            train_dataset=rows(),
            data_collator=collate,
            **extra,
        )

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_needs_the_same_losses(tmp_path):
    student, teacher = narrow_pair()
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer(student, teacher, rows(), losses=[HiddenLoss()], **settings).train()
    folder = tmp_path / "checkpoint-1"
    assert (folder / STATE_FILE).is_file()
    kept = load_file(folder / STATE_FILE)
    save_file({"other": torch.zeros(1)}, folder / STATE_FILE)
    run = trainer(*narrow_pair(), rows(), losses=[HiddenLoss()], **settings)
    with pytest.raises(CheckpointError, match="Resume with the same"):
        run.train(resume_from_checkpoint=str(folder))
    (folder / STATE_FILE).write_bytes(b"not a file of ours")
    with pytest.raises(CheckpointError, match="no readable"):
        run.train(resume_from_checkpoint=str(folder))
    assert kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": [HiddenLoss(projection=False)]}, "8.*16|16.*8"),
        ({"losses": [HiddenLoss(layers={0: 7})]}, "7"),
        ({"losses": [AttentionLoss(layers={3: 1})]}, "3"),
        ({"ema_decay": 0.9}, "not both"),
        ({"teacher": None, "ema_decay": 1.5}, "between 0 and 1"),
        ({"teacher": None, "ema_decay": "0.9"}, "ema_decay must be a number"),
        ({"final_label_weight": -1.0}, "final_label_weight must be a number of at least 0"),
        ({"label_weight": "0.5"}, "label_weight must be a number"),
        ({"losses": [LogitLoss]}, "must be a list of loss objects"),
        ({"losses": LogitLoss()}, "losses must be a list"),
        ({"losses": [LogitLoss(final_weight=0.0)], "label_weight": 0.0}, "At the last step"),
        ({"losses": [], "label_weight": 0.0, "final_label_weight": 1.0}, "At the first step"),
        ({"teacher": []}, "empty list"),
        (
            {"teacher": [tiny.model("bert", seed=s) for s in (3, 4)], "teacher_weights": "confidence"},
            "give eval_dataset",
        ),
    ],
)
def test_errors_come_before_training(change, message):
    student, teacher = narrow_pair()
    given = {"teacher": teacher, "train_dataset": rows(), "data_collator": collate, **change}
    with pytest.raises(SettingError, match=message):
        DistillationTrainer(student, arguments(), **given)


def test_record_tells_of_the_settings():
    student, teacher = narrow_pair()
    losses = [LogitLoss(final_weight=0.0), HiddenLoss(distance="cosine")]
    trainer(student, teacher, rows(), losses=losses).train()
    step = student.config.hfshrink["history"][-1]
    assert step["method"] == "logits + hidden"
    assert step["settings"]["losses"] == {
        "logits": {"temperature": 2.0, "weight": 1.0, "final_weight": 0.0},
        "hidden": {"distance": "cosine", "weight": 1.0},
    }
    json.dumps(step)
