"""What the client does on the Hub: repositories, uploads, downloads, revisions, pull requests."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hub.accounts import WRITE_TOKEN
from hub.server import running_hub
from hub.store import Store

BLOCK = bytes(range(256)) * 4096  # 1 MB


def add(path, content):
    return CommitOperationAdd(path, content)


def put(api, repo, **files):
    """A commit of files; ``a__txt`` stands for a.txt."""
    operations = [add(name.replace("__", "."), content) for name, content in files.items()]
    return api.create_commit(repo, operations, commit_message="files")


def get(api, repo, path, tmp_path, **kwargs):
    return Path(api.hf_hub_download(repo, path, cache_dir=tmp_path / "downloads", **kwargs)).read_bytes()


def test_who_the_token_belongs_to(api, reader):
    assert (api.whoami()["name"], api.whoami()["auth"]["accessToken"]["role"]) == ("tester", "write")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert {org["name"]: org["roleInOrg"] for org in api.whoami()["orgs"]} == {"acme": "write", "lookers": "read"}


def test_a_repository_is_created_once(api, hub):
    url = api.create_repo("tester/tiny")
    assert (str(url), url.repo_id, url.repo_type) == (f"{hub.endpoint}/tester/tiny", "tester/tiny", "model")
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("tester/tiny")
    assert str(api.create_repo("tester/tiny", exist_ok=True)) == str(url)
    assert api.create_repo("tiny", exist_ok=True).repo_id == "tester/tiny"


def test_a_dataset_may_have_a_models_name(api):
    api.create_repo("tester/tiny")
    assert api.create_repo("tester/tiny", repo_type="dataset").repo_type == "dataset"
    assert api.dataset_info("tester/tiny").id == "tester/tiny"


def test_organisations_take_repositories_of_their_writers(api):
    assert api.create_repo("acme/tiny").repo_id == "acme/tiny"
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("lookers/tiny")


def test_a_repository_is_deleted_and_moved(api, repo):
    api.move_repo(repo, "tester/other")
    assert api.repo_exists("tester/other")
    api.delete_repo("tester/other")
    assert not api.repo_exists("tester/other")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("tester/other")
    api.delete_repo("tester/other", missing_ok=True)


def test_small_files_come_back_and_are_in_git(api, hub, repo, tmp_path):
    commit = api.create_commit(repo, [add("a/b.txt", b"hello\n"), add("empty", b"")], commit_message="two files")
    assert hub.git(repo, "show", "main:a/b.txt") == "hello\n"
    assert hub.git(repo, "log", "-1", "--format=%H %an %s").split(maxsplit=2) == [commit.oid, "tester", "two files\n"]
    assert get(api, repo, "a/b.txt", tmp_path) == b"hello\n"
    assert get(api, repo, "empty", tmp_path) == b""
    assert commit.commit_url == f"{hub.endpoint}/{repo}/commit/{commit.oid}"
    assert commit.repo_url.repo_id == repo


def test_large_files_are_pointers_in_git_and_come_back_without_the_token(api, hub, repo, tmp_path):
    big = BLOCK * 11
    put(api, repo, model__safetensors=BLOCK, notes__txt=big)
    oid = hashlib.sha256(big).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(big)}\n"
    assert hub.git(repo, "show", "main:notes.txt") == pointer
    assert "notes.txt filter=lfs" in hub.git(repo, "show", "main:.gitattributes")
    assert get(api, repo, "notes.txt", tmp_path) == big
    assert get(api, repo, "model.safetensors", tmp_path) == BLOCK
    files = {file.path: file for file in api.list_repo_tree(repo)}
    assert (files["notes.txt"].size, files["notes.txt"].lfs.sha256) == (len(big), oid)


def test_large_files_are_uploaded_in_parts_and_once(api, hub, repo, tmp_path):
    hub.state.chunk_size = 2**20
    data = BLOCK * 2 + b"the end"
    put(api, repo, model__safetensors=data)
    assert sum(path.startswith("/upload/part/") for _, path, _ in hub.requests) == 3
    assert get(api, repo, "model.safetensors", tmp_path) == data
    hub.requests.clear()
    put(api, repo, copy__safetensors=data)
    assert not [path for _, path, _ in hub.requests if path.startswith("/upload/")]
    assert get(api, repo, "copy.safetensors", tmp_path) == data


def test_a_commit_that_changes_nothing_is_not_made(api, hub, repo):
    first = put(api, repo, config__json=b"{}", model__safetensors=BLOCK)
    assert put(api, repo, config__json=b"{}", model__safetensors=BLOCK).oid == first.oid
    assert hub.git(repo, "rev-list", "--count", "main") == "2\n"


def test_ignored_files_stay_away(api, repo):
    operations = [add(".gitignore", b"*.log\n"), add("a.log", b"1"), add("a.txt", b"1")]
    api.create_commit(repo, operations, commit_message="files")
    put(api, repo, b__log=b"1", b__txt=b"1")
    assert set(api.list_repo_files(repo)) == {".gitattributes", ".gitignore", "a.txt", "b.txt"}


def test_files_and_folders_are_deleted(api, repo):
    api.create_commit(repo, [add(f"x/{n}.txt", b"1") for n in range(3)] + [add("y", b"2")], commit_message="files")
    api.delete_file("y", repo)
    api.delete_folder("x", repo)
    assert api.list_repo_files(repo) == [".gitattributes"]
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        api.delete_file("y", repo)


def test_files_are_copied_within_a_repository(api, repo, tmp_path):
    put(api, repo, a__txt=b"small", a__bin=BLOCK)
    api.create_commit(repo, [CommitOperationCopy("a.bin", "b.bin")], commit_message="copy")
    assert get(api, repo, "b.bin", tmp_path) == BLOCK


def test_a_folder_is_uploaded_with_what_it_deletes(api, repo, tmp_path):
    put(api, repo, old__txt=b"1")
    folder = tmp_path / "folder"
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx" / "model.onnx").write_bytes(BLOCK)
    (folder / ".env").write_text("secret")
    api.upload_folder(repo_id=repo, folder_path=folder, delete_patterns="*.txt", ignore_patterns=".env")
    assert api.list_repo_files(repo) == [".gitattributes", "onnx/model.onnx"]
    snapshot = Path(api.snapshot_download(repo, cache_dir=tmp_path / "downloads"))
    assert (snapshot / "onnx" / "model.onnx").read_bytes() == BLOCK


def test_branches_and_tags(api, hub, repo, tmp_path):
    first = put(api, repo, a__txt=b"1")
    api.create_tag(repo, tag="v1", tag_message="one")
    api.create_branch(repo, branch="try/int8", revision="v1")
    second = api.create_commit(repo, [add("a.txt", b"2")], commit_message="two", revision="try/int8")
    refs = api.list_repo_refs(repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": first.oid, "try/int8": second.oid}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": first.oid}
    contents = [get(api, repo, "a.txt", tmp_path, revision=rev) for rev in ("main", "v1", "try/int8", second.oid)]
    assert contents == [b"1", b"1", b"2", b"2"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(repo, branch="try/int8")
    api.create_tag(repo, tag="v1", exist_ok=True)
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="try/int8")
    assert hub.git(repo, "for-each-ref", "--format=%(refname)") == "refs/heads/main\n"


def test_a_pull_request_is_opened_grown_and_merged(api, hub, repo, tmp_path):
    opened = api.create_commit(repo, [add("a.txt", b"1")], commit_message="please", create_pr=True)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    assert opened.pr_url == f"{hub.endpoint}/{repo}/discussions/1"
    api.create_commit(repo, [add("b.txt", b"2")], commit_message="more", revision=opened.pr_revision)
    assert "a.txt" not in api.list_repo_files(repo)
    assert get(api, repo, "b.txt", tmp_path, revision="refs/pr/1") == b"2"
    assert [ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests] == ["refs/pr/1"]
    assert api.get_discussion_details(repo, 1).status == "open"
    assert "+2" in api.get_discussion_details(repo, 1).diff
    api.merge_pull_request(repo, 1)
    assert set(api.list_repo_files(repo)) == {".gitattributes", "a.txt", "b.txt"}
    assert api.get_discussion_details(repo, 1).merge_commit_oid == api.repo_info(repo).sha


def test_discussions_are_opened_answered_renamed_and_closed(api, stranger, repo):
    number = api.create_discussion(repo, "A question", description="why?").num
    assert stranger.comment_discussion(repo, number, "because").content == "because"
    assert api.rename_discussion(repo, number, "An answer").new_title == "An answer"
    assert api.change_discussion_status(repo, number, "closed").new_status == "closed"
    assert [(found.title, found.status) for found in api.get_repo_discussions(repo)] == [("An answer", "closed")]
    pull = api.create_pull_request(repo, "A change", description="soon")
    assert (pull.num, pull.status, pull.is_pull_request) == (2, "draft", True)


def test_what_the_card_says_is_what_the_repository_says(api, repo):
    card = """---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-classification
