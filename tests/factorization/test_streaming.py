"""File to file: the same tensors as loading, factorizing and saving; resumed after a kill; errors before work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification

import tiny
from hfshrink import load
from hfshrink.checkpoint import layer_map, set_layers
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.factorization import deciding
from hfshrink.factorization.run import factorize
from hfshrink.factorization.streaming import stream_factors
from hfshrink.layers import LowRankLinear
from hfshrink.record import report
from hfshrink.streaming import shards

SHAPES = {
    "bert": {},
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},
    "vit": {},  # transformers renames its keys while loading and saving
    "resnet": {},
}
SIZES = [{"rank_ratio": 0.6}, {"rank": 4}, {"energy": 0.8}, {"max_parameters": 0.85}, {"max_size_bytes": 0.8}]
"""Budgets as parts of the dense model."""


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def config(folder):
    found = json.loads((folder / "config.json").read_text())
    found.pop("hfshrink", None)
    return found


def same_tensors(folder, other):
    found, expected = tensors(folder), tensors(other)
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key]) for key in found
    )


def in_memory(source, folder, **how):
    """The model that is loaded, factored and saved."""
    return factorize(load(source)[0], **how, output_dir=folder)


def sized(size, folder):
    """The keyword of `SIZES` with a budget in its own unit."""
    [(keyword, value)] = size.items()
    if not keyword.startswith("max_"):
        return size
    found = tensors(folder).values()
    return {keyword: int(value * sum(t.numel() if keyword == "max_parameters" else t.nbytes for t in found))}


@pytest.fixture
def source(tmp_path):
    tiny.model("bert", num_labels=3).save_pretrained(tmp_path / "source", max_shard_size="10KB")
    tiny.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: next(iter(size)))
@pytest.mark.parametrize("family", SHAPES)
def test_files_equal_those_of_load_factorize_save(family, size, tmp_path):
    tiny.model(family, **SHAPES[family]).save_pretrained(tmp_path / "source", max_shard_size="8KB")
    how = {**sized(size, tmp_path / "source"), "rank_multiple": 2}
    results = stream_factors(tmp_path / "source", tmp_path / "stream", **how, max_shard_size="7KB")
    model = in_memory(tmp_path / "source", tmp_path / "memory", **how)
    step = report(model).steps[-1]
    assert same_tensors(tmp_path / "stream", tmp_path / "memory")
    assert config(tmp_path / "stream") == config(tmp_path / "memory")
    assert results["modules"] == step.modules == list(layer_map(model))
    assert results["skipped"] == step.skipped
    assert {name: results[name] for name in step.results} == step.results
    assert results["parameters_before"] == step.before.parameters
    assert results["parameters_after"] == step.after.parameters < step.before.parameters
    assert results["size_bytes"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "stream").values())
    assert results["unused"] == []
    assert results["shards"] == len(list((tmp_path / "stream").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    tiny.model("llama").to(dtype).save_pretrained(tmp_path / "source")
    stream_factors(tmp_path / "source", tmp_path / "stream", rank_ratio=0.5, rank_multiple=1)
    in_memory(tmp_path / "source", tmp_path / "memory", rank_ratio=0.5, rank_multiple=1)
    assert same_tensors(tmp_path / "stream", tmp_path / "memory")
    assert {tensor.dtype for tensor in tensors(tmp_path / "stream").values()} == {dtype}


def test_a_checkpoint_in_another_dtype_than_its_config_says(source, tmp_path):
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16"}))
    stream_factors(source, tmp_path / "stream", rank_ratio=0.5, rank_multiple=1)
    in_memory(source, tmp_path / "memory", rank_ratio=0.5, rank_multiple=1)
    assert same_tensors(tmp_path / "stream", tmp_path / "memory")


def test_large_weights_of_low_rank_take_the_solver_that_memory_takes(tmp_path):
    """Far below full rank a randomized one serves."""
    made = {"hidden_size": 1032, "intermediate_size": 1032, "num_hidden_layers": 1}
    tiny.model("bert", "feature-extraction", **made).save_pretrained(tmp_path / "source")
    how = {"rank": 16, "include": "*intermediate*"}
    stream_factors(tmp_path / "source", tmp_path / "stream", **how)
    in_memory(tmp_path / "source", tmp_path / "memory", **how)
    assert same_tensors(tmp_path / "stream", tmp_path / "memory")


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
def test_the_result_loads_and_computes_what_the_products_do(family, tmp_path):
    model = tiny.model(family)
    model.save_pretrained(tmp_path / "source")
    results = stream_factors(tmp_path / "source", tmp_path / "stream", rank_ratio=0.9, rank_multiple=1)
    loaded, info = type(model).from_pretrained(tmp_path / "stream", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name in results["modules"]:
        dense = loaded.get_submodule(name).to_dense()
        model.get_submodule(name).weight.data = dense.weight.data
    batch = tiny.inputs(family)
    assert torch.allclose(tiny.logits(loaded.eval(), batch), tiny.logits(model, batch), atol=1e-4)


def test_factors_are_the_truncated_svd(source, tmp_path):
    name = "bert.encoder.layer.1.output.dense"
    stream_factors(source, tmp_path / "stream", rank=5, include=name)
    weight = tensors(source)[f"{name}.weight"].double()
    found = tensors(tmp_path / "stream")
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5]
    product = found[f"{name}.up"].double() @ found[f"{name}.weight"].double()
    assert torch.allclose(product, expected, atol=1e-6)


def test_include_exclude_heads_and_what_stays_dense(source, tmp_path):
    results = stream_factors(source, tmp_path / "one", rank=9, include=["*output.dense", "classifier"])
    assert results["skipped"]["classifier"] == "the task head"
    assert "break-even rank is 8" in results["skipped"]["bert.encoder.layer.0.attention.output.dense"]
    assert results["ranks"] == {f"bert.encoder.layer.{number}.output.dense": 9 for number in (0, 1)}
    results = stream_factors(source, tmp_path / "other", rank=2, exclude="*attention*")
    assert "classifier" in results["modules"]
    assert not any("attention" in name for name in results["modules"])


def test_embeddings_that_are_named_are_factored(source, tmp_path):
    how = {"rank": 4, "include": "*word_embeddings"}
    stream_factors(source, tmp_path / "stream", **how)
    in_memory(source, tmp_path / "memory", **how)
    assert same_tensors(tmp_path / "stream", tmp_path / "memory")


def test_the_record_is_written_before_the_folder_is_there(source, tmp_path):
    seen = []

    def record(folder, results):
        seen.append((sorted(file.name for file in folder.iterdir()), dict(results)))
        assert not (tmp_path / "stream").exists()

    results = stream_factors(source, tmp_path / "stream", rank=4, record=record)
    assert seen == [(sorted(file.name for file in (tmp_path / "stream").iterdir()), results)]
    assert {"tokenizer.json", "config.json", "model.safetensors"} <= set(seen[0][0])
    assert {file.name for file in tmp_path.iterdir()} == {"source", "stream"}


@pytest.mark.parametrize("size", [{"rank_ratio": 0.5}, {"energy": 0.6}], ids=["ratio", "energy"])
def test_a_stopped_call_goes_on_where_it_stood(size, source, tmp_path, monkeypatch):
    how = {**size, "rank_multiple": 1, "max_shard_size": "2KB"}
    stream_factors(source, tmp_path / "whole", **how)
    write, calls = shards._write_shard, []

    def some(path, parts):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(path)
        return write(path, parts)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", some)
        with pytest.raises(KeyboardInterrupt):
            stream_factors(source, tmp_path / "stream", **how)
    counted = []
    decompose = deciding.decompose
    monkeypatch.setattr(deciding, "decompose", lambda *args, **kwargs: counted.append(0) or decompose(*args, **kwargs))
    results = stream_factors(source, tmp_path / "stream", **how)
    assert results["resumed_shards"] == 4
    assert 0 < len(counted) < len(results["modules"])
    assert same_tensors(tmp_path / "stream", tmp_path / "whole")
    assert {file.name for file in tmp_path.iterdir()} == {"source", "stream", "whole"}


def test_energies_that_are_known_are_not_computed_again(source, tmp_path, monkeypatch):
    decompose, counted = deciding.decompose, []

    def few(*args, **kwargs):
        if len(counted) == 5:
            raise KeyboardInterrupt
        counted.append(0)
        return decompose(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(deciding, "decompose", few)
        with pytest.raises(KeyboardInterrupt):
            stream_factors(source, tmp_path / "stream", energy=0.6)
    monkeypatch.setattr(deciding, "decompose", lambda *args, **kwargs: counted.append(0) or decompose(*args, **kwargs))
    results = stream_factors(source, tmp_path / "stream", energy=0.6)
    dense = [name for name in results["skipped"] if "energy" in results["skipped"][name]]
    assert len(counted) == 2 * len(results["modules"]) + len(dense)


KILLED = """
import sys, time
from hfshrink.factorization import deciding
from hfshrink.factorization.streaming import stream_factors
decompose = deciding.decompose
deciding.decompose = lambda *given, **how: (time.sleep(0.1), decompose(*given, **how))[1]
stream_factors(sys.argv[1], sys.argv[2], rank_ratio=0.5, max_shard_size="3KB")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_stood(source, tmp_path):
    target, partial = tmp_path / "out", tmp_path / ".out.streaming"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", KILLED, source, target], env=environment)
    try:
        deadline = time.monotonic() + 120
        while len(list(partial.glob("*.safetensors"))) < 2 and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    finished = json.loads((partial / "streaming.json").read_text())["shards"]
    results = stream_factors(source, target, rank_ratio=0.5, max_shard_size="3KB")
    assert results["resumed_shards"] == len(finished) >= 1
    stream_factors(source, tmp_path / "whole", rank_ratio=0.5, max_shard_size="3KB")
    assert same_tensors(target, tmp_path / "whole")
    assert not partial.exists()


