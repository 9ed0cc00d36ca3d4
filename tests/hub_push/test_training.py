import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainingArguments

import tiny
from hfshrink import CompressionTrainer, DistillationTrainer, Pruning, PruningTrainer
from hfshrink.errors import SettingError
from hub_push.conftest import files, log

ROWS = Dataset.from_dict({"input_ids": [[7, 8, 9], [10, 11, 12]] * 4, "labels": [0, 1] * 4})
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
RECORD = {"hfshrink_record.json", "hfshrink_results.json"}
STATES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "pruning_state.safetensors"}


def trainer_of(hub, tmp_path, kind=PruningTrainer, **settings):
    chosen = {"max_steps": 4, "save_steps": 2, "push_to_hub": True, "hub_token": hub.token, "seed": 1, **settings}
    told = {"report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2, "use_cpu": True}
    args = TrainingArguments(str(tmp_path / "run"), hub_model_id="small", **chosen, **told)
    model = tiny.model("bert", num_labels=2)
    extra = {"teacher": tiny.model("bert", num_labels=2, seed=1)} if kind is DistillationTrainer else {}
    extra = extra or {"pruning": Pruning(0.5, "neurons")}
    return kind(model, args, train_dataset=ROWS, processing_class=tiny.tokenizer(), **extra)


def weights(hub, api, revision, name="model.safetensors"):
    return load_file(api.hf_hub_download("tester/small", name, revision=revision))


def revisions(hub):
    return hub.git("tester/small", "rev-list", "main").splitlines()[:-1]


@pytest.mark.parametrize("kind", [PruningTrainer, CompressionTrainer, DistillationTrainer])
def test_every_save_is_pushed_and_the_end_has_our_card(hub, api, tmp_path, kind):
    trainer = trainer_of(hub, tmp_path, kind, hub_always_push=True)
    trainer.train()
    url = trainer.push_to_hub()
    assert url.startswith(f"{hub.endpoint}/tester/small/commit/")
    assert log(hub) == ["End of training", "Training in progress, step 4", "Training in progress, step 2"]
    plots = {name for name in files(hub) if name.startswith("plots/")}
    assert bool(plots) == (kind is not DistillationTrainer)
    assert files(hub) == MODEL | RECORD | plots | {"README.md"}
    readme = hub.git("tester/small", "show", "main:README.md")
    assert "made smaller with hfshrink" in readme
    assert all(f"]({plot})" in readme for plot in plots)
    assert "in training" not in readme
    assert "in training" in hub.git("tester/small", "show", f"{revisions(hub)[-1]}:README.md")
    sent, own = weights(hub, api, "main"), trainer.model.state_dict()
    assert all(tensor.equal(own[name]) for name, tensor in sent.items())
    assert trainer.push_to_hub() == url  # nothing changed: no commit


def test_checkpoints_are_pushed_with_their_weights_in_one_commit(hub, api, tmp_path):
    trainer = trainer_of(hub, tmp_path, hub_strategy="checkpoint", hub_always_push=True)
    trainer.train()
    trainer._finish_current_push()
    last = {f"last-checkpoint/{name}" for name in MODEL | STATES}
    assert log(hub) == ["Training in progress, step 4, checkpoint", "Training in progress, step 2, checkpoint"]
    for revision, step in zip(revisions(hub), (4, 2), strict=True):
        assert files(hub, revision=revision) == MODEL | last | {"README.md"}
        root, inner = (
            weights(hub, api, revision, name) for name in ("model.safetensors", "last-checkpoint/model.safetensors")
        )
        assert all(tensor.equal(inner[name]) for name, tensor in root.items())
        state = json.loads(hub.git("tester/small", "show", f"{revision}:last-checkpoint/trainer_state.json"))
        assert state["global_step"] == step
    assert not list(Path(trainer.args.output_dir).glob(".hfshrink-push-*"))


def test_a_run_resumes_from_the_pushed_checkpoint(hub, api, tmp_path):
    whole = trainer_of(hub, tmp_path / "a", hub_strategy="all_checkpoints", hub_always_push=True)
    whole.train()
    whole._finish_current_push()
    api.snapshot_download("tester/small", local_dir=tmp_path / "down", allow_patterns="checkpoint-2/*")
    resumed = trainer_of(hub, tmp_path / "b", push_to_hub=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "down" / "checkpoint-2"))
    ours = resumed.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole.model.state_dict().items())


def test_the_token_is_in_nothing_that_is_pushed(hub, api, tmp_path):
    trainer = trainer_of(hub, tmp_path, hub_strategy="all_checkpoints", hub_always_push=True)
    trainer.train()
    trainer.push_to_hub()
    assert (Path(trainer.args.output_dir) / "training_args.bin").exists()
    for file in (tmp_path / "hub").rglob("*"):
        if file.is_file():
            assert hub.token.encode() not in file.read_bytes()
    assert not [name for name in files(hub) if "training_args" in name]


def test_a_push_that_fails_does_not_stop_training(hub, tmp_path, caplog):
    trainer = trainer_of(hub, tmp_path, hub_always_push=True)
    hub.fail("POST", "/commit/main", status=403, times=1)
    trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step == 4
    assert "The push of step 2 failed, training goes on" in caplog.text
    assert log(hub) == ["Training in progress, step 4"]


def test_the_end_strategy_pushes_once(hub, tmp_path):
    trainer = trainer_of(hub, tmp_path, hub_strategy="end")
    trainer.train()
    trainer.save_model()
    assert log(hub) == ["Model save"]


def test_the_access_is_checked_before_training(hub, tmp_path):
    with pytest.raises(SettingError, match="may only read"):
        trainer_of(hub, tmp_path, hub_token=hub.read_token)


def test_a_trainer_that_was_not_to_push_can_do_so_afterwards(hub, tmp_path):
    trainer = trainer_of(hub, tmp_path, push_to_hub=False)
    trainer.train()
    future = trainer.push_to_hub("By hand", blocking=False, tags=["mine"], language="en", tasks="not a field")
    assert future.result().startswith(hub.endpoint)
    assert log(hub) == ["By hand"]
    readme = hub.git("tester/small", "show", "main:README.md")
    assert "- mine" in readme
    assert "language: en" in readme


def test_the_local_card_keeps_what_was_written(hub, tmp_path):
    trainer = trainer_of(hub, tmp_path, push_to_hub=False)
    trainer.train()
    trainer.create_model_card("en", "mit", model_name="Mine")
    file = Path(trainer.args.output_dir) / "README.md"
    assert "# Mine" in file.read_text()
    file.write_text(file.read_text() + "\nBy hand.\n")
    trainer.create_model_card(model_name="Other")
    assert "# Other" in file.read_text()
    assert "By hand." in file.read_text()
    assert "license: mit" in file.read_text()


def test_a_model_without_record_gets_the_plain_trainers_card(hub, tmp_path):
    trainer = trainer_of(hub, tmp_path, push_to_hub=False)
    Path(trainer.args.output_dir).mkdir(exist_ok=True)
    trainer.create_model_card(model_name="Plain")
    assert "generated automatically" in (Path(trainer.args.output_dir) / "README.md").read_text()
