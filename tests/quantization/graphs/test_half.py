"""`onnx-fp16`: half the bytes, float32 at both ends, and an error for weights and activations that don't fit."""

import numpy as np
import onnx_ir
import pytest
import torch

import exports
import tiny
from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.half import make_half, to_half
from hfshrink.quantization.graphs.nodes import module_of, weight_nodes
from hfshrink.quantization.graphs.parity import check_parity


@pytest.fixture(scope="module")
def bert():
    with pytest.MonkeyPatch.context() as patch:
        return exports.make(make_half, "bert", patch, ["classifier"])


def weights(program):
    found = {name: value.const_value for name, value in program.graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if tensor is not None and len(tensor.shape) > 1}


def test_outputs_are_close_and_float32(bert):
    model, (exported, *_) = bert
    batch = tiny.inputs("bert")
    got = exported(**batch, token_type_ids=torch.zeros_like(batch["input_ids"])).logits
    expected = tiny.logits(model, batch)
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_are_half_and_kept_ones_are_not(bert):
    _, (exported, changed, results) = bert
    kinds = {name: tensor.dtype for name, tensor in weights(exported.program).items()}
    assert kinds.pop("classifier.weight") == onnx_ir.DataType.FLOAT
    assert onnx_ir.DataType.FLOAT not in kinds.values()
    assert "bert.encoder.layer.0.output.dense" in changed
    assert "classifier" not in changed
    assert "halves the file" in results["note"]


def test_language_models_generate_in_half(monkeypatch):
    model, (exported, *_) = exports.make(make_half, "llama", monkeypatch)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [0, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    expected = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(exported.generate(**batch, max_new_tokens=3, do_sample=False), expected)


def test_convolutional_networks_run_in_half(monkeypatch):
    model, (exported, changed, _) = exports.make(make_half, "resnet", monkeypatch)
    batch = tiny.inputs("resnet")
    expected, got = tiny.logits(model, batch), exported(**batch).logits
    assert 0 < (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert onnx_ir.DataType.FLOAT not in {tensor.dtype for tensor in weights(exported.program).values()}
    assert any("convolution" in name for name in changed)


def test_weights_that_do_not_fit_are_named():
    model, exported = exports.of("bert")
    program = exported.program
    name = next(name for name in weights(program) if name.endswith("word_embeddings.weight"))
    values = program.graph.initializers[name].const_value.numpy().copy()
    values[3, 3] = 1e5
    program.graph.initializers[name].const_value = onnx_ir.Tensor(values, name=name)
    message = r"word_embeddings.weight of bert.embeddings.word_embeddings holds 1e\+05; float16 ends at 65504"
    with pytest.raises(SettingError, match=message):
        to_half(program)
    with pytest.raises(SettingError, match="nothing to convert"):
        to_half(program, [module for module, _ in model.named_modules()])


def test_activations_that_do_not_fit_are_found():
    """Each weight fits; a sum of their products does not."""
    model, exported = exports.of("bert")
    for node in weight_nodes(exported.program, ("MatMul", "Gemm")):
        if module_of(node).endswith("intermediate.dense"):
            values = node.inputs[1].const_value.numpy()
            node.inputs[1].const_value = onnx_ir.Tensor(
                values * (6e4 / np.abs(values).max()), name=node.inputs[1].name
            )
    check_parity(model, exported, None, "text-classification")
    exported = type(exported)(exported.components, exported.export_format, exported.config)
    exported.components["model"].program, _ = to_half(exported.program)
    with pytest.raises(SettingError, match="outputs hold NaN or infinity"):
        check_parity(model, exported, None, "text-classification")
