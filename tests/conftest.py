"""What every test shares: no network, one seed, two threads (one where tests run side by side)."""

import gc
import os

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", TOKENIZERS_PARALLELISM="false"
)

import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
collect_ignore = [f"{room}/training/ddp_run.py" for room in ("distillation", "pruning", "quantization")]  # scripts


@pytest.fixture(scope="session", autouse=True)
def _imported_stays():
    """A Trainer collects garbage in every run: of what the libraries made at their import there is none."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded(tmp_path, monkeypatch):
    """The same random state for each test; whatever writes to the current folder writes to a temporary one."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