def test_other_ranks_start_anew(source, tmp_path):
    stream_factors(source, tmp_path / "expected", rank_ratio=0.5, rank_multiple=1, max_shard_size="5KB")

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_factors(source, tmp_path / "stream", rank_ratio=0.6, rank_multiple=1, max_shard_size="5KB", record=stop)
    results = stream_factors(source, tmp_path / "stream", rank_ratio=0.5, rank_multiple=1, max_shard_size="5KB")
    assert results["resumed_shards"] == 0
    assert same_tensors(tmp_path / "stream", tmp_path / "expected")


@pytest.fixture
def no_decomposition(monkeypatch):
    """What is refused is refused before work."""
    monkeypatch.setattr(deciding, "decompose", None)


@pytest.mark.usefixtures("no_decomposition")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "Give exactly one of rank_ratio, rank, energy, max_parameters, max_size_bytes, got none"),
        ({"rank": 4, "energy": 0.5}, "got rank=4, energy=0.5"),
        ({"rank_ratio": 0}, "rank_ratio must lie between 0 and 1"),
        ({"rank_ratio": 1.0}, "rank_ratio must lie between 0 and 1"),
        ({"rank_ratio": float("nan")}, "rank_ratio must lie between 0 and 1"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"rank": 10**6}, r"No module would become smaller.*rank 1000000 saves no parameters"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\]"),
        ({"max_parameters": 1.5}, "max_parameters must be a whole number"),
        ({"max_size_bytes": True}, "max_size_bytes must be a whole number"),
        ({"energy": 0.5, "rank_multiple": 0}, "rank_multiple must be a whole number"),
        ({"rank": 4, "max_shard_size": "5"}, "max_shard_size must be bytes or a size"),
        ({"rank": 4, "include": "*.no_such"}, r"wildcard '\*\.no_such' matches none"),
        ({"rank": 4, "include": "classifier"}, "no module left to factor"),
    ],
)
def test_settings_out_of_range(how, message, source, tmp_path):
    with pytest.raises(SettingError, match=message):
        stream_factors(source, tmp_path / "stream", **how)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


