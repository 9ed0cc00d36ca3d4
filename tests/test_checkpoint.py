"""The layer map, its reading from other people's configs, `to_dense` and `save_aside`."""

from __future__ import annotations

import copy
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import cuts
import tiny
from hfshrink import checkpoint
from hfshrink.checkpoint import HfshrinkConfig, layer_map, set_layers, to_dense
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.layers import LowRankLinear, ResizedConv1D, ResizedLinear
from hfshrink.loading import load
from hfshrink.record import report
from hfshrink.saving import save_aside

QUERY = "bert.encoder.layer.0.attention.self.query"
SPEC = {"kind": "low_rank", "in_features": 16, "out_features": 16, "rank": 4, "bias": True}


@pytest.fixture
def network() -> nn.Module:
    return tiny.model("bert")


def factored(linear: nn.Linear, rank: int = 2) -> LowRankLinear:
    return LowRankLinear.from_dense(linear, torch.ones(linear.out_features, rank), linear.weight[:rank])


def edit_config(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


class TestSetLayers:
    def test_extends_the_map(self, network: nn.Module) -> None:
        set_layers(network, {QUERY: factored(network.get_submodule(QUERY))})
        key = QUERY.replace("query", "key")
        set_layers(network, {key: factored(network.get_submodule(key), rank=3)})
        assert list(layer_map(network)) == [QUERY, key]
        saved = network.config.to_dict()["quantization_config"]
        assert saved == {"quant_method": "hfshrink", "format_version": 1, "layers": layer_map(network)}
        json.dumps(saved)

    def test_may_replace_a_compressed_layer(self, network: nn.Module) -> None:
        dense = network.get_submodule(QUERY)
        set_layers(network, {QUERY: factored(dense)})
        set_layers(network, {QUERY: factored(dense, rank=5)})
        assert network.config.quantization_config.layers[QUERY]["rank"] == 5

    def test_leaves_a_dense_model_dense(self, network: nn.Module) -> None:
        assert layer_map(network) == {}
        assert not hasattr(network.config, "quantization_config")

    @pytest.mark.parametrize("held", [BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "gptq"}])
    def test_one_slot(self, network: nn.Module, held: Any) -> None:
        """Trap 4: the slot is taken; the message says the way out."""
        network.config.quantization_config = held
        with pytest.raises(SettingError, match=r"quantized by (bitsandbytes|gptq), .* save it, and quantize"):
            set_layers(network, {QUERY: factored(network.get_submodule(QUERY))})
        assert network.config.quantization_config is held

    def test_refusals_change_nothing(self, network: nn.Module) -> None:
        good = factored(network.get_submodule(QUERY))
        wide = factored(nn.Linear(16, 24))
        bare = factored(nn.Linear(16, 16, bias=False))
        for bad, match in (
            ({"bert.nowhere": good}, "has no module called 'bert.nowhere'"),
            ({"bert.encoder": good}, "Only a Linear can be replaced by a LowRankLinear, got BertEncoder"),
            ({"bert.pooler.dense": wide}, r"\(24, 16\) can't replace one of shape \(16, 16\) \(bert.pooler.dense\)"),
            ({"bert.pooler.dense": bare}, "for bert.pooler.dense has no bias, the Linear there has one"),
            ({"bert.pooler.dense": nn.Linear(16, 16)}, "Expected a layer of kind low_rank, .* got Linear"),
        ):
            with pytest.raises(SettingError, match=match):
                set_layers(network, {QUERY: good, **bad})
            assert layer_map(network) == {}
        with pytest.raises(SettingError, match="Expected a transformers model"):
            set_layers(nn.Linear(2, 2), {})

    def test_each_kind_has_its_class(self) -> None:
        network = tiny.model("gpt2")
        name = "transformer.h.0.mlp.c_fc"
        conv = network.get_submodule(name)
        with pytest.raises(SettingError, match=r"Only a Linear can be replaced by a LowRankLinear, got Conv1D"):
            set_layers(
                network, {name: LowRankLinear.from_dense(nn.Linear(64, 16), torch.ones(16, 1), conv.weight[:1])}
            )
        cut = ResizedConv1D.from_dense(conv, outputs=torch.arange(60))
        set_layers(network, {name: cut})
        set_layers(network, {name: ResizedConv1D.from_dense(cut, outputs=torch.arange(50))})
        assert layer_map(network)[name]["nf"] == 50
        bert = tiny.model("bert")
        with pytest.raises(SettingError, match=r"Only a Conv1D can be replaced by a ResizedConv1D, got Linear"):
            set_layers(bert, {QUERY: ResizedConv1D.from_dense(conv, outputs=torch.arange(5))})

    def test_fused_parts_keep_the_same(self) -> None:
        network = tiny.model("gpt2")
        name = "transformer.h.0.attn.c_attn"
        layer = ResizedConv1D.from_dense(network.get_submodule(name), outputs=torch.arange(24))
        with pytest.raises(SettingError, match=rf"24 of 48 outputs are not the same in each part. \({name}\)"):
            set_layers(network, {name: layer})
        assert layer_map(network) == {}

    def test_tied_weights_stay(self) -> None:
        network = tiny.model("gpt2")
        with pytest.raises(SettingError, match=r"weight of lm_head is tied .* exclude='lm_head'"):
            set_layers(network, {"lm_head": factored(network.lm_head)})

    def test_a_cut_layer_is_not_refactored(self, network: nn.Module) -> None:
        """Its factors have the cut size, which the config does not know."""
        set_layers(network, {QUERY: ResizedLinear.from_dense(network.get_submodule(QUERY), torch.arange(8))})
        with pytest.raises(SettingError, match=r"shape \(8, 16\) can't replace one of shape \(16, 16\).* to_dense"):
            set_layers(network, {QUERY: factored(network.get_submodule(QUERY))})

    def test_copies_are_independent(self, network: nn.Module) -> None:
        set_layers(network, {QUERY: factored(network.get_submodule(QUERY))})
        other = copy.deepcopy(network)
        to_dense(other)
        assert list(layer_map(network)) == [QUERY]
        assert network.config.quantization_config.layers == layer_map(network)


