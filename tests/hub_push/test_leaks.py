import json
import logging
import traceback

import pytest

import tiny
from hfshrink.errors import CheckpointError, HfshrinkError
from hfshrink.hub import push_to_hub
from hfshrink.hub.leaks import check_file, clean, known_secrets, scrub
from hub_push.conftest import with_record

SECRET = "hunter2-hunter2-hunter2"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """Secrets in the environment, and a home folder with a telling name."""
    home = tmp_path / "home" / "ada.lovelace"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MY_SERVICE_PASSWORD", SECRET)
    monkeypatch.setenv("OTHER_API_KEY", TOKEN)
    return home


def all_bytes(hub, kind="models"):
    """Every byte of every revision, large files too."""
    found = b""
    for file in (hub.state.store.folder).rglob("*"):
        if file.is_file() and ".git/objects" not in file.as_posix():
            found += file.read_bytes()
    names = hub.git("tester/small", "rev-list", "--objects", "--all", kind=kind).splitlines()
    for line in names:
        blob = line.split()[0]
        if hub.git("tester/small", "cat-file", "-t", blob, kind=kind).strip() == "blob":
            found += hub.git("tester/small", "cat-file", "-p", blob, kind=kind).encode()
    return found


def test_nothing_secret_reaches_the_hub_the_log_or_the_terminal(hub, planted, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    settings = {
        "calibration": str(planted / "secret-project" / "rows"),
        "token": TOKEN,
        "note": f"made with {SECRET} and {hub.token} from {planted}/x.csv",
    }
    model = with_record(tiny.model("bert", num_labels=2), **settings)
    model.config.vocab_file = str(planted / "vocab.txt")
    model.config._name_or_path = str(planted / "models" / "mine")
    folder = planted / "small"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / ".env").write_text(f"TOKEN={SECRET}")
    (folder / "training_args.bin").write_text(hub.token)
    push_to_hub(folder, "small", token=hub.token)
    captured = capfd.readouterr()
    for text in (SECRET, TOKEN, hub.token, "ada.lovelace"):
        assert text.encode() not in all_bytes(hub)
        assert text not in captured.out + captured.err
        assert text not in "\n".join(record.getMessage() for record in caplog.records if "hfshrink" in record.name)


@pytest.mark.parametrize("secret", [SECRET, TOKEN, "the token"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja", "vocab.txt"])
def test_a_file_that_holds_a_secret_is_refused(hub, api, planted, folder, name, secret):
    secret = hub.token if secret == "the token" else secret
    (folder / name).write_text('{"x": "' + secret + '"}')
    with pytest.raises(CheckpointError, match=f"{name} holds") as raised:
        push_to_hub(folder, "small")
    assert secret not in "".join(traceback.format_exception(raised.value))
    assert not api.repo_exists("tester/small")


def test_errors_and_their_tracebacks_hold_no_token(hub, folder, planted):
    paths = {"/commit/main": 403, "/api/repos/create": 401, "whoami": 401, "/upload/": 403}
    for number, (path, status) in enumerate(paths.items()):
        hub.failures.clear()
        headers = {"X-Error-Message": f"bad token {hub.token} of {planted}/x"}
        hub.fail(path=path, status=status, times=99, headers=headers)
        with pytest.raises(HfshrinkError) as raised:
            push_to_hub(folder, f"small-{number}", token=hub.token)
        told = "".join(traceback.format_exception(raised.value))
        assert hub.token not in told
        assert "ada.lovelace" not in told


def test_the_card_holds_no_secret_of_its_metadata(hub, planted, folder):
    with pytest.raises(CheckpointError, match="The card holds"):
        push_to_hub(folder, "small", tags=[SECRET])


def test_paths_deep_in_a_config_go_and_tokens_that_look_like_paths_stay(hub, api, planted, folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    deep = {"text_config": {"name": f"{planted}/base"}, "notes": [f"made in {planted}/x", "file:///srv/ada/y"]}
    config |= deep | {"extra_special_tokens": {"end": "/s", "think": "</think>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    push_to_hub(folder, "small")
    sent = json.loads(hub.git("tester/small", "show", "main:tokenizer_config.json"))
    assert sent["text_config"] == {"name": "base"}
    assert sent["notes"] == ["made in ~/x", "y"]
    assert sent["extra_special_tokens"] == {"end": "/s", "think": "</think>"}
    assert b"lovelace" not in all_bytes(hub)


def test_code_of_the_models_own_is_told_of(hub, folder, caplog):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_mine.Mine", "AutoConfig": "org/base--configuration.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    push_to_hub(folder, "small")
    assert "code of its own (modeling_mine.Mine), which is not uploaded" in caplog.text


def test_secrets_on_the_border_of_two_chunks_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("hfshrink.hub.leaks.CHUNK", 100)
    monkeypatch.setattr("hfshrink.hub.leaks.OVERLAP", 40)
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 90 + SECRET.encode() + b"y" * 90)
    with pytest.raises(CheckpointError, match="weights holds it"):
        check_file("weights", file, {"it": SECRET})


def test_short_and_harmless_variables_are_no_secrets(monkeypatch):
    for name, value in {"A_TOKEN": "short", "TOKENIZERS_PARALLELISM": "false" * 3, "B_TOKEN": "1234567890"}.items():
        monkeypatch.setenv(name, value)
    assert not [what for what in known_secrets() if what.endswith(("A_TOKEN", "PARALLELISM", "B_TOKEN"))]


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("/home/ada/rows", "rows"),
        ("C:\\Users\\ada\\rows", "rows"),
        ("see /data/ada/x.csv.", "see x.csv."),
        ("org/model", "org/model"),
        ("https://host/a/b/c", "https://host/a/b/c"),
        ("1/2/3 and a/b", "1/2/3 and a/b"),
        ("/", "/"),
    ],
)
def test_paths_lose_their_folders(text, cleaned):
    assert clean(text, {}) == cleaned


def test_signed_addresses_lose_their_signature():
    assert scrub("PUT https://s3/x?X-Amz-Signature=abc' failed", {}) == "PUT https://s3/x' failed"
