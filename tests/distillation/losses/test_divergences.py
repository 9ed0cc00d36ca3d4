"""Each formula recomputed in plain loops, its laws, and its gradient."""

import math

import pytest
import torch

from hfshrink.distillation.losses.divergences import (
    SparseTargets,
    decoupled_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    sorted_distance,
    sparse_kl_divergence,
    standardize_logits,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def softmax(row, temperature=1.0):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


# name -> (the function on logits, the formula on the teacher's p and the student's q)
SLOW = {
    "forward": (kl_divergence, kl),
    "reverse": (reverse_kl_divergence, lambda p, q: kl(q, p)),
    "jsd": (
        lambda *given: jensen_shannon_divergence(*given, beta=0.3),
        lambda p, q: 0.3 * kl(p, mix(p, q, 0.3)) + 0.7 * kl(q, mix(p, q, 0.3)),
    ),
    "skewed": (lambda *given: skewed_kl_divergence(*given, skew=0.2), lambda p, q: kl(p, mix(p, q, 0.2))),
    "skewed reverse": (
        lambda *given: skewed_reverse_kl_divergence(*given, skew=0.2),
        lambda p, q: kl(q, mix(p, q, 0.8)),
    ),
}
both = pytest.mark.parametrize(("function", "formula"), SLOW.values(), ids=SLOW)


@both
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_each_divergence_equals_a_slow_loop(function, formula, temperature):
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    pairs = list(zip(teacher[mask].tolist(), student[mask].tolist(), strict=True))
    expected = sum(formula(softmax(a, temperature), softmax(b, temperature)) for a, b in pairs) / len(pairs)
    got = function(student, teacher, temperature, mask)
    assert got.item() == pytest.approx(temperature**2 * expected, rel=1e-4)


@both
def test_each_divergence_is_least_at_the_teacher_and_ignores_masked_rows(function, formula):
    teacher = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.tensor([True, True, False, False])
    student = torch.where(mask[:, None], teacher, torch.randn_like(teacher)).requires_grad_()
    loss = function(student, teacher, 2.0, mask)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert student.grad.abs().max().item() < 1e-12
    assert function(student, teacher, 2.0, torch.zeros_like(mask)).item() == 0.0


@both
def test_each_gradient_is_that_of_the_value(function, formula):
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda logits: function(logits, teacher, 2.0, None), student)


@both
def test_half_precision_is_computed_in_float32(function, formula):
    student, teacher = torch.randn(8, 50).bfloat16(), torch.randn(8, 50).bfloat16()
    got = function(student, teacher, 2.0, None)
    assert got.dtype == torch.float32
    assert got.item() == function(student.float(), teacher.float(), 2.0, None).item()


@both
def test_sure_answers_give_finite_losses_and_gradients(function, formula):
    teacher = torch.tensor([[500.0, -500.0, 0.0]])
    student = (-teacher).requires_grad_()
    loss = function(student, teacher, 1.0, None)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@both
def test_forbidden_classes_add_nothing(function, formula):
    shared = torch.tensor([[1.0, 2.0, -math.inf, 0.5]])
    teacher, student = shared * 0.5, shared.clone().requires_grad_()
    loss = function(student, teacher, 1.0, None)
    loss.backward()
    kept = [0, 1, 3]
    assert loss.item() == pytest.approx(function(shared[:, kept], teacher[:, kept], 1.0, None).item(), rel=1e-5)
    assert student.grad[0, kept].isfinite().all()
    assert student.grad[0, 2] == 0.0


def test_classes_that_the_teacher_alone_forbids_have_no_share():
    teacher, student = torch.tensor([[1.0, -math.inf, 0.0]]), torch.tensor([[0.3, 0.2, 0.1]], requires_grad=True)
    p, q = softmax([1.0, 0.0]), softmax([0.3, 0.2, 0.1])
    expected = p[0] * math.log(p[0] / q[0]) + p[1] * math.log(p[1] / q[2])
    loss = kl_divergence(student, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert student.grad[0].tolist() == pytest.approx([q[0] - p[0], q[1], q[2] - p[1]], rel=1e-4)
    student.grad = None
    loss = decoupled_divergence(student, teacher, torch.tensor([0]), 1.0, other_weight=1.0)
    loss.backward()
    binary = kl((p[0], p[1]), (q[0], q[1] + q[2]))
    assert loss.item() == pytest.approx(binary + math.log((q[1] + q[2]) / q[2]), rel=1e-5)
    assert student.grad.isfinite().all()
    kept = SparseTargets(torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), tail=False)
    assert sparse_kl_divergence(teacher, kept).item() == pytest.approx(-math.log(p[0]), rel=1e-5)


