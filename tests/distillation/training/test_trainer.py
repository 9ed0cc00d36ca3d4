"""The Trainer: scaling, parts, alignment, resuming, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer

import tiny
from hfshrink import DistillationMixin, DistillationTrainer, LogitLoss, report
from hfshrink.distillation import DecoupledLoss, FeatureMapLoss, cache_teacher
from hfshrink.distillation.losses.divergences import kl_divergence
from hfshrink.errors import SettingError
from training import HEADS, arguments, collate, no_dropout, pair, rows, trainer


def gradients_of_one_step(labels, per_device, accumulation, **kwargs):
    student, teacher = pair(labels)
    found = {}

    class Spy(DistillationTrainer):
        def _clip_grad_norm(self, model):
            found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            return super()._clip_grad_norm(model)

    run = trainer(
        student,
        teacher,
        rows(labels=labels),
        Spy,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        **kwargs,
    )
    run.train()
    return found, run.state.log_history[0]


@pytest.mark.parametrize("labels", list(HEADS))
def test_accumulated_small_batches_equal_one_large_batch(labels):
    whole, whole_log = gradients_of_one_step(labels, 8, 1)
    parts, parts_log = gradients_of_one_step(labels, 2, 4)
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], rtol=1e-4, atol=1e-6), name
    for key in ("loss", "loss_labels", "loss_logits"):
        assert parts_log[key] == pytest.approx(whole_log[key], rel=1e-4)


def test_accumulation_with_label_smoothing():
    whole, whole_log = gradients_of_one_step("class", 8, 1, label_smoothing_factor=0.1)
    parts, parts_log = gradients_of_one_step("class", 2, 4, label_smoothing_factor=0.1)
    plain = gradients_of_one_step("class", 8, 1)[1]
    assert parts_log["loss"] == pytest.approx(whole_log["loss"], rel=1e-4)
    assert whole_log["loss_logits"] == pytest.approx(plain["loss_logits"], rel=1e-5)
    assert whole_log["loss_labels"] != pytest.approx(plain["loss_labels"], rel=1e-4)
    assert all(torch.allclose(whole[name], parts[name], rtol=1e-4, atol=1e-6) for name in whole)


@pytest.mark.parametrize("labels", list(HEADS))
def test_loss_is_the_weighted_sum_of_its_parts(labels):
    student, teacher = pair(labels)
    run = trainer(student, teacher, rows(labels=labels), losses=[LogitLoss(3.0, weight=0.7)], label_weight=0.2)
    run.model.train()
    batch = collate([run.train_dataset[i] for i in range(4)])
    run.current_gradient_accumulation_steps = 1
    got = run.compute_loss(run.model, dict(batch)).item()
    with torch.no_grad():
        ours, theirs = student(**batch), teacher(**batch)
    x, y = ours.logits, theirs.logits
    if labels == "regression":
        part = ((x - y) ** 2).mean()
    elif labels == "multi":
        part = 9 * torch.nn.functional.binary_cross_entropy_with_logits(x / 3, torch.sigmoid(y / 3))
    elif labels == "class":
        part = kl_divergence(x, y, 3.0)
    else:
        counted = batch["labels"] != -100
        if labels == "causal":
            x, y, counted = x[:, :-1], y[:, :-1], counted[:, 1:]
        part = kl_divergence(x[counted], y[counted], 3.0)
    assert got == pytest.approx(0.2 * ours.loss.item() + 0.7 * part.item(), rel=1e-5)


def test_teacher_of_itself_adds_nothing():
    student, _ = pair()
    twin = tiny.model("bert", seed=1, num_hidden_layers=1, **no_dropout("bert"))
    run = trainer(student, twin, rows(), label_weight=0.0, logging_steps=1, max_steps=3)
    run.train()
    assert [log["loss_logits"] for log in run.state.log_history if "loss" in log] == pytest.approx(
        [0, 0, 0], abs=1e-10
    )


def test_permuted_labels_train_the_same_student():
    students = []
    for flip in (False, True):
        student, teacher = pair(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        if flip:
            teacher.config.id2label, teacher.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
            with torch.no_grad():
                teacher.classifier.weight.copy_(teacher.classifier.weight.flip(0))
                teacher.classifier.bias.copy_(teacher.classifier.bias.flip(0))
        trainer(student, teacher, rows()).train()
        students.append(student)
    states = [student.state_dict() for student in students]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_teacher_learns_nothing_and_is_not_saved(tmp_path):
    student, teacher = pair()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = trainer(student, teacher, rows())
    run.train()
    run.save_model(tmp_path)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
    again = type(student).from_pretrained(tmp_path)
    assert again.state_dict().keys() == student.state_dict().keys()


def test_kept_logits_train_like_the_teacher():
    states = []
    for keep in (False, True):
        student, teacher = pair()
        data = cache_teacher(rows(), teacher, batch_size=1) if keep else rows()
        trainer(student, None if keep else teacher, data).train()
        states.append(student.state_dict())
    assert all(torch.allclose(value, states[1][name], atol=1e-5) for name, value in states[0].items())


def test_kept_logits_leave_the_labels_alone():
    """Teacher and data set name the labels in different orders: a live teacher and its kept logits must agree."""
    from datasets import ClassLabel

    states = []
    for keep in (False, True):
        student, teacher = pair(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        teacher.config.id2label, teacher.config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
        data = rows().cast_column("labels", ClassLabel(names=["no", "yes"]))
        kept = cache_teacher(data, teacher, batch_size=1)
        assert kept["labels"] == data["labels"]
        assert all(parameter.requires_grad for parameter in teacher.parameters())
        trainer(student, teacher, kept if keep else data).train()
        states.append(student.state_dict())
    assert all(torch.allclose(value, states[1][name], atol=1e-5) for name, value in states[0].items())


@pytest.mark.parametrize("labels", ["tokens", "causal"])
def test_batch_without_any_label_takes_no_part(labels):
    found = []
    for masked in (False, True):
        student, teacher = pair(labels)
        data = rows(labels=labels)
        if masked:
            data = data.map(
                lambda row, i: {"labels": [-100] * len(row["labels"])} if 4 <= i < 8 else row, with_indices=True
            )
        run = trainer(
            student,
            teacher,
            data if masked else data.select([0, 1, 2, 3]),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2 if masked else 1,
            train_sampling_strategy="sequential",
            max_steps=1,
        )
        run.train()
        found.append(student.state_dict())
    assert all(torch.isfinite(value).all() for value in found[1].values())
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())


def test_encoder_decoder_learns_with_and_without_labels():
    from transformers import T5Config, T5ForConditionalGeneration

    settings = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "decoder_start_token_id": 0}
    data = Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7]] * 4, "labels": [[8, 9], [10, 11, 12]] * 4})
    for label_weight in (0.0, 0.5):
        models = [T5ForConditionalGeneration(T5Config(**settings, num_layers=n)) for n in (1, 2)]
        run = trainer(*models, data, label_weight=label_weight, logging_steps=1)
        run.train()
        assert run.state.log_history[0]["loss_logits"] > 0


def test_streaming_data_trains():
    student, teacher = pair()
    run = trainer(student, teacher, rows().to_iterable_dataset())
    run.train()
    assert report(student).steps[-1].results == {"train_examples": None, "steps": 2}


def test_parts_are_logged_anew_in_a_second_run():
    student, teacher = pair()
    run = trainer(student, teacher, rows(), logging_steps=2, learning_rate=0.0)
    for _ in range(2):
        run.train()
        log = run.state.log_history[0]
        assert log["loss"] == pytest.approx(0.5 * log["loss_labels"] + log["loss_logits"], rel=1e-4)


def test_evaluation_tells_of_both_sides():
    """Agreement, both accuracies and the loss part, against a recomputation over the whole set."""
    student, teacher = pair(num_labels=3)
    held_out = rows(10, seed=1)
    seen = {}

    def metrics(found):
        seen[len(seen)] = found.predictions
        return {"share_of_class_0": float((found.predictions.argmax(-1) == 0).mean())}

    run = DistillationTrainer(
        student,
        arguments(per_device_eval_batch_size=4),
        teacher=teacher,
        train_dataset=rows(),
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=metrics,
    )
    got = run.evaluate()
    batch = collate([held_out[i] for i in range(10)])
    x, y = tiny.logits(student, batch), tiny.logits(teacher, batch)
    labels = batch["labels"]
    assert got["eval_agreement"] == pytest.approx((x.argmax(-1) == y.argmax(-1)).float().mean().item())
    assert got["eval_accuracy"] == pytest.approx((x.argmax(-1) == labels).float().mean().item())
    assert got["eval_teacher_accuracy"] == pytest.approx((y.argmax(-1) == labels).float().mean().item())
    assert got["eval_loss_logits"] == pytest.approx(kl_divergence(x, y, 2.0).item(), rel=1e-4)
    assert got["eval_teacher_share_of_class_0"] == pytest.approx((y.argmax(-1) == 0).float().mean().item())
    assert torch.allclose(torch.as_tensor(seen[1]), y, atol=1e-5)
    again = run.evaluate()
    assert {k: v for k, v in again.items() if "second" not in k and "time" not in k} == {
        k: v for k, v in got.items() if "second" not in k and "time" not in k
    }


@pytest.mark.parametrize("labels", ["regression", "multi", "tokens", "causal"])
def test_agreement_of_every_head(labels):
    student, teacher = pair(labels)
    held_out = rows(8, labels, seed=1)
    run = DistillationTrainer(
        student,
        arguments(),
        teacher=teacher,
        train_dataset=rows(labels=labels),
        eval_dataset=held_out,
        data_collator=collate,
    )
    got = run.evaluate()
    batch = collate([held_out[i] for i in range(8)])
    x, y, truth = tiny.logits(student, batch), tiny.logits(teacher, batch), batch["labels"]
    if labels == "regression":
        assert got["eval_distance"] == pytest.approx(((x - y) ** 2).mean().item(), rel=1e-4)
        assert got["eval_teacher_squared_error"] == pytest.approx(((y[:, 0] - truth) ** 2).mean().item(), rel=1e-4)
        return
    if labels == "multi":
        x, y, counted = x > 0, y > 0, torch.ones_like(x, dtype=torch.bool)
    else:
        x, y, counted = x.argmax(-1), y.argmax(-1), truth != -100
        if labels == "causal":
            x, y, truth, counted = x[:, :-1], y[:, :-1], truth[:, 1:], counted[:, 1:]
    assert got["eval_agreement"] == pytest.approx((x == y)[counted].float().mean().item())
    assert got["eval_teacher_accuracy"] == pytest.approx((y == truth)[counted].float().mean().item())


def test_evaluation_shows_the_students_own_loss():
    student, teacher = pair()
    losses = []
    for cls, extra in ((Trainer, {}), (DistillationTrainer, {"teacher": teacher})):
        run = cls(student, arguments(), train_dataset=rows(), eval_dataset=rows(8), data_collator=collate, **extra)
        losses.append(run.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_resumed_run_equals_an_uninterrupted_one():
    family, task, _ = HEADS["class"]  # with dropout: the random state must be restored too
    states = []
    for stop in (None, 3):
        student, teacher = tiny.model(family, task, seed=1, num_hidden_layers=1), tiny.model(family, task, seed=2)
        settings = {
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "output_dir": f"run-{stop}",
            "logging_steps": 2,
        }
        settings["optim"] = "adamw_torch"
        if stop is None:
            run = trainer(student, teacher, rows(), **settings)
            run.train()
        else:
            trainer(student, teacher, rows(), **{**settings, "max_steps": 6}).train()
            fresh = tiny.model(family, task, seed=9, num_hidden_layers=1)
            run = trainer(fresh, teacher, rows(), **settings)
            run.train(resume_from_checkpoint=str(Path("run-3") / "checkpoint-3"))
            student = fresh
        parts = [log["loss_logits"] for log in run.state.log_history if "loss" in log][-1]
        states.append((student.state_dict(), parts, run.state.global_step))
    assert states[0][2] == states[1][2] == 6
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


def test_teacher_gets_inputs_that_the_student_does_not_take():
    student = tiny.model("distilbert", seed=1, n_layers=1)
    teacher = tiny.model("bert", seed=2)
    data = tiny.tokenizer()(["a good film", "bad"], ["not bad", "a dull plot"])
    data = Dataset.from_dict({**data, "labels": [0, 1]})
    run = trainer(student, teacher, data, per_device_train_batch_size=2, max_steps=1)
    run.train()
    batch = collate(list(data))
    seen = {}
    forward = teacher.forward
    teacher.forward = lambda **kwargs: seen.update(kwargs) or forward(**kwargs)
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    run.compute_loss(run.model, batch)
    assert torch.equal(seen["token_type_ids"], batch["token_type_ids"])


def test_language_model_collator_makes_the_labels():
    student, teacher = (
        tiny.model("bert", "fill-mask", seed=1, num_hidden_layers=1),
        tiny.model("bert", "fill-mask", seed=2),
    )
    run = DistillationTrainer(
        student,
        arguments(max_steps=1, logging_steps=1),
        teacher=teacher,
        train_dataset=rows(labels=None),
        data_collator=DataCollatorForLanguageModeling(tiny.tokenizer(), mlm_probability=0.5),
    )
    run.train()
    assert run.state.log_history[0]["loss_logits"] > 0


def test_bf16_autocast_trains():
    student, teacher = pair()
    run = trainer(student, teacher, rows(), bf16=True, logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss_logits"] > 0
    assert student.dtype == torch.float32


def test_any_trainer_takes_the_mixin():
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Mine(DistillationMixin, Seq2SeqTrainer):
        pass

    student, teacher = pair()
    args = Seq2SeqTrainingArguments(**{**arguments(max_steps=1).to_dict(), "disable_tqdm": True})
    Mine(student, args, teacher=teacher, train_dataset=rows(), data_collator=collate).train()
    assert report(student).steps[-1].technique == "distill"


def test_record_survives_saving(tmp_path):
    student, teacher = pair()
    trainer(student, teacher, rows(), losses=[LogitLoss(4.0)]).train()
    student.save_pretrained(tmp_path)
    step = report(tmp_path).steps[-1]
    assert (step.technique, step.method) == ("distill", "logits")
    assert step.settings["losses"] == {"logits": {"temperature": 4.0, "weight": 1.0}}
    assert step.results == {"train_examples": 16, "steps": 2}
    assert json.loads((tmp_path / "config.json").read_text())["hfshrink"]["format_version"] == 1


def test_unlabelled_data_needs_label_weight_zero():
    student, teacher = pair()
    trainer(student, teacher, rows(labels=None), label_weight=0.0).train()
    with pytest.raises(SettingError, match="train_dataset has no labels .* label_weight is 0.5"):
        trainer(student, teacher, rows(labels=None)).train()


def test_broken_teacher_is_named():
    student, teacher = pair()
    teacher.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(SettingError, match="At step 0 the teacher's logits hold NaN or infinity"):
        trainer(student, teacher, rows()).train()


def test_broken_student_is_named():
    student, teacher = pair()
    student.classifier.weight.data.fill_(float("inf"))
    with pytest.raises(SettingError, match="At step 0 the student's logits hold NaN or infinity"):
        trainer(student, teacher, rows()).train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_weight": -1}, "label_weight must be a number of at least 0, got -1"),
        ({"losses": [], "label_weight": 0.0}, "nothing to learn from"),
        ({"losses": [LogitLoss(), LogitLoss()]}, "Each loss must have a name of its own"),
        (
            {"teacher": None},
            "The losses LogitLoss need a teacher: give teacher=, ema_decay=, or a train_dataset with cached",
        ),
        ({"data": Dataset.from_dict({"input_ids": []})}, "train_dataset is empty"),
        ({"data": Dataset.from_dict({"text": ["a"], "labels": [0]})}, "has the columns labels, text, none of which"),
        (
            {"data": Dataset.from_dict({"input_ids": [[5] * 40], "labels": [0]})},
            "longest row has 40 tokens, .* student reads at most 34",
        ),
        ({"teacher": "no/such/folder/here"}, "There is no folder"),
    ],
)
def test_errors_come_before_training(change, message):
    from hfshrink import HfshrinkError

    student, teacher = pair()
    given = {"student": student, "teacher": teacher, "data": rows(), **change}
    with pytest.raises(HfshrinkError, match=message):
        trainer(given.pop("student"), given.pop("teacher"), given.pop("data"), **given)


def test_student_can_not_be_its_own_teacher():
    student, _ = pair()
    with pytest.raises(SettingError, match="the same object"):
        trainer(student, student, rows())
    assert all(parameter.requires_grad for parameter in student.parameters())


def spans(count=8, unlabelled=()):
    """Rows of unequal length with the start and end of an answer."""
    data = rows(count, None)
    starts = [-100 if i in unlabelled else 0 for i in range(count)]
    return data.add_column("start_positions", starts).add_column("end_positions", [max(s, -100) for s in starts])


def span_pair():
    quiet = no_dropout("bert")
    return (
        tiny.model("bert", "question-answering", seed=1, num_hidden_layers=1, **quiet),
        tiny.model("bert", "question-answering", seed=2, **quiet),
    )


def first_log(student, teacher, data, **kwargs):
    settings = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential", **kwargs}
    run = trainer(student, teacher, data, **settings)
    run.train()
    return run.state.log_history[0]


def test_spans_from_a_cache_equal_those_of_the_teacher():
    """Though a cached teacher knows nothing of the padding that a batch adds."""
    live = first_log(*span_pair(), spans())
    student, teacher = span_pair()
    kept = first_log(student, None, cache_teacher(spans(), teacher))
    assert kept["loss_logits"] == pytest.approx(live["loss_logits"], rel=1e-5)


def test_spans_without_answer_have_no_label():
    """Half of the rows: the label part is the sum over the others, divided by all."""
    log = first_log(*span_pair(), spans(8, unlabelled=range(4)), per_device_train_batch_size=8)
    student, _ = span_pair()
    batch = collate([spans()[i] for i in range(8)])
    with torch.no_grad():
        outputs = student(**{n: v for n, v in batch.items() if "positions" not in n})
    cross = [
        torch.nn.functional.cross_entropy(x[4:], torch.zeros(4, dtype=torch.long), reduction="sum") / 8
        for x in (outputs.start_logits, outputs.end_logits)
    ]
    assert log["loss_labels"] == pytest.approx(((cross[0] + cross[1]) / 2).item(), rel=1e-4)


def test_several_teachers_of_spans_are_compared():
    student, teacher = span_pair()
    other = tiny.model("bert", "question-answering", seed=5)
    run = DistillationTrainer(
        student,
        arguments(),
        teacher=[teacher, other],
        train_dataset=spans(),
        eval_dataset=spans(),
        data_collator=collate,
    )
    assert 0 <= run.evaluate()["eval_agreement"] <= 1


def evaluated(**kwargs):
    student, teacher = pair()
    settings = {"compute_metrics": lambda found: {"mean": np.float32(np.mean(found.predictions))}, **kwargs}
    extra = {n: settings.pop(n) for n in ("include_for_metrics", "batch_eval_metrics") if n in settings}
    run = DistillationTrainer(
        student,
        arguments(**extra),
        teacher=teacher,
        train_dataset=rows(),
        eval_dataset=rows(8, seed=1),
        data_collator=collate,
        **settings,
    )
    return run.evaluate()


def test_teachers_metrics_are_the_trainers():
    got = evaluated(preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))
    json.dumps(got)
    assert got["eval_teacher_mean"] in [i / 8 for i in range(9)]


def test_metrics_from_inputs_are_the_students_alone():
    got = evaluated(include_for_metrics=["inputs"], compute_metrics=lambda found: {"rows": len(found.inputs)})
    assert got["eval_rows"] == 8
    assert "eval_teacher_rows" not in got


def test_default_objective_of_a_search_is_the_loss(tmp_path):
    pytest.importorskip("optuna", reason="needs optuna")
    from hfshrink import make_student

    _, teacher = pair()
    run = DistillationTrainer(
        model_init=lambda: make_student(teacher, 1),
        args=arguments(output_dir=str(tmp_path), max_steps=1),
        teacher=teacher,
        train_dataset=rows(),
        eval_dataset=rows(8, seed=1),
        data_collator=collate,
    )
    seen = []
    evaluate = run.evaluate
    run.evaluate = lambda *args, **kwargs: seen.append(evaluate(*args, **kwargs)) or seen[-1]
    best = run.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}, n_trials=1, backend="optuna"
    )
    assert best.objective == pytest.approx(seen[-1]["eval_loss"])


def test_left_padding_counts_the_same_items_everywhere():
    """The first token of a row follows padding: no part learns it, in batches of any size."""
    student, teacher = pair("causal")
    data = rows(8, "causal")

    def left(batch):
        made = collate(batch)
        lengths = made["attention_mask"].sum(1)
        rolled = {
            n: torch.stack([row.roll(int(row.numel() - k)) for row, k in zip(v, lengths, strict=True)])
            for n, v in made.items()
        }
        return {**rolled, "labels": rolled["labels"].masked_fill(rolled["attention_mask"] == 0, -100)}

    def log(size, steps):
        import copy

        run = DistillationTrainer(
            copy.deepcopy(student),
            arguments(
                max_steps=1,
                logging_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                train_sampling_strategy="sequential",
            ),
            teacher=teacher,
            train_dataset=data,
            data_collator=left,
        )
        run.train()
        return run.state.log_history[0]

    whole, parts = log(8, 1), log(2, 4)
    for name in ("loss", "loss_labels", "loss_logits"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_decoupled_loss_of_partly_labelled_rows_accumulates():
    data = rows(8)
    half = data.remove_columns("labels").add_column("labels", [1, -100, -100, -100, 0, 2, 1, 0])

    def log(size, steps):
        student, teacher = pair(num_labels=3)
        return first_log(
            student,
            teacher,
            half,
            losses=[DecoupledLoss()],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )

    whole, parts = log(8, 1), log(2, 4)
    assert parts["loss_decoupled"] == pytest.approx(whole["loss_decoupled"], rel=1e-4)


def test_cached_answers_are_one_teachers():
    student, teacher = pair()
    with pytest.raises(SettingError, match="one teacher's cached answers, but several"):
        trainer(student, [teacher, tiny.model("bert", seed=5)], cache_teacher(rows(), teacher))


def test_several_cached_evaluation_sets():
    student, teacher = pair("tokens")
    sets = {name: cache_teacher(rows(6, "tokens", seed=i), teacher) for i, name in enumerate("ab")}
    run = DistillationTrainer(
        student,
        arguments(),
        teacher=teacher,
        train_dataset=rows(labels="tokens"),
        eval_dataset=sets,
        data_collator=collate,
    )
    got = run.evaluate()
    assert {"eval_a_agreement", "eval_b_agreement"} <= set(got)


def test_encoder_decoder_predicts_without_labels():
    made = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": tiny.VOCABULARY}
    from transformers import T5Config, T5ForConditionalGeneration

    student, teacher = (T5ForConditionalGeneration(T5Config(**made, decoder_start_token_id=0)) for _ in range(2))
    data = rows(4, None).add_column("labels", [[5, 6]] * 4)
    run = DistillationTrainer(
        student, arguments(), teacher=teacher, train_dataset=data, eval_dataset=data, data_collator=collate
    )
    assert "eval_agreement" in run.evaluate()
    labelled = {n: v for n, v in collate([data[0]]).items() if n != "labels"}
    with torch.no_grad():
        run.model.eval()
        labelled["decoder_input_ids"] = torch.tensor([[0]])
        run._eval_sums, run._teacher_predictions = {}, None
        assert run.prediction_step(run.model, labelled, True)[0] is None


def test_answers_of_another_teacher_are_refused():
    student, teacher = pair()
    kept = cache_teacher(rows(), tiny.model("bert", seed=5))
    with pytest.raises(SettingError, match="are not this teacher's"):
        trainer(student, teacher, kept)
    trainer(student, None, kept)  # without one they are taken as they are
    trainer(student, teacher, cache_teacher(rows(), teacher, dtype="float16"))


@pytest.mark.parametrize("family", ["vit", "resnet", "mobilenet_v2"])
def test_students_of_images_learn_from_a_resnet(family):
    """Of its own family, of another one, and cut to depthwise separable convolutions."""
    from hfshrink import make_student

    teacher = tiny.model("resnet", seed=2)
    small = {"depth_multiplier": 0.1, "finegrained_output": False} if family == "mobilenet_v2" else {}
    student = make_student(teacher, architecture=family, **small) if small else tiny.model(family, seed=1)
    generator = torch.Generator().manual_seed(0)
    size = 32 if small else 8
    images = torch.rand(8, 3, size, size, generator=generator)
    data = Dataset.from_dict({"pixel_values": images.tolist(), "labels": [0, 1] * 4})
    losses = [LogitLoss(), FeatureMapLoss()] if family == "resnet" else [LogitLoss()]
    run = trainer(student, teacher, data, losses=losses, logging_steps=1)
    run.train()
    log = run.state.log_history[0]
    assert {f"loss_{loss.name}" for loss in losses} <= set(log)
    assert log["loss"] == pytest.approx(
        0.5 * log["loss_labels"] + sum(log[f"loss_{x.name}"] for x in losses), rel=1e-4
    )