class TestReading:
    @pytest.mark.parametrize(
        ("keywords", "match"),
        [
            ({"format_version": 2}, "has format 2, this hfshrink reads 1..1. Upgrade"),
            ({"format_version": "1"}, "has format '1'"),
            ({"format_version": True}, "has format True"),
            ({"layers": [1]}, "layer map as a JSON object, got list"),
            ({"layers": {"a": {**SPEC, "kind": "zip"}}}, r"Unknown kind of layer 'zip'.*\(layer a\)"),
            ({"layers": {"a": {**SPEC, "rank": 10**12}}}, r"rank must be an integer in 1..2\*\*31"),
            ({"layers": dict.fromkeys(range(100_001), SPEC)}, "claims 100,001 layers; at most 100,000"),
        ],
    )
    def test_bounds(self, keywords: dict[str, Any], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            HfshrinkConfig(**keywords)

    @pytest.fixture
    def folder(self, network: nn.Module, tmp_path: Path) -> Path:
        set_layers(network, {QUERY: factored(network.get_submodule(QUERY))} | cuts.resized(network, "bert"))
        network.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda q: q.update(format_version=7), "has format 7"),
            (lambda q: q["layers"].update({"bert.nowhere": SPEC}), "names 'bert.nowhere', which BertFor.* has not"),
            (lambda q: q["layers"].update({"nowhere": SPEC}), "names 'nowhere', which"),
            (
                lambda q: q["layers"].update({"base_model.pooler.dense": SPEC}),
                "names 'base_model.pooler.dense', which",
            ),
            (lambda q: q["layers"].update({"bert.pooler": SPEC}), "Only a Linear can be replaced .* got BertPooler"),
            (lambda q: q["layers"].update({"pooler.dense": SPEC, "bert.pooler.dense": SPEC}), r"pooler.*twice"),
            (lambda q: q["layers"].update({"classifier": SPEC}), r"\(16, 16\) can't replace one of shape \(2, 16\)"),
            (lambda q: q["layers"][QUERY].update(dense_out_features=99), r"shape \(99, 16\) can't replace"),
            (lambda q: q["layers"][QUERY].update(bias=False), "has no bias, the Linear there has one"),
        ],
    )
    def test_foreign_maps(self, folder: Path, change: Any, match: str) -> None:
        edit_config(folder, change)
        with pytest.raises(CheckpointError, match=match):
            load(folder)

    def test_another_size_than_the_weights(self, folder: Path) -> None:
        edit_config(folder, lambda q: q["layers"][QUERY].update(out_features=5))
        with pytest.raises(RuntimeError, match=r"mismatch|size"):
            load(folder)
        with pytest.raises(CheckpointError, match=f"no fitting .*weight.* for {QUERY}"):
            AutoModelForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)

    @pytest.mark.parametrize("key", ["weight", "kept_rows"])
    def test_missing_tensor(self, folder: Path, key: str) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors[f"{QUERY}.{key}"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"no fitting {key} for {QUERY}: it is half-written"):
            load(folder)

    def test_corrupt_indices(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{QUERY}.kept_rows"][0] = -3
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"corrupt: kept_rows must lie in 0\.\.15, got -3.*\({QUERY}\)"):
            load(folder)

    def test_fused_parts_that_kept_different_features(self, tmp_path: Path) -> None:
        network = tiny.model("gpt2")
        name = "transformer.h.0.attn.c_attn"
        kept = torch.cat([torch.arange(8) + 16 * part for part in range(3)])
        set_layers(network, {name: ResizedConv1D.from_dense(network.get_submodule(name), outputs=kept)})
        network.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors[f"{name}.kept_outputs"][8:16] += 8  # other keys than queries
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"3 parts of the fused c_attn must keep the same .*\({name}\)"):
            load(tmp_path)

    def test_no_compression_while_loading(self, tmp_path: Path) -> None:
        tiny.model("bert").save_pretrained(tmp_path)
        config = HfshrinkConfig({QUERY: SPEC})
        with pytest.raises(CheckpointError, match="can't compress while loading"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)


