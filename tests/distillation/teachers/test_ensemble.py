"""Several teachers: weighted means, confidence, calibration."""

import math

import pytest
import torch
from torch.nn import functional as F

from hfshrink.distillation.teachers.ensemble import (
    calibrate_temperature,
    check_teacher_weights,
    combine_logits,
    confidence_weights,
)
from hfshrink.errors import SettingError


def test_equal_weights_give_the_mean():
    logits = [torch.randn(5, 3) for _ in range(4)]
    assert torch.allclose(combine_logits(logits, [0.25] * 4), torch.stack(logits).mean(0))


def test_one_weight_of_one_picks_that_teacher():
    logits = [torch.randn(2, 4, 3) for _ in range(3)]
    assert torch.equal(combine_logits(logits, [0.0, 1.0, 0.0]), logits[1])


def test_weights_per_position_equal_a_loop():
    logits, weights = [torch.randn(2, 4, 3) for _ in range(3)], torch.rand(3, 2, 4)
    combined = combine_logits(logits, weights)
    for row in range(2):
        for position in range(4):
            expected = sum(weights[k, row, position] * logits[k][row, position] for k in range(3))
            assert torch.allclose(combined[row, position], expected, atol=1e-6)


def test_low_precision_logits_are_combined_in_float32():
    logits = [torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([257.0, 1.0]).bfloat16()]
    assert combine_logits(logits, [0.5, 0.5]).dtype == torch.float32


def test_confidence_weights_by_hand():
    logits = [torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.5, 0.0, 0.0]])]
    weights = confidence_weights(logits, [2.0, 1.0], sharpness=0.5)
    raw = []
    for one, temperature in zip(logits, (2.0, 1.0), strict=True):
        exps = [math.exp(z / temperature) for z in one[0].tolist()]
        chances = [e / sum(exps) for e in exps]
        raw.append(math.exp(sum(p * math.log(p) for p in chances) / 0.5))
    assert weights[:, 0].tolist() == pytest.approx([w / sum(raw) for w in raw], rel=1e-5)


def test_confidence_weights_sum_to_one_and_become_uniform_when_blunt():
    logits = [3 * torch.randn(4, 6, 5) for _ in range(3)]
    weights = confidence_weights(logits, [1.0, 2.0, 3.0])
    assert weights.shape == (3, 4, 6)
    assert torch.allclose(weights.sum(0), torch.ones(4, 6))
    assert torch.allclose(
        confidence_weights(logits, [1.0] * 3, sharpness=1e6), torch.full((3, 4, 6), 1 / 3), atol=1e-5
    )


def test_a_sharp_rule_takes_the_surest_teacher():
    logits = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])]
    assert confidence_weights(logits, [1.0] * 3, sharpness=1e-3)[:, 0].tolist() == pytest.approx([0, 1, 0], abs=1e-6)


def test_extreme_logits_stay_finite():
    weights = confidence_weights([torch.tensor([[1e4, -1e4]]), torch.zeros(1, 2)], [1e-2, 1.0])
    assert torch.isfinite(weights).all()
    labelled = confidence_weights([torch.tensor([[1e4, -1e4]]), torch.zeros(1, 2)], [1e-2, 1.0], multi_label=True)
    assert labelled[:, 0].tolist() == pytest.approx([2 / 3, 1 / 3], rel=1e-5)  # exp(0) against exp(-log 2)


