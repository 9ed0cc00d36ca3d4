"""The formulas on hidden states, attention and feature maps, recomputed slowly, and their laws."""

import math

import pytest
import torch

from hfshrink.distillation.losses.features import (
    attention_mse,
    cosine_distance,
    default_relation_heads,
    feature_map_mse,
    first_tokens,
    hidden_mse,
    normalized_distance,
    relation_loss,
    split_heads,
)
from hfshrink.errors import SettingError

BATCH, HEADS, LENGTH, WIDTH = 3, 2, 5, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(vector):
    return math.sqrt(sum(x * x for x in vector))


def slow_mean(one, student, teacher, mask):
    values = []
    for b in range(BATCH):
        for i in range(LENGTH):
            if mask is None or mask[b, i]:
                values.append(one(student[b, i].tolist(), teacher[b, i].tolist()))
    return sum(values) / len(values)


SLOW = {
    hidden_mse: lambda s, t: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / WIDTH,
    cosine_distance: lambda s, t: 1 - sum(a * b for a, b in zip(s, t, strict=True)) / norm(s) / norm(t),
    normalized_distance: lambda s, t: sum((a / norm(s) - b / norm(t)) ** 2 for a, b in zip(s, t, strict=True)),
}


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("distance", SLOW)
def test_distances_of_states_equal_a_slow_loop(distance, mask):
    student, teacher = states(BATCH, LENGTH, WIDTH), states(BATCH, LENGTH, WIDTH, seed=1)
    assert distance(student, teacher, mask).item() == pytest.approx(
        slow_mean(SLOW[distance], student, teacher, mask), rel=1e-5
    )


def allowed(b, i, j, mask, causal):
    return (mask is None or (mask[b, i] and mask[b, j])) and not (causal and j > i)


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_attention_mse_equals_a_slow_loop(mask, causal):
    student, teacher = states(BATCH, HEADS, LENGTH, LENGTH), states(BATCH, HEADS, LENGTH, LENGTH, seed=1)
    values = [
        (student[b, h, i, j] - teacher[b, h, i, j]).item() ** 2
        for b in range(BATCH)
        for h in range(HEADS)
        for i in range(LENGTH)
        for j in range(LENGTH)
        if allowed(b, i, j, mask, causal)
    ]
    loss = attention_mse(student, teacher, mask, CAUSAL if causal else None)
    assert loss.item() == pytest.approx(sum(values) / len(values), rel=1e-5)


def relation_row(x, b, r, i, heads, allow):
    """Softmax of x_i · x_j / √d_r in relation head r; x is (batch, old heads, sequence, old width)."""
    whole = [torch.cat([x[b, h, j] for h in range(x.shape[1])]).tolist() for j in range(LENGTH)]
    width = len(whole[0]) // heads
    parts = [vector[r * width : (r + 1) * width] for vector in whole]
    powers = {
        j: math.exp(sum(a * c for a, c in zip(parts[i], parts[j], strict=True)) / math.sqrt(width))
        for j in range(LENGTH)
        if allow(j)
    }
    return {j: power / sum(powers.values()) for j, power in powers.items()}


