"""One teacher or several, asked as one."""

import pytest
import torch

import tiny
from hfshrink.distillation import DistillationTrainer, LogitLoss
from hfshrink.distillation.teachers.ensemble import calibrate_temperature
from hfshrink.distillation.teachers.panel import Teachers
from hfshrink.errors import SettingError
from training import arguments, collate, pair, rows, trainer


def three(num_labels=3):
    """A student and two teachers; the second names its labels in another order."""
    made = [tiny.model("bert", seed=seed, num_labels=num_labels) for seed in range(3)]
    names = ["one", "two", "three"]
    for number, model in enumerate(made):
        order = names[::-1] if number == 2 else names
        model.config.id2label = dict(enumerate(order))
        model.config.label2id = {name: i for i, name in enumerate(order)}
    return made


BATCH = tiny.inputs("bert", batch=5)


def test_several_teachers_answer_with_the_mean_of_their_logits():
    student, first, second = three()
    a, b = tiny.logits(first, BATCH), tiny.logits(second, BATCH).flip(-1)
    assert torch.allclose(Teachers([first, second], student).ask(BATCH, ["labels"]).logits, (a + b) / 2)
    weighted = Teachers([first, second], student, weights=[3, 1]).ask(BATCH, ["labels"]).logits
    assert torch.allclose(weighted, 0.75 * a + 0.25 * b, atol=1e-6)


def test_one_teacher_answers_bit_for_bit():
    student, first, _ = three()
    assert torch.equal(Teachers([first], student).ask(BATCH, ["labels"]).logits, tiny.logits(first, BATCH))


def test_confident_weights_follow_the_calibrated_entropy():
    """The second teacher guesses at random and shouts: calibrated, it hardly counts."""
    student, first, _ = three()
    liar = tiny.model("bert", seed=9, num_labels=3)
    liar.config.id2label, liar.config.label2id = first.config.id2label, first.config.label2id
    liar.classifier.weight.data *= 50
    first.classifier.weight.data *= 5
    held_out = tiny.inputs("bert", batch=64, length=12, seed=4)
    held_out["labels"] = tiny.logits(first, held_out).argmax(-1)  # the first teacher is right
    teachers = Teachers([first, liar], student, weights="confidence")
    with pytest.raises(SettingError, match="not calibrated yet"):
        teachers.ask(BATCH, ["labels"])
    kind, loud = teachers.calibrate([held_out], ["labels"], "single_label")
    assert loud > 3 * kind
    right = tiny.logits(first, BATCH).argmax(-1)
    agreed = teachers.ask(BATCH, ["labels"]).logits.argmax(-1) == right
    uniform = Teachers([first, liar], student).ask(BATCH, ["labels"]).logits.argmax(-1) == right
    assert agreed.all()
    assert not uniform.all()


def test_calibration_needs_labels():
    student, first, second = three()
    teachers = Teachers([first, second], student, weights="confidence")
    with pytest.raises(SettingError, match="have none"):
        teachers.calibrate([BATCH], ["labels"], "single_label")
    with pytest.raises(SettingError, match="eval_dataset has none"):
        teachers.calibrate([{**BATCH, "labels": torch.full((5,), -100)}], ["labels"], "single_label")


def test_calibration_shifts_the_labels_of_language_models():
    student, first = pair("causal")
    second = tiny.model("llama", seed=7)
    batch = collate([rows(labels="causal", count=40)[i] for i in range(40)])
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    teachers = Teachers([first, second], student, weights="confidence")
    got = teachers.calibrate([batch], ["labels"], "causal_tokens")
    logits = tiny.logits(first, {n: v for n, v in batch.items() if n != "labels"})
    counted = batch["labels"][:, 1:] != -100
    expected = calibrate_temperature(logits[:, :-1][counted], batch["labels"][:, 1:][counted])
    assert got[0] == pytest.approx(expected)
    teachers.ask(batch, ["labels"])


