"""`onnx-int4`: nodes compute with the codes that rounding gave, Gemm included, and what can't be done says so."""

from collections import Counter

import numpy as np
import pytest
import torch

import exports
import tiny
from hfshrink.errors import SettingError
from hfshrink.loading import load
from hfshrink.quantization.graphs.four_bit import FourBitWriter, Grid, make_four_bit, pack
from hfshrink.quantization.graphs.rounding import dequantized, round_clipped, round_to_nearest

ROWS = [tiny.inputs("gpt2", batch=8, length=12, seed=seed) for seed in range(6)]


def ops(program):
    return Counter(node.op_type for node in program.graph)


def differences(model, exported, family="gpt2", **more):
    batch = tiny.inputs(family)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else None
    expected, got = tiny.logits(model, batch), exported(**batch, **more).logits
    return ((expected - got)[real] if expected.ndim == 3 else expected - got).abs(), expected.abs().mean()


@pytest.fixture(scope="module")
def aware():
    with pytest.MonkeyPatch.context() as patch:
        return exports.make(make_four_bit, "gpt2", patch, ["lm_head"], calibration=ROWS, group_size=16)


def written(grid, rounding, tables=None):
    _, exported = exports.of("bert")
    writer = FourBitWriter(exported.program, ["classifier"])
    writer.write_matrices(grid, rounding, {}, {})
    if tables:
        writer.write_tables(tables)
    return exported, writer.finish()


def test_gemm_of_gpt2_is_converted_and_generates(aware):
    gpt2, (exported, changed, results) = aware
    assert ops(exported.program)["MatMulNBits"] == 8
    assert ops(exported.program)["Gemm"] == 0
    assert {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.wte"} <= set(changed)
    assert "lm_head" not in changed
    assert (results["rounding"], results["rounded_without_data"]) == ("gptq", [])
    assert results["output_error_to_nearest"] < 0.8
    difference, size = differences(gpt2, exported)
    assert 0 < difference.mean() < 0.3 * size
    tokens = exported.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 7


def test_saved_export_generates_the_same(aware, tmp_path):
    _, (exported, *_) = aware
    exported.save_pretrained(tmp_path / "lm")
    ids = torch.tensor([[5, 6, 7]])
    again = load(tmp_path / "lm")[0].generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, exported.generate(input_ids=ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [1, 4])
def test_graph_computes_with_the_codes(symmetric, level):
    """PyTorch with the dequantized weights gives the same, up to the kernel's 8-bit activations."""
    exported, changed = written(Grid(4, 32, symmetric, level), round_clipped)
    assert ops(exported.program)["MatMulNBits"] == len(changed)
    bert, model = (tiny.model("bert", **exports.SIZES["bert"]) for _ in range(2))
    for name in changed:
        weight = model.get_submodule(name).weight
        weight.data = dequantized(*round_clipped(weight, 4, 32, symmetric), 32)
    difference, _ = differences(model, exported, token_type_ids=torch.zeros(3, 7, dtype=torch.long))
    from_float, _ = differences(bert, exported, token_type_ids=torch.zeros(3, 7, dtype=torch.long))
    assert difference.max() < (1e-4 if level == 1 else 0.05)
    assert from_float.mean() > difference.mean()


@pytest.mark.parametrize("bits", [4, 8])
def test_tables_give_the_rows_of_the_codes(bits):
    exported, changed = written(Grid(4, 32, True, 1), round_to_nearest, Grid(bits, 32, True, 1))
    assert "bert.embeddings.word_embeddings" in changed
    assert ops(exported.program)["GatherBlockQuantized"] == 3
    model = tiny.model("bert", **exports.SIZES["bert"])
    for name in changed:
        weight, table = model.get_submodule(name).weight, "embeddings" in name
        rounding = round_clipped if table and bits == 4 else round_to_nearest
        weight.data = dequantized(*rounding(weight, bits if table else 4, 32), 32, bits if table else 4)
    difference, _ = differences(model, exported, token_type_ids=torch.zeros(3, 7, dtype=torch.long))
    assert difference.max() < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_tied_table_is_stored_once(bits, monkeypatch):
    sizes = {"head_bits": bits, "embeddings": f"int{bits}"}
    model, (exported, changed, _) = exports.make(make_four_bit, "llama", monkeypatch, group_size=32, **sizes)
    assert {"lm_head", "model.embed_tokens"} <= set(changed)
    stored = [value.const_value.numpy() for value in exported.program.graph.initializers.values()]
    assert sum(array.dtype == np.uint8 and array.shape[:1] == (tiny.VOCABULARY,) for array in stored) == 1
    assert not any(array.dtype == np.float32 and array.size >= 32 * 24 for array in stored)
    difference, size = differences(model, exported)
    assert difference.mean() < 0.5 * size


def test_convolutions_stay_float_and_are_counted(monkeypatch):
    model, (exported, changed, results) = exports.make(make_four_bit, "resnet", monkeypatch, group_size=16)
    assert changed == ["classifier.1"]
    count = ops(exported.program)["Conv"]
    assert count > 0
    assert results["note"].startswith(f"{count} convolutions stay float")
    difference, size = differences(model, exported, "resnet")
    assert 0 < difference.mean() < 0.2 * size
    with pytest.raises(SettingError, match="convolutions stay float, they need onnx-int8-static"):
        exports.make(make_four_bit, "resnet", monkeypatch, ["classifier.1"])


def test_packing_by_hand():
    codes = torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8)
    assert pack(codes, 4, 4).tolist() == [[[0x21, 0x43], [0x05, 0]]]
    assert pack(codes, 8, 4).tolist() == [[[1, 2, 3, 4], [5, 0, 0, 0]]]
    assert pack(codes, 4, 4).dtype == np.uint8


def test_nothing_to_quantize_raises():
    model, exported = exports.of("bert")
    with pytest.raises(SettingError, match="nothing to quantize: no MatMul or Gemm with constant weights"):
        FourBitWriter(exported.program, [name for name, _ in model.named_modules()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "gptq"}, "GPTQ .* needs calibration"),
        ({"rounding": "up"}, "rounding must be one of rtn, clip, hqq, gptq, got 'up'"),
        ({"group_size": 48}, "group_size must be one of 16, 32, 64, 128, 256, got 48"),
        ({"embeddings": "int2"}, "embeddings must be one of int8, int4, fp32, got 'int2'"),
        ({"head_bits": 3}, "head_bits must be one of 4, 8, got 3"),
        ({"accuracy_level": 9}, "accuracy_level must be one of"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SettingError, match=message):
        make_four_bit(None, None, [], **options)
