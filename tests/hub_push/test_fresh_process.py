"""What was pushed, as a stranger's fresh process gets it; pushes that are killed."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import tiny
from hfshrink import factorize, prune, quantize
from hfshrink.hub import push_to_hub
from hfshrink.selection import select
from hub.client import run_python
from hub_push.conftest import files, log

pytestmark = pytest.mark.slow
LOAD = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification as Auto
from transformers.exporters import ExportedModel

ids = torch.arange(7, 19).reshape(3, 4)
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
logits = {}

def run(name, model):
    with torch.no_grad():
        logits[name] = torch.as_tensor(model(**inputs).logits).contiguous()

run("native", Auto.from_pretrained("tester/native").eval())
run("beside", ExportedModel.from_pretrained("tester/mapped", subfolder="onnx/onnx-int8"))
run("export", ExportedModel.from_pretrained("tester/export"))
assert "hfshrink" not in sys.modules
import hfshrink
run("mapped", Auto.from_pretrained("tester/mapped").eval())
save_file(logits, sys.argv[1])

from datasets import load_dataset
print(json.dumps(load_dataset("tester/few", split="train")[:]))
"""


def here(model):
    ids = torch.arange(7, 19).reshape(3, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        return torch.as_tensor(model(**inputs).logits)


def lfs_sizes(hub, repo_id):
    lines = hub.git(repo_id, "grep", "-h", "-E", "^size ", "main", "--", "*.safetensors").splitlines()
    return [int(line.split()[1]) for line in lines]


def test_all_tiers_are_bit_equal_in_a_fresh_process_and_the_subset_too(hub, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    native = prune(tiny.model("bert", num_labels=2, **wide), 0.5)
    push_to_hub(native, "native", max_shard_size="5MB")
    assert sum(lfs_sizes(hub, "tester/native")) > 10e6
    assert len(lfs_sizes(hub, "tester/native")) >= 3
    mapped = factorize(tiny.model("bert", num_labels=2), 0.5)
    beside = quantize(mapped, "onnx-int8")
    push_to_hub(mapped, "mapped", exports={"onnx-int8": beside}, processor=tiny.tokenizer())
    push_to_hub(beside, "export", processor=tiny.tokenizer())
    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(40)], "label": [0, 1] * 20})
    subset = select(rows, 0.25, "random")
    push_to_hub(subset, "few", rows=True)
    printed = run_python(hub, tmp_path / "stranger", LOAD, str(tmp_path / "there.safetensors"), timeout=500)
    there = load_file(tmp_path / "there.safetensors")
    for name, model in {"native": native, "mapped": mapped, "beside": beside, "export": beside}.items():
        assert there[name].equal(here(model)), name
    assert json.loads(printed) == subset.dataset[:]


TRAIN = """
import sys
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, TrainingArguments
from hfshrink import Pruning, PruningTrainer
rows = Dataset.from_dict({"input_ids": [[7, 8, 9], [10, 11, 12]] * 4, "labels": [0, 1] * 4})
told = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "hub_model_id": "small"}
args = TrainingArguments("run", push_to_hub=True, hub_strategy="checkpoint", max_steps=4, save_steps=2, **told)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
trainer = PruningTrainer(model, args, train_dataset=rows, pruning=Pruning(0.5, "neurons"))
trainer.train()
print(trainer.push_to_hub())
sent, own = AutoModelForSequenceClassification.from_pretrained("tester/small").state_dict(), model.state_dict()
assert all(torch.equal(tensor, sent[name]) for name, tensor in own.items())
"""


def test_a_trainer_pushes_from_a_fresh_process(hub, tmp_path):
    tiny.model("bert", num_labels=2).save_pretrained(tmp_path / "base")
    printed = run_python(hub, tmp_path / "author", TRAIN, str(tmp_path / "base"), timeout=500)
    assert printed.strip().splitlines()[-1].startswith(f"{hub.endpoint}/tester/small/commit/")
    assert log(hub)[0] == "End of training"
    assert {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trainer_state.json")} <= files(hub)


KILLED = """
import os, random, signal, sys, time
import torch
sys.path[:0] = sys.argv[3:]
import datasets, jinja2, matplotlib.figure, transformers  # once, not in each child
import tiny
from hfshrink.cards import model_card
from hub_push.conftest import with_record
from hfshrink.hub import push_to_hub

torch.set_num_threads(1)
rng = random.Random(int(sys.argv[1]))

model = tiny.model("bert", num_labels=2, hidden_size=128, intermediate_size=512)

def push(version):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    push_to_hub(with_record(model, version=version), "small", max_shard_size="300KB", commit_message=str(version))

def forked(version, seconds):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            push(version)
            code = 0
        finally:
            os._exit(code)
    start = time.monotonic()
    while seconds is None or time.monotonic() - start < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status, time.monotonic() - start
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], time.monotonic() - start

status, duration = forked(0, None)
assert status == 0, status
killed = 0
for version in range(1, int(sys.argv[2]) + 1):
    killed += forked(version, rng.uniform(0.1, 1.1) * duration)[0] != 0
status, _ = forked(99, None)
assert status == 0, status
print(killed)
"""


def test_pushes_killed_at_random_never_leave_a_torn_revision(hub, api, tmp_path):
    paths = [path for path in sys.path if path.endswith("tests")] or [str(tmp_path)]
    killed = int(run_python(hub, tmp_path / "author", KILLED, "0", "20", *paths, timeout=1500).split()[-1])
    revisions = hub.git("tester/small", "rev-list", "main").splitlines()[:-1]
    versions = []
    for revision in revisions:
        folder = tmp_path / "there" / revision
        api.snapshot_download("tester/small", revision=revision, local_dir=folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        shards = {name: load_file(folder / name) for name in set(index.values())}
        found = {float(value) for shard in shards.values() for tensor in shard.values() for value in tensor.unique()}
        told = json.loads((folder / "hfshrink_record.json").read_text())["history"][0]["settings"]["version"]
        config = json.loads((folder / "config.json").read_text())["hfshrink"]["history"][0]["settings"]["version"]
        assert found == {float(told)}
        assert told == config
        assert {name for shard in shards.values() for name in shard} == set(index)
        versions.append(told)
    assert versions[0] == 99
    assert versions[-1] == 0
    assert len(set(versions)) == len(versions)
    assert killed >= 10
    assert len(versions) >= 2 + 20 - killed  # some are killed after their commit
