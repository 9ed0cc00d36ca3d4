"""`hfshrink card`: prints or writes the card, and keeps what someone wrote into it."""

import json

import pytest
from typer.testing import CliRunner

import hfshrink.cli.cards  # noqa: F401 # adds the command
import tiny
from cards.records import full_report
from hfshrink import make_student
from hfshrink.cards import model_card
from hfshrink.cli import app
from hfshrink.errors import CheckpointError, SettingError


@pytest.fixture
def small(tmp_path):
    make_student(tiny.model("bert"), num_layers=1).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def run(*words):
    return CliRunner().invoke(app, ["card", *(str(word) for word in words)])


def test_help_has_an_example():
    done = run("--help")
    assert done.exit_code == 0
    assert "Example: hfshrink card " in done.stdout


def test_without_an_output_the_card_is_printed(small):
    assert run(small).stdout == model_card(small).content + "\n"
    assert not (small / "README.md").exists()


def test_the_readme_is_written_and_what_stands_in_it_is_kept(small):
    (small / "README.md").write_text("---\nlicense: mit\nmine: 1\n---\nBy hand.\n")
    done = run(small, "--output", small, "--repo-id", "me/small", "--language", "en", "--base-model", "org/base")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{small / 'README.md'} written.\n"
    text = (small / "README.md").read_text()
    for part in ("license: mit", "mine: 1", "base_model: org/base", "- en", 'from_pretrained("me/small")'):
        assert part in text
    assert text.endswith("\nBy hand.\n")
    assert run(small, "-o", small / "README.md", "--license", "isc").exit_code == 0
    assert "license: isc" in (small / "README.md").read_text()


def test_licence_and_language_come_from_the_bases_card(small, tmp_path):
    (tmp_path / "base.md").write_text("---\nlicense: cc-by-nc-4.0\nlanguage: fr\n---\n")
    text = run(small, "--base-card", tmp_path / "base.md", "--model-name", "petit").stdout
    assert "license: cc-by-nc-4.0" in text
    assert "language: fr" in text
    assert "\n# petit\n" in text
    assert "**cc-by-nc-4.0 is not among the permissive licences.**" in text


def test_plots_lie_beside_the_card(small):
    pytest.importorskip("matplotlib")
    full_report().save(small)
    done = run(small, "-o", small, "--plots")
    assert done.exit_code == 0, done.output
    assert (small / "plots" / "size-metric.png").is_file()
    assert "](plots/size-metric.png)" in (small / "README.md").read_text()


def test_folders_of_subsets_get_a_data_card(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(full_report().details["subset"]))
    text = run(tmp_path, "--license", "mit", "--model-name", "few reviews").stdout
    assert "\n# few reviews\n" in text
    assert "1,000 of the 10,000 rows" in text
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match="can't be read as JSON"):
        raise run(tmp_path).exception


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--license", "whatever"], SettingError, "is no identifier"),
        (["--repo-id", "x"], SettingError, "repo_id must be a Hub id"),
        (["--base-card", "none.md"], CheckpointError, "no such file"),
        (["-o", "none/README.md"], CheckpointError, "There is no folder none"),
    ],
)
def test_errors_say_what_is_wrong(words, error, message, small):
    with pytest.raises(error, match=message):
        raise run(small, *words).exception


def test_a_missing_folder_and_a_readme_that_can_not_be_read_are_told(small):
    with pytest.raises(CheckpointError, match="There is no folder nowhere"):
        raise run("nowhere").exception
    (small / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="Can't write .* It is as it was"):
        raise run(small, "-o", small).exception
