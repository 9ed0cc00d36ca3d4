"""Exports of models that were trained for them: their own ranges and groups, and the parity with what was trained."""

from __future__ import annotations

import pytest
from transformers import AutoModelForSequenceClassification

import tiny
import training
from hfshrink import CompressionTrainer, quantize, report
from hfshrink.quantization.exports import _as_trained
from hfshrink.quantization.graphs.four_bit import make_four_bit
from hfshrink.quantization.request import Request
from hfshrink.quantization.training.exporting import make_learned
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import QATTrainer

pytest.importorskip("onnxruntime", reason="needs the extra onnx")

WIDE = {"hidden_size": 32, "intermediate_size": 64}
GROUPS = QAT(4, activation_bits=None, group_size=32)


def trained(quantization, cls=QATTrainer, **how):
    network = tiny.model("bert", seed=1, **WIDE)
    args = training.arguments(max_steps=2, optim="adamw_torch", learning_rate=1e-3)
    rows = {"train_dataset": training.rows(16), "data_collator": training.collate}
    cls(network, args, quantization=quantization, **rows, **how).train()
    return network.eval()


def plan(model, scheme, **options):
    calibration = options.pop("calibration", None)
    rest = (None, calibration, None, None, None, None, None, False, False, options)
    return _as_trained(Request(model, scheme, *rest), model)


def test_what_was_trained_chooses_the_maker():
    static, groups = trained(QAT()), trained(GROUPS)
    assert plan(static, "onnx-int8-static") == (make_learned, {}, True)
    assert plan(static, "onnx-int8-static", calibration=[{}])[0] is not make_learned
    assert plan(static, "onnx-int8-static", samples=8)[1:] == ({"samples": 8}, False)
    assert plan(static, "onnx-int4")[1:] == ({}, False)
    assert plan(groups, "onnx-int4") == (make_four_bit, {"rounding": "rtn", "group_size": 32}, True)
    assert plan(groups, "onnx-int8-static")[1:] == ({}, False)
    assert plan(tiny.model("bert"), "onnx-int4")[1:] == ({}, False)


def test_the_training_is_found_behind_later_steps():
    """The teacher's step comes last; the group size is that of the training, not the usual one."""
    quantization = QAT(3, activation_bits=None, group_size=16, embeddings=True)
    model = trained(quantization, CompressionTrainer, teacher=tiny.model("bert", seed=2, **WIDE))
    assert [step.technique for step in report(model).steps] == ["quantize", "distill"]
    options = {"rounding": "rtn", "group_size": 16, "embeddings": "int4"}
    assert plan(model, "onnx-int4") == (make_four_bit, options, True)


def test_eight_bits_in_groups_are_not_four():
    model = trained(QAT(8, activation_bits=None, group_size=16))
    assert plan(model, "onnx-int4")[1:] == ({}, False)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [QAT(), QAT(embeddings=True), QAT(4, embeddings=True)])
def test_learned_ranges_need_no_calibration(quantization):
    """Tables too hold the trained codes, also those of 4 bits, which a scale of max|w| / 127 would round anew."""
    step = report(quantize(trained(quantization), "onnx-int8-static", processor=tiny.tokenizer())).steps[-1]
    assert step.results["ranges_from"] == "training"
    assert step.results["parity"]["max_difference"] < 1e-5
    assert len(step.modules) == 13 + 3 * quantization.embeddings


def test_learned_ranges_outlive_saving(tmp_path):
    trained(QAT(4)).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    step = report(quantize(model, "onnx-int8-static", processor=tiny.tokenizer())).steps[-1]
    assert step.results["ranges_from"] == "training"
    assert step.results["parity"]["max_difference"] < 1e-5
    assert step.results["fused"]["attention"] == 2


@pytest.mark.slow
def test_trained_groups_are_found_again():
    """The kernel rounds activations to 8 bits; the weights are the trained ones."""
    exported = quantize(trained(GROUPS), "onnx-int4", processor=tiny.tokenizer())
    parity = report(exported).steps[-1].results["parity"]
    assert parity["max_difference"] < 0.02
    assert parity["agreement"] == 1.0
