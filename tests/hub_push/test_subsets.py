import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from huggingface_hub import DatasetCard

from hfshrink.errors import SettingError
from hfshrink.hub import push_to_hub
from hfshrink.hub.subsets import write_rows
from hfshrink.selection import select
from hub_push.conftest import files, log

INDEX = {"README.md", "indices.npy", "report.json"}
ROWS = "data/train-00000-of-00001.parquet"


@pytest.fixture
def rows():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    return Dataset.from_dict({"text": [f"text {n}" for n in range(40)], "label": [0, 1] * 20}, features)


@pytest.fixture
def subset(rows):
    return select(rows, 0.25, "random")


def card(hub):
    return DatasetCard(hub.git("tester/few", "show", "main:README.md", kind="datasets"))


def put(api, texts):
    for name, text in texts.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="tester/few", repo_type="dataset")


def test_rows_indices_report_and_card_arrive_in_one_commit(hub, api, subset, rows):
    url = push_to_hub(subset, "few", rows=True)
    assert url.startswith(f"{hub.endpoint}/datasets/tester/few/commit/")
    assert log(hub, "tester/few", kind="datasets") == ["Upload subset with hfshrink"]
    assert files(hub, "tester/few", kind="datasets") == INDEX | {ROWS}
    got = Dataset.from_parquet(api.hf_hub_download("tester/few", ROWS, repo_type="dataset"))
    assert got.features == rows.features
    assert got[:] == subset.dataset[:]
    indices = np.load(api.hf_hub_download("tester/few", "indices.npy", repo_type="dataset"))
    assert indices.tolist() == subset.indices.tolist()
    told = {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    assert card(hub).data["configs"] == [told]
    assert 'load_dataset("tester/few")' in card(hub).content


def test_a_second_push_makes_no_commit(hub, subset):
    assert push_to_hub(subset, "few", rows=True) == push_to_hub(subset, "few", rows=True)


@pytest.mark.parametrize("asked", [None, False])
def test_without_a_licence_only_indices_go_and_it_says_so(hub, subset, asked):
    push_to_hub(subset, "few", rows=asked)
    assert files(hub, "tester/few", kind="datasets") == INDEX
    told = {None: "The licence of the source is not known", False: "The rows themselves are not part"}[asked]
    assert told in card(hub).content
    assert card(hub).data["viewer"] is False
    report = json.loads(hub.git("tester/few", "show", "main:report.json", kind="datasets"))
    assert told in report["notes"][-1]


def test_rows_of_an_earlier_push_go_when_they_are_no_longer_published(hub, subset):
    push_to_hub(subset, "few", rows=True)
    push_to_hub(subset, "few", rows=False)
    assert files(hub, "tester/few", kind="datasets") == INDEX
    assert "configs" not in card(hub).data.to_dict()
    push_to_hub(subset, "few", rows=True)
    assert ROWS in files(hub, "tester/few", kind="datasets")
    assert "viewer" not in card(hub).data.to_dict()


def test_other_splits_and_their_entry_stay(hub, api, subset):
    push_to_hub(subset, "few", rows=True)
    test = {"split": "test", "path": "data/test-*"}
    text = str(card(hub)).replace("  data_files:\n", "  data_files:\n  - split: test\n    path: data/test-*\n")
    put(api, {"README.md": text, "data/test-00000-of-00001.parquet": "rows of others"})
    push_to_hub(subset, "few", rows=True)
    assert card(hub).data["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}, test]
    push_to_hub(subset, "few", rows=False)
    there = files(hub, "tester/few", kind="datasets")
    assert ROWS not in there
    assert "data/test-00000-of-00001.parquet" in there
    assert card(hub).data["configs"] == [{"config_name": "default", "data_files": [test]}]


def test_rows_of_others_are_not_replaced(hub, api, subset):
    api.create_repo("tester/few", repo_type="dataset")
    put(api, {ROWS: "rows of others"})
    with pytest.raises(SettingError, match="which hfshrink did not push and this dataset would replace"):
        push_to_hub(subset, "few", rows=True)


def test_the_licence_of_the_source_decides(hub, api, subset):
    push_to_hub(subset, "few", base_card={"license": "cc-by-sa-4.0"})
    assert ROWS in files(hub, "tester/few", kind="datasets")
    push_to_hub(subset, "few", base_card={"license": "cc-by-nc-nd-4.0"})
    assert ROWS not in files(hub, "tester/few", kind="datasets")
    with pytest.raises(SettingError, match="does not let everybody pass copies on"):
        push_to_hub(subset, "few", base_card={"license": "cc-by-nc-nd-4.0"}, rows=True)


def test_what_belongs_to_models_is_refused(hub, api, subset):
    with pytest.raises(SettingError, match="belong to models"):
        push_to_hub(subset, "few", exports={"a": "b"})
    api.create_repo("tester/few")
    with pytest.raises(SettingError, match="is a model repository, this is a data set"):
        push_to_hub(subset, "few")


def test_many_rows_go_to_several_files(tmp_path, monkeypatch, rows):
    monkeypatch.setattr("hfshrink.hub.subsets.SHARD_BYTES", 100)
    found = write_rows(rows.select(range(0, 40, 2)), tmp_path / "rows", "test")
    assert len(found) > 1
    assert next(iter(found)) == f"data/test-00000-of-{len(found):05d}.parquet"
    again = load_dataset("parquet", data_files=[str(file) for file in found.values()], cache_dir=str(tmp_path / "c"))
    assert again["train"]["text"] == rows["text"][::2]


def test_images_go_into_the_file_and_their_folder_does_not(tmp_path):
    pillow = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    (tmp_path / "ada").mkdir()
    pillow.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "ada" / "red.png")
    images = Dataset.from_dict({"image": [str(tmp_path / "ada" / "red.png")]}, Features({"image": Image()}))
    (file,) = write_rows(images, tmp_path / "rows", "train").values()
    (tmp_path / "ada" / "red.png").unlink()
    assert Dataset.from_parquet(str(file))[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert str(tmp_path).encode() not in file.read_bytes()
