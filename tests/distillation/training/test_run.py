"""`distill` in one call."""

import copy

import pytest
import torch
from datasets import ClassLabel, Dataset

import tiny
from hfshrink import make_student, report
from hfshrink.distillation import HiddenLoss, distill
from hfshrink.errors import SettingError
from training import pair, rows

QUICK = {"max_steps": 2, "use_cpu": True, "dataloader_pin_memory": False, "disable_tqdm": True}


def texts(**columns):
    return Dataset.from_dict({"text": ["a good film", "a bad film", "no plot", "very fine story"], **columns})


def saved_teacher(folder, **config):
    tiny.model("bert", seed=2, **config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_raw_texts_from_a_folder(tmp_path, capsys):
    teacher = saved_teacher(tmp_path)
    student = make_student(teacher, 1)
    before = copy.deepcopy(student.state_dict())
    labels = texts().add_column("label", [1, 0, 0, 1], feature=ClassLabel(names=["LABEL_0", "LABEL_1"]))
    got = distill(student, teacher, labels, eval_dataset=labels, **QUICK)
    assert got is student
    assert not got.training
    assert any(not torch.equal(before[name], value) for name, value in got.state_dict().items())
    step = report(got).steps[-1]
    assert (step.technique, step.settings["label_weight"], step.results["steps"]) == ("distill", 0.5, 2)
    assert capsys.readouterr().out == ""


def test_rows_without_labels_are_learned_from_the_teacher_alone(tmp_path):
    teacher = saved_teacher(tmp_path)
    assert report(distill(make_student(teacher, 1), teacher, texts(), **QUICK)).steps[-1].settings["label_weight"] == 0
    unknown = texts(label=[-100] * 4)
    done = distill(make_student(teacher, 1), teacher, unknown, **QUICK)
    assert report(done).steps[-1].settings["label_weight"] == 0


def test_rows_with_and_without_labels_mix():
    """The label part is the sum over labelled rows divided by all rows: here half of them have a label."""
    from hfshrink.distillation import DistillationTrainer
    from training import arguments, collate

    student, teacher = pair()
    data = rows(8)
    half = data.remove_columns("labels").add_column("labels", [1, -100] * 4)
    run = DistillationTrainer(student, arguments(), teacher=teacher, train_dataset=half, data_collator=collate)
    batch = collate([half[i] for i in range(8)])
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    run.compute_loss(run.model, dict(batch))
    got = run._loss_sums["labels"].item()
    logits = tiny.logits(student, {n: v for n, v in batch.items() if n != "labels"})
    every = torch.nn.functional.cross_entropy(logits, torch.ones(8, dtype=torch.long), reduction="none")
    assert got == pytest.approx((every[::2].sum() / 8).item(), rel=1e-5)
    none = {**batch, "labels": torch.full((8,), -100)}
    run._loss_sums = {}
    assert torch.isfinite(run.compute_loss(run.model, none))
    assert run._loss_sums["labels"].item() == 0


def test_each_generation_starts_anew_from_the_one_before(monkeypatch):
    student, teacher = pair()
    first = copy.deepcopy(student.state_dict())
    seen = []
    from hfshrink.distillation.training import run as room

    class Spy(room.DistillationTrainer):
        def __init__(self, model, *args, **kwargs):
            seen.append((copy.deepcopy(model.state_dict()), copy.deepcopy(kwargs["teacher"].state_dict())))
            super().__init__(model, *args, **kwargs)

        def train(self, *args, **kwargs):
            output = super().train(*args, **kwargs)
            seen.append((copy.deepcopy(self.model.state_dict()), None))
            return output

    monkeypatch.setattr(room, "DistillationTrainer", Spy)
    distill(student, teacher, rows(), generations=2, losses=[HiddenLoss()], **QUICK)
    (start, _), (trained, _), (again, taught_by), _ = seen
    assert all(torch.equal(first[n], start[n]) and torch.equal(first[n], again[n]) for n in first)
    assert all(torch.equal(trained[n], taught_by[n]) for n in first)
    assert [step.technique for step in report(student).steps] == ["distill", "distill"]


def test_interrupted_run_resumes(tmp_path):
    settings = {**QUICK, "max_steps": 4, "output_dir": tmp_path, "save_strategy": "steps", "save_steps": 2}
    student, teacher = pair()
    twin = copy.deepcopy(student)
    distill(student, teacher, rows(), **settings)
    for folder in tmp_path.glob("checkpoint-4"):
        folder.rename(tmp_path / "gone")
    distill(twin, teacher, rows(), resume=True, **settings)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in student.state_dict().items())


def test_causal_language_model_learns_every_token(tmp_path):
    tiny.model("llama", seed=2).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    done = distill(make_student(str(tmp_path), 1), str(tmp_path), texts(), **QUICK)
    step = report(done).steps[-1]
    assert step.settings["losses"]["logits"]["temperature"] == 1.0
    assert step.settings["label_weight"] == 0.5


def test_masked_language_model_gets_its_masks(tmp_path):
    tiny.model("bert", "fill-mask", seed=2).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not distill(make_student(str(tmp_path), 1), str(tmp_path), texts(), **QUICK).training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learnig_rate": 1}, "no setting 'learnig_rate'. Did you mean 'learning_rate'"),
        ({"teacher_chache": "x"}, "Did you mean 'teacher_cache'"),
        ({"generations": 0}, "generations must be"),
        ({"resume": True}, "resume=True needs output_dir"),
        ({"args": 1}, "no setting 'args'"),
        ({"teacher": []}, "need a teacher"),
        ({"teacher": None, "generations": 2}, "generations needs a teacher"),
        ({"train_dataset": Dataset.from_dict({"input_ids": [[5, 6]], "labels": [4]})}, "Labels must lie in 0..1"),
        ({"train_dataset": Dataset.from_dict({"input_ids": [[5, 6]], "label": [4]})}, "Labels must lie in 0..1"),
        ({"train_dataset": 7}, "Expected a datasets.Dataset"),
    ],
)
def test_wrong_input_is_named(change, message):
    student, teacher = pair()
    given = {"student": student, "teacher": teacher, "train_dataset": rows(), **QUICK, **change}
    with pytest.raises(SettingError, match=message):
        distill(**given)


def test_hyperparameter_search_tries_fresh_students(tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    from hfshrink.distillation import DistillationTrainer
    from training import arguments, collate

    _, teacher = pair()
    made = []

    def student():
        made.append(make_student(teacher, 1))
        return made[-1]

    run = DistillationTrainer(
        model_init=student,
        args=arguments(output_dir=str(tmp_path), max_steps=2),
        teacher=teacher,
        losses=[HiddenLoss()],
        train_dataset=rows(),
        eval_dataset=rows(8, seed=1),
        data_collator=collate,
    )
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
        compute_objective=lambda metrics: metrics["eval_teacher_accuracy"] - metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
        direction="maximize",
    )
    assert set(best.hyperparameters) == {"learning_rate"}
    assert len(made) == 3  # the first tells the trainer what to expect
    assert sorted(len(report(model).steps) for model in made)[-2:] == [2, 2]


def test_own_average_needs_no_teacher():
    student, _ = pair()
    step = report(distill(student, None, rows(), ema_decay=0.5, **QUICK)).steps[-1]
    assert step.settings["ema_decay"] == 0.5


def test_each_generation_has_a_cache_of_its_own(tmp_path):
    student, teacher = pair()
    distill(student, teacher, rows(), generations=2, teacher_cache=tmp_path, **QUICK)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["generation-0", "generation-1"]
