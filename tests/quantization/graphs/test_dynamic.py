"""`make_dynamic`: fused and plain int8 graphs are as close to the model, with the same weights."""

import numpy as np
import pytest
import torch
from transformers.exporters import ExportedComponent, ExportedModel

import tiny
from hfshrink.errors import SettingError
from hfshrink.quantization.graphs import dynamic
from hfshrink.quantization.graphs.exporting import export_float
from hfshrink.quantization.graphs.fusing import fuse_graph
from hfshrink.quantization.graphs.nodes import module_of, weight_nodes

INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [5, 9, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    "token_type_ids": torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]),
}


@pytest.fixture(scope="module")
def bert():
    return tiny.model("bert", num_labels=3)


@pytest.fixture(scope="module")
def exported(bert):
    return export_float(bert)


@pytest.fixture(scope="module")
def made(bert, exported):
    """fuse -> what `make_dynamic` returns; one export serves both."""

    def clone(model, processor, generation):
        component = exported.components["model"]
        components = {"model": ExportedComponent(component.program.clone(), component.metadata)}
        return ExportedModel(components, exported.export_format, config=exported.config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "export_graph", clone)
        return {
            fuse: dynamic.make_dynamic(bert, None, ["classifier"], fuse=fuse, reduce_range=False)
            for fuse in (True, False)
        }


def codes(exported):
    graph = exported.components["model"].program.graph
    tensors = [value.const_value.numpy() for value in graph.initializers.values() if value.const_value is not None]
    return sorted(one.tobytes() for one in tensors if one.dtype == np.int8 and one.ndim == 2)


def test_the_fused_float_graph_equals_the_model_with_an_empty_row_too(bert, exported):
    component = exported.components["model"]
    program = component.program.clone()
    assert fuse_graph(program) == {"attention": 2, "norms": 5}
    fused = ExportedModel({"model": ExportedComponent(program, component.metadata)}, "onnx", config=exported.config)
    inputs = {**INPUTS, "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]])}
    assert torch.allclose(fused(**inputs).logits, tiny.logits(bert, inputs), atol=1e-5)


def test_record_says_what_was_fused(made):
    assert made[True][2] == {"reduce_range": False, "fused": {"attention": 2, "norms": 5}}
    assert made[False][2] == {"reduce_range": False, "fused": {}}


def test_fused_and_plain_hold_the_same_weights_of_the_same_modules(made):
    assert made[True][1] == made[False][1]
    assert codes(made[True][0]) == codes(made[False][0])


def test_fused_is_as_close_to_the_model_as_plain(bert, made):
    expected = tiny.logits(bert, INPUTS)
    errors = [float((made[fuse][0](**INPUTS).logits - expected).abs().max()) for fuse in (True, False)]
    assert 0 < max(errors) < 0.1 * float(expected.abs().max())
    assert torch.allclose(made[True][0](**INPUTS).logits, made[False][0](**INPUTS).logits, atol=max(errors))


def test_graph_is_of_standard_operators_only(made):
    program = made[True][0].components["model"].program
    assert {node.domain for node in program.graph} <= {"", "ai.onnx"}
    assert [node.op_type for node in program.graph].count("Attention") == 2


def test_queries_keys_and_values_are_quantized_once(made):
    """q, k and v read the same activations: 4 quantizations per layer for 6 products, and one for the pooler."""
    ops = [node.op_type for node in made[True][0].components["model"].program.graph]
    assert (ops.count("MatMulInteger"), ops.count("DynamicQuantizeLinear")) == (13, 9)


def test_reduce_range_keeps_seven_bits(exported):
    reduced, _ = dynamic.quantize_dynamic(exported, reduce_range=True)
    largest = max(np.abs(np.frombuffer(one, np.int8).astype(int)).max() for one in codes(reduced))
    assert largest <= 64


def test_nothing_left_to_quantize_is_told(exported):
    nodes = weight_nodes(exported.components["model"].program, dynamic.QUANTIZED_OPS)
    with pytest.raises(SettingError, match="nothing to quantize"):
        dynamic.quantize_dynamic(exported, [module_of(node) for node in nodes])
