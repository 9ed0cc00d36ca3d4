import pytest
from huggingface_hub import close_session
from typer.testing import CliRunner

import tiny
from hfshrink.cli import app
from hfshrink.errors import SettingError
from hub.client import work_on
from hub.server import running_hub
from hub_push.conftest import files, log, with_record, write_export


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub(tmp_path / "hub") as hub:
        work_on(hub, monkeypatch, tmp_path / "home")
        yield hub
        close_session()


def run(*args):
    return CliRunner().invoke(app, ["push", *map(str, args)], catch_exceptions=False)


def test_push_publishes_a_folder_with_an_export_beside_it(hub, tmp_path):
    with_record(tiny.model("bert", num_labels=2)).save_pretrained(tmp_path / "small")
    export = write_export(tmp_path / "export")
    options = ("--private", "--revision", "dev", "--tag", "v1", "--message", "Mine", "--license", "mit")
    more = ("--model-name", "Small one", "--language", "en", "--export", f"onnx-int8={export}")
    done = run(tmp_path / "small", "small", *options, *more)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{hub.endpoint}/tester/small/commit/")
    assert log(hub, revision="dev") == ["Mine"]
    assert "onnx/onnx-int8/model.onnx" in files(hub, revision="v1")
    readme = hub.git("tester/small", "show", "dev:README.md")
    assert "# Small one" in readme
    assert "license: mit" in readme


def test_push_takes_no_token_on_the_command_line():
    words = CliRunner().invoke(app, ["push", "--help"]).stdout.split()
    assert "--private" in " ".join(words)
    assert not [word for word in words if word.startswith("--token")]


def test_push_refuses_an_export_without_a_scheme(tmp_path):
    with pytest.raises(SettingError, match="must be scheme=folder"):
        run(tmp_path, "small", "--export", "folder")
