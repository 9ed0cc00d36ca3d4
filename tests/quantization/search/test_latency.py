"""Times of matrix products: which products there are, what is timed once, and what is told."""

from __future__ import annotations

import pytest
import torch

import tiny
from hfshrink.errors import SettingError
from hfshrink.quantization.search.latency import find_products, measure_costs
from hfshrink.quantization.search.mixed_graphs import _write

pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def test_products_of_one_example():
    """34 tokens, the positions of a tiny BERT; the pooler reads one of them."""
    model = tiny.model("bert").train()
    names = ["bert.encoder.layer.0.intermediate.dense", "bert.pooler.dense"]
    state = torch.get_rng_state()
    found = find_products(model, tiny.tokenizer(), names)
    assert found == {names[0]: (34, 16, 24), names[1]: (1, 16, 16)}
    assert list(found) == names
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.idle = torch.nn.Linear(2, 2)
    with pytest.raises(SettingError, match="idle did not run, so there is no time of it"):
        find_products(model, None, ["idle"])


def test_each_product_is_timed_once_and_in_its_precision():
    made = []

    def write(product, name):
        made.append(name)
        exported = product if name == "fp32" else _write(product, {"matrix": name}, (), 16)[0]
        made.append({node.op_type for node in exported.components["model"].program.graph})
        return exported

    products = {"a": (4, 16, 32), "b": (4, 16, 32)}
    found = measure_costs(products, ("int4", "int8", "fp32"), write)
    assert made[::2] == ["int4", "int8", "fp32"]
    assert "MatMulNBits" in made[1]
    assert "MatMulInteger" in made[3]
    assert made[5] == {"MatMul"}
    assert found["a"] == found["b"]
    assert all(isinstance(cost, int) and cost >= 1 for cost in found["a"].values())


def test_more_work_takes_longer():
    found = measure_costs({"small": (4, 16, 16), "large": (128, 512, 512)}, ("fp32",), lambda product, _: product)
    assert found["large"]["fp32"] > 3 * found["small"]["fp32"]
