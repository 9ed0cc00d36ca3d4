"""Rounding to few bits: cases by hand, ONNX Runtime's own packing, a loop without blocks, and laws."""

import numpy as np
import pytest
import torch

from hfshrink.errors import SettingError
from hfshrink.quantization.graphs import rounding
from hfshrink.quantization.graphs.rounding import (
    dequantized,
    gptq,
    hqq,
    output_error,
    round_clipped,
    round_to_nearest,
)

DATA_FREE = (round_to_nearest, round_clipped, hqq)


def weight(rows=24, columns=64, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns=64, rows=400, seed=1):
    """Correlated, with a few loud columns, as in a transformer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, ::13] *= 4
    return x


def test_symmetric_by_hand():
    """The largest entry, 4, gets code 0 by a negative scale: 4 / −8; the others are w / −0.5 + 8."""
    codes, scales, zero_points = round_to_nearest(torch.tensor([[4.0, -3.5, 0.3, 0.0]]), 4, None)
    assert (codes.tolist(), scales.tolist(), zero_points) == ([[0, 15, 7, 8]], [[-0.5]], None)
    assert codes.dtype == torch.uint8


def test_asymmetric_by_hand():
    """Range 0 … 3 in three steps: scale 1, zero point 0; and −1 … 2: zero point 1."""
    codes, scales, zeros = round_to_nearest(torch.tensor([[0.0, 3.0, 1.2, 2.0], [-1.0, 2.0, 0.4, 0.0]]), 2, 4, False)
    assert codes.tolist() == [[0, 3, 1, 2], [0, 3, 1, 1]]
    assert (scales.tolist(), zeros.tolist()) == ([[1.0], [1.0]], [[0], [1]])


@pytest.mark.parametrize("function", DATA_FREE)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_on_the_grid_stay(function, symmetric, bits):
    grid = dequantized(*round_to_nearest(weight(), bits, 16, symmetric), 16, bits)
    again = dequantized(*function(grid, bits, 16, symmetric), 16, bits)
    assert torch.allclose(grid, again, atol=1e-6)


@pytest.mark.parametrize("function", DATA_FREE)
def test_error_is_at_most_half_a_step_when_nothing_is_clipped(function):
    made = function(weight(), 8, 16, False)
    steps = made.scales.abs().repeat_interleave(16, dim=1)
    error = (dequantized(*made, 16, 8) - weight()).abs()
    if function is round_to_nearest:
        assert (error <= 0.501 * steps).all()
    assert error.mean() < 0.3 * steps.mean()


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_those_of_onnx_runtime(symmetric):
    native = pytest.importorskip("onnxruntime.capi._pybind_state")
    from hfshrink.quantization.graphs.four_bit import pack

    for width in (64, 40):
        w, groups = weight(columns=width), -(-width // 32)
        packed = np.zeros((24, groups, 16), np.uint8)
        scales, zeros = np.zeros((24, groups), np.float32), np.zeros((24, (groups + 1) // 2), np.uint8)
        padded = np.ascontiguousarray(np.pad(w.numpy().T, ((0, groups * 32 - width), (0, 0))))
        native.quantize_matmul_4bits(packed, padded, scales, zeros, 32, 24, width, symmetric)
        made = round_to_nearest(w, 4, 32, symmetric)
        assert np.array_equal(made.scales.numpy(), scales)
        mine = pack(made.codes, 4, 32)
        full = width // 32  # of the last group ONNX Runtime leaves the padding at 0, as `pack` does
        assert np.array_equal(mine[:, :full], packed[:, :full])
        assert np.array_equal(mine, packed)
        if not symmetric:
            assert np.array_equal(pack(made.zero_points, 4, 2)[:, 0, 0], zeros[:, 0])


def test_last_group_may_be_shorter():
    made = round_to_nearest(weight(columns=40), 4, 16)
    assert (made.codes.shape, made.scales.shape) == ((24, 40), (24, 3))
    whole = round_to_nearest(weight(columns=40)[:, 32:], 4, None)
    assert torch.equal(made.codes[:, 32:], whole.codes)


def test_zeros_stay_zero():
    for function in DATA_FREE:
        for symmetric in (True, False):
            made = function(torch.zeros(2, 16), 4, 16, symmetric)
            assert not dequantized(*made, 16).any()
            assert torch.isfinite(made.scales).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_clipping_and_hqq_lower_what_they_minimize(symmetric, bits):
    w = weight()
    near, clipped, half = (dequantized(*f(w, bits, 32, symmetric), 32, bits) - w for f in DATA_FREE)
    assert clipped.square().sum() < near.square().sum()
    assert half.abs().pow(0.7).sum() < near.abs().pow(0.7).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reorder", [True, False])
def test_gptq_is_the_plain_loop_of_its_paper(symmetric, reorder, monkeypatch):
    """One column at a time, the inverse Hessian shrunk by elimination: no blocks, no Cholesky factor."""
    monkeypatch.setattr(rounding, "BLOCK_COLUMNS", 7)
    w, x = weight(6, 32), inputs(32)
    gram = (x.T @ x).double()
    made = gptq(w, gram, 3, 16, symmetric, reorder=reorder)
    zeros = made.zero_points if made.zero_points is not None else torch.full_like(made.scales, 4)
    left, codes = w.double().clone(), torch.zeros_like(w)
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(32, dtype=torch.float64))
    order = gram.diagonal().argsort(descending=True) if reorder else torch.arange(32)
    for column in order.tolist():
        scale, zero = made.scales[:, column // 16].double(), zeros[:, column // 16].double()
        codes[:, column] = (left[:, column] / scale + zero + 0.5).floor().clamp(0, 7)
        error = (left[:, column] - scale * (codes[:, column] - zero)) / inverse[column, column]
        left -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    assert (codes != made.codes).float().mean() < 0.02  # ties of float32 and float64


def test_gptq_has_the_least_output_error():
    """20–40 % less than rounding to the nearest is the published range; loud correlated inputs give more."""
    w, x = weight(48, 128), inputs(128)
    gram = x.T @ x
    for bits in (3, 4):
        errors = [output_error(w - dequantized(*f(w, bits, 32), 32, bits), gram) for f in DATA_FREE]
        aware = output_error(w - dequantized(*gptq(w, gram, bits, 32), 32, bits), gram)
        assert aware < 0.6 * min(errors)


def test_output_error_is_the_difference_of_outputs():
    x, d = inputs(16).double(), weight(4, 16).double()
    assert torch.allclose(output_error(d, x.T @ x), (x @ d.T).square().sum())


def test_gptq_without_correlation_rounds_each_weight_alone():
    w = weight(8, 32)
    made = gptq(w, torch.eye(32), 4, 16, reorder=False)
    assert torch.equal(made.codes, round_clipped(w, 4, 16).codes)


def test_gptq_without_damping_takes_the_hessian_as_it_is():
    """With H of 1e-6 times the size, a floor of the damping that does not scale would drown it."""
    w, gram = weight(8, 32), inputs(32).T @ inputs(32)
    codes = [gptq(w, gram * unit, 4, 16, damping=0.0).codes for unit in (1.0, 1e-6)]
    assert (codes[0] != codes[1]).float().mean() < 0.02


def test_gptq_takes_columns_that_the_data_left_at_zero():
    gram = inputs(32).T @ inputs(32)
    gram[5] = gram[:, 5] = 0
    w = weight(8, 32)
    error = (dequantized(*gptq(w, gram, 4, 16), 16) - w)[:, 5].abs().max()
    assert error < 1
    assert torch.isfinite(dequantized(*gptq(w, torch.zeros(32, 32), 4, 16), 16)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_to_nearest(torch.zeros(3), 4, 16), r"shape \(out, in\), got \(3,\)"),
        (lambda: round_to_nearest(weight(), 1, 16), "bits must lie in 2..8, got 1"),
        (lambda: round_to_nearest(weight(), 4, 0), "group_size must be at least 1, or None for whole rows, got 0"),
        (lambda: hqq(torch.full((2, 16), float("nan")), 4, 16), "NaN or infinite"),
        (lambda: hqq(weight(), 4, 16, norm=2.0), r"norm must lie in \(0, 1\], got 2.0"),
        (lambda: gptq(weight(), torch.eye(3), 4, 16), r"of shape \(64, 64\), got \(3, 3\)"),
        (lambda: gptq(weight(), torch.ones(64, 64), 4, 16, damping=0.0), "not positive definite.*damping"),
        (lambda: gptq(weight(), -torch.eye(64), 4, 16), "not positive definite.*damping"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(SettingError, match=message):
        call()
