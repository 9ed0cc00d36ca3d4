"""Two processes prune what one process prunes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import training


def run(folder, processes, per_device, accumulation, *words):
    """Train in processes of their own and return the model's weights."""
    training.launch(Path(__file__).with_name("ddp_run.py"), processes, folder, per_device, accumulation, *words)
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "structure", "special"),
    [
        ("magnitude", "unstructured", ""),
        ("movement", "unstructured", ""),
        ("taylor", "heads+neurons", ""),
        ("movement", "heads+neurons", "taught"),
    ],
)
def test_two_processes_equal_one(tmp_path, method, structure, special):
    one = run(tmp_path / "one", 1, 8, 1, method, structure, special)
    two = run(tmp_path / "two", 2, 2, 2, method, structure, special)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value == 0, two[name] == 0), name
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