@pytest.mark.usefixtures("no_decomposition")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named_before_work(value, tmp_path):
    model = tiny.model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[-1, -1] = value
    model.save_pretrained(tmp_path / "source")
    for how in ({"rank": 4}, {"energy": 0.9}):
        with pytest.raises(SettingError, match=r"encoder\.layer\.1\.output\.dense\.weight has NaN or infinite"):
            stream_factors(tmp_path / "source", tmp_path / "stream", **how)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


@pytest.mark.usefixtures("no_decomposition")
def test_values_that_only_the_config_s_dtype_makes_infinite(tmp_path):
    model = tiny.model("bert")
    with torch.no_grad():
        model.bert.pooler.dense.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "source")
    settings = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))
    with pytest.raises(SettingError, match=r"pooler\.dense\.weight has NaN or infinite values as torch\.float16"):
        stream_factors(tmp_path / "source", tmp_path / "stream", rank=4)


@pytest.mark.usefixtures("no_decomposition")
def test_quantized_and_compressed_sources(source, tmp_path):
    settings = json.loads((source / "config.json").read_text())
    for method, error, message in (
        ("gptq", UnsupportedModelError, "is quantized by gptq"),
        ("hfshrink", SettingError, "holds compressed layers already"),
    ):
        held = {"quant_method": method, "layers": {}}
        (source / "config.json").write_text(json.dumps({**settings, "quantization_config": held}))
        with pytest.raises(error, match=message):
            stream_factors(source, tmp_path / "stream", rank=4)