def labelled(rows=400, classes=4, scale=1.0, seed=0):
    """Labels drawn from the softmax of the scores: at scale 1 the teacher is calibrated, T = scale."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, classes, generator=generator)
    labels = torch.multinomial(torch.softmax(scores, -1), 1, generator=generator).squeeze(-1)
    return scores * scale, labels


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.0])
def test_calibration_finds_the_best_temperature_of_a_grid(scale):
    logits, labels = labelled(scale=scale)
    found = calibrate_temperature(logits, labels)
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    chances = torch.log_softmax(logits.double() / grid[:, None, None], dim=-1)  # (temperatures, rows, classes)
    losses = -chances[:, torch.arange(len(labels)), labels].mean(1)
    assert found == pytest.approx(grid[losses.argmin()].item(), rel=5e-3)
    assert found == pytest.approx(scale, rel=0.2)
    assert F.cross_entropy(logits.double() / found, labels) <= losses.min() + 1e-12


def test_scaled_logits_scale_the_temperature():
    logits, labels = labelled()
    assert calibrate_temperature(5 * logits, labels) == pytest.approx(
        5 * calibrate_temperature(logits, labels), rel=1e-6
    )


def test_ignored_labels_do_not_count():
    logits, labels = labelled(rows=60)
    holes = labels.clone()
    holes[::3] = -100
    wanted = calibrate_temperature(logits[holes != -100], holes[holes != -100])
    assert calibrate_temperature(logits, holes) == wanted
    assert calibrate_temperature(logits.reshape(6, 10, 4), holes.reshape(6, 10)) == wanted


def test_multi_label_calibration_finds_the_best_of_a_grid():
    scores = torch.randn(300, 3)
    labels = torch.bernoulli(torch.sigmoid(scores))
    found = calibrate_temperature(3 * scores, labels)
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    scaled = 3 * scores.double() / grid[:, None, None]
    target = labels.double().expand_as(scaled)
    losses = F.binary_cross_entropy_with_logits(scaled, target, reduction="none").mean((1, 2))
    assert found == pytest.approx(grid[losses.argmin()].item(), rel=5e-3)


@pytest.mark.parametrize(("labels", "bound"), [([0, 0], 1e-2), ([1, 1], 1e2)])
def test_a_temperature_at_a_bound_is_reported(labels, bound, caplog):
    assert calibrate_temperature(torch.tensor([[2.0, 0.0], [3.0, 0.0]]), torch.tensor(labels)) == bound
    assert "held-out rows lies at the bound" in caplog.text


def test_confidence_protects_the_target_from_a_corrupted_teacher():
    """Two good teachers and one that shouts at random; calibration on held-out rows unmasks it."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 6, (2000,), generator=generator)

    def good(noise):
        return 4 * F.one_hot(labels, 6) + noise * torch.randn(2000, 6, generator=generator)

    teachers = [good(1.5), good(1.5), 20 * torch.randn(2000, 6, generator=generator)]
    held_out, rest = slice(0, 500), slice(500, None)

    def accuracy(target):
        return (target.argmax(-1) == labels[rest]).float().mean().item()

    best = max(accuracy(one[rest]) for one in teachers)
    uniform = accuracy(combine_logits([one[rest] for one in teachers], check_teacher_weights("uniform", 3)))
    temperatures = [calibrate_temperature(one[held_out], labels[held_out]) for one in teachers]
    scaled = [one[rest] / t for one, t in zip(teachers, temperatures, strict=True)]
    weights = confidence_weights([one[rest] for one in teachers], temperatures, sharpness=0.5)
    weighted = accuracy(combine_logits(scaled, weights))
    assert uniform < best - 0.02  # the uniform mean loses two points or more
    assert weighted > best - 0.005  # the weighted one half a point at most
    boast = confidence_weights([one[rest] for one in teachers], [1.0] * 3, sharpness=0.5)
    assert weights[2].mean() < 0.1 < 1 / 3 < boast[2].mean()  # without calibration the loud one is believed most


def test_teacher_weights():
    assert check_teacher_weights(None, 4) == [0.25] * 4
    assert check_teacher_weights("confidence", 2) == "confidence"
    assert check_teacher_weights((2, 0, 2), 3) == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("best", 'must be "uniform", "confidence" or numbers, got \'best\''),
        ([1.0], "There are 2 teachers, but 1 weights"),
        ([1.0, -1.0], "0 or more, and one of them above 0"),
        ([0, 0], "0 or more, and one of them above 0"),
        ([1.0, math.nan], "0 or more"),
    ],
)
def test_wrong_teacher_weights(weights, message):
    with pytest.raises(SettingError, match=message):
        check_teacher_weights(weights, 2)


def test_wrong_arguments_are_named():
    one, other = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(SettingError, match=r"shapes \(2, 3\), \(2, 4\); they must be the same"):
        combine_logits([one, other], [0.5, 0.5])
    with pytest.raises(SettingError, match="no teachers' logits"):
        combine_logits([], [])
    with pytest.raises(SettingError, match=r"one weight for each of 2 teachers.*got \(2, 3\)"):
        combine_logits([one, one], torch.ones(2, 3))
    with pytest.raises(SettingError, match="temperature above 0 for each of 2 teachers"):
        confidence_weights([one, one], [1.0])
    with pytest.raises(SettingError, match="sharpness must be above 0, got 0"):
        confidence_weights([one, one], [1.0, 1.0], sharpness=0)
    with pytest.raises(SettingError, match="no confidence"):
        confidence_weights([torch.zeros(2, 1)] * 2, [1.0, 1.0])
    for labels, message in (
        (torch.tensor([0, 3]), r"Labels must lie in 0..2"),
        (torch.tensor([0]), r"need labels of shape \(2,\)"),
        (torch.tensor([-100, -100]), "no labelled row"),
        (torch.full((2, 3), 2.0), "must lie in 0..1"),
    ):
        with pytest.raises(SettingError, match=message):
            calibrate_temperature(one, labels)
    with pytest.raises(SettingError, match="NaN or infinity"):
        calibrate_temperature(torch.full((1, 2), math.nan), torch.tensor([0]))
