"""What the Hub refuses: wrong tokens, names, fields, bytes, revisions, and requests that it doesn't know."""

import base64
import hashlib
import json

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import BadRequestError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from hub.server import running_hub


def a_file():
    return [CommitOperationAdd("a.txt", b"1")]  # the client takes an operation once


@pytest.fixture
def post(hub):
    """Sends JSON to the Hub: the answer."""

    def send(path, content, method="POST", token=hub.token):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx2.request(method, hub.endpoint + path, content=body, headers={"Authorization": f"Bearer {token}"})

    return send


def ndjson(*lines, header=None):
    head = {"key": "header", "value": {"summary": "m", "description": "", **(header or {})}}
    return b"\n".join(json.dumps(line).encode() for line in [head, *lines])


def regular(path, data):
    content = base64.b64encode(data).decode()
    return {"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}}


def test_an_unknown_route_is_501_and_fails_the_test(tmp_path, online):
    running = running_hub(tmp_path)
    hub = running.__enter__()
    assert httpx2.get(f"{hub.endpoint}/api/collections/x").status_code == 501
    with pytest.raises(AssertionError, match="unknown route: GET /api/collections/x"):
        running.__exit__(None, None, None)


def test_kernels_are_not_built(hub, api):
    with pytest.raises(HfHubHTTPError, match="501"):
        api.create_repo("tester/app", repo_type="kernel")
    assert "kernel" in hub.problems.pop()


ODD = (".hidden", "a--b", "a..b", "-a", "a.git", "a.ipynb", "a/b", "", "a b", "é", "x" * 97)


def test_names_against_the_rule_are_refused(post):
    answers = {name: post("/api/repos/create", {"name": name, "organization": None}) for name in ODD}
    assert [name for name, answer in answers.items() if answer.status_code != 400] == []
    assert all("Invalid name" in answer.json()["error"] for answer in answers.values())


def test_unknown_fields_are_refused(post, repo):
    assert post("/api/repos/create", {"name": "a", "colour": "red"}).status_code == 400
    assert post(f"/api/models/{repo}/settings", {"colour": "red"}, "PUT").status_code == 400
    assert "colour" in post(f"/api/models/{repo}/branch/b", {"colour": "red"}).json()["error"]


def test_a_read_token_reads_only(reader, api, repo):
    assert reader.repo_exists(repo)
    with pytest.raises(HfHubHTTPError, match="403"):
        reader.create_repo("tester/other")
    with pytest.raises(HfHubHTTPError, match="write token"):
        reader.create_commit(repo, a_file(), commit_message="m")


def test_a_stranger_proposes_but_does_not_write(stranger, api, repo):
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        stranger.create_commit(repo, a_file(), commit_message="m")
    assert stranger.create_commit(repo, a_file(), commit_message="m", create_pr=True).pr_num == 1
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_branch(repo, branch="b")
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.delete_repo(repo)
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_repo("tester/mine")


def test_no_token_and_a_wrong_token_are_401(nobody, api, repo, post):
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_repo("tester/other")
    with pytest.raises(HfHubHTTPError, match="401"):
        nobody.create_commit(repo, a_file(), commit_message="m")
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_unknown")


def test_a_private_repository_is_hidden(api, reader, stranger, nobody, tmp_path):
    api.create_repo("tester/secret", private=True)
    api.create_commit("tester/secret", a_file(), commit_message="m")
    assert reader.model_info("tester/secret").private
    for client, status in ((stranger, 404), (nobody, 401)):
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            client.model_info("tester/secret")
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            client.hf_hub_download("tester/secret", "a.txt", cache_dir=tmp_path)
        with pytest.raises(RepositoryNotFoundError, match=str(status)):
            client.list_repo_files("tester/secret")
    api.update_repo_settings("tester/secret", private=False)
    assert nobody.model_info("tester/secret").private is False


def test_a_gated_repository_shows_its_name_only(api, reader, stranger, nobody, repo, tmp_path):
    api.create_commit(repo, a_file(), commit_message="m")
    api.update_repo_settings(repo, gated="manual")
    assert nobody.model_info(repo).gated == "manual"
    for client, status in ((stranger, 403), (nobody, 401)):
        with pytest.raises(GatedRepoError, match=str(status)):
            client.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
        with pytest.raises(GatedRepoError):
            client.auth_check(repo)
    assert reader.hf_hub_download(repo, "a.txt", cache_dir=tmp_path)
    api.auth_check(repo, write=True)


def test_a_commit_on_a_stale_parent_is_412(api, hub, repo):
    old = api.repo_info(repo).sha
    api.create_commit(repo, a_file(), commit_message="m", parent_commit=old)
    change = [CommitOperationAdd("b.txt", b"2")]
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        api.create_commit(repo, change, commit_message="m", parent_commit=old)
    assert refused.value.response.status_code == 412
    assert "b.txt" not in hub.git(repo, "ls-tree", "--name-only", "main")


def test_a_reference_moves_from_where_it_was_or_not_at_all(hub, api, repo):
    repository = hub.state.store.find("models", repo)
    first = api.repo_info(repo).sha
    second = api.create_commit(repo, a_file(), commit_message="m").oid
    for old in (first, None):
        with pytest.raises(Exception, match="A commit has happened since"):
            repository.point("refs/heads/main", first, old)
    with pytest.raises(Exception, match="A commit has happened since"):
        repository.commit("refs/heads/main", first, [], "late", "tester")
    assert api.repo_info(repo).sha == second


def test_an_lfs_file_without_its_object_is_refused(post, hub, repo):
    oid = hashlib.sha256(b"x").hexdigest()
    line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 1}}
    answer = post(f"/api/models/{repo}/commit/main", ndjson(line))
    assert (answer.status_code, "was not uploaded" in answer.json()["error"]) == (400, True)
    assert hub.git(repo, "rev-list", "--count", "main") == "1\n"


