import json

import pytest
from safetensors.numpy import load_file, save_file

from hfshrink.errors import CheckpointError
from hfshrink.hub.contents import export_files, matches, read_folder
from hub_push.conftest import write_export


@pytest.mark.parametrize(
    "name",
    [
        *(".env", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
        *("pytorch_model.bin", "model.pkl", "modeling_mine.py", "events.out.tfevents.1", "id_rsa", "notes.txt"),
        *("pruning_state.safetensors", "quantization_state.safetensors", "distillation.safetensors", "a.safetensors"),
    ],
)
def test_what_is_not_listed_stays(folder, name):
    (folder / name).write_text("{}")
    assert name not in read_folder(folder).files


@pytest.mark.parametrize("name", ["checkpoint-5/config.json", ".git/config", "plots/notes.txt", "plots/deep/a.png"])
def test_other_folders_stay(folder, name):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("{}")
    assert name not in read_folder(folder).files


@pytest.mark.parametrize(
    "name", ["plots/size.png", "chat_template.jinja", "additional_chat_templates/rag.jinja", "1_Pooling/config.json"]
)
def test_what_is_listed_goes(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    assert name in read_folder(folder).files


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "secret").write_text("x")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"vocab.txt is a link that leads out"):
        read_folder(folder)
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to(folder / "nothing")
    with pytest.raises(CheckpointError, match="link to nothing"):
        read_folder(folder)


def test_a_linked_folder_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").write_text("x")
    (folder / "plots").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="plots is a link that leads out"):
        read_folder(folder)


def test_links_inside_the_folder_are_followed(folder):
    (folder / "real").write_text("x")
    (folder / "vocab.txt").symlink_to(folder / "real")
    assert "vocab.txt" in read_folder(folder).files


def test_weights_and_an_export_in_one_folder_are_refused(folder):
    (folder / "export.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds weights .* and an export"):
        read_folder(folder)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pytorch_model.bin, which can run code"):
        read_folder(folder)


def test_weights_that_would_be_filled_at_random_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {**weights, "x.parametrizations.weight.original": weights["classifier.bias"]}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="holds parametrized weights"):
        read_folder(folder)


def test_half_written_weights_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(CheckpointError, match="half-written or corrupt"):
        read_folder(folder)


def test_a_missing_shard_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    next((tmp_path / "m").glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        read_folder(tmp_path / "m")


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"export_format": "other", "components": {}}', "can't be read"),
        ('{"export_format": "onnx", "components": {"model": {"file": "../../x"}}}', "is no file of"),
        ('{"export_format": "onnx", "components": {"model": {"file": "/etc/passwd"}}}', "is no file of"),
        ('{"export_format": "onnx", "components": {"model": {"file": "missing.onnx"}}}', "is no file of"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path, manifest, told):
    write_export(tmp_path / "export")
    (tmp_path / "export" / "export.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=told):
        export_files(tmp_path / "export")


def test_an_export_has_the_files_of_its_manifest(tmp_path):
    folder = write_export(tmp_path / "export")
    (folder / "model.onnx.bak").write_text("x")
    assert set(read_folder(folder).files) == {"config.json", "export.json", "model.onnx", "model.onnx.data"}
    assert json.loads((folder / "export.json").read_text())["export_format"] == "onnx"


def test_a_star_never_reaches_into_a_folder():
    assert matches("data/train-0.parquet", ["data/*.parquet"])
    assert not matches("data/x/train-0.parquet", ["data/*.parquet"])
    assert not matches("Model.safetensors", ["model.safetensors"])
