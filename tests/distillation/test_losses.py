"""The formulas, recomputed slowly, and their laws."""

import math
from types import SimpleNamespace

import pytest
import torch

import tiny
from hfshrink import LogitLoss
from hfshrink.distillation import binary_cross_entropy, kl_divergence, mean_squared_error
from hfshrink.distillation.losses import loss_mask
from hfshrink.errors import SettingError


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_kl(student, teacher, temperature):
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_equals_a_slow_loop(temperature):
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(
        slow_kl(student, teacher, temperature), rel=1e-5
    )


def test_kl_by_hand():
    # teacher (1/2, 1/2), student (1/4, 3/4): KL = ½ ln 2 + ½ ln(2/3) = ½ ln(4/3)
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    assert kl_divergence(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_kl_of_a_teacher_and_itself_is_zero():
    logits = torch.randn(6, 5) * 10
    assert kl_divergence(logits, logits.clone(), temperature=3.0).item() == 0.0


def test_gradient_keeps_its_size_at_every_temperature():
    teacher = torch.randn(64, 5) / 100  # nearly linear: T² undoes 1/T of the logits and 1/T of the probabilities
    norms = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(64, 5, requires_grad=True)
        kl_divergence(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_masked_positions_do_not_count():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = slow_kl(student[mask], teacher[mask], 2.0)
    assert kl_divergence(student, teacher, 2.0, mask).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student, teacher, 2.0, torch.zeros_like(mask)).item() == 0.0


def test_binary_cross_entropy_equals_a_slow_loop():
    student, teacher, t = torch.randn(3, 4), torch.randn(3, 4), 2.0
    total = 0.0
    for z, w in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-w / t)), 1 / (1 + math.exp(-z / t))
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    assert binary_cross_entropy(student, teacher, t).item() == pytest.approx(t**2 * total / 12, rel=1e-5)


def test_binary_cross_entropy_is_least_at_the_teacher():
    teacher = torch.randn(3, 4)
    student = teacher.clone().requires_grad_()
    binary_cross_entropy(student, teacher, 2.0).backward()
    assert student.grad.abs().max().item() < 1e-7


def test_mean_squared_error_by_hand():
    assert mean_squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])).item() == pytest.approx(6.5)


def test_causal_heads_are_shifted():
    ids = torch.tensor([[5, 6, 7, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    mask = loss_mask(inputs, "causal_tokens")
    assert mask.tolist() == [[True, True, False]]
    student, teacher = (SimpleNamespace(logits=torch.randn(1, 4, 8)) for _ in range(2))
    got = LogitLoss(temperature=1.0)(student, teacher, head="causal_tokens", mask=mask)
    assert got.item() == pytest.approx(slow_kl(student.logits[0, :2], teacher.logits[0, :2], 1.0), rel=1e-5)


def test_labels_decide_over_padding():
    inputs = {"labels": torch.tensor([[-100, 1, -100]]), "attention_mask": torch.ones(1, 3)}
    assert loss_mask(inputs, "tokens").tolist() == [[False, True, False]]
    assert loss_mask(inputs, "single_label") is None


def test_question_answering_takes_the_mean_of_start_and_end():
    one, two = (tiny.model("bert", "question-answering", seed=seed) for seed in (0, 1))
    batch = tiny.inputs("bert")
    with torch.no_grad():
        a, b = one(**batch), two(**batch)
    expected = (
        kl_divergence(a.start_logits, b.start_logits, 2.0) + kl_divergence(a.end_logits, b.end_logits, 2.0)
    ) / 2
    assert LogitLoss()(a, b, head="span", mask=None).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("bad", [{"temperature": 0}, {"temperature": -1}, {"weight": -1}])
def test_bad_settings(bad):
    with pytest.raises(SettingError, match=f"{next(iter(bad))} must .*, got {next(iter(bad.values()))}"):
        LogitLoss(**bad)


def test_different_shapes_name_both_sides():
    student, teacher = SimpleNamespace(logits=torch.zeros(2, 3)), SimpleNamespace(logits=torch.zeros(2, 4))
    with pytest.raises(SettingError, match=r"student's logits have shape \(2, 3\), the teacher's \(2, 4\)"):
        LogitLoss()(student, teacher, head="single_label", mask=None)
