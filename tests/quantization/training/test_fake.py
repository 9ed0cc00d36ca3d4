"""The maths of fake quantization against hand cases, a slow autograd formulation and the ONNX reference."""

import numpy as np
import pytest
import torch

from hfshrink.quantization.training import fake


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow(values, scale, low, high, factor=1.0):
    """LSQ as autograd sees it: detached rounding and clipping, and a scale whose gradient is g times as large."""
    scale = (scale - scale * factor).detach() + scale * factor
    clipped = torch.clamp(values / scale, low, high)
    return (clipped.round() - clipped).detach().add(clipped) * scale


def test_by_hand():
    """s = 0.5, codes −2..2: halves go to the even neighbour, what is out of range saturates."""
    values = torch.tensor([-9.0, -0.75, -0.25, 0.0, 0.24, 0.25, 0.26, 0.75, 9.0])
    found = fake.fake_quantize(values, torch.tensor(0.5), -2, 2)
    assert found.tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0]


def test_weight_scales_by_hand():
    rows = torch.tensor([[[0.5, -1.4]], [[0.0, 0.0]]])
    assert fake.weight_scale(rows, 4).flatten().tolist() == pytest.approx([0.175, 1.0])
    assert fake.weight_scale(-rows, 4).flatten().tolist() == pytest.approx([-0.175, 1.0])
    assert fake.weight_scale(rows, 8).flatten().tolist() == pytest.approx([1.4 / 127, 1.0])
    assert fake.first_scale(torch.tensor([[[1.0, -3.0]]]), 2).item() == pytest.approx(1.5)  # 2 · 2 / √1, at most 3 / 2
    flat = torch.ones(1, 1, 100) * 0.1
    flat[..., 0] = 100.0
    assert fake.first_scale(flat, 4).item() == pytest.approx(2 * float(flat.mean()) / 7**0.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_is_on_the_grid_stays_there(bits):
    rows = numbers(6, 1, 40)
    low, high = fake.code_range(bits)
    once = fake.fake_quantize(rows, fake.weight_scale(rows, bits), low, high)
    scale = fake.weight_scale(once, bits)
    again = fake.fake_quantize(once, scale, low, high)
    assert torch.allclose(once, again, rtol=1e-6, atol=0)
    expected = (rows / fake.weight_scale(rows, bits)).round().clamp(low, high)
    assert torch.equal((once / scale).round(), expected)
    assert expected.abs().amax(-1).eq(-low).all()


def test_the_error_is_at_most_half_a_step_and_zero_stays_zero():
    values = numbers(1000) * 3
    low, high = values.aminmax()
    scale, zero_point = fake.affine(low, high)
    found = fake.fake_quantize(values, scale, -zero_point, 255 - zero_point)
    assert (found - values).abs().max() <= scale * (1 + 1e-4)  # the zero point is rounded too, at the two ends
    assert fake.fake_quantize(torch.zeros(3), scale, -zero_point, 255 - zero_point).eq(0).all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 4.0), (-4.0, -1.0)])
def test_ranges_always_hold_zero(low, high):
    scale, zero_point = fake.affine(torch.tensor(low), torch.tensor(high))
    assert 0 <= float(zero_point) <= 255
    assert float(scale) == pytest.approx(4 / 255 if low or high else 1.0)
    assert float(zero_point) == (255 if high < 0 else 0)


@pytest.mark.parametrize("bounds", [(-8, 7), (-1, 1), (-37.0, 218.0)])
@pytest.mark.parametrize("shape", [(), (6, 1, 1), (6, 2, 1)])
def test_gradients_equal_the_slow_formulation(bounds, shape):
    values, weight = numbers(6, 2, 10), numbers(6, 2, 10, seed=1)
    scale = 0.1 + numbers(*shape, seed=2).abs() / 5
    results = []
    for function in (fake.fake_quantize, slow):
        v, s = values.clone().requires_grad_(), scale.clone().requires_grad_()
        out = function(v, s, *bounds, 0.3)
        (out * weight).sum().backward()
        results.append((out.detach(), v.grad, s.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_gradient_of_a_weight_whose_largest_sets_the_scale_goes_straight_through():
    rows = numbers(5, 3, 8).requires_grad_()
    fake.fake_quantize(rows, fake.weight_scale(rows, 8), -127, 127).sum().backward()
    assert rows.grad.eq(1).all()


def test_rows_share_scales_as_asked():
    weight = numbers(6, 4, 3, 3)
    assert fake.as_rows(weight).shape == (6, 1, 36)
    assert fake.as_rows(weight, 12).shape == (6, 3, 12)
    assert torch.equal(fake.from_rows(fake.as_rows(weight, 12), weight), weight)
    transposed = numbers(8, 6)
    rows = fake.as_rows(transposed, 4, True)
    assert torch.equal(rows[2, 1], transposed[4:, 2])
    assert torch.equal(fake.from_rows(rows, transposed, True), transposed)


def test_half_precision_goes_through_float32():
    values = numbers(50).bfloat16()
    found = fake.fake_quantize(values, torch.tensor(0.03), -128, 127)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fake.fake_quantize(values.float(), torch.tensor(0.03), -128, 127).bfloat16())


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_those_of_onnx(seed):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    values = numbers(4000, seed=seed) * 2
    values[:256] = torch.arange(-128, 128) * 0.01 + 0.005  # halves
    scale, zero_point = fake.affine(torch.tensor(-1.0 - seed / 7), torch.tensor(1.55))
    h = onnx.helper
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    info = [h.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", "y")]
    constants = [
        onnx.numpy_helper.from_array(np.float32(scale), "s"),
        onnx.numpy_helper.from_array(np.uint8(zero_point), "z"),
    ]
    graph = h.make_graph(nodes, "pair", info[:1], info[1:], constants)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 21)])
    expected = ReferenceEvaluator(model).run(None, {"x": values.numpy()})[0]
    found = fake.fake_quantize(values, scale, -zero_point, 255 - zero_point)
    assert torch.allclose(found, torch.tensor(expected), rtol=1e-6, atol=1e-7)