@pytest.mark.parametrize("causal", [False, True], ids=["both ways", "causal"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_relation_loss_equals_a_slow_loop_for_other_heads_and_widths(mask, causal):
    student, teacher = states(BATCH, 2, LENGTH, 4), states(BATCH, 3, LENGTH, 4, seed=1)  # 8 and 12 wide
    heads, rows = 4, []
    for b in range(BATCH):
        for r in range(heads):
            for i in range(LENGTH):
                if mask is not None and not mask[b, i]:
                    continue

                def allow(j, b=b, i=i):
                    return allowed(b, i, j, mask, causal)

                p, q = (relation_row(x, b, r, i, heads, allow) for x in (teacher, student))
                rows.append(sum(p[j] * math.log(p[j] / q[j]) for j in p))
    loss = relation_loss(student, teacher, heads, mask, CAUSAL if causal else None)
    assert loss.item() == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_relations_by_hand():
    # one head of width 1: student 0, 0 -> (½, ½) in each row; teacher 0, √ln 3 -> (½, ½) and (¼, ¾)
    student = torch.zeros(1, 1, 2, 1)
    teacher = torch.tensor([0.0, math.sqrt(math.log(3))]).reshape(1, 1, 2, 1)
    second = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert relation_loss(student, teacher, 1).item() == pytest.approx(second / 2, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        lambda s, t: hidden_mse(s[:, 0], t[:, 0], MASK),
        lambda s, t: cosine_distance(s[:, 0], t[:, 0], MASK),
        lambda s, t: normalized_distance(s[:, 0], t[:, 0], MASK),
        lambda s, t: attention_mse(s @ s.mT, t @ t.mT, MASK),
        lambda s, t: relation_loss(s, t, 4, MASK, CAUSAL),
    ],
    ids=["hidden", "cosine", "normalized", "attention", "relation"],
)
class TestEveryLossWithPadding:
    def test_is_zero_with_no_gradient_where_both_are_equal(self, loss):
        student = states(BATCH, HEADS, LENGTH, WIDTH).requires_grad_()
        value = loss(student, student.detach().clone())
        value.backward()
        assert value.item() == 0.0
        assert student.grad.abs().max() < 1e-7

    def test_does_not_depend_on_what_padding_holds(self, loss):
        student, teacher = states(BATCH, HEADS, LENGTH, WIDTH), states(BATCH, HEADS, LENGTH, WIDTH, seed=1)
        noisy = torch.where(MASK[:, None, :, None], student, 100.0)
        assert loss(noisy, teacher).item() == loss(student, teacher).item()

    def test_has_the_gradient_of_finite_differences(self, loss):
        student = states(BATCH, HEADS, LENGTH, WIDTH).requires_grad_()
        teacher = states(BATCH, HEADS, LENGTH, WIDTH, seed=1)
        step = states(BATCH, HEADS, LENGTH, WIDTH, seed=2)
        loss(student, teacher).backward()
        with torch.no_grad():
            slope = (loss(student + 0.01 * step, teacher) - loss(student - 0.01 * step, teacher)) / 0.02
        assert (student.grad * step).sum().item() == pytest.approx(slope.item(), rel=0.01, abs=1e-3)

    def test_works_in_half_precision(self, loss):
        student, teacher = states(BATCH, HEADS, LENGTH, WIDTH), states(BATCH, HEADS, LENGTH, WIDTH, seed=1)
        half = loss(student.bfloat16(), teacher.bfloat16())
        assert half.isfinite()
        assert half.item() == pytest.approx(loss(student, teacher).item(), rel=0.1)


def test_a_batch_of_nothing_but_padding_gives_zero_and_no_nan():
    student = states(1, HEADS, LENGTH, WIDTH).requires_grad_()
    teacher, mask = states(1, HEADS, LENGTH, WIDTH, seed=1), torch.zeros(1, LENGTH, dtype=torch.bool)
    total = relation_loss(student, teacher, 2, mask) + hidden_mse(student[:, 0], teacher[:, 0], mask)
    total = total + attention_mse(student @ student.mT, teacher @ teacher.mT, mask)
    total.backward()
    assert total.item() == 0.0
    assert not student.grad.any()


def test_cosine_is_half_of_the_normalized_distance():
    student, teacher = states(BATCH, LENGTH, WIDTH), states(BATCH, LENGTH, WIDTH, seed=1)
    expected = 1 - torch.cosine_similarity(student, teacher, dim=-1).mean()
    assert cosine_distance(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


def test_first_token_is_the_first_that_is_not_padding():
    x = states(BATCH, LENGTH, WIDTH)
    assert torch.equal(first_tokens(x), x[:, :1])
    assert torch.equal(first_tokens(x, MASK), torch.stack([x[0, 0], x[1, 0], x[2, 1]])[:, None])


def test_relations_do_not_see_how_the_teacher_splits_its_heads():
    student, teacher = states(BATCH, 2, LENGTH, 6), states(BATCH, 2, LENGTH, 6, seed=1)
    resplit = split_heads(teacher, 4)
    assert relation_loss(student, teacher, 3).item() == pytest.approx(relation_loss(student, resplit, 3).item())
    assert torch.equal(split_heads(resplit, 2), teacher)


def test_relations_are_blind_to_a_rotation_inside_each_head():
    x = states(BATCH, HEADS, LENGTH, WIDTH)
    turn, _ = torch.linalg.qr(states(WIDTH, WIDTH, seed=3))
    assert relation_loss(x @ turn, x, HEADS).item() == pytest.approx(0.0, abs=1e-6)


def test_default_relation_heads_divide_all_widths_and_stay_wide():
    assert default_relation_heads(768, 768, 384) == 48
    assert default_relation_heads(768, 312) == 24
    assert default_relation_heads(768, 128) == 16
    assert default_relation_heads(16, 8) == 1
    assert default_relation_heads(7, 768) == 1


def test_relation_heads_must_divide():
    with pytest.raises(SettingError, match="got 3 for 2 heads × 4 = 8"):
        relation_loss(states(1, 2, 5, 4), states(1, 2, 5, 4), 3)


def test_feature_maps_equal_a_slow_loop():
    student, teacher = states(2, 3, 2, 2), states(2, 3, 4, 4, seed=1)
    total = 0.0
    for b in range(2):
        for c in range(3):
            for y in range(2):
                for x in range(2):
                    pooled = sum(teacher[b, c, 2 * y + dy, 2 * x + dx].item() for dy in (0, 1) for dx in (0, 1)) / 4
                    total += (student[b, c, y, x].item() - pooled) ** 2
    assert feature_map_mse(student, teacher).item() == pytest.approx(total / 24, rel=1e-5)
    assert feature_map_mse(teacher, student).item() == pytest.approx(total / 24, rel=1e-5)


def test_feature_maps_of_one_size_are_not_pooled():
    student, teacher = states(2, 3, 5, 4), states(2, 3, 5, 4, seed=1)
    assert feature_map_mse(student, teacher).item() == pytest.approx((student - teacher).square().mean().item())