def test_uploaded_bytes_are_hashed_and_counted(post, hub, repo):
    oid = hashlib.sha256(b"right").hexdigest()
    batch = {"operation": "upload", "transfers": ["basic"], "objects": [{"oid": oid, "size": 5}]}
    actions = post(f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]["actions"]
    href = actions["upload"]["href"]
    assert httpx2.put(href, content=b"wrong").status_code == 400
    assert httpx2.put(href, content=b"right and more").status_code == 400
    assert httpx2.put(href.replace("size=5", "size=6"), content=b"right").status_code == 403
    assert post(f"/{repo}.git/info/lfs/objects/verify", {"oid": oid, "size": 5}).status_code == 404
    assert httpx2.put(href, content=b"right").status_code == 200
    assert post(f"/{repo}.git/info/lfs/objects/verify", {"oid": oid, "size": 5}).status_code == 200
    assert "actions" not in post(f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]


def test_parts_are_counted_and_compared_by_their_etags(post, hub, repo):
    hub.state.chunk_size = 4
    data = b"0123456789"
    oid = hashlib.sha256(data).hexdigest()
    batch = {"operation": "upload", "transfers": ["basic", "multipart"], "objects": [{"oid": oid, "size": 10}]}
    upload = post(f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]["actions"]["upload"]
    urls = [upload["header"][f"{n:05d}"] for n in (1, 2, 3)]
    assert httpx2.put(urls[0], content=data[:3]).status_code == 400
    etags = [httpx2.put(url, content=data[4 * n : 4 * n + 4]).headers["etag"] for n, url in enumerate(urls)]
    parts = [{"partNumber": n, "etag": etag} for n, etag in enumerate(etags, 1)]
    assert httpx2.post(upload["href"], json={"oid": oid, "parts": parts[:2]}).status_code == 400
    wrong = [{**parts[0], "etag": '"0"'}, *parts[1:]]
    assert httpx2.post(upload["href"], json={"oid": oid, "parts": wrong}).status_code == 400
    assert httpx2.post(upload["href"], json={"oid": oid, "parts": parts}).status_code == 200


def test_a_token_sent_to_the_storage_is_a_problem(post, hub, repo):
    batch = {"operation": "upload", "objects": [{"oid": "0" * 64, "size": 5}]}
    href = post(f"/{repo}.git/info/lfs/objects/batch", batch).json()["objects"][0]["actions"]["upload"]["href"]
    assert href.startswith("http://localhost:")
    assert httpx2.put(href, content=b"12345", headers={"Authorization": f"Bearer {hub.token}"}).status_code == 400
    assert hub.problems.pop() == "a token was sent to the storage's host"


def test_regular_files_over_ten_megabytes_are_refused(post, repo):
    answer = post(f"/api/models/{repo}/commit/main", ndjson(regular("a.txt", bytes(10 * 2**20 + 1))))
    assert (answer.status_code, "must go through LFS" in answer.json()["error"]) == (400, True)


OUTSIDE = ("../a", "/a", "a//b", ".git/config", "a/.GIT/b", "a\\b", "a\nb", "", "./a")


def test_paths_out_of_the_repository_are_refused(post, repo):
    answers = {path: post(f"/api/models/{repo}/commit/main", ndjson(regular(path, b"1"))) for path in OUTSIDE}
    assert [path for path, answer in answers.items() if answer.status_code != 400] == []
    assert all("Invalid path" in answer.json()["error"] for answer in answers.values())


FORMS = [
    (b"", "first line must be the header"),
    (b"{", "no JSON"),
    (ndjson({"key": "move", "value": {}}), "unknown key 'move'"),
    (ndjson({"key": "file", "value": {"path": "a"}}), "'content'"),
    (ndjson({"key": "deletedFile", "value": {"path": "a", "force": True}}), "unknown fields"),
    (ndjson({"key": "file", "value": {"path": "a", "content": "%", "encoding": "base64"}}), "not base64"),
    (ndjson(header={"parentCommit": "main"}), "parentCommit"),
    (ndjson(header={"summary": " "}), "summary"),
]


def test_commits_of_another_form_are_refused(post, hub, repo):
    for body, message in FORMS:
        answer = post(f"/api/models/{repo}/commit/main", body)
        assert (answer.status_code, message in answer.json()["error"]) == (400, True), (message, answer.text)
    assert hub.git(repo, "rev-list", "--count", "main") == "1\n"


def test_references_that_are_none_are_refused(api, repo):
    for name in ("refs/pr/1", "a..b", "a b"):
        with pytest.raises(BadRequestError, match="Invalid reference"):
            api.create_branch(repo, branch=name)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.delete_branch(repo, branch="main")
    api.create_tag(repo, tag="v1")
    with pytest.raises(BadRequestError, match="no branch"):
        api.create_commit(repo, a_file(), commit_message="m", revision="v1")


def test_a_readme_with_bad_metadata_is_refused_before_and_at_the_commit(api, post, hub, repo):
    readme = b"---\nlicense: my-own\n---\n"
    with pytest.raises(ValueError, match='"license" must be one of'):
        api.create_commit(repo, [CommitOperationAdd("README.md", readme)], commit_message="m")
    answer = post(f"/api/models/{repo}/commit/main", ndjson(regular("README.md", readme)))
    assert (answer.status_code, "Invalid metadata in README.md" in answer.json()["error"]) == (400, True)
    assert "README.md" not in hub.git(repo, "ls-tree", "--name-only", "main")


def test_the_suite_knows_no_real_hub():
    assert constants.HF_HUB_OFFLINE
