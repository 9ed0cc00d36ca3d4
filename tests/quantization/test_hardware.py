"""`auto`: what the processor can do is read from the system's words, and the table's first fitting line is taken."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

import tiny
from hfshrink.quantization import hardware
from hfshrink.quantization.hardware import (
    EXTRAS,
    FLAGS,
    RULES,
    choose_scheme,
    features_in,
    installed_extras,
    model_kind,
    processor_features,
    warn_if_slower,
)

X86 = """processor\t: 0
model name\t: AMD EPYC
flags\t\t: fpu sse2 avx avx2 avx512f avx512_bf16 avx512_vnni
bogomips\t: 4000
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm bf16
"""
MAC = """hw.optional.neon: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 0
hw.optional.arm.FEAT_DotProd: 1
hw.optional.avx512f: 0
"""
EVERYTHING = frozenset(EXTRAS)


@pytest.fixture(scope="module")
def models():
    seq2seq = AutoModelForSeq2SeqLM.from_config(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    made = {"encoder": tiny.model("bert"), "conv": tiny.model("resnet"), "causal": tiny.model("llama")}
    return {**made, "seq2seq": seq2seq}


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (X86, {"avx2", "avx512", "bf16", "vnni"}),
        (ARM, {"neon", "dotprod", "i8mm", "bf16"}),
        (MAC, {"neon", "bf16", "dotprod"}),
        ("flags : avx_vnni", {"vnni"}),
        ("model name : avx2 vnni", set()),
        ("no colon\x00 here", set()),
        ("", set()),
    ],
)
def test_features_are_the_flags_of_the_flags_line(text, features):
    assert features_in(text) == features


def test_this_processor_is_known_by_the_same_words_as_pytorch_uses():
    found = processor_features()
    assert found <= {*FLAGS, "cuda"}
    capability = torch.backends.cpu.get_cpu_capability()
    if capability in ("AVX2", "AVX512"):
        assert capability.lower() in found


def test_without_a_word_from_the_system_pytorch_is_asked(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", missing)
    monkeypatch.setattr(hardware.platform, "system", lambda: "Windows")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processor_features() == {"avx2", "avx512"}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert processor_features() == frozenset()


def test_a_mac_without_sysctl_does_not_raise(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", missing)
    monkeypatch.setattr(hardware.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(hardware.subprocess, "run", missing)
    assert isinstance(processor_features(), frozenset)


def test_a_broken_gpu_driver_does_not_raise(monkeypatch):
    def broken():
        raise RuntimeError("driver")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert "cuda" not in processor_features()


def test_kinds(models):
    assert {kind: model_kind(model) for kind, model in models.items()} == {kind: kind for kind in models}
    assert model_kind(tiny.model("llama", "text-classification")) == "encoder"
    assert model_kind(tiny.model("vit")) == "encoder"  # one small convolution, and Linears


@pytest.mark.parametrize(
    ("kind", "calibrated", "features", "installed", "scheme"),
    [
        ("encoder", False, {"avx2", "vnni"}, EVERYTHING, "onnx-int8"),
        ("encoder", True, {"avx2", "vnni"}, EVERYTHING, "onnx-int8"),
        ("encoder", True, {"avx2", "vnni"}, {"onnx"}, "onnx-int8"),
        ("encoder", True, {"avx2"}, EVERYTHING, "onnx-int8"),
        ("encoder", False, {"neon"}, {"onnx"}, "onnx-int8"),
        ("encoder", True, {"vnni", "cuda"}, EVERYTHING, "bf16"),
        ("encoder", True, {"vnni"}, (), "bf16"),
        ("conv", True, {"vnni"}, EVERYTHING, "onnx-int8-static"),
        ("conv", True, {"vnni"}, {"openvino"}, "openvino-int8"),
        ("conv", True, {"neon"}, EVERYTHING, "onnx-int8-static"),
        ("conv", False, {"vnni", "bf16"}, EVERYTHING, "bf16"),
        ("conv", False, {"vnni"}, EVERYTHING, "onnx-fp16"),
        ("causal", False, {"vnni"}, EVERYTHING, "onnx-int8"),
        ("causal", False, {"cuda"}, EVERYTHING, "nf4"),
        ("causal", False, {"cuda"}, {"onnx"}, "bf16"),
        ("seq2seq", False, {"vnni"}, EVERYTHING, "bf16"),
        ("seq2seq", False, {"cuda"}, EVERYTHING, "int8"),
    ],
)
def test_the_scheme_follows_kind_data_processor_and_packages(models, kind, calibrated, features, installed, scheme):
    chosen, reason = choose_scheme(models[kind], calibrated, features, installed)
    assert chosen == scheme
    assert reason.endswith(".")
    assert "\n" not in reason


def test_a_causal_model_of_a_billion_parameters_gets_four_bits():
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        large = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=5))
    assert choose_scheme(large, features=set(), installed={"onnx"})[0] == "onnx-int4"


def test_the_reason_says_what_calibration_would_bring(models):
    assert "calibration=" not in choose_scheme(models["encoder"], False, {"vnni"}, EVERYTHING)[1]
    assert "calibration=, onnx-int8-static" in choose_scheme(models["conv"], False, set(), {"onnx"})[1]
    assert "calibration=" not in choose_scheme(models["conv"], True, set(), {"onnx"})[1]


def test_every_line_of_the_table_can_win(models):
    """A line that an earlier one always beats would be dead."""
    won = set()
    for number, rule in enumerate(RULES):
        earlier = [r for r in RULES[:number] if r.kind == rule.kind]
        for r in earlier:
            weaker = (
                set(r.features) <= set(rule.features)
                and r.installed in (None, rule.installed)
                and r.calibrated <= rule.calibrated
                and r.parameters <= rule.parameters
            )
            assert not weaker, (r, rule)
        won.add(rule.kind)
    assert won == set(models)


def test_installed_extras_are_looked_up_without_imports():
    import importlib.util

    assert ("openvino" in installed_extras()) == all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))


@pytest.mark.parametrize(
    ("scheme", "features", "words"),
    [
        ("int8", {"bf16"}, "is faster"),
        ("nf4", {"bf16"}, "bfloat16"),
        ("nf4", set(), None),
        ("nf4", {"bf16", "cuda"}, None),
        ("bf16", {"bf16"}, None),
        ("bf16", {"avx2"}, "no bfloat16 instructions"),
        ("onnx-fp16", {"bf16"}, "no faster"),
        ("onnx-int8", {"bf16"}, None),
    ],
)
def test_schemes_that_are_slower_here_are_named(scheme, features, words):
    warning = warn_if_slower(scheme, features)
    assert warning is None if words is None else words in warning
