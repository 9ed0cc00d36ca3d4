import errno

import pytest
from huggingface_hub import HfApi

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.hub import push_to_hub
from hfshrink.hub.retries import TRIES, waiting_time, with_retries
from hub_push.conftest import log

COMMIT = r"/commit/main"


def puts(hub):
    return [path for method, path, status in hub.requests if method == "PUT" and status == 200]


PASSING = [(status, COMMIT) for status in (429, 500, 502, 504)]
PASSING += [(503, path) for path in ("/api/whoami-v2", "/api/repos/create", "/api/validate-yaml", COMMIT, "/upload/")]


@pytest.mark.parametrize(("status", "path"), PASSING)
def test_trouble_that_passes_is_waited_for(hub, folder, waits, status, path):
    failure = hub.fail(path=path, status=status, times=2)
    push_to_hub(folder, "small")
    assert failure.hits == 2
    assert len(log(hub)) == 1
    assert len(waits) >= 2


@pytest.mark.parametrize("headers", [{"Retry-After": "37"}, {"RateLimit": '"api";r=0;t=37'}])
def test_the_hub_says_how_long_to_wait(hub, folder, waits, headers):
    hub.fail(path="/api/repos/create", status=429, headers=headers)
    push_to_hub(folder, "small")
    assert waits == [37.0]


def test_waits_grow_and_end(hub, folder, waits):
    hub.fail(path="/api/repos/create", status=503, times=99)
    with pytest.raises(CheckpointError, match=r"Can't create tester/small: HTTP 503"):
        push_to_hub(folder, "small")
    assert len(waits) == TRIES - 1
    assert all(0.8 * 2**number <= wait <= 1.2 * 2**number for number, wait in enumerate(waits))


def test_a_wait_that_is_too_long_is_none(hub, folder, waits):
    hub.fail(path="/api/repos/create", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(CheckpointError, match="HTTP 429.*try again later"):
        push_to_hub(folder, "small")
    assert waits == []


@pytest.mark.parametrize("path", ["/api/whoami-v2", "/api/models/tester/small$", COMMIT, "/upload/", "/objects/batch"])
def test_dropped_connections_are_tried_again(hub, folder, path):
    failure = hub.fail(path=path, drop=True, times=1)
    push_to_hub(folder, "small")
    assert failure.hits == 1
    assert len(log(hub)) == 1


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, folder):
    hub.fail("POST", COMMIT, lost=True)
    url = push_to_hub(folder, "small")
    assert len(log(hub)) == 1
    assert url.endswith(hub.git("tester/small", "rev-parse", "main").strip())


def test_an_upload_cut_in_the_middle_is_resumed_by_the_next_push(hub, folder):
    hub.fail("PUT", "/upload/", after_bytes=1000, times=99)
    with pytest.raises(CheckpointError, match="repository is as it was, and another try sends only what is missing"):
        push_to_hub(folder, "small")
    assert log(hub) == []
    hub.failures.clear()
    push_to_hub(folder, "small")
    assert len(log(hub)) == 1


def test_what_the_hub_has_is_not_sent_again(hub, folder):
    hub.fail("POST", COMMIT, status=503, times=99)
    with pytest.raises(
        CheckpointError,
        match=r"The Hub has received model.safetensors, but not config.json.*no commit was confirmed.*HTTP 503",
    ):
        push_to_hub(folder, "small")
    assert len(puts(hub)) == 1
    assert log(hub) == []
    hub.failures.clear()
    push_to_hub(folder, "small")
    assert len(puts(hub)) == 1


def test_the_error_tells_what_was_and_was_not_uploaded(hub, model):
    hub.fail("PUT", "/upload/", status=403, skip=5, times=99)
    with pytest.raises(CheckpointError) as raised:
        push_to_hub(model, "small", max_shard_size="4KB")
    received, lacks = str(raised.value).split(", but not ")
    assert "model-00001-of" in received
    assert "config.json" not in received  # it goes with the commit
    assert "model-00007-of" in lacks
    assert "config.json" in lacks
    assert "has no right" in lacks


@pytest.mark.parametrize(
    ("status", "told"), [(401, "hf auth login"), (403, "no right"), (404, "may not see it"), (409, "HTTP 409")]
)
def test_what_does_not_pass_is_not_tried_again(hub, folder, waits, status, told):
    failure = hub.fail("POST", COMMIT, status=status, times=99)
    with pytest.raises(CheckpointError, match=told):
        push_to_hub(folder, "small")
    assert failure.hits == 1
    assert waits == []


def pushing_meanwhile(monkeypatch, hub, times):
    """Somebody commits a README right before each of the next commits."""
    commit, other = HfApi.create_commit, HfApi(endpoint=hub.endpoint, token=hub.token)
    left = list(range(times))

    def slow(self, *args, **kwargs):
        if left and self is not other:
            text = f"---\nlicense: mit\n---\nWritten meanwhile {left.pop()}.\n".encode()
            other.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="tester/small")
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", slow)


def test_a_push_of_somebody_else_meanwhile_is_kept(hub, folder, monkeypatch):
    pushing_meanwhile(monkeypatch, hub, 1)
    push_to_hub(folder, "small")
    readme = hub.git("tester/small", "show", "main:README.md")
    assert "Written meanwhile 0." in readme
    assert "made smaller with hfshrink" in readme
    assert 412 in {status for _, _, status in hub.requests}


def test_one_who_pushes_all_the_time_is_told(hub, folder, monkeypatch):
    pushing_meanwhile(monkeypatch, hub, 2)
    with pytest.raises(CheckpointError, match="moved twice"):
        push_to_hub(folder, "small")
    assert "hfshrink_record.json" not in hub.git("tester/small", "ls-tree", "-r", "--name-only", "main")


def test_a_full_disk_is_told_and_nothing_is_made(hub, api, model, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left on device.*Nothing was uploaded"):
        push_to_hub(model, "small")
    assert not api.repo_exists("tester/small")


def test_no_network_is_told(hub, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="Can't ask the Hub who you are: the connection failed"):
        push_to_hub(folder, "small")


def test_offline_mode_is_not_tried_again(hub, folder, monkeypatch, waits):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode"):
        push_to_hub(folder, "small")
    assert waits == []


def test_a_readme_that_the_hub_refuses_stops_before_the_upload(hub, api, folder):
    with pytest.raises(SettingError, match="The Hub refuses the metadata of the card: .*pipeline_tag"):
        push_to_hub(folder, "small", pipeline_tag=["a", "b"])
    hub.fail("POST", "validate-yaml", status=400, times=9)
    with pytest.raises(CheckpointError, match="push to tester/small failed. Nothing was uploaded.*HTTP 400"):
        push_to_hub(folder, "small")
    assert puts(hub) == []


def test_a_gitignore_that_leaves_weights_out_is_an_error(hub, api, folder):
    api.create_repo("tester/small")
    api.upload_file(path_or_fileobj=b"*.safetensors\n", path_in_repo=".gitignore", repo_id="tester/small")
    before = hub.git("tester/small", "rev-parse", "main")
    with pytest.raises(SettingError, match="leaves model.safetensors out"):
        push_to_hub(folder, "small")
    assert hub.git("tester/small", "rev-parse", "main") == before


def test_retries_are_bounded():
    calls = []

    def failing():
        calls.append(1)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        with_retries(failing, "Trying", tries=1)
    assert len(calls) == 1
    assert waiting_time(ValueError("x"), 1) is None
    assert 24 <= waiting_time(ConnectionResetError(), 30) <= 36
