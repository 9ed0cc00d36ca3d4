"""transformers' own quantization configs: used, recorded without secrets, refused where they can't run."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import hfshrink
import tiny
from hfshrink.errors import MissingDependencyError, SettingError, UnsupportedModelError
from hfshrink.quantization.weights.bits import load_bits, quantize_nf4
from hfshrink.quantization.weights.foreign import (
    changed_layers,
    check_runnable,
    is_foreign_config,
    plain_config,
    quantize_with_config,
)

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def needs_bitsandbytes():
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")


def bare(kind, method, **fields):
    """A config whose own check for its package is left out."""
    config = object.__new__(getattr(transformers, kind))
    vars(config).update(quant_method=method, **fields)
    return config


@pytest.fixture
def folder(tmp_path):
    tiny.model("bert", **WIDE).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_a_bitsandbytes_config_is_our_scheme_of_the_same_settings(folder, tmp_path):
    needs_bitsandbytes()
    model, modules, results = quantize_with_config(folder, BitsAndBytesConfig(**NF4))
    ours, layers, _ = load_bits(folder, "nf4")
    one, other = model.state_dict(), ours.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert modules == layers
    assert results["skipped"] == {"classifier": "task head"}
    assert results["config"]["class"] == "BitsAndBytesConfig"
    assert json.loads(json.dumps(results["config"])) == results["config"]
    assert results["config"]["llm_int8_skip_modules"] == ["classifier"]
    logits = tiny.logits(model, tiny.inputs("bert"))
    model.save_pretrained(tmp_path / "saved")  # after a forward pass
    assert torch.equal(tiny.logits(type(model).from_pretrained(tmp_path / "saved"), tiny.inputs("bert")), logits)


def test_what_the_config_says_about_skipping_is_kept(folder):
    needs_bitsandbytes()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier", "bert.pooler"])
    _, modules, results = quantize_with_config(folder, config)
    assert len(modules) == 2 * 6
    assert results["skipped"] == {}
    assert config.llm_int8_skip_modules == ["classifier", "bert.pooler"]


def test_a_config_that_quantizes_nothing_raises(folder):
    needs_bitsandbytes()
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["bert", "classifier"])
    with pytest.raises(SettingError, match="BitsAndBytesConfig quantized none of the layers"):
        quantize_with_config(folder, config)


@pytest.mark.parametrize(
    ("kind", "method", "module", "package"),
    [
        ("TorchAoConfig", "torchao", "torchao", "torchao"),
        ("HqqConfig", "hqq", "hqq", "hqq"),
        ("GPTQConfig", "gptq", "gptqmodel", "gptqmodel"),
        ("QuantoConfig", "quanto", "optimum.quanto", "optimum-quanto"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_its_pip_line(
    kind, method, module, package, folder, monkeypatch
):
    from hfshrink.quantization.weights import foreign

    monkeypatch.setattr(foreign, "_is_installed", lambda name: name != module)
    with pytest.raises(MissingDependencyError, match=rf"{kind} needs the package '{module}'.*pip install '{package}'"):
        quantize_with_config(folder, bare(kind, method))


def test_bitsandbytes_itself_missing(folder, monkeypatch):
    from hfshrink.quantization.weights import foreign

    monkeypatch.setattr(foreign, "_is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hfshrink\[bnb\]'"):
        quantize_with_config(folder, bare("BitsAndBytesConfig", "bitsandbytes"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("kind", ["FbgemmFp8Config", "FineGrainedFP8Config", "HiggsConfig"])
def test_a_config_that_needs_a_gpu_is_refused_without_one(kind, folder):
    with pytest.raises(SettingError, match=rf"{kind} can't run on this machine: .*GPU"):
        quantize_with_config(folder, getattr(transformers, kind)())


def test_a_config_needs_a_checkpoint_that_is_float(folder, tmp_path):
    needs_bitsandbytes()
    with pytest.raises(SettingError, match=r"give its folder or Hub id, got a BertForSequenceClassification"):
        quantize_with_config(tiny.model("bert"), BitsAndBytesConfig(**NF4))
    quantize_nf4(tiny.model("bert", **WIDE))[0].save_pretrained(tmp_path / "nf4")
    with pytest.raises(UnsupportedModelError, match="quantized by bitsandbytes already"):
        quantize_with_config(tmp_path / "nf4", BitsAndBytesConfig(**NF4))


def test_unknown_methods_are_refused():
    class Own(BitsAndBytesConfig):
        pass

    config = Own(load_in_8bit=True)
    config.quant_method = "own"
    with pytest.raises(SettingError, match="Own can't run on this machine: Unknown quantization type"):
        check_runnable(config)


def test_configs_are_told_from_names():
    assert is_foreign_config(BitsAndBytesConfig(load_in_8bit=True))
    assert not is_foreign_config("int8")
    assert not is_foreign_config(None)
    assert not is_foreign_config({"load_in_8bit": True})


def test_the_record_holds_no_objects_secrets_or_paths(tmp_path):
    class Gptq(BitsAndBytesConfig):
        def to_dict(self):
            return {
                "bits": 4,
                "hf_token": "hf_secret",
                "tokenizer": tiny.tokenizer(),
                "dataset": ["a text"] * 2000,
                "cache": str(tmp_path),
                "dtype": torch.bfloat16,
                "modules": ({"q": 1}, None),
            }

    plain = plain_config(Gptq(load_in_8bit=True))
    assert plain == {
        "class": "Gptq",
        "bits": 4,
        "tokenizer": type(tiny.tokenizer()).__name__,
        "dataset": "2000 entries",
        "cache": tmp_path.name,
        "dtype": "bfloat16",
        "modules": [{"q": 1}, None],
    }
    assert "hf_secret" not in json.dumps(plain)


def test_a_float_model_has_no_changed_layers():
    assert changed_layers(tiny.model("bert")) == []
    assert changed_layers(tiny.model("gpt2")) == []


def test_torchao_configs_give_the_bits_of_its_own_call_and_reload(folder, tmp_path):
    quantization = pytest.importorskip("torchao.quantization", reason="the package torchao is not installed")
    for kind in (quantization.Int8DynamicActivationInt8WeightConfig, quantization.Int8WeightOnlyConfig):
        bare, inputs = hfshrink.load(folder)[0], tiny.inputs("bert")
        quantization.quantize_(bare, kind())
        found = hfshrink.quantize(folder, transformers.TorchAoConfig(kind()), output_dir=tmp_path / kind.__name__)
        reloaded = hfshrink.load(tmp_path / kind.__name__)[0]
        expected = tiny.logits(bare, inputs)
        assert torch.equal(tiny.logits(found, inputs), expected)
        assert torch.equal(tiny.logits(reloaded, inputs), expected)
        step = hfshrink.report(found).steps[-1]
        file = load_file(tmp_path / kind.__name__ / "model.safetensors")
        assert len(step.modules) == sum(isinstance(module, torch.nn.Linear) for module in found.modules())
        buffers = sum(buffer.nbytes for buffer in found.buffers())  # of positions: not saved
        assert step.after.memory_bytes == sum(tensor.nbytes for tensor in file.values()) + buffers
