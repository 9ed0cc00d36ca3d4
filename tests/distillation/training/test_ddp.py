"""Two processes train the student that one process trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import training


def run(folder, processes, per_device, accumulation, labels, special=""):
    """Train in processes of their own and return the student's weights and the last training log."""
    script = Path(__file__).with_name("ddp_run.py")
    printed = training.launch(script, processes, folder, per_device, accumulation, labels, special)
    logs = dict(line.split("=") for line in printed.splitlines() if line.startswith(("loss", "eval_")))
    return load_file(folder / "model.safetensors"), {name: float(value) for name, value in logs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "special"),
    [
        ("class", ""),
        ("tokens", ""),
        ("causal", ""),
        ("class", "features"),
        ("class", "cache"),
        ("causal", "cache"),
        ("causal", "fsdp"),
    ],
)
def test_two_processes_equal_one(tmp_path, labels, special):
    """Token heads have another number of items on each process: a mean of means would be wrong."""
    one, one_log = run(tmp_path / "one", 1, 8, 1, labels, special)
    two, two_log = run(tmp_path / "two", 2, 2, 2, labels, special)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
    assert one_log == pytest.approx(two_log, rel=1e-4)
    assert "loss_hidden" in one_log if special == "features" else {"loss_labels", "loss_logits"} <= one_log.keys()