def test_the_ends_of_jensen_shannon_are_the_two_kl_divergences():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    assert jensen_shannon_divergence(student, teacher, 2.0, beta=0) == kl_divergence(student, teacher, 2.0)
    assert jensen_shannon_divergence(student, teacher, 2.0, beta=1) == reverse_kl_divergence(student, teacher, 2.0)


def test_jensen_shannon_by_hand():
    # p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): ½ log(4/3) + ½ (½ log(2/3) + ½ log 2)
    student, teacher = torch.zeros(1, 2), torch.tensor([[1e4, -1e4]])
    expected = 0.5 * math.log(4 / 3) + 0.25 * (math.log(2 / 3) + math.log(2))
    assert jensen_shannon_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_jensen_shannon_is_symmetric_at_one_half():
    one, two = torch.randn(4, 5), torch.randn(4, 5)
    there, back = jensen_shannon_divergence(one, two), jensen_shannon_divergence(two, one)
    assert there.item() == pytest.approx(back.item(), rel=1e-6)


def test_skew_zero_is_the_plain_divergence_and_skew_bounds_it():
    student, teacher = torch.randn(4, 5) * 100, torch.randn(4, 5) * 100
    assert skewed_kl_divergence(student, teacher, skew=0) == kl_divergence(student, teacher)
    assert skewed_reverse_kl_divergence(student, teacher, skew=0) == reverse_kl_divergence(student, teacher)
    assert skewed_kl_divergence(student, teacher, skew=0.1).item() <= math.log(10) + 1e-5


def test_mean_squared_error_counts_the_masked_in_rows():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 9.0]]), torch.tensor([[3.0, 2.0], [0.0, 0.0]])
    assert mean_squared_error(student, teacher, torch.tensor([True, False])).item() == 2.0
    assert mean_squared_error(student, teacher).item() == pytest.approx((4 + 81) / 4)


def slow_decoupled(student, teacher, labels, temperature, alpha, beta):
    total, rows = 0.0, 0
    for ours, theirs, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        if label == -100:
            continue
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        others = [[v for i, v in enumerate(row) if i != label] for row in (theirs, ours)]
        target = kl((p[label], 1 - p[label]), (q[label], 1 - q[label]))
        total += alpha * target + beta * kl(softmax(others[0], temperature), softmax(others[1], temperature))
        rows += 1
    return temperature**2 * total / rows


def test_decoupled_divergence_equals_a_slow_loop():
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 3, -100, 1, 1])
    got = decoupled_divergence(student, teacher, labels, 3.0, target_weight=0.7, other_weight=5.0)
    assert got.item() == pytest.approx(slow_decoupled(student, teacher, labels, 3.0, 0.7, 5.0), rel=1e-4)
    masked = decoupled_divergence(student, teacher, labels, 3.0, torch.tensor([True, True, True, False, False]))
    assert masked.item() == pytest.approx(slow_decoupled(student[:2], teacher[:2], labels[:2], 3.0, 1, 8), rel=1e-4)


def test_decoupled_divergence_with_the_teachers_weights_is_the_plain_one():
    student, teacher, labels = torch.randn(1, 6), torch.randn(1, 6), torch.tensor([2])
    rest = 1 - softmax(teacher[0].tolist(), 2.0)[2]
    got = decoupled_divergence(student, teacher, labels, 2.0, other_weight=rest)
    assert got.item() == pytest.approx(kl_divergence(student, teacher, 2.0).item(), rel=1e-4)


