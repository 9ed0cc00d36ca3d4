"""Scores by hand, against slow loops, and against the change of a real loss."""

from __future__ import annotations

import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.pruning.criteria import scores


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestWeights:
    def test_by_hand(self) -> None:
        weight, gradient = torch.tensor([[1.0, -2.0], [0.0, 4.0]]), torch.tensor([[3.0, 0.5], [9.0, -0.25]])
        assert scores.magnitude(weight).tolist() == [[1, 2], [0, 4]]
        assert scores.taylor(weight, gradient).tolist() == [[3, 1], [0, 1]]
        assert scores.movement_gradient(weight, gradient).tolist() == [[3, -1], [0, -1]]
        assert scores.fisher(weight, gradient.square()).tolist() == [[4.5, 0.5], [0, 0.5]]
        assert scores.wanda(weight, torch.tensor([2.0, 0.5])).tolist() == [[2, 1], [0, 2]]
        assert scores.filter_norms(weight).tolist() == [3, 4]

    def test_wanda_is_the_slow_loop(self) -> None:
        weight, x = randn(3, 4), randn(7, 4, seed=1)
        found = scores.wanda(weight, x.square().sum(dim=0).sqrt())
        for i in range(3):
            for j in range(4):
                norm = sum(float(row[j]) ** 2 for row in x) ** 0.5
                assert float(found[i, j]) == pytest.approx(abs(float(weight[i, j])) * norm)

    def test_fisher_is_the_mean_over_examples(self) -> None:
        weight, x = randn(1, 3), randn(5, 3, seed=1)
        squares = torch.stack([(2 * (weight @ row) * row)[None] for row in x]).square().mean(dim=0)
        slow = [[0.5 * float(w) ** 2 * float(s) for w, s in zip(weight[0], squares[0], strict=True)]]
        torch.testing.assert_close(scores.fisher(weight, squares), torch.tensor(slow, dtype=torch.float64))

    def test_movement_is_the_gradient_through_a_mask(self) -> None:
        weight, x = randn(2, 3), randn(4, 3, seed=1)
        mask = torch.tensor([[1.0, 0, 1], [0, 1, 1]], dtype=torch.float64).requires_grad_()
        masked = (weight * mask).detach().requires_grad_()
        (x @ (weight * mask).T).pow(3).sum().backward()
        (x @ masked.T).pow(3).sum().backward()
        torch.testing.assert_close(scores.movement_gradient(weight, masked.grad), mask.grad)

    def test_taylor_predicts_the_loss(self) -> None:
        weight, x = randn(2, 3).requires_grad_(), randn(9, 3, seed=1)
        loss = (x @ weight.T).sin().sum()
        loss.backward()
        found = scores.taylor(weight, weight.grad)
        assert not found.requires_grad
        step, nudged = 1e-6, weight.detach().clone()
        nudged[1, 2] *= 1 - step
        change = float(((x @ nudged.T).sin().sum() - loss).detach()) / step
        assert abs(change) == pytest.approx(float(found[1, 2]), rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        weight, small = torch.tensor([[3e-4, 2.0]], dtype=dtype), torch.tensor([[1e-6, 1.0]])
        found = scores.fisher(weight, small)
        assert found.dtype == torch.float32
        assert float(found[0, 0]) > 0
        assert {scores.magnitude(weight).dtype, scores.taylor(weight, small).dtype} == {torch.float32}

    def test_errors(self) -> None:
        weight = torch.ones(2, 3)
        for call, match in (
            (
                lambda: scores.taylor(weight, torch.ones(3)),
                r"gradient must have the weight's shape \(2, 3\), got \(3,\)",
            ),
            (lambda: scores.fisher(weight, torch.ones(1, 3)), r"squared_gradient must have .* got \(1, 3\)"),
            (lambda: scores.wanda(weight, torch.ones(2)), r"norms \(in,\), got shapes \(2, 3\) and \(2,\)"),
        ):
            with pytest.raises(SettingError, match=match):
                call()


class TestSoftMovement:
    def test_gradient_is_that_of_autograd(self) -> None:
        given = randn(3, 4).requires_grad_()
        penalty = scores.soft_movement_penalty(given)
        penalty.backward()
        torch.testing.assert_close(scores.soft_movement_gradient(given), given.grad, rtol=1e-6, atol=1e-9)
        slow = sum(1 / (1 + float((-value).exp())) for value in given.detach().flatten()) / 12
        assert float(penalty.detach()) == pytest.approx(slow, rel=1e-6)


class TestRandom:
    def test_seeded_and_without_trace(self) -> None:
        state = torch.get_rng_state()
        found = scores.random_scores((2, 3), seed=5)
        assert torch.equal(found, scores.random_scores((2, 3), seed=5))
        assert not torch.equal(found, scores.random_scores((2, 3), seed=6))
        assert torch.equal(state, torch.get_rng_state())


class TestUnits:
    def test_magnitude_by_hand(self) -> None:
        slices = [torch.tensor([[3.0, 0.0], [1.0, -1.0]]), torch.tensor([[-4.0], [1.0]])]
        assert scores.unit_magnitude(slices, order=1).tolist() == [7, 3]
        torch.testing.assert_close(scores.unit_magnitude(slices), torch.tensor([5.0, 3**0.5]))

    def test_filters_of_a_convolution_are_the_slow_sum(self) -> None:
        weight = randn(3, 2, 2, 2)
        slow = [sum(abs(float(value)) for value in one.flatten()) for one in weight]
        torch.testing.assert_close(scores.filter_norms(weight), torch.tensor(slow, dtype=torch.float64))
        assert torch.equal(scores.filter_norms(weight), scores.filter_norms(weight.flatten(start_dim=1)))

    def test_taylor_is_the_gradient_of_a_gate(self) -> None:
        """Heads of two rows each: |∂L/∂gate|, from the writing and from the reading side alike."""
        up, down, x = randn(4, 3).requires_grad_(), randn(2, 4, seed=1).requires_grad_(), randn(5, 3, seed=2)
        gates = torch.ones(2, dtype=torch.float64, requires_grad=True)
        hidden = x @ up.T * gates.repeat_interleave(2)
        (hidden @ down.T).pow(2).sum().backward()
        for weight, gradient in ((up, up.grad), (down.T, down.grad.T)):
            slices, gradients = (tensor.reshape(2, -1) for tensor in (weight, gradient))
            torch.testing.assert_close(scores.unit_taylor([slices], [gradients]), gates.grad.abs())

    def test_taylor_sums_before_the_absolute_value(self) -> None:
        weight, gradient = torch.tensor([[1.0, 1.0]]), torch.tensor([[5.0, -5.0]])
        assert scores.unit_taylor([weight, weight], [gradient, 2 * gradient]).tolist() == [0]

    def test_activation_mean_is_the_slow_loop(self) -> None:
        x, heads = randn(2, 3, 4), torch.tensor([[0, 3], [1, 2]])
        found = scores.activation_mean(x, heads)
        for unit, (first, second) in enumerate(heads.tolist()):
            norms = [float(token[first] ** 2 + token[second] ** 2) ** 0.5 for row in x for token in row]
            assert float(found[unit]) == pytest.approx(sum(norms) / 6)
        neurons = scores.activation_mean(x, torch.arange(4)[:, None])
        torch.testing.assert_close(neurons, x.abs().mean(dim=(0, 1)))
        assert scores.activation_mean(x[0, 0], heads).shape == (2,)

    def test_errors(self) -> None:
        part = torch.ones(2, 3)
        for call, match in (
            (lambda: scores.unit_magnitude([part], order=3), "order must be 1 or 2, got 3"),
            (lambda: scores.unit_magnitude([]), r"slices of shape \(units, n\) .* got none"),
            (lambda: scores.unit_magnitude([part, part[:1]]), r"got \(2, 3\), \(1, 3\)"),
            (lambda: scores.unit_taylor([part], []), "a gradient for each of 1 slices, got 0"),
            (lambda: scores.unit_taylor([part], [part[:, :1]]), r"the weight's shape \(2, 3\), got \(2, 1\)"),
            (lambda: scores.activation_mean(torch.ones(0, 3), torch.tensor([[0]])), "at least one token"),
        ):
            with pytest.raises(SettingError, match=match):
                call()
