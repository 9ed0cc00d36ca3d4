"""Two processes learn the weights, ranges and scales that one process learns."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import training
from hfshrink.quantization.training.folding import learned_ranges


def run(folder, processes, per_device, accumulation, *words):
    """Train in processes of their own and return the model."""
    training.launch(Path(__file__).with_name("ddp_run.py"), processes, folder, per_device, accumulation, *words)
    return AutoModelForSequenceClassification.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("ranges", "special"), [("max", ""), ("lsq", ""), ("lsq", "taught")])
def test_two_processes_equal_one(tmp_path, ranges, special):
    one = run(tmp_path / "one", 1, 8, 1, ranges, special)
    two = run(tmp_path / "two", 2, 2, 2, ranges, special)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, two.state_dict()[name], rtol=1e-4, atol=1e-5), name
    (limits, scales), (others, rivals) = learned_ranges(one), learned_ranges(two)
    for name in limits:
        assert limits[name] == pytest.approx(others[name], rel=1e-4), name
        assert torch.allclose(scales[name], rivals[name], rtol=1e-4)