tags: [int8]
base_model: some/base
base_model_relation: quantized
---
# Tiny
"""
    put(api, repo, README__md=card.encode(), model__safetensors=BLOCK)
    info = api.model_info(repo, files_metadata=True)
    assert (info.pipeline_tag, info.library_name, info.card_data["license"]) == (
        "text-classification",
        "transformers",
        "apache-2.0",
    )
    assert {"int8", "en", "license:apache-2.0", "base_model:quantized:some/base"} <= set(info.tags)
    sizes = {file.rfilename: (file.size, file.lfs is not None) for file in info.siblings}
    assert sizes["README.md"] == (len(card), False)
    assert sizes["model.safetensors"] == (len(BLOCK), True)
    assert set(vars(api.model_info(repo, expand=["sha"]))) >= {"sha"}
    assert api.model_info(repo, expand=["sha"]).siblings is None


def test_long_trees_and_histories_come_in_pages(api, hub, repo):
    hub.state.page_size = 2
    operations = [add(f"x/{n}.txt", str(n).encode()) for n in range(5)]
    api.create_commit(repo, operations, commit_message="five")
    for n in range(3):
        put(api, repo, a__txt=str(n).encode())
    paths = [entry.path for entry in api.list_repo_tree(repo, recursive=True, expand=True)]
    assert paths == [".gitattributes", "a.txt", "x", *(f"x/{n}.txt" for n in range(5))]
    assert [commit.title for commit in api.list_repo_commits(repo)] == ["files"] * 3 + ["five", "initial commit"]


def test_paths_are_looked_up(api, repo):
    put(api, repo, a__txt=b"12345", b__bin=BLOCK)
    found = api.get_paths_info(repo, ["a.txt", "b.bin", "none"], expand=True)
    assert [(file.path, file.size, file.last_commit.title) for file in found] == [
        ("a.txt", 5, "files"),
        ("b.bin", len(BLOCK), "files"),
    ]


@pytest.mark.parametrize("name", ["a.txt", "b.bin"])
def test_parts_of_files_are_read(hub, api, repo, name):
    data = b"0123456789" if name == "a.txt" else BLOCK
    put(api, repo, **{name.replace(".", "__"): data})
    files = HfFileSystem(endpoint=hub.endpoint, token=hub.token, skip_instance_cache=True)
    with files.open(f"{repo}/{name}", block_size=4) as file:
        file.seek(3)
        assert file.read(4) == data[3:7]
    assert files.size(f"{repo}/{name}") == len(data)
    assert any(status == 206 for _, _, status in hub.requests)


def test_what_is_missing_is_named(api, repo, tmp_path):
    with pytest.raises(EntryNotFoundError) as missing:
        get(api, repo, "none.txt", tmp_path)
    assert missing.value.response.headers["X-Repo-Commit"] == api.repo_info(repo).sha
    with pytest.raises(RevisionNotFoundError):
        get(api, repo, "none.txt", tmp_path, revision="no-branch")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/none")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "no-folder"))
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(repo, [add("a.txt", b"1")], commit_message="m", revision="no-branch")


def test_what_was_pushed_is_there_after_a_restart(api, hub, repo, online, tmp_path):
    oid = put(api, repo, model__safetensors=BLOCK).oid
    with running_hub(hub.state.store.folder) as again:
        api.endpoint = again.endpoint
        assert api.repo_info(repo).sha == oid
        assert get(api, repo, "model.safetensors", tmp_path) == BLOCK


@contextmanager
def server_process(folder):
    command = [sys.executable, "-m", "hub.server", "--port", "0", "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


@pytest.mark.slow
def test_the_server_runs_as_a_process(api, tmp_path):
    with server_process(tmp_path / "process") as (_, endpoint):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", endpoint)
        api.endpoint = endpoint
        assert api.create_repo("tester/tiny").repo_id == "tester/tiny"


def push_until_it_fails(api, told):
    """Commits of two files with one number in both; notes the commits that the server confirmed."""
    try:
        for number in range(1000):
            both = [add(path, str(number).encode()) for path in ("a", "b/c")]
            told.append(api.create_commit("tester/tiny", both, commit_message=str(number)).oid)
    except Exception:  # the server is gone
        return


@pytest.mark.slow
def test_a_server_killed_amid_commits_keeps_all_that_it_confirmed(online, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds, wait=time.sleep: wait(min(seconds, 0.01)))
    told = []
    with server_process(tmp_path / "process") as (process, endpoint):
        api = HfApi(endpoint=endpoint, token=WRITE_TOKEN)
        api.create_repo("tester/tiny")
        pushing = threading.Thread(target=push_until_it_fails, args=(api, told))
        pushing.start()
        while len(told) < 5:
            pushing.join(0.01)
        process.kill()
        pushing.join()
    repository = Store(tmp_path / "process").find("models", "tester/tiny")
    repository.git("fsck", "--strict")
    commits = repository.git("rev-list", "--reverse", "main").decode().split()[1:]
    assert commits[: len(told)] == told
    for number, commit in enumerate(commits):
        assert repository.read(commit, "a") == repository.read(commit, "b/c") == str(number).encode()


def test_delete_and_add_in_one_commit(api, repo, tmp_path):
    put(api, repo, a__txt=b"1")
    operations = [CommitOperationDelete("a.txt"), add("b.json", json.dumps({"b": 1}).encode())]
    api.create_commit(repo, operations, commit_message="change")
    assert set(api.list_repo_files(repo)) == {".gitattributes", "b.json"}
