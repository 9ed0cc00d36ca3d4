import dataclasses
import json

import pytest
from safetensors.torch import load_file

import tiny
from hfshrink.cards import model_card
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.hub import push_to_hub
from hfshrink.record import CompressionReport, report
from hub_push.conftest import files, log, with_record, write_export

PUSHED = {
    *("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("hfshrink_record.json", "hfshrink_results.json"),
}


def show(hub, name, revision="main", repo_id="tester/small", kind="models"):
    return hub.git(repo_id, "show", f"{revision}:{name}", kind=kind)


def test_model_record_results_and_card_arrive_in_one_commit(hub, api, model, capfd):
    url = push_to_hub(model, "small", processor=tiny.tokenizer())
    assert "%|" not in capfd.readouterr().err  # no progress bars where there is no terminal
    assert url.startswith(f"{hub.endpoint}/tester/small/commit/")
    assert log(hub) == ["Upload model with hfshrink"]
    assert files(hub) == PUSHED
    record = CompressionReport.from_dict(json.loads(show(hub, "hfshrink_record.json")))
    assert record.steps[0].technique == "prune"
    assert json.loads(show(hub, "hfshrink_results.json"))["compressed"]["scores"][0]["value"] == 0.9
    assert 'from_pretrained("tester/small")' in show(hub, "README.md")
    weights = load_file(api.hf_hub_download("tester/small", "model.safetensors"))
    assert all(weights[name].equal(tensor) for name, tensor in model.state_dict().items() if name in weights)


def test_a_second_push_makes_no_commit(hub, folder):
    first = push_to_hub(folder, "small")
    sent = len([path for method, path, _ in hub.requests if method == "PUT"])
    assert push_to_hub(folder, "small") == first
    assert len(log(hub)) == 1
    assert len([path for method, path, _ in hub.requests if method == "PUT"]) == sent


def test_a_model_in_memory_makes_the_same_files_twice(hub, model):
    assert push_to_hub(model, "small") == push_to_hub(model, "small")


def test_only_listed_files_of_a_folder_go(hub, folder):
    for name in (".env", "training_args.bin", "optimizer.pt", "notes.txt", "pytorch_model.bin", "model.py", ".netrc"):
        (folder / name).write_text("x")
    for inner in ("checkpoint-5", "runs", ".cache", "plots"):
        (folder / inner).mkdir()
        (folder / inner / "model.safetensors").write_text("x")
    push_to_hub(folder, "small")
    assert files(hub) == PUSHED


def test_a_readme_edited_on_the_hub_keeps_what_was_written(hub, api, folder):
    push_to_hub(folder, "small")
    text = show(hub, "README.md").replace("---\n\n<!--", "---\n\nBy hand, above.\n\n<!--", 1) + "\n## Mine\n\nBelow.\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="tester/small")
    push_to_hub(folder, "small", model_name="Renamed")
    kept = show(hub, "README.md")
    assert "By hand, above." in kept
    assert "## Mine\n\nBelow." in kept
    assert "# Renamed" in kept
    assert "# bert" not in kept


def test_what_was_added_to_the_folders_own_card_is_in_a_new_repository(hub, folder):
    text = str(model_card(folder))
    (folder / "README.md").write_text(text.replace("---\n\n<!--", "---\n\nBy hand.\n\n<!--", 1))
    push_to_hub(folder, "small", license="mit")
    assert "By hand.\n\n<!--" in show(hub, "README.md")
    (folder / "README.md").write_text("Someone else's README.")
    push_to_hub(folder, "other")
    assert "Someone else" not in show(hub, "README.md", repo_id="tester/other")


def test_a_licence_that_is_given_goes_before_the_one_that_is_there(hub, folder):
    push_to_hub(folder, "small", license="mit")
    push_to_hub(folder, "small")
    assert "license: mit" in show(hub, "README.md")
    push_to_hub(folder, "small", license="apache-2.0")
    assert "license: apache-2.0" in show(hub, "README.md")


def test_branch_tag_and_pull_request(hub, api, folder):
    push_to_hub(folder, "small", revision="smaller", tag="v1", commit_message="First")
    assert log(hub) == []
    assert log(hub, revision="smaller") == ["First"]
    assert log(hub, revision="v1") == ["First"]
    push_to_hub(folder, "small", revision="smaller", tag="v1")  # nothing changed: the tag fits
    with pytest.raises(SettingError, match="has a tag 'v1' at"):
        push_to_hub(folder, "small", tag="v1")
    request = push_to_hub(folder, "small", create_pr=True)
    assert request.pr_revision == "refs/pr/1"
    assert log(hub) == []
    assert "model.safetensors" in files(hub, revision="refs/pr/1")


def test_a_pull_request_goes_to_anothers_repository(hub, api, folder):
    api.create_repo("tester/small")
    with pytest.raises(SettingError, match="can't write to 'tester'; choose one of"):
        push_to_hub(folder, "tester/small", token=hub.stranger_token)
    assert push_to_hub(folder, "tester/small", token=hub.stranger_token, create_pr=True).pr_num == 1


def test_a_private_repository_is_private(hub, api, folder):
    push_to_hub(folder, "small", private=True)
    assert api.model_info("tester/small").private
    push_to_hub(folder, "small", private=True)
    api.create_repo("tester/open")
    with pytest.raises(SettingError, match="exists and is public"):
        push_to_hub(folder, "open", private=True)


def test_old_shards_go_with_the_commit_that_replaces_them(hub, model):
    push_to_hub(model, "small", max_shard_size="10KB")
    assert "model.safetensors.index.json" in files(hub)
    push_to_hub(model, "small")
    assert {name for name in files(hub) if "safetensors" in name} == {"model.safetensors"}
    push_to_hub(model, "small", max_shard_size="10KB")
    assert "model.safetensors" not in files(hub)


def test_exports_lie_beside_the_weights(hub, folder, tmp_path):
    push_to_hub(folder, "small", exports={"onnx-int8": write_export(tmp_path / "export")})
    beside = {f"onnx/onnx-int8/{name}" for name in ("config.json", "export.json", "model.onnx", "model.onnx.data")}
    assert files(hub) == PUSHED | beside
    assert 'subfolder="onnx/onnx-int8"' in show(hub, "README.md")
    push_to_hub(folder, "small")
    assert beside <= files(hub)  # of a push without them they stay


def test_an_export_alone_lies_at_the_root_and_replaces_weights(hub, folder, tmp_path):
    push_to_hub(folder, "small")
    push_to_hub(write_export(tmp_path / "export"), "small", processor=tiny.tokenizer())
    assert {"export.json", "model.onnx", "model.onnx.data", "tokenizer.json"} <= files(hub)
    assert "model.safetensors" not in files(hub)
    assert "library_name: onnx" in show(hub, "README.md")
    push_to_hub(folder, "small")
    assert "export.json" not in files(hub)
    assert "model.onnx" not in files(hub)


def test_what_others_put_there_stays(hub, api, folder, tmp_path):
    mine = {"plots/mine.png", "model.onnx", "notes.txt", "onnx/onnx-int8/README.md"}
    api.create_repo("tester/small")
    for name in mine:
        api.upload_file(path_or_fileobj=b"by hand", path_in_repo=name, repo_id="tester/small")
    push_to_hub(folder, "small", exports={"onnx-int8": write_export(tmp_path / "a")})
    push_to_hub(folder, "small", exports={"onnx-int8": write_export(tmp_path / "b", text=b"other")})
    assert mine <= files(hub)


def test_plots_of_an_earlier_push_go(hub, model):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    step = dataclasses.replace(report(model).steps[0], results={"kept_ratios": {"a": 0.5}})
    drawn = with_record(tiny.model("bert", num_labels=2))
    dataclasses.replace(report(drawn), steps=(step,)).attach(drawn)
    push_to_hub(drawn, "small")
    assert [name for name in files(hub) if name.startswith("plots/layers-")]
    push_to_hub(model, "small")
    assert not [name for name in files(hub) if name.startswith("plots/")]


def test_an_export_does_not_replace_weights_of_others(hub, api, model, tmp_path):
    api.create_repo("tester/small")
    api.upload_file(path_or_fileobj=b"weights", path_in_repo="model.safetensors", repo_id="tester/small")
    with pytest.raises(SettingError, match="holds model.safetensors, which hfshrink did not push"):
        push_to_hub(write_export(tmp_path / "export"), "small")
    assert files(hub) == {"model.safetensors"}


def test_what_can_be_known_before_work_is_said_before_anything_is_made(hub, api, folder, model, monkeypatch):
    plain = tiny.model("bert")
    with pytest.raises(SettingError, match="has no record"):
        push_to_hub(plain, "small")
    with pytest.raises(CheckpointError, match="no folder 'missing'"):
        push_to_hub("missing", "small")
    with pytest.raises(SettingError, match="may only read"):
        push_to_hub(folder, "small", token=hub.read_token)
    with pytest.raises(SettingError, match="can't write to 'somebody'"):
        push_to_hub(folder, "somebody/small")
    with pytest.raises(SettingError, match="can't write to 'lookers'; choose one of tester, acme,"):
        push_to_hub(folder, "lookers/small")  # an organisation in which the user only reads
    for name in ("a/b/c", "-small", "sm all", "small.git", "a--b", "../small", ""):
        with pytest.raises(SettingError, match="repo_id must be"):
            push_to_hub(folder, name)
    with pytest.raises(SettingError, match="without spaces") as raised:
        push_to_hub(folder, "small", token="hf_secret\n")
    assert "hf_secret" not in str(raised.value)
    with pytest.raises(SettingError, match="tag= and create_pr=True"):
        push_to_hub(folder, "small", tag="v1", create_pr=True)
    with pytest.raises(SettingError, match="no tester/small to open a pull request"):
        push_to_hub(folder, "small", create_pr=True)
    with pytest.raises(SettingError, match="rows= belongs to subsets"):
        push_to_hub(folder, "small", rows=True)
    with pytest.raises(SettingError, match="no identifier that the Hub knows"):
        push_to_hub(folder, "small", license="my own")
    api.create_repo("tester/small", repo_type="dataset")
    with pytest.raises(
        SettingError, match=r"is a data set repository.*create_repo\('tester/small', repo_type='model'\)"
    ):
        push_to_hub(folder, "small")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SettingError, match="needs a token"):
        push_to_hub(folder, "small")
    assert not api.repo_exists("tester/small")


def test_exports_must_belong_to_the_weights(hub, folder, tmp_path):
    with pytest.raises(SettingError, match="of a vit model"):
        push_to_hub(folder, "small", exports={"onnx-int8": write_export(tmp_path / "a", model_type="vit")})
    with pytest.raises(SettingError, match="must map names"):
        push_to_hub(folder, "small", exports={"../x": tmp_path / "a"})
    with pytest.raises(SettingError, match="go beside weights"):
        push_to_hub(tmp_path / "a", "small", exports={"x": write_export(tmp_path / "b", model_type="vit")})


def test_the_folder_itself_is_not_changed(hub, tmp_path):
    model = with_record(tiny.model("bert", num_labels=2), calibration="/home/ada/private/rows")
    model.save_pretrained(tmp_path / "small")
    before = {file.name: file.read_bytes() for file in (tmp_path / "small").iterdir()}
    push_to_hub(tmp_path / "small", "small")
    assert {file.name: file.read_bytes() for file in (tmp_path / "small").iterdir()} == before
    assert "/home/ada" not in show(hub, "config.json")
    assert json.loads(show(hub, "config.json"))["hfshrink"]["history"][0]["settings"] == {"calibration": "rows"}
