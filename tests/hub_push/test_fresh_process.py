"""What was pushed, as a stranger's fresh process gets it; pushes that are killed."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import tiny
from hfshrink import factorize, prune, quantize
from hfshrink.hub import push_to_hub
from hfshrink.selection import select
from hub.client import run_python
from hub_push.conftest import log

pytestmark = pytest.mark.slow
LOAD = """
import sys, torch
from safetensors.torch import save_file
{imports}
ids = torch.arange(7, 19).reshape(3, 4)
inputs = {{"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}}
model = {load}
with torch.no_grad():
    logits = model(**inputs).logits
save_file({{"logits": torch.as_tensor(logits).contiguous()}}, sys.argv[1])
"""
AUTO = "from transformers import AutoModelForSequenceClassification as Auto"
EXPORTED = "from transformers.exporters import ExportedModel"


def there(hub, tmp_path, load, *imports):
    """The logits that a fresh process computes."""
    code = LOAD.format(imports="\n".join(imports), load=load)
    run_python(hub, tmp_path / "stranger", code, str(tmp_path / "there.safetensors"), timeout=500)
    return load_file(tmp_path / "there.safetensors")["logits"]


def here(model):
    ids = torch.arange(7, 19).reshape(3, 4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    with torch.no_grad():
        return torch.as_tensor(model(**inputs).logits)


def test_a_native_model_in_shards_of_more_than_10_mb_is_bit_equal(hub, tmp_path):
    model = prune(tiny.model("bert", num_labels=2, hidden_size=256, intermediate_size=1024, num_hidden_layers=5), 0.5)
    push_to_hub(model, "small", max_shard_size="5MB")
    sizes = [size for _, size in lfs_objects(hub)]
    assert sum(sizes) > 10e6
    assert len(sizes) >= 3
    assert there(hub, tmp_path, 'Auto.from_pretrained("tester/small")', AUTO).equal(here(model))


def lfs_objects(hub):
    pointers = hub.git("tester/small", "grep", "-h", "-E", "^(oid|size) ", "main", "--", "*.safetensors").splitlines()
    pairs = zip(pointers[::2], pointers[1::2], strict=True)
    return {(oid.split(":")[-1], int(size.split()[1])) for oid, size in pairs}


def test_a_layer_map_is_bit_equal_and_an_export_lies_beside_it(hub, tmp_path):
    model = factorize(tiny.model("bert", num_labels=2), 0.5)
    exported = quantize(model, "onnx-int8")
    push_to_hub(model, "small", exports={"onnx-int8": exported}, processor=tiny.tokenizer())
    loaded = there(hub, tmp_path, 'Auto.from_pretrained("tester/small").eval()', "import hfshrink", AUTO)
    assert loaded.equal(here(model))
    beside = 'ExportedModel.from_pretrained("tester/small", subfolder="onnx/onnx-int8")'
    assert there(hub, tmp_path, beside, EXPORTED).equal(here(exported))


def test_an_export_alone_is_bit_equal(hub, tmp_path):
    exported = quantize(tiny.model("bert", num_labels=2), "onnx-int8")
    push_to_hub(exported, "small", processor=tiny.tokenizer())
    assert there(hub, tmp_path, 'ExportedModel.from_pretrained("tester/small")', EXPORTED).equal(here(exported))


def test_a_subset_is_read_by_load_dataset(hub, tmp_path):
    from datasets import Dataset

    rows = Dataset.from_dict({"text": [f"text {n}" for n in range(40)], "label": [0, 1] * 20})
    subset = select(rows, 0.25, "random")
    push_to_hub(subset, "few", rows=True)
    code = """
import json
from datasets import load_dataset
rows = load_dataset("tester/few", split="train")
print(json.dumps(rows[:]))
"""
    assert json.loads(run_python(hub, tmp_path / "stranger", code, timeout=500)) == subset.dataset[:]


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
"""


def test_a_trainer_pushes_from_a_fresh_process(hub, tmp_path):
    tiny.model("bert", num_labels=2).save_pretrained(tmp_path / "base")
    printed = run_python(hub, tmp_path / "author", TRAIN, str(tmp_path / "base"), timeout=500)
    assert printed.strip().splitlines()[-1].startswith(f"{hub.endpoint}/tester/small/commit/")
    assert log(hub)[0] == "End of training"
    loaded = there(hub, tmp_path, 'Auto.from_pretrained("tester/small")', "import hfshrink", AUTO)
    assert loaded.isfinite().all()


KILLED = """
import os, random, signal, sys, time
import torch
sys.path[:0] = sys.argv[3:]
import tiny
from hub_push.conftest import with_record
from hfshrink.hub import push_to_hub

torch.set_num_threads(1)
rng = random.Random(int(sys.argv[1]))

def push(version):
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 5}
    model = tiny.model("bert", num_labels=2, **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(version)
    push_to_hub(with_record(model, version=version), "small", max_shard_size="3MB", commit_message=str(version))

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
