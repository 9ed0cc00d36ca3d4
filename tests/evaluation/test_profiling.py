"""`profile`: operations by hand, sizes from the tensors, times that are sane, memory of a real process."""

import random

import pytest
import torch

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation import measure_latencies, profile
from hfshrink.evaluation.machine import processor_name, read_energy
from hfshrink.evaluation.profiling import count_macs, weight_bytes
from hfshrink.inputs import image_shape, random_inputs
from hfshrink.measurement import Measurement


def bert_macs(tokens, hidden=16, inner=24, layers=2, labels=2):
    projections, attention = 4 * tokens * hidden**2, 2 * tokens**2 * hidden
    return layers * (projections + attention + 2 * tokens * hidden * inner) + hidden**2 + hidden * labels


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [5, 20])
def test_macs_equal_a_count_by_hand(attention, tokens):
    model = tiny.model("bert")
    model.set_attn_implementation(attention)
    assert count_macs(model, random_inputs(model, 1, tokens)) == bert_macs(tokens)


def test_macs_of_a_convolution_by_hand():
    model = tiny.model("resnet", num_channels=3)
    inputs = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    total = 0

    def count(module, _, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    found = count_macs(model, inputs)
    assert found == total


def test_profile_of_a_torch_model():
    model = tiny.model("bert").train()
    with torch.no_grad():
        model.classifier.weight.zero_()
    threads = torch.get_num_threads()
    found = profile(model, sequence_length=8, batch_sizes=(1, 3), repeats=4, memory=False)
    tensors = list(model.parameters())
    assert found.parameters == sum(p.numel() for p in tensors)
    assert found.nonzero_parameters == sum(int((p != 0).sum()) for p in tensors)
    assert 4 * found.parameters <= found.memory_bytes <= 4 * found.parameters + 10_000
    assert 4 * found.parameters <= found.size_bytes <= 4 * found.parameters + 10_000
    assert found.macs == bert_macs(8)
    assert found.loaded_bytes is None
    assert found.device == processor_name()
    assert [(x.batch_size, x.sequence_length, x.repeats, x.threads) for x in found.latency] == [
        (1, 8, 4, 1),
        (3, 8, 4, 1),
    ]
    assert all(0 < x.latency_ms_p50 <= x.latency_ms_p95 and x.cpu_ms > 0 for x in found.latency)
    assert model.training
    assert torch.get_num_threads() == threads
    assert isinstance(found, Measurement)


def test_a_folder_is_measured_by_its_files(tmp_path):
    tiny.model("bert").save_pretrained(tmp_path)
    assert (
        profile(tmp_path, sequence_length=4, repeats=1, memory=False).size_bytes
        == (tmp_path / "model.safetensors").stat().st_size
    )
    (tmp_path / "model.safetensors").unlink()
    assert weight_bytes(tmp_path) is None


def test_memory_of_a_fresh_process(tmp_path):
    model = tiny.model("bert", vocab_size=400_000)
    found = profile(model, sequence_length=4, batch_sizes=(1,), repeats=1)
    assert found.peak_memory_bytes >= found.loaded_bytes > 0
    assert found.memory_bytes < 2 * found.peak_memory_bytes


def test_memory_is_none_where_the_model_does_not_load(tmp_path, monkeypatch, caplog):
    model = tiny.model("bert")
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder: None)
    found = profile(model, sequence_length=4, batch_sizes=(1,), repeats=1)
    assert (found.size_bytes, found.loaded_bytes, found.peak_memory_bytes) == (None, None, None)
    assert "does not load in a process of its own" in caplog.text


def test_variants_are_interleaved(monkeypatch):
    calls = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.inner, self.name = tiny.model("bert"), name
            self.config, self.device = self.inner.config, self.inner.device

        def forward(self, input_ids):
            calls.append(self.name)

    names = ["a", "b", "c"]
    found = measure_latencies(
        {name: Spy(name) for name in names}, sequence_length=3, batch_sizes=(1,), repeats=20, seed=4
    )
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 25
    assert all(sorted(turn) == names for turn in rounds)
    assert len(set(map(tuple, rounds))) > 2
    order = random.Random(4)
    assert rounds == [order.sample(names, 3) for _ in range(25)]
    assert set(found) == set(names)


def test_inputs_hold_what_the_model_takes():
    for family, names in {"bert": 3, "distilbert": 2, "gpt2": 3, "llama": 2}.items():
        inputs = random_inputs(tiny.model(family), 2, 6)
        assert len(inputs) == names
        assert all(tensor.shape == (2, 6) for tensor in inputs.values())
        assert inputs["input_ids"].min() > 0
    same = [random_inputs(tiny.model("bert"), 2, 6, seed=9)["input_ids"] for _ in range(2)]
    assert torch.equal(*same)


def test_pictures_have_the_size_of_the_config():
    assert random_inputs(tiny.model("vit"), 2, 6)["pixel_values"].shape == (2, 3, 8, 8)
    processor = type("Processor", (), {"size": {"height": 10, "width": 12}})()
    assert image_shape(tiny.model("resnet"), processor) == (3, 10, 12)
    assert image_shape(tiny.model("resnet")) == (3, 224, 224)
    assert profile(tiny.model("vit"), repeats=1, memory=False).latency[0].sequence_length is None


def test_a_model_without_text_or_images_is_refused():
    class Other(torch.nn.Module):
        def forward(self, input_values):
            return input_values

    with pytest.raises(UnsupportedModelError, match="takes input_values"):
        random_inputs(Other(), 1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 35}, r"sequence_length must lie in 1\.\.3\d for this model, got 35"),
        ({"sequence_length": 0}, r"sequence_length must lie in 1\.\."),
        ({"batch_sizes": (1, 0)}, "batch_sizes must be at least 1 and whole, got 0"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"repeats": 0}, "repeats must be at least 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=message):
        profile(tiny.model("bert"), memory=False, **settings)


def test_energy_counters(tmp_path):
    assert read_energy(tmp_path) is None
    zones = {"intel-rapl:0": ("package-0", 5), "intel-rapl:0:0": ("core", 3), "intel-rapl:1": ("package-1", 7)}
    for zone, (kind, value) in {**zones, "intel-rapl:2": ("psys", 12)}.items():  # the platform holds the packages
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{kind}\n")
        (tmp_path / zone / "energy_uj").write_text(f"{value}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("100\n")
    assert read_energy(tmp_path) == {"intel-rapl:0": (5, 100), "intel-rapl:1": (7, 100)}
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert read_energy(tmp_path) is None


def test_energy_per_call(monkeypatch):
    readings = iter([{"z": (90, 100)}, {"z": (90, 100)}, {"z": (30, 100)}])
    monkeypatch.setattr("hfshrink.evaluation.profiling.read_energy", lambda: next(readings))
    found = profile(tiny.model("bert"), sequence_length=4, batch_sizes=(1,), repeats=4, memory=False)
    assert found.energy_joules == pytest.approx(40e-6 / 4)  # the counter ran over
