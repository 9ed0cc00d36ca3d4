"""The door of `quantize` for PyTorch: three ways to one result, what the record says, and what is refused in time."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

import tiny
from hfshrink import load, quantize, report
from hfshrink.checkpoint import set_layers
from hfshrink.errors import CheckpointError, MissingDependencyError, SettingError, UnsupportedModelError
from hfshrink.inputs import model_inputs
from hfshrink.layers import ResizedLinear
from hfshrink.modules import measure_parameters
from hfshrink.quantization import SCHEMES, checkpoints, hardware, run
from hfshrink.streaming.skeleton import count_names

pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_labels": 3}
PLAIN = ["bf16", "fp16", "int8", "nf4", "fp4"]
BITS = PLAIN[2:]
BATCH = tiny.inputs("bert")
ROWS = Dataset.from_dict({"text": ["a good film", "bad", "the sun is warm", "no plot"] * 4, "label": [0, 1, 2, 1] * 4})
LAYER = "bert.encoder.layer.0.intermediate.dense"


def bert(**config):
    return tiny.model("bert", **{**WIDE, **config})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "model"
    bert().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def contents(path):
    """Every file below a folder with the hash of what it holds."""
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("scheme", PLAIN)
def test_three_ways_make_one_model_and_one_record(scheme, folder, tmp_path):
    in_memory = quantize(bert(), scheme, output_dir=tmp_path / "memory", processor=tiny.tokenizer())
    named = quantize(folder, scheme)
    assert quantize(folder, scheme, output_dir=tmp_path / "files") == tmp_path / "files"

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "files")
    assert equal_states(plain, in_memory)
    assert equal_states(plain, named)
    assert equal_states(plain, AutoModelForSequenceClassification.from_pretrained(tmp_path / "memory"))
    assert load(tmp_path / "memory")[1] is not None
    assert load(tmp_path / "files")[1] is not None

    found = {"memory": in_memory, "named": named, "files": tmp_path / "files"}
    steps = {way: report(made).steps[-1] for way, made in found.items()}
    count = measure_parameters(bert()).parameters
    for step in steps.values():
        assert (step.technique, step.method) == ("quantize", scheme)
        assert step.before.parameters == step.after.parameters == count
        assert step.skipped == ({"classifier": "task head"} if scheme in BITS else {})
        assert step.modules == steps["memory"].modules
        assert ("classifier" in step.modules) == (scheme not in BITS)
        assert step.seconds > 0
    assert all(report(made).details["task"] == "text-classification" for made in found.values())
    assert report(tmp_path / "memory") == report(in_memory)
    assert report(tmp_path / "files") == report(plain)
    for way in ("memory", "files"):
        assert steps[way].after.size_bytes == (tmp_path / way / "model.safetensors").stat().st_size
    assert steps["named"].after.size_bytes is None
    assert steps["files"].before.size_bytes == (folder / "model.safetensors").stat().st_size
    assert steps["memory"].after.memory_bytes < steps["memory"].before.memory_bytes
    assert steps["memory"].results["parity"]["rows"] > 0
    assert report(tmp_path / "files").base_model == "model"
    assert f"{count:,}" in str(report(tmp_path / "files"))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "vit"])
def test_parameters_are_counted_without_weights(family):
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    model = tiny.model(family, **tied)
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    assert count_names(skeleton) == measure_parameters(model).parameters


def test_mixed_through_the_door(folder, tmp_path):
    model = quantize(folder, "mixed", output_dir=tmp_path / "out", calibration=ROWS, size_ratio=0.5, samples=8)
    step = report(tmp_path / "out").steps[-1]
    assert report(model).steps[-1] == step
    assert (step.settings["size_ratio"], step.settings["samples"]) == (0.5, 8)
    assert step.results["memory_bytes"] <= 0.5 * step.before.memory_bytes
    batch = tiny.inputs("bert")
    assert torch.equal(tiny.logits(load(tmp_path / "out")[0], batch), tiny.logits(model, batch))


def test_a_config_of_transformers_in_place_of_a_scheme(folder, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"device_map": {"": "cpu"}, "dtype": torch.float32, "token": "hf_secret", "max_shard_size": "30KB"}
    model = quantize(folder, config, output_dir=tmp_path / "out", **options)
    step = report(tmp_path / "out").steps[-1]
    assert report(model).steps[-1] == step
    assert step.method == "bitsandbytes"
    assert step.settings == {"device_map": {"": "cpu"}, "dtype": "float32", "max_shard_size": "30KB"}
    assert step.results["config"]["bnb_4bit_quant_type"] == "nf4"
    assert step.before.parameters == measure_parameters(bert()).parameters
    assert "hf_secret" not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert equal_states(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out"), quantize(folder, "nf4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "*"}, "exclude= belongs to the schemes of hfshrink"),
        ({"max_drop": 0.1, "calibration": ROWS}, "max_drop= belongs to the schemes"),
        ({"calibration": ROWS}, "calibration= belongs to the schemes"),
        ({"device_maps": "auto"}, "has no option 'device_maps' here.*Did you mean device_map"),
        ({"max_shard_size": "1GB"}, "max_shard_size belongs to .* output_dir"),
    ],
)
def test_keywords_that_a_config_has_not(options, message, folder):
    with pytest.raises(SettingError, match=message):
        quantize(folder, BitsAndBytesConfig(load_in_8bit=True), **options)


def test_every_scheme_of_auto_exists_and_its_reason_is_recorded(folder, tmp_path, monkeypatch):
    assert {rule.scheme for rule in hardware.RULES} <= set(SCHEMES)
    monkeypatch.setattr(hardware, "choose_scheme", lambda model, _: ("nf4", f"on {model.device} a test says so."))
    monkeypatch.setattr(run, "check_scheme", lambda scheme: SCHEMES[scheme])
    quantize(folder, "auto", output_dir=tmp_path / "out", max_shard_size="40KB")
    step = report(tmp_path / "out").steps[-1]
    assert (step.method, step.settings["reason"]) == ("nf4", "on meta a test says so.")  # chosen without weights
    assert step.results["shards"] > 1


def test_device_map_while_loading(folder):
    model = quantize(folder, "nf4", device_map={"": "cpu"})
    assert equal_states(model, quantize(folder, "nf4"))
    assert report(model).steps[-1].settings == {"device_map": {"": "cpu"}}


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("int8", {"double_quantization": True}, "int8 has no option 'double_quantization' here; it has device_map"),
        ("nf4", {"double_quantisation": True}, "Did you mean double_quantization"),
        ("nf4", {"max_shard_size": "1GB"}, "belongs to the schemes of PyTorch with an output_dir"),
        ("bf16", {"device_map": "auto"}, "device_map belongs to a named checkpoint that int8, nf4 or fp4 quantize"),
        ("onnx-int8", {"device_map": "auto"}, "device_map belongs to a named checkpoint"),
        ("onnx-int8", {"processr": 1}, "onnx-int8 has no option 'processr'"),
        ("onnx-int9", {}, "scheme must be one of .*Did you mean onnx-int"),
        ({"load_in_8bit": True}, {}, "scheme must be one of"),
        (None, {}, "scheme must be one of"),
        ("bf16", {"exclude": "classifier"}, "bf16 stores all weights alike, so exclude"),
        ("int8", {"max_drop": 0.1}, "max_drop needs labelled rows in calibration"),
        ("int8", {"max_drop": -1, "calibration": ROWS}, "max_drop must be a number of at least 0"),
        ("int8", {"metric": "accuracy"}, "metric= belongs to max_drop="),
        ("nf4", {"exclude": "clasifier"}, "wildcard 'clasifier' matches none of"),
        ("nf4", {"exclude": "*"}, "nf4 finds nothing to quantize"),
    ],
)
def test_wrong_settings_are_told_before_weights_are_read(scheme, options, message, folder, monkeypatch):
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(SettingError, match=message):
        quantize(folder, scheme, **options)


def test_options_of_file_to_file(folder, tmp_path):
    for options, message in (
        ({"device_map": "auto"}, "device_map belongs to .* file to file no device is needed"),
        ({"max_shard_size": "much"}, "max_shard_size must be bytes or a size"),
        ({"max_shard_sise": "1GB"}, "Did you mean max_shard_size"),
    ):
        with pytest.raises(SettingError, match=message):
            quantize(folder, "nf4", output_dir=tmp_path / "out", **options)
    with pytest.raises(SettingError, match="bf16 has no option 'double_quantization'"):
        quantize(folder, "bf16", output_dir=tmp_path / "out", double_quantization=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["int8", "onnx-int8", "mixed", "bf16"])
def test_what_can_not_be_quantized_is_refused_before_work(scheme, folder, tmp_path, monkeypatch):
    quantized = quantize(bert(), "nf4", output_dir=tmp_path / "nf4")
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text("{}")
    (export / "export.json").write_text("{}")
    foreign = tmp_path / "gptq"
    foreign.mkdir()
    settings = json.loads((folder / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    before = contents(tmp_path)
    for source, message in (
        (quantized, "BertForSequenceClassification is quantized by bitsandbytes already"),
        (tmp_path / "nf4", "nf4 is quantized by bitsandbytes already"),
        (export, "is an export already"),
        (foreign, "quantized by gptq already"),
    ):
        for target in (None, tmp_path / "out"):
            with pytest.raises(UnsupportedModelError, match=message):
                quantize(source, scheme, output_dir=target)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("scheme", BITS)
def test_a_layer_map_takes_the_slot_of_bitsandbytes_and_not_of_a_cast(scheme, tmp_path):
    model = bert()
    feed, kept = model.bert.encoder.layer[0], torch.arange(96)
    up = ResizedLinear.from_dense(feed.intermediate.dense, rows=kept)
    down = ResizedLinear.from_dense(feed.output.dense, columns=kept)
    set_layers(model, {LAYER: up, "bert.encoder.layer.0.output.dense": down})
    model.save_pretrained(tmp_path / "cut")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for source in (model, tmp_path / "cut"):
        with pytest.raises(SettingError, match=r"one place for a quantization.*to_dense"):
            quantize(source, scheme, output_dir=tmp_path / "out")
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    cast = quantize(tmp_path / "cut", "bf16", output_dir=tmp_path / scheme)
    assert equal_states(load(tmp_path / scheme)[0], cast)


@pytest.mark.parametrize("source", ["memory", "named"])
@pytest.mark.parametrize("scheme", ["bf16", "nf4", "onnx-int8", "auto"])
def test_a_full_folder_is_told_before_work_and_stays(scheme, source, folder, tmp_path, monkeypatch):
    model = bert() if source == "memory" else folder
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", None)
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        quantize(model, scheme, output_dir=tmp_path / "out")
    assert contents(tmp_path) == {"out/mine.txt": hashlib.sha256(b"keep").hexdigest()}
    if source == "memory":
        assert type(model.get_submodule(LAYER)) is torch.nn.Linear
        assert model.dtype == torch.float32


@pytest.mark.parametrize("rows", [[], Dataset.from_dict({"text": []}), [{"title": torch.ones(1)}], 5])
def test_calibration_that_is_empty_or_wrong_changes_nothing(rows, tmp_path):
    model = bert()
    with pytest.raises(SettingError):
        quantize(model, "nf4", calibration=rows, processor=tiny.tokenizer(), output_dir=tmp_path / "out")
    assert equal_states(model, bert())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["bert.pooler.dense.bias", f"{LAYER}.weight"])
@pytest.mark.parametrize("scheme", ["bf16", "int8", "nf4"])
def test_weights_that_are_not_finite_change_nothing(scheme, place, tmp_path):
    model = bert()
    with torch.no_grad():
        model.get_parameter(place).view(-1)[0] = float("nan")
    with pytest.raises(SettingError, match="NaN or inf"):
        quantize(model, scheme, output_dir=tmp_path / "out")
    assert type(model.get_submodule(LAYER)) is torch.nn.Linear
    assert model.dtype == torch.float32
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["system", "safetensors"])
def test_no_space_leaves_the_folder_as_it_was(kind, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left") if kind == "system" else SafetensorError("No space left")

    model = bert()
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"Can't write .*No space left.*as it was"):
        quantize(model, "int8", output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("way", ["memory", "named", "files"])
def test_a_missing_extra_is_told_before_work(way, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = bert() if way == "memory" else folder
    with pytest.raises(MissingDependencyError, match=r"pip install 'hfshrink\[bnb\]'"):
        quantize(model, "nf4", output_dir=tmp_path / "out" if way == "files" else None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_config_for_gpus_is_refused_on_a_cpu(folder, tmp_path):
    from transformers import FineGrainedFP8Config

    before = contents(folder)
    with pytest.raises(SettingError, match="can't run on this machine: .*GPU"):
        quantize(folder, FineGrainedFP8Config(), output_dir=tmp_path / "out")
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_calibration_rows_of_an_iterator_serve_twice_and_read_a_named_checkpoint(folder, tmp_path):
    rows = ({key: part[number : number + 1] for key, part in BATCH.items()} for number in range(3))
    model = quantize(folder, "nf4", calibration=rows, output_dir=tmp_path / "out")
    parity = report(model).steps[-1].results["parity"]
    assert (parity["inputs"], parity["rows"]) == ("calibration rows", 3)
    assert parity["max_difference"] > 0
    assert report(tmp_path / "out") == report(model)


def test_max_drop_restores_modules_until_the_bound_holds(monkeypatch):
    """A maker that ruins the model while more than two modules are quantized: the guard has to find that out."""
    names = [f"bert.encoder.layer.{layer}.{part}.dense" for layer in (0, 1) for part in ("intermediate", "output")]

    def make(model, kept_float, **_):
        quantized = [name for name in names if name not in kept_float]
        if len(quantized) > 2:
            model.classifier.weight.data.neg_()
            model.classifier.bias.data.neg_()
        return model, quantized, {"skipped": {}}

    model = bert()
    answers = tiny.logits(model, dict(tiny.tokenizer()(list(ROWS["text"]), padding=True, return_tensors="pt")))
    rows = Dataset.from_dict({"text": ROWS["text"], "label": answers.argmax(-1).tolist()})
    monkeypatch.setattr(type(SCHEMES["int8"]), "load_maker", lambda _: make)
    done = quantize(model, "int8", calibration=rows, max_drop=0.0, processor=tiny.tokenizer())
    assert done is model
    step = report(done).steps[-1]
    assert len(step.modules) == len(step.results["restored"]) == 2
    assert step.skipped == {"classifier": "task head"} | dict.fromkeys(
        step.results["restored"], "restored by max_drop"
    )
    assert step.results["guard"]["float"] == 1.0
    assert step.results["parity"]["agreement"] == 1.0


def test_max_drop_of_a_scheme_that_holds_it(folder):
    model = quantize(folder, "int8", calibration=ROWS, metric="accuracy", max_drop=1.0)
    step = report(model).steps[-1]
    assert step.results["restored"] == []
    assert (step.settings["max_drop"], step.settings["metric"]) == (1.0, "accuracy")


def test_half_precision_checkpoints_stay_as_small(folder, tmp_path):
    bert().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    streamed = quantize(tmp_path / "half", "int8", output_dir=tmp_path / "files")
    checked = quantize(tmp_path / "half", "int8", output_dir=tmp_path / "checked", calibration=[BATCH])
    assert equal_states(AutoModelForSequenceClassification.from_pretrained(streamed), checked)
    with pytest.raises(SettingError, match="no weights to cast"):
        quantize(tmp_path / "half", "bf16", calibration=[BATCH])


def test_a_scheme_that_brings_no_speed_says_so(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(hardware, "processor_features", lambda: frozenset({"bf16"}))
    with caplog.at_level(logging.WARNING, "hfshrink"):
        quantize(folder, "nf4", output_dir=tmp_path / "out")
    assert sum("nf4 saves memory, not time" in record.message for record in caplog.records) == 1
    assert "nf4 saves memory, not time" in str(report(tmp_path / "out"))


def test_the_record_is_there_as_soon_as_the_folder_is(folder, tmp_path, monkeypatch):
    def no_record(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "report", no_record)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, "bf16", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from hfshrink import quantize
from hfshrink.quantization.weights.streaming import Converter
convert = Converter.convert
Converter.convert = lambda *given: (time.sleep(0.05), convert(*given))[1]
quantize(sys.argv[1], "nf4", output_dir=sys.argv[2], max_shard_size="20KB")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_stood(folder, tmp_path):
    target, partial = tmp_path / "out", tmp_path / ".out.streaming"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, folder, target], env=environment)
    try:
        deadline = time.monotonic() + 300
        while len(list(partial.glob("*.safetensors"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    shards = json.loads((partial / "streaming.json").read_text())["shards"]
    quantize(folder, "nf4", output_dir=target, max_shard_size="20KB")
    assert report(target).steps[-1].results["resumed_shards"] == len(shards) >= 1
    assert not partial.exists()
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".out.aside-")] == ["out"]
    whole = quantize(folder, "nf4")
    assert equal_states(AutoModelForSequenceClassification.from_pretrained(target), whole)


@pytest.mark.parametrize("scheme", ["bf16", "fp16"])
def test_images_are_read_in_the_models_dtype(scheme):
    model = quantize(tiny.model("resnet"), scheme)
    inputs = tiny.inputs("resnet")
    assert report(model).steps[-1].results["parity"]["max_difference"] < 0.05
    found = model_inputs(model, inputs)["pixel_values"]
    assert found.dtype == model.dtype
    assert torch.allclose(found.float(), inputs["pixel_values"], atol=0.02)
