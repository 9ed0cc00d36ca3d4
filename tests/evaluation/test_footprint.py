"""Memory of a process that loads one model: the libraries that it needs are not counted."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import hfshrink
import tiny
from hfshrink.evaluation import footprint
from hfshrink.evaluation.footprint import measure_footprint

TWICE = """
import json, sys
from hfshrink.evaluation import footprint
from hfshrink.loading import load

footprint._import_model_code(sys.argv[1])
modules = set(sys.modules)
found = footprint.measure_footprint(sys.argv[1], 4)
late = {name.partition(".")[0] for name in set(sys.modules) - modules}
before = footprint._resident("VmRSS")
again, _ = load(sys.argv[1])
[tensor.count_nonzero() for tensor in again.parameters()]
print(json.dumps([found["loaded_bytes"], footprint._resident("VmRSS") - before, sorted(late)]))
"""


def test_a_process_that_measures_itself(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    assert set(measure_footprint(str(tmp_path), 4)) == {"loaded_bytes", "peak_memory_bytes"}


def test_what_a_library_takes_is_not_counted(tmp_path):
    """Loading once more in the same process finds every library there: what grows then is the model alone."""
    pytest.importorskip("bitsandbytes")
    hfshrink.quantize(tiny.model("bert", vocab_size=200_000), "int8", output_dir=tmp_path / "model")
    command = [sys.executable, "-W", "ignore", "-c", TWICE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, again, late = json.loads(done.stdout.splitlines()[-1])
    assert "bitsandbytes" not in late
    assert "accelerate" not in late
    assert loaded == pytest.approx(again, abs=15e6)  # bitsandbytes with what it imports takes 50 MB


def test_only_libraries_that_are_there_are_imported(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setitem(footprint.LIBRARIES, "torchao", ("no_such_library", "transformers.no_such_module"))
    monkeypatch.setattr(footprint.importlib, "import_module", asked.append)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "torchao"}}))
    footprint._import_model_code(str(tmp_path))
    assert asked == ["transformers.no_such_module"]


@pytest.mark.parametrize("export_format", ["onnx", "openvino", "executorch"])
def test_an_export_brings_its_exporter_and_its_runner(export_format, tmp_path, monkeypatch):
    asked = []
    auto = SimpleNamespace(get_exporter_class=asked.append, get_runner_class=asked.append)
    monkeypatch.setitem(sys.modules, "transformers.exporters.auto", auto)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "export.json").write_text(json.dumps({"export_format": export_format}))
    footprint._import_model_code(str(tmp_path))
    assert asked == [export_format] * 2


@pytest.mark.slow
def test_loaded_bytes_hold_at_least_the_weights(tmp_path):
    """Safetensors are mapped, not read: without touching the pages a model would seem to need no memory."""
    tiny.model("bert", hidden_size=512, intermediate_size=2048, vocab_size=20_000).save_pretrained(tmp_path)
    found = hfshrink.profile(tmp_path, sequence_length=4, batch_sizes=(1,), repeats=1)
    assert 0.9 * found.memory_bytes <= found.loaded_bytes <= 1.5 * found.memory_bytes
    assert found.peak_memory_bytes >= found.loaded_bytes