@pytest.mark.usefixtures("no_decomposition")
def test_integers_in_the_place_of_weights(source, tmp_path):
    for file in source.glob("*.safetensors"):
        parts = {key: t.to(torch.int8) if key.endswith("dense.weight") else t for key, t in load_file(file).items()}
        save_file(parts, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"attention\.output\.dense\.weight is stored as I8"):
        stream_factors(source, tmp_path / "stream", rank=4)


@pytest.mark.usefixtures("no_decomposition")
def test_no_space_is_told_before_the_start(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(CheckpointError, match=r"factorize writes [\d,]+ bytes to .*where 1,000 are free"):
        stream_factors(source, tmp_path / "stream", rank=4)
    assert {file.name for file in tmp_path.iterdir()} == {"source"}


@pytest.mark.usefixtures("no_decomposition")
def test_folders_that_can_not_be_written_or_read(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="not empty"):
        stream_factors(source, tmp_path / "full", rank=4)
    for folder in (source, tmp_path):
        with pytest.raises(SettingError, match="holds the model that is read"):
            stream_factors(source, folder, rank=4, overwrite=True)
    file = min(source.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{file.name} can't be read"):
        stream_factors(source, tmp_path / "stream", rank=4)


def test_an_output_inside_the_source_is_not_read_as_a_part_of_it(source):
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    stream_factors(source, source / "thin", rank=4)
    assert before == {file.name: file.read_bytes() for file in source.iterdir() if file.is_file()}
    assert isinstance(load(source / "thin")[0].bert.pooler.dense, LowRankLinear)


def test_without_hfshrink_s_map_the_file_does_not_fit(source, tmp_path):
    stream_factors(source, tmp_path / "stream", rank=4)
    settings = json.loads((tmp_path / "stream" / "config.json").read_text())
    settings.pop("quantization_config")
    (tmp_path / "stream" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "stream")


def test_a_base_model_s_checkpoint_is_read_without_its_prefix(tmp_path):
    model = tiny.model("bert")
    state = {key.removeprefix("bert."): tensor for key, tensor in model.state_dict().items()}
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "source")
    save_file(state, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    stream_factors(tmp_path / "source", tmp_path / "stream", rank=4, include="*query")
    loaded = load(tmp_path / "stream")[0]
    query = loaded.bert.encoder.layer[0].attention.self.query
    layer = LowRankLinear.from_dense(nn.Linear(16, 16), query.up, query.weight)
    layer.bias = query.bias
    set_layers(model, {"bert.encoder.layer.0.attention.self.query": layer})
    other = loaded.bert.encoder.layer[1].attention.self.query
    model.bert.encoder.layer[1].attention.self.query = other
    batch = tiny.inputs("bert")
    assert torch.equal(tiny.logits(loaded, batch), tiny.logits(model, batch))
