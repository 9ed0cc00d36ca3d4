"""Low-rank factors against singular values of explicit products and errors over explicit samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.factorization import factors as module
from hfshrink.factorization.factors import decompose, low_rank_factors

SHAPES = [(12, 8), (8, 12), (9, 9)]
WEIGHTINGS = ["none", "fisher", "activation", "both"]


def problem(out: int, features: int, seed: int = 0, tokens: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """W (out, features), row weights (out,) and correlated inputs (tokens, features) of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    scale = 10 ** -torch.rand(features, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing * scale
    rows = 0.1 + torch.rand(out, generator=generator, dtype=torch.float64)
    return torch.randn(out, features, generator=generator, dtype=torch.float64), rows, x


def keywords(weighting: str, rows: Tensor, x: Tensor) -> dict[str, Tensor]:
    both = {"row_weight": rows, "input_gram": x.T @ x}
    return {"none": {}, "fisher": {"row_weight": rows}, "activation": {"input_gram": x.T @ x}, "both": both}[weighting]


def slow_error(difference: Tensor, weighting: str, rows: Tensor, x: Tensor) -> float:
    """Sample by sample and row by row: Σ_x Σ_i (d_i · difference_i · x)²; unit vectors for x without activations."""
    rows = rows if weighting in ("fisher", "both") else torch.ones_like(rows)
    samples = x if weighting in ("activation", "both") else torch.eye(difference.shape[1], dtype=torch.float64)
    return sum(float((d * (row @ sample)) ** 2) for sample in samples for d, row in zip(rows, difference, strict=True))


def test_hand_case() -> None:
    """W = diag(3, 4) turned: the largest singular value is 4, split as 2 · 2; a third of the rows' weight turns it."""
    weight = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    up, down = low_rank_factors(weight, 1)
    assert (up @ down).tolist() == [[0.0, 0.0], [4.0, 0.0]]
    assert up.abs().flatten().tolist() == down.abs().flatten().tolist()[::-1] == [0.0, 2.0]
    assert decompose(weight).tails.tolist() == [25.0, 9.0, 0.0]
    up, down = low_rank_factors(weight, 1, row_weight=torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    # inputs (x, y) with Σ x² = 1, Σ y² = 4: the errors are 4 · 9 and 16
    up, down = low_rank_factors(weight, 1, input_gram=torch.diag(torch.tensor([1.0, 4.0])))
    torch.testing.assert_close(up @ down, torch.tensor([[0.0, 3.0], [0.0, 0.0]]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_error_is_the_tail_at_every_rank(shape: tuple[int, int], weighting: str) -> None:
    weight, rows, x = problem(*shape)
    found = decompose(weight, **keywords(weighting, rows, x))
    assert found.tails.shape == (min(shape) + 1,)
    assert float(found.tails[0]) == pytest.approx(slow_error(weight, weighting, rows, x))
    for rank in range(1, min(shape) + 1):
        up, down = found.factors(rank)
        error = slow_error(weight - up @ down, weighting, rows, x)
        assert error == pytest.approx(float(found.tails[rank]), rel=1e-8, abs=1e-11 * float(found.tails[0]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], weighting: str) -> None:
    weight, rows, x = problem(*shape)
    up, down = low_rank_factors(weight, min(shape), **keywords(weighting, rows, x))
    torch.testing.assert_close(up @ down, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_tails_are_those_of_the_singular_values_of_the_weighted_weight(shape: tuple[int, int], weighting: str) -> None:
    weight, rows, x = problem(*shape)
    weighted = (rows[:, None] if weighting in ("fisher", "both") else 1) * weight
    weighted = weighted @ (x.T if weighting in ("activation", "both") else torch.eye(shape[1], dtype=torch.float64))
    squares = torch.linalg.svdvals(weighted)[: min(shape)].square()
    tails = torch.tensor([float(squares[rank:].sum()) for rank in range(min(shape) + 1)], dtype=torch.float64)
    found = decompose(weight, **keywords(weighting, rows, x)).tails
    torch.testing.assert_close(found, tails, rtol=1e-9, atol=1e-11 * float(tails[0]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_other_factors_do_better(weighting: str) -> None:
    """Neither random ones nor, with the inner problem solved exactly, steps away from the optimum."""
    weight, rows, x = problem(12, 8)
    up, down = low_rank_factors(weight, 3, **keywords(weighting, rows, x))
    best = slow_error(weight - up @ down, weighting, rows, x)
    for step in (1e-3, 1e-1, 10.0):
        other = (up + step * torch.randn_like(up)) @ (down + step * torch.randn_like(down))
        assert slow_error(weight - other, weighting, rows, x) > best


def test_each_weighting_is_best_at_its_own_error_only() -> None:
    weight, rows, x = problem(12, 8)
    products = {kind: torch.mm(*low_rank_factors(weight, 3, **keywords(kind, rows, x))) for kind in WEIGHTINGS}
    for judge in WEIGHTINGS:
        errors = {kind: slow_error(weight - product, judge, rows, x) for kind, product in products.items()}
        assert all(errors[judge] < 0.99 * errors[kind] for kind in WEIGHTINGS if kind != judge)


def test_plain_factors_are_the_truncated_svd_split_evenly() -> None:
    for shape in SHAPES:
        weight, _, _ = problem(*shape)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        up, down = low_rank_factors(weight, 4)
        torch.testing.assert_close(up @ down, u[:, :4] * s[:4] @ vh[:4])
        torch.testing.assert_close(up.T @ up, torch.diag(s[:4]))
        torch.testing.assert_close(down @ down.T, torch.diag(s[:4]))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_both_sides_of_a_component_have_one_norm_however_many_tokens_there_were(weighting: str) -> None:
    for shape in SHAPES:
        weight, rows, x = problem(*shape)
        up, down = low_rank_factors(weight, 5, **keywords(weighting, 1e3 * rows, 1e3 * x))
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


def test_unit_of_a_weighting_does_not_matter() -> None:
    weight, rows, x = problem(12, 8)
    one = torch.mm(*low_rank_factors(weight, 3, row_weight=rows, input_gram=x.T @ x))
    other = torch.mm(*low_rank_factors(weight, 3, row_weight=1e-9 * rows, input_gram=1e12 * x.T @ x))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_features_that_never_fire_cost_no_rank(shape: tuple[int, int]) -> None:
    """Zero rows and columns in the Gram matrix: the live features get the factors that they would get alone."""
    weight, rows, x = problem(*shape)
    dead = torch.tensor([1, 4])
    weight[:, dead] *= 100
    x[:, dead] = 0
    live = [feature for feature in range(shape[1]) if feature not in dead]
    for row_weight in (None, rows):
        up, down = low_rank_factors(weight, 3, row_weight=row_weight, input_gram=x.T @ x)
        alone = low_rank_factors(weight[:, live], 3, row_weight=row_weight, input_gram=(x.T @ x)[live][:, live])
        torch.testing.assert_close((up @ down)[:, live], torch.mm(*alone), rtol=1e-6, atol=1e-7)
        # the dead ones are projected like the others, D⁻¹ U Uᵀ D W
        rows_ = torch.ones_like(rows) if row_weight is None else rows
        u = torch.linalg.qr(rows_[:, None] * alone[0]).Q
        projected = u @ u.T @ (rows_[:, None] * weight[:, dead]) / rows_[:, None]
        torch.testing.assert_close((up @ down)[:, dead], projected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_gram_of_any_rank_has_exact_tails(tokens: int, shape: tuple[int, int]) -> None:
    """Fewer tokens than features: rank `tokens` leaves no error, and nothing is NaN at any rank (DRONE's case)."""
    weight, rows, x = problem(*shape, tokens=tokens)
    found = decompose(weight, input_gram=x.T @ x)
    total = float(found.tails[0])
    assert float(found.tails[tokens]) < 1e-10 * total
    for rank in range(1, min(shape) + 1):
        up, down = found.factors(rank)
        assert slow_error(weight - up @ down, "activation", rows, x) == pytest.approx(
            float(found.tails[rank]), rel=1e-6, abs=1e-10 * total
        )
    torch.testing.assert_close(up @ down, weight, rtol=1e-5, atol=1e-5)


def test_singular_gram_takes_the_eigen_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues that rounding made negative, beyond the jitter: Cholesky fails, eigh does not."""
    weight, _, x = problem(12, 8)
    gram = x.T @ x
    values, vectors = torch.linalg.eigh(gram)
    values[:3] = torch.tensor([-3.0, -2.0, 0.0], dtype=torch.float64) * 1e-8 * float(values[-1])
    gram = (vectors * values) @ vectors.T
    assert int(torch.linalg.cholesky_ex(gram).info) > 0
    calls = []
    qr = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda *args, **kwargs: calls.append(1) or qr(*args, **kwargs))
    found = decompose(weight, input_gram=gram)
    assert calls
    cleaned = (vectors * values.clamp(min=0)) @ vectors.T
    up, down = found.factors(3)
    error = float(((weight - up @ down) @ cleaned @ (weight - up @ down).T).trace())
    assert error == pytest.approx(float(found.tails[3]), rel=1e-6)
    torch.testing.assert_close(torch.mm(*found.factors(8)), weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_weight_0_cost_no_rank_and_get_the_best_fit_that_is_left(shape: tuple[int, int]) -> None:
    weight, rows, x = problem(*shape)
    rows[[0, 3]] = 0
    kept = rows > 0
    for gram in (None, x.T @ x):
        found = decompose(weight, row_weight=rows, input_gram=gram)
        up, down = found.factors(3)
        alone = low_rank_factors(weight[kept], 3, row_weight=rows[kept], input_gram=gram)
        torch.testing.assert_close((up @ down)[kept], torch.mm(*alone), rtol=1e-6, atol=1e-7)
        root = torch.eye(shape[1], dtype=torch.float64) if gram is None else x.T
        fit = torch.linalg.lstsq((down @ root).T, (weight[~kept] @ root).T).solution.T @ down
        torch.testing.assert_close((up @ down)[~kept], fit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_any_weight_at_all_the_factors_are_plain(shape: tuple[int, int]) -> None:
    weight, rows, x = problem(*shape)
    nothing = decompose(weight, row_weight=0 * rows, input_gram=0 * x.T @ x)
    torch.testing.assert_close(torch.mm(*nothing.factors(3)), torch.mm(*low_rank_factors(weight, 3)))
    assert float(nothing.tails[0]) < 1e-20
    assert bool((torch.mm(*low_rank_factors(0 * weight, 3)) == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_factors_have_the_weights_dtype_and_float64s_error(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, rows, x = problem(*shape)
    weight = weight.to(dtype).requires_grad_()
    up, down = low_rank_factors(weight, 4, row_weight=rows.float(), input_gram=(x.T @ x).float())
    assert (up.shape, down.shape) == ((shape[0], 4), (4, shape[1]))
    assert {up.dtype, down.dtype} == {dtype}
    assert not up.requires_grad
    assert up.is_contiguous()
    assert down.is_contiguous()
    exact = decompose(weight.double(), row_weight=rows, input_gram=x.T @ x).factors(4)
    # one rounding per factor
    torch.testing.assert_close(up.double(), exact[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(down.double(), exact[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
def test_a_single_row_or_column_is_its_own_factor(shape: tuple[int, int], weighting: str) -> None:
    weight, rows, x = problem(*shape)
    up, down = low_rank_factors(weight, 1, **keywords(weighting, rows, x))
    torch.testing.assert_close(up @ down, weight)


def test_a_weight_of_low_rank_is_found_exactly() -> None:
    weight = problem(40, 3)[0] @ problem(3, 30)[0]
    found = decompose(weight)
    assert float(found.tails[3]) < 1e-14 * float(found.tails[0])
    torch.testing.assert_close(torch.mm(*found.factors(3)), weight, rtol=1e-11, atol=1e-11)


def test_fewer_factors_keep_all_tails() -> None:
    weight, rows, x = problem(12, 8)
    whole = decompose(weight, row_weight=rows, input_gram=x.T @ x)
    part = decompose(weight, 3, row_weight=rows, input_gram=x.T @ x)
    assert torch.equal(part.tails, whole.tails)
    assert [tuple(factor.shape) for factor in (part.up, part.down)] == [(12, 3), (3, 8)]
    for one, other in zip(part.factors(2), whole.factors(2), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(SettingError, match=r"rank must be in 1\.\.3 .* got 4"):
        part.factors(4)


@pytest.mark.parametrize("shape", [(200, 150), (150, 200)])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_randomized_solver_is_within_a_thousandth_of_the_best(decay: float, shape: tuple[int, int]) -> None:
    """Singular values i^−decay: flat ones are the hardest. Its tails are the errors of its own factors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    weight = u * s * torch.arange(1, 151, dtype=torch.float64) ** -decay @ vh
    _, rows, x = problem(*shape, tokens=300)
    for weighting in ("none", "both"):
        options = keywords(weighting, rows, x)
        best, fast = decompose(weight, **options), decompose(weight, 10, solver="randomized", **options)
        assert fast.tails.shape == (11,)
        assert float(fast.tails[0]) == pytest.approx(float(best.tails[0]), rel=1e-10)
        assert bool((fast.tails >= best.tails[:11] * (1 - 1e-10)).all())
        assert float(fast.tails[10]) <= 1.001 * float(best.tails[10])
        for rank in (1, 10):
            up, down = fast.factors(rank)
            difference = (rows[:, None] if weighting == "both" else 1) * (weight - up @ down)
            difference = difference @ x.T if weighting == "both" else difference
            assert float(difference.square().sum()) == pytest.approx(float(fast.tails[rank]), rel=1e-7)
        again = decompose(weight, 10, solver="randomized", **options)
        assert torch.equal(again.tails, fast.tails)


def test_auto_is_randomized_far_below_a_large_rank_only(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _, _ = problem(96, 80)
    assert len(decompose(weight, 5).tails) == 81
    monkeypatch.setattr(module, "RANDOMIZED_SIDE", 80)
    assert len(decompose(weight, 5).tails) == 6
    assert len(decompose(weight, 6).tails) == 81
    assert len(decompose(weight, 5, solver="full").tails) == 81
    assert len(decompose(weight, 50, solver="randomized").tails) == 81  # with its spare vectors it is full


def test_a_float32_gram_matrix_will_do() -> None:
    """Rounding of a Gram matrix summed in float32, with features over four orders, is neither asymmetry nor minus."""
    weight, _, x = problem(40, 64, tokens=50)
    x = x * torch.logspace(-2, 2, 64)
    for matrix in (weight, weight.T.repeat(1, 2)[:, :64], torch.cat([weight, -2 * weight.flip(1)])):
        single = decompose(matrix, input_gram=x.float().T @ x.float()).tails
        double = decompose(matrix, input_gram=x.T @ x).tails
        torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-6 * float(double[0]))


def test_order_of_the_tails_and_device() -> None:
    weight, rows, x = problem(12, 8)
    tails = decompose(weight, row_weight=rows, input_gram=x.T @ x).tails
    assert bool((tails.diff() <= 0).all())
    assert (tails.dtype, tails.device.type, float(tails[-1])) == (torch.float64, "cpu", 0.0)