class TestToDense:
    def test_record_and_config(self, network: nn.Module) -> None:
        dense_parameters = sum(p.numel() for p in network.parameters())
        set_layers(network, cuts.mixed(network, "bert"))
        compressed_parameters = sum(p.numel() for p in network.parameters())
        names = list(layer_map(network))
        assert to_dense(network) is network
        assert layer_map(network) == {}
        assert not hasattr(network.config, "quantization_config")
        [step] = report(network).steps
        assert (step.technique, step.method, step.modules) == ("to_dense", "low_rank + resized", names)
        assert (step.before.parameters, step.after.parameters) == (compressed_parameters, dense_parameters)
        assert step.after.nonzero_parameters < dense_parameters

    def test_of_a_folder(self, network: nn.Module, tmp_path: Path) -> None:
        set_layers(network, cuts.resized(network, "bert"))
        network.save_pretrained(tmp_path)
        dense = to_dense(tmp_path)
        assert not hasattr(dense, "hf_quantizer")
        assert not hasattr(dense, "quantization_method")
        batch = tiny.inputs("bert")
        torch.testing.assert_close(tiny.logits(dense, batch), tiny.logits(network, batch))

    def test_dequantize_of_transformers_does_the_same(self, network: nn.Module, tmp_path: Path) -> None:
        set_layers(network, cuts.resized(network, "bert"))
        network.save_pretrained(tmp_path)
        loaded, _ = load(tmp_path)
        loaded.dequantize()
        assert layer_map(loaded) == {}
        assert not hasattr(loaded.config, "quantization_config")
        assert torch.equal(loaded.get_submodule(QUERY).weight, to_dense(network).get_submodule(QUERY).weight)

    def test_of_an_export(self, network: nn.Module) -> None:
        export = SimpleNamespace(config=network.config)
        with pytest.raises(UnsupportedModelError, match="An export has no layers to turn back"):
            to_dense(export)

    def test_of_a_dense_model(self, network: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
        to_dense(network)
        assert "no compressed layers" in caplog.text
        assert report(network).steps == ()


def test_reload_registers_again() -> None:
    before = dict(vars(checkpoint))
    try:
        importlib.reload(checkpoint)
        assert AUTO_QUANTIZER_MAPPING["hfshrink"] is checkpoint.HfshrinkQuantizer is not before["HfshrinkQuantizer"]
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["hfshrink"] is checkpoint.HfshrinkConfig
    finally:
        vars(checkpoint).update(before)
        AUTO_QUANTIZER_MAPPING["hfshrink"] = before["HfshrinkQuantizer"]
        AUTO_QUANTIZATION_CONFIG_MAPPING["hfshrink"] = before["HfshrinkConfig"]


class TestSaveAside:
    def write(self, folder: Path, text: str = "new", **keywords: Any) -> None:
        with save_aside(folder, **keywords) as aside:
            assert aside.parent == folder.parent.resolve()
            (aside / "file").write_text(text)

    def names(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    def test_missing_empty_and_nested_targets(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for target in (tmp_path / "empty", tmp_path / "missing", tmp_path / "a" / "b"):
            self.write(target)
            assert (target / "file").read_text() == "new"
        assert self.names(tmp_path) == ["a", "empty", "missing"]

    def test_relative_target(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with save_aside("model") as aside:
            (aside / "file").touch()
        assert self.names(tmp_path) == ["model"]

    def test_mode_is_that_of_any_new_folder(self, tmp_path: Path) -> None:
        self.write(tmp_path / "model")
        (tmp_path / "plain").mkdir()
        assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode

    def test_full_target(self, tmp_path: Path) -> None:
        self.write(tmp_path / "model", "old")
        (tmp_path / "model" / "other").touch()
        with pytest.raises(CheckpointError, match=r"model is not empty.*overwrite=True"):
            self.write(tmp_path / "model")
        assert (tmp_path / "model" / "file").read_text() == "old"
        self.write(tmp_path / "model", overwrite=True)
        assert self.names(tmp_path / "model") == ["file"]
        assert (tmp_path / "model" / "file").read_text() == "new"
        assert self.names(tmp_path) == ["model"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_error_leaves_no_trace(self, tmp_path: Path, error: type[BaseException]) -> None:
        self.write(tmp_path / "model", "old")
        for target, overwrite in ((tmp_path / "model", True), (tmp_path / "fresh", False)):
            with pytest.raises(error), save_aside(target, overwrite=overwrite) as aside:  # noqa: PT012
                (aside / "file").write_text("half")
                raise error
        assert self.names(tmp_path) == ["model"]
        assert (tmp_path / "model" / "file").read_text() == "old"

    def test_target_filled_meanwhile(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not empty"), save_aside(tmp_path / "model"):  # noqa: PT012
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "theirs").touch()
        assert self.names(tmp_path / "model") == ["theirs"]
        assert self.names(tmp_path) == ["model"]

    def test_failed_swap_puts_the_old_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write(tmp_path / "model", "old")
        rename = Path.rename

        def fail_once(self: Path, target: Path) -> Path:
            if ".aside-" in self.name:
                raise OSError("disk gone")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_once)
        with pytest.raises(CheckpointError, match=r"Can't move .* disk gone"):
            self.write(tmp_path / "model", overwrite=True)
        assert (tmp_path / "model" / "file").read_text() == "old"
        assert self.names(tmp_path) == ["model"]

    def test_bad_places(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for target, match in (
            (tmp_path / "file", "is a file"),
            (tmp_path / "file" / "model", "Can't write"),
            (tmp_path / "link", "symbolic link; give the folder that it points to: .*real"),
        ):
            with pytest.raises(CheckpointError, match=match), save_aside(target, overwrite=True):
                pytest.fail("the block ran")
        monkeypatch.chdir(tmp_path / "real")
        with pytest.raises(CheckpointError, match="holds the working directory"), save_aside(tmp_path, overwrite=True):
            pytest.fail("the block ran")
        with pytest.raises(CheckpointError, match="is a mount point or the working directory"), save_aside("."):
            pytest.fail("the block ran")
        assert self.names(tmp_path) == ["file", "link", "real"]

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
    def test_unwritable_parent(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Can't write"), save_aside(tmp_path / "closed" / "model"):
            pytest.fail("the block ran")

    def test_leftovers(self, tmp_path: Path) -> None:
        """What killed runs left goes after a day; what may be alive, a link or the only old copy stays."""
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "precious").touch()
        parent = tmp_path / "parent"
        old = [".model.aside-00000001", ".model.replaced-00000001"]
        for name in (*old, ".model.aside-00000002", ".other.aside-00000001"):
            (parent / name).mkdir(parents=True)
            (parent / name / "half").touch()
        (parent / ".model.aside-00000003").symlink_to(outside)
        long_ago = time.time() - 2 * 24 * 3600
        for name in (*old, ".other.aside-00000001"):
            os.utime(parent / name, (long_ago, long_ago))
        os.utime(outside, (long_ago, long_ago))
        self.write(parent / "model")
        kept = [".model.aside-00000002", ".model.aside-00000003", ".other.aside-00000001"]
        assert self.names(parent) == sorted([*kept, ".model.replaced-00000001", "model"])
        assert (outside / "precious").exists()
        self.write(parent / "model", overwrite=True)
        assert self.names(parent) == sorted([*kept, "model"])


def test_full_disk_leaves_the_target_as_it_was(tmp_path):
    def write():
        with save_aside(tmp_path / "out") as aside:
            (aside / "half").write_text("x")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"Can't write .*out: .*No space left.* It is as it was"):
        write()
    assert list(tmp_path.iterdir()) == []
