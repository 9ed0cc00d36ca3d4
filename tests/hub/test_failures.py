"""Planned failures reach the client as true ones would, and leave the repository whole."""

import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

BLOCK = bytes(range(256)) * 4096


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The client waits seconds before it tries again."""
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.01)))


def push(api, repo, data=BLOCK):
    return api.create_commit(repo, [CommitOperationAdd("a.bin", data)], commit_message="m")


def count(hub, repo):
    return int(hub.git(repo, "rev-list", "--count", "main"))


def test_what_passes_is_tried_again(hub, api, repo):
    for status in (429, 500, 502, 503, 504):
        hub.requests.clear()
        plans = [
            hub.fail("POST", "/preupload/", status=status, headers={"Retry-After": "0"}),
            hub.fail("POST", "objects/batch", status=status),
            hub.fail("PUT", "/upload/", status=status, times=2),
        ]
        push(api, repo, BLOCK + str(status).encode())
        assert [plan.hits for plan in plans] == [1, 1, 2]
        assert [found for method, _, found in hub.requests if method == "PUT"] == [status, status, 200]


def test_a_refused_commit_is_told_and_leaves_the_revision(hub, api, repo):
    for status in (400, 401, 403, 404, 409, 412, 429, 500):
        hub.fail("POST", "/commit/main", status=status)
        with pytest.raises(HfHubHTTPError, match=f"planned failure {status}"):
            push(api, repo)
    assert count(hub, repo) == 1
    push(api, repo)
    assert count(hub, repo) == 2


def test_an_error_code_makes_the_clients_error(hub, api, repo):
    hub.fail("GET", f"/api/models/{repo}$", status=404, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)


@pytest.mark.parametrize("how", [{"drop": True}, {"after_bytes": 1000}])
def test_a_broken_upload_is_sent_again(hub, api, repo, how):
    plan = hub.fail("PUT", "/upload/", times=2, **how)
    push(api, repo)
    assert (plan.hits, count(hub, repo)) == (2, 2)
    assert [status for method, _, status in hub.requests if method == "PUT"] == [0, 0, 200]
    assert not list(hub.state.store.folder.rglob("incoming/*"))


def test_an_upload_that_ends_in_the_middle_goes_on_with_what_is_missing(hub, api, repo):
    hub.fail("PUT", "/upload/", drop=True, skip=1, times=6)
    files = [CommitOperationAdd(f"{name}.bin", name.encode() + BLOCK) for name in "ab"]
    with pytest.raises(RuntimeError, match="Error while uploading"):
        api.create_commit(repo, files, commit_message="m", num_threads=1)
    assert count(hub, repo) == 1
    hub.requests.clear()
    files = [CommitOperationAdd(f"{name}.bin", name.encode() + BLOCK) for name in "ab"]
    api.create_commit(repo, files, commit_message="m")
    assert [status for method, _, status in hub.requests if method == "PUT"] == [200]
    assert count(hub, repo) == 2


def test_a_commit_whose_answer_is_lost_is_there(hub, api, repo):
    hub.fail("POST", "/commit/main", lost=True)
    with pytest.raises(Exception, match="disconnected|reset|closed"):
        push(api, repo)
    assert count(hub, repo) == 2
    push(api, repo)
    assert count(hub, repo) == 2


def test_a_commit_that_is_cut_is_not_there(hub, api, repo):
    hub.fail("POST", "/commit/main", after_bytes=20)
    with pytest.raises(Exception, match="disconnected|reset|closed|rror"):
        push(api, repo)
    assert count(hub, repo) == 1


def test_a_broken_download_is_asked_for_again(hub, api, repo, tmp_path):
    push(api, repo)
    plan = hub.fail("GET", "/storage/", after_bytes=300_000)
    path = api.hf_hub_download(repo, "a.bin", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == BLOCK
    assert plan.hits == 1
    assert [status for _, path, status in hub.requests if path.startswith("/storage/")] == [0, 200]


def test_failures_are_for_chosen_requests(hub, api, repo):
    plan = hub.fail("POST", r"/commit/main\?create_pr=1", status=500)
    push(api, repo)
    assert plan.hits == 0
    with pytest.raises(HfHubHTTPError, match="planned failure 500"):
        api.create_commit(repo, [CommitOperationAdd("b", b"1")], commit_message="m", create_pr=True)
    assert api.list_repo_refs(repo, include_pull_requests=True).pull_requests == []


def test_a_plan_is_one_failure(hub):
    with pytest.raises(ValueError, match="one of status, drop"):
        hub.fail("GET", "/", status=500, drop=True)
    with pytest.raises(ValueError, match="the Hub has no models tester/none"):
        hub.git("tester/none", "log")