def test_decoupled_divergence_is_stable_and_its_gradient_right():
    labels = torch.tensor([0, -100])
    for size in (1.0, 400.0):
        teacher = size * torch.tensor([[2.0, -1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        student = (-teacher).requires_grad_()
        loss = decoupled_divergence(student, teacher, labels, 1.0)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(student.grad).all()
        assert not student.grad[1].any()
    inputs = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: decoupled_divergence(logits, teacher / 400, labels), inputs)


def test_standardized_rows_have_mean_zero_and_deviation_one():
    logits = torch.randn(3, 4, 7, dtype=torch.float64) * 9 + 5
    got = standardize_logits(logits)
    assert torch.allclose(got.mean(-1), torch.zeros(3, 4, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(got.pow(2).mean(-1), torch.ones(3, 4, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(standardize_logits(3 * logits - 2), got, atol=1e-6)
    assert torch.isfinite(standardize_logits(torch.zeros(1, 4))).all()


def sparse(teacher, k, tail):
    """The k most probable entries; without a tail their shares of their sum."""
    values, ids = teacher.softmax(-1).topk(k, dim=-1)
    return SparseTargets(ids, values if tail else values / values.sum(-1, keepdim=True), tail)


def slow_sparse(student, targets):
    total = 0.0
    ids, probabilities = targets.ids.flatten(0, -2).tolist(), targets.probabilities.flatten(0, -2).tolist()
    for logits, row, p in zip(student.flatten(0, -2).tolist(), ids, probabilities, strict=True):
        q = softmax(logits)
        kept = {i for i, value in zip(row, p, strict=True) if value}
        total += kl(p, [q[i] for i in row])
        if targets.tail:
            total += kl([1 - sum(p)], [1 - sum(q[i] for i in kept)])
    return total / (student.shape[0] * student.shape[1])


@pytest.mark.parametrize("tail", [True, False])
def test_sparse_divergence_equals_a_slow_loop(tail):
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    targets = sparse(teacher, 3, tail)
    assert sparse_kl_divergence(student, targets).item() == pytest.approx(slow_sparse(student, targets), rel=1e-4)


@pytest.mark.parametrize("tail", [True, False])
def test_unused_slots_hold_no_token(tail):
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    targets = sparse(teacher, 3, tail)
    ids = torch.cat([torch.zeros_like(targets.ids[..., :2]), targets.ids], -1)  # token 0, which may also be kept
    padded = torch.cat([torch.zeros_like(targets.probabilities[..., :2]), targets.probabilities], -1)
    expected = sparse_kl_divergence(student, targets).item()
    assert sparse_kl_divergence(student, SparseTargets(ids, padded, tail)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_sparse_divergence_of_all_entries_is_the_plain_one(tail):
    student, teacher = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6)
    got = sparse_kl_divergence(student, sparse(teacher, 6, tail))
    assert got.item() == pytest.approx(kl_divergence(student, teacher).item(), rel=1e-4)
    got.backward()
    assert torch.isfinite(student.grad).all()


def test_sparse_divergence_with_a_tail_is_zero_at_the_teacher_and_bounded_by_the_plain_one():
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    assert sparse_kl_divergence(teacher, sparse(teacher, 2, True)).item() == pytest.approx(0, abs=1e-6)
    values = [sparse_kl_divergence(student, sparse(teacher, k, True)).item() for k in (1, 3, 6, 9)]
    assert values == sorted(values)  # merging entries never raises a divergence
    assert values[-1] == pytest.approx(kl_divergence(student, teacher).item(), rel=1e-4)


def test_the_students_own_tail_is_stable_where_it_is_tiny():
    targets = SparseTargets(torch.tensor([[0]]), torch.tensor([[0.5]]), tail=True)
    student = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # its tail is 2 e^-200: 0 in float32
    loss = sparse_kl_divergence(student, targets)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - math.log(2) + 200), rel=1e-5)
    assert student.grad[0].tolist() == pytest.approx([0.5, -0.25, -0.25])


def test_sampled_targets_have_the_plain_gradient_in_the_mean():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(1, 8), torch.randn(1, 8, requires_grad=True)
    kl_divergence(student, teacher).backward()
    plain, student.grad = student.grad, None
    draws = torch.multinomial(teacher.softmax(-1).expand(4000, -1), 5, replacement=True, generator=generator)
    ids = torch.arange(8).expand(4000, 8)
    shares = torch.nn.functional.one_hot(draws, 8).float().mean(1)
    sparse_kl_divergence(student.expand(4000, -1), SparseTargets(ids, shares, tail=False)).backward()
    assert torch.allclose(student.grad, plain, atol=0.01)


def test_sparse_divergence_counts_the_masked_in_positions():
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 9)
    targets = sparse(teacher, 3, True)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    first = SparseTargets(targets.ids[:1, :1], targets.probabilities[:1, :1], True)
    expected = sparse_kl_divergence(student[:1, :1], first).item()
    assert sparse_kl_divergence(student, targets, mask=mask).item() == pytest.approx(expected, rel=1e-6)


def test_sorted_distance_by_hand_and_blind_to_order():
    student, teacher = torch.tensor([[0.2, 0.7, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.3, 0.1]]).log()
    # (0.7, 0.2, 0.1, 0) against (0.5, 0.3, 0.1, 0.1)
    assert sorted_distance(student, teacher).item() == pytest.approx(0.4)
    assert sorted_distance(teacher, student).item() == pytest.approx(0.4)
    assert sorted_distance(teacher[:, [3, 1, 0, 2]], teacher).item() == pytest.approx(0, abs=1e-6)
    two = torch.cat([student, student])
    assert sorted_distance(two, torch.cat([teacher, -teacher]), mask=torch.tensor([True, False])).item() == (
        pytest.approx(0.4)
    )
