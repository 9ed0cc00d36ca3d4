"""transformers and datasets push to the Hub and load from it, bit by bit what was pushed."""

import hashlib

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import tiny
from hub.client import run_python, work_on

LOAD_MODEL = """
import hashlib, sys
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained("tester/tiny", revision=sys.argv[1])
state = sorted(model.state_dict().items())
print(hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in state)).hexdigest())
"""
PUSH_DATASET = """
from datasets import Dataset, DatasetDict
rows = {"text": ["good film", "bad film", "the cat"], "label": [1, 0, 1]}
train = Dataset.from_dict(rows)
DatasetDict(train=train, test=train.select([0])).push_to_hub("tester/rows", private=True)
train.push_to_hub("tester/rows", config_name="other", num_shards=2)
"""
LOAD_DATASET = """
from datasets import get_dataset_config_names, load_dataset
print(get_dataset_config_names("tester/rows"))
print(load_dataset("tester/rows", "default", split="train").to_dict())
print(load_dataset("tester/rows", "other", split="train").num_rows, load_dataset("tester/rows", "default")["test"][0])
streamed = load_dataset("tester/rows", "default", split="train", streaming=True)
print([row["label"] for row in streamed])
"""


def digest(model):
    state = sorted(model.state_dict().items())
    return hashlib.sha256(b"".join(name.encode() + value.numpy().tobytes() for name, value in state)).hexdigest()


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    work_on(hub, monkeypatch, tmp_path / "home")
    return hub


@pytest.fixture
def model():
    return tiny.model("bert", "text-classification", seed=3)


def test_a_model_in_shards_and_its_tokenizer_come_back(client, api, model):
    model.push_to_hub("tester/tiny", max_shard_size="5KB", private=True)
    tiny.tokenizer().push_to_hub("tester/tiny")
    shards = [name for name in api.list_repo_files("tester/tiny") if name.endswith(".safetensors")]
    assert len(shards) > 1
    again = AutoModelForSequenceClassification.from_pretrained("tester/tiny")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained("tester/tiny")("good film") == tiny.tokenizer()("good film")
    assert api.model_info("tester/tiny").private
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModelForSequenceClassification.from_pretrained("tester/tiny", token=False)


def test_a_model_comes_back_from_a_branch_a_tag_and_a_pull_request(client, api, model):
    model.push_to_hub("tester/tiny", revision="small", create_pr=False)
    api.create_tag("tester/tiny", tag="v1", revision="small")
    tiny.model("bert", "text-classification", seed=4).push_to_hub("tester/tiny", create_pr=True)
    loaded = {
        revision: digest(AutoModelForSequenceClassification.from_pretrained("tester/tiny", revision=revision))
        for revision in ("small", "v1", "refs/pr/1")
    }
    assert loaded["small"] == loaded["v1"] == digest(model) != loaded["refs/pr/1"]


def test_the_trainer_pushes_its_model_and_checkpoints(client, api, model, tmp_path):
    batch = tiny.inputs("bert", batch=4)
    rows = Dataset.from_dict({**{name: value.tolist() for name, value in batch.items()}, "labels": [0, 1, 0, 1]})
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        push_to_hub=True,
        hub_model_id="tester/tiny",
        hub_token=client.token,
        hub_strategy="checkpoint",
        hub_always_push=True,
        save_steps=1,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    url = trainer.push_to_hub(commit_message="trained")
    assert url.startswith(f"{client.endpoint}/tester/tiny/commit/")
    files = api.list_repo_files("tester/tiny")
    assert {"README.md", "model.safetensors", "config.json"} <= set(files)
    assert any(name.startswith("last-checkpoint/") for name in files)
    assert digest(AutoModelForSequenceClassification.from_pretrained("tester/tiny")) == digest(model)


@pytest.mark.slow
def test_a_model_is_loaded_in_a_fresh_process(client, model, tmp_path):
    model.push_to_hub("tester/tiny", private=True)
    revision = client.git("tester/tiny", "rev-parse", "main").strip()
    assert run_python(client, tmp_path / "fresh", LOAD_MODEL, revision) == digest(model) + "\n"


@pytest.mark.slow
def test_data_sets_are_pushed_and_loaded_in_processes(hub, tmp_path):
    run_python(hub, tmp_path / "push", PUSH_DATASET)
    names, rows, counts, streamed = run_python(hub, tmp_path / "load", LOAD_DATASET).splitlines()
    assert names == "['default', 'other']"
    assert rows == str({"text": ["good film", "bad film", "the cat"], "label": [1, 0, 1]})
    assert counts == "3 {'text': 'good film', 'label': 1}"
    assert streamed == "[1, 0, 1]"
