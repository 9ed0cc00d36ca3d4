import itertools

import numpy as np
import pytest
import torch
from torch import nn

from hfshrink.selection.blockwise import Rows
from hfshrink.selection.learning import ClassRows, Learning
from hfshrink.selection.matching import exchange, gradient_distance, loss_gradients, mean_gap, nearest_distinct
from hfshrink.selection.nearest_rows import head_logits, matched_rows
from hfshrink.selection.random_networks import RandomNetwork, random_convnet, random_layer


def normal(*shape, seed=0, **kwargs):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def linear(dimensions, classes=2):
    """Features that are the rows themselves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RandomNetwork(nn.Identity(), dimensions, classes)


def test_mean_gap_is_zero_for_the_same_rows_in_any_order_and_number():
    real = normal(6, 3)
    assert mean_gap(real, real.flip(0)).item() == pytest.approx(0, abs=1e-12)
    assert mean_gap(real, torch.cat([real, real])).item() == pytest.approx(0, abs=1e-12)


def test_mean_gap_is_the_squared_distance_between_the_means():
    real, synthetic = normal(6, 3), normal(4, 3, seed=1)
    wanted = sum((real[:, f].mean() - synthetic[:, f].mean()).item() ** 2 for f in range(3))  # a slow recomputation
    assert mean_gap(real, synthetic).item() == pytest.approx(wanted, rel=1e-5)


def test_gradient_distance_sees_angles_alone():
    gradients = [normal(3, 2, 5), normal(4, 3, seed=1), normal(4, seed=2)]
    assert gradient_distance(gradients, gradients).item() == pytest.approx(0, abs=1e-5)
    longer = [7 * part for part in gradients]
    assert gradient_distance(gradients, longer).item() == pytest.approx(0, abs=1e-5)
    opposite = [-part for part in gradients]
    assert gradient_distance(gradients, opposite).item() == pytest.approx(2 * (3 + 4), rel=1e-5)  # biases left out


def test_gradient_distance_of_units_without_gradient():
    nothing, something = torch.zeros(2, 3), torch.ones(2, 3)
    assert gradient_distance([nothing], [nothing]).item() == 0
    assert gradient_distance([nothing], [something]).item() == 2


def test_loss_gradients_of_a_linear_layer_are_those_of_the_closed_form():
    layer, rows = nn.Linear(3, 4), normal(5, 3)
    weight, bias = loss_gradients(layer, rows, 2)
    errors = layer(rows).softmax(dim=1) - nn.functional.one_hot(torch.tensor([2] * 5), 4)
    assert torch.allclose(weight, errors.T @ rows / 5, atol=1e-6)
    assert torch.allclose(bias, errors.mean(dim=0), atol=1e-6)


@pytest.mark.parametrize("method", ["distribution", "gradient"])
def test_losses_have_the_slope_of_finite_differences(method):
    network = random_layer(3, 2, 4, seed=1).double()
    real, rows = normal(5, 3, dtype=torch.float64), normal(2, 3, seed=1, dtype=torch.float64)

    def loss(synthetic):
        if method == "distribution":
            return mean_gap(network.body(real), network.body(synthetic))
        wanted = loss_gradients(network, real, 1)
        return gradient_distance(wanted, loss_gradients(network, synthetic, 1, differentiable=True))

    assert torch.autograd.gradcheck(loss, [rows.requires_grad_()])


def test_nearest_distinct_joins_the_closest_pairs_first():
    distances = normal(3, 6).abs()
    left, wanted = {(p, r): distances[p, r].item() for p in range(3) for r in range(6)}, {}
    while left:
        point, row = min(left, key=left.get)
        wanted[point] = row
        left = {pair: value for pair, value in left.items() if point != pair[0] and row != pair[1]}
    assert nearest_distinct(distances).tolist() == [wanted[point] for point in range(3)]


def test_nearest_distinct_gives_equal_points_different_rows():
    assert nearest_distinct(torch.tensor([[3.0, 1.0, 2.0]] * 3)).sort().values.tolist() == [0, 1, 2]


def test_exchange_never_raises_the_loss_and_nothing_better_is_one_exchange_away():
    features, start = normal(12, 4), torch.arange(3)
    target = features.mean(dim=0)

    def loss(rows):
        return ((features[list(rows)].mean(dim=0) - target) ** 2).sum().item()

    chosen = exchange(features, target, start).tolist()
    assert len(set(chosen)) == 3
    assert loss(chosen) < loss(start.tolist())
    for place, row in itertools.product(range(3), set(range(12)) - set(chosen)):
        assert loss([*chosen[:place], row, *chosen[place + 1 :]]) >= loss(chosen) - 1e-9


def test_exchange_leaves_rows_that_match_already():
    features = torch.tensor([[0.0], [2.0], [1.1], [1.1]])
    assert exchange(features, torch.tensor([1.0]), torch.tensor([1, 0])).tolist() == [1, 0]


def test_matched_rows_are_the_nearest_by_brute_force_where_features_tell_nothing():
    points, vectors = normal(4, 3).numpy(), normal(50, 3, seed=1).numpy()
    found = matched_rows(Rows(vectors), points, lambda block: torch.zeros(len(block), 1))
    wanted = nearest_distinct(torch.tensor(np.linalg.norm(points[:, None] - vectors[None], axis=2)))
    assert found.tolist() == wanted.tolist()


def test_matched_rows_take_all_rows_where_there_are_no_more():
    vectors = normal(4, 3).numpy()
    found = matched_rows(Rows(vectors), normal(4, 3, seed=1).numpy(), torch.from_numpy)
    assert sorted(found.tolist()) == [0, 1, 2, 3]


def test_matched_rows_see_no_blocks(monkeypatch):
    points, vectors = normal(3, 2).numpy(), normal(200, 2, seed=1).numpy()
    whole = matched_rows(Rows(vectors), points, torch.from_numpy)
    monkeypatch.setattr("hfshrink.selection.blockwise.BLOCK_NUMBERS", 21)
    assert matched_rows(Rows(vectors), points, torch.from_numpy).tolist() == whole.tolist()


def test_head_logits_are_those_of_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    labels = np.arange(90) % 3
    vectors = (normal(90, 4).numpy() + np.eye(3, 4)[labels]).astype(np.float32)
    found = head_logits(Rows(vectors), labels, np.arange(90), seed=0)
    scaled = vectors / torch.from_numpy(vectors).double().std().item()
    oracle = linear_model.LogisticRegression(C=10 / 4, tol=1e-8, max_iter=1000).fit(scaled, labels)  # λ n = 1 / C
    assert np.allclose(torch.from_numpy(found).softmax(dim=1), oracle.predict_proba(scaled), atol=2e-3)


def test_a_class_outside_the_sample_of_a_head_keeps_its_chance(monkeypatch):
    monkeypatch.setattr("hfshrink.selection.nearest_rows.HEAD_ROWS", 10)
    labels = (np.arange(2000) == 7).astype(int)
    vectors = normal(2000, 2).numpy() + 20 * labels[:, None].astype(np.float32)
    found = head_logits(Rows(vectors).centred(), labels, np.array([7, 8]), seed=0)
    assert found.argmax(axis=1).tolist() == [1, 0]


def test_head_logits_of_equal_rows_are_the_shares_of_the_classes():
    labels = np.array([0, 0, 0, 1])
    found = head_logits(Rows(np.zeros((4, 3), np.float32)), labels, np.arange(4), seed=0)
    assert np.allclose(torch.from_numpy(found).softmax(dim=1), [[0.75, 0.25]] * 4, atol=1e-3)


def learning(real, method="distribution", **changes):
    settings = {"steps": 60, "rate": 0.1, "batch_rows": 8, "seed": 3, **changes}
    return Learning(real, lambda seed: linear(3), method, **settings)


def real_rows():
    rows = normal(16, 3)
    rows[8:] += 2
    return rows, ClassRows([np.arange(8), np.arange(8, 16)], lambda where: rows[where])


def test_linear_features_bring_the_synthetic_mean_to_the_class_mean():
    rows, real = real_rows()
    synthetic, losses = learning(real, steps=300).run(2)
    wanted = torch.stack([rows[:8].mean(dim=0), rows[8:].mean(dim=0)])
    assert torch.allclose(synthetic.mean(dim=1), wanted, atol=1e-2)
    assert losses[-1] < 1e-3 * losses[0]


def test_a_draw_takes_all_rows_of_a_small_class_and_different_ones_of_a_large():
    rows, real = real_rows()
    assert torch.equal(real.draw(1, np.random.default_rng(0), 20), rows[8:])
    assert len(torch.unique(real.draw(0, np.random.default_rng(0), 5), dim=0)) == 5


def test_learning_needs_no_gradients_around_it():
    _, real = real_rows()
    with torch.inference_mode():
        losses = learning(real, steps=40).run(2)[1]
    assert losses[-1] < losses[0]


def test_gradient_matching_lowers_its_loss():
    _, real = real_rows()
    _, losses = learning(real, "gradient", steps=30).run(2)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])


@pytest.mark.parametrize("method", ["distribution", "gradient"])
def test_one_seed_gives_one_result_and_leaves_the_global_generator(method):
    _, real = real_rows()
    state = torch.random.get_rng_state()
    run = Learning(real, lambda seed: random_layer(3, 2, 8, seed), method, 12, 0.1, 4, seed=5).run
    first, again = run(2)[0], run(2)[0]
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = Learning(real, lambda seed: random_layer(3, 2, 8, seed), method, 12, 0.1, 4, seed=6).run(2)[0]
    assert not torch.equal(first, other)


def test_bounds_hold():
    _, real = real_rows()
    bounds = (torch.tensor(-0.1), torch.tensor(0.1))
    assert learning(real, bounds=bounds).run(2)[0].abs().max() <= 0.1


@pytest.mark.parametrize(("shape", "features"), [((1, 28, 28), 5 * 9), ((3, 8, 9), 5 * 16), ((2, 4, 4), 5 * 4)])
def test_convnet_fits_its_images(shape, features):
    network = random_convnet(shape, 3, 5, seed=0)
    assert network.body(torch.zeros(2, *shape)).shape == (2, features)
    assert network(normal(2, *shape)).shape == (2, 3)
    assert torch.equal(network.head.weight, random_convnet(shape, 3, 5, seed=0).head.weight)