def test_calibration_of_multi_label_heads():
    student, first = pair("multi")
    second = tiny.model("bert", seed=7, problem_type="multi_label_classification")
    batch = collate([rows(labels="multi", count=20)[i] for i in range(20)])
    teachers = Teachers([first, second], student, weights="confidence")
    teachers.calibrate([batch], ["labels"], "multi_label")
    assert teachers.ask(batch, ["labels"]).logits.shape == (20, 2)
    with pytest.raises(SettingError, match="needs a head with classes"):
        teachers.calibrate([batch], ["labels"], "span")


def test_teacher_that_does_not_fit_stays_as_it_was():
    student, teacher = pair(num_labels=3)[0], tiny.model("bert")
    with pytest.raises(SettingError):
        Teachers([teacher], student)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_teacher_with_a_device_map_stays_there(tmp_path):
    from hfshrink import load

    student, teacher = pair()
    teacher.save_pretrained(tmp_path)
    places = {"bert": "cpu", "classifier": "disk"}  # the second device of a machine that has only one
    mapped, _ = load(str(tmp_path), device_map=places, offload_folder=str(tmp_path / "offloaded"))
    assert mapped.hf_device_map == places
    run = trainer(student, mapped, rows(), logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss_logits"] > 0


def test_trainer_takes_several_teachers():
    student, teacher = pair()
    other = tiny.model("bert", seed=5)
    run = DistillationTrainer(
        student,
        arguments(logging_steps=1),
        teacher=[teacher, other],
        teacher_weights="confidence",
        train_dataset=rows(),
        eval_dataset=rows(8, seed=3),
        data_collator=collate,
    )
    assert {"eval_agreement", "eval_teacher_accuracy"} <= set(run.evaluate())  # calibrated when it is first needed
    run.train()
    step = student.config.hfshrink["history"][-1]
    assert step["settings"]["teacher_weights"] == "confidence"
    assert len(step["results"]["teacher_temperatures"]) == 2


def test_span_heads_combine_start_and_end():
    models = [tiny.model("bert", "question-answering", seed=seed) for seed in range(3)]
    got = Teachers(models[1:], models[0]).ask(BATCH, ["start_positions", "end_positions"])
    with torch.no_grad():
        each = [model(**BATCH) for model in models[1:]]
    for name in ("start_logits", "end_logits"):
        assert torch.allclose(getattr(got, name), sum(outputs[name] for outputs in each) / 2)


@pytest.mark.parametrize(
    ("teachers", "weights", "message"),
    [
        ([], "uniform", "empty list"),
        ([1], "confidence", "weighs several teachers, one is given"),
        ([1, 2], [1, 2, 3], "3 weights"),
        ([1, 2], [-1, 2], "-1"),
        ([1, 2], "loudest", "loudest"),
    ],
)
def test_wrong_weights_are_named(teachers, weights, message):
    student, *made = three()
    with pytest.raises(SettingError, match=message):
        Teachers(made[: len(teachers)], student, weights=weights)


def test_features_need_one_teacher():
    from hfshrink.distillation import HiddenLoss

    student, teacher = pair()
    with pytest.raises(SettingError, match="looks inside one teacher, but 2 are given"):
        trainer(student, [teacher, tiny.model("bert", seed=5)], rows(), losses=[LogitLoss(), HiddenLoss()])


def test_quantized_teacher_stays_where_it_is(tmp_path):
    """A teacher in 8 bits, loaded by transformers with bitsandbytes, teaches as its float self does, nearly."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    student, teacher = pair()
    teacher.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    near = Teachers([small], student, device="cpu").ask(BATCH, ["labels"]).logits
    assert torch.allclose(near, tiny.logits(teacher, BATCH), atol=0.1)
    run = trainer(student, small, rows(), logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss_logits"] > 0


def test_teacher_in_its_own_dtype():
    student, teacher = pair()
    run = trainer(student, teacher.to(torch.bfloat16), rows(), logging_steps=1)
    run.train()
    assert student.dtype == torch.float32
    assert run.teacher.dtype == torch.bfloat16
