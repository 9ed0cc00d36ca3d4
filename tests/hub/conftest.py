"""A Hub for each test, and clients in this process that may reach it."""

import pytest
from huggingface_hub import HfApi, close_session, constants

from hub.server import running_hub


@pytest.fixture
def hub(tmp_path):
    """A fresh Hub; the test fails if it is asked what it doesn't know."""
    with running_hub(tmp_path / "hub") as hub:
        yield hub
        close_session()


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The suite is offline; the Hub is on this machine."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def api(hub, online):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def reader(hub, online):
    return HfApi(endpoint=hub.endpoint, token=hub.read_token)


@pytest.fixture
def stranger(hub, online):
    return HfApi(endpoint=hub.endpoint, token=hub.stranger_token)


@pytest.fixture
def nobody(hub, online):
    return HfApi(endpoint=hub.endpoint, token=False)


@pytest.fixture
def repo(api):
    """An empty model repository."""
    return api.create_repo("tester/tiny").repo_id
