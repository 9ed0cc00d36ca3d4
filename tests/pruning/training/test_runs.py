"""Runs that are repeated, fail, end early, or start from other things than a transformers model."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

import tiny
import training
from hfshrink import report
from hfshrink.errors import SettingError
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.trainer import PruningTrainer


def make(network, pruning, rows=None, collate=training.collate, arguments=None, **kwargs):
    settings = training.arguments(**{"max_steps": 4, **(arguments or {})})
    data = {"train_dataset": rows or training.rows(16), "data_collator": collate}
    return PruningTrainer(network, settings, pruning=pruning, **data, **kwargs)


class At(TrainerCallback):
    """Does something when a step ends."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


def test_a_second_run_with_learned_scores_writes_checkpoints(tmp_path):
    how = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    trainer = make(tiny.model("bert"), Pruning(0.5, method="movement"), arguments=how)
    trainer.train()
    trainer.train()
    assert [step.technique for step in report(trainer.model).steps] == ["prune", "prune"]


def test_a_run_that_fails_leaves_dense_weights():
    def fail(control):
        raise RuntimeError("no memory")

    network = tiny.model("bert")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = make(network, Pruning(0.5, cooldown=0.5), callbacks=[At(3, fail)], arguments={"learning_rate": 0.0})
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_run_that_ends_early_says_so(caplog):
    def stop(control):
        control.should_training_stop = True

    network = tiny.model("bert")
    trainer = make(network, Pruning(0.8, cooldown=0.0), callbacks=[At(2, stop)])
    trainer.train()
    assert "ended after step 2 of 4" in caplog.text
    assert 0 < report(network).steps[-1].results["sparsity"] < 0.8


def test_a_new_model_for_each_run_starts_its_record():
    trainer = make(None, Pruning(0.5, "neurons"), model_init=lambda: tiny.model("bert"))
    found = []
    for _ in range(2):
        trainer.train()
        [step] = report(trainer.model).steps
        found.append((step.before.parameters, step.after.parameters))
    assert found[0] == found[1]
    assert found[0][0] > found[0][1]


def test_a_plain_module_is_pruned_without_a_record():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x, labels=None):
            logits = self.down(self.up(x).relu())
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    network = Net()
    rows = Dataset.from_dict({"x": torch.randn(16, 6).tolist(), "labels": [0, 1] * 8})
    make(network, Pruning(0.5), rows, collate=None).train()
    assert sum(int((module.weight == 0).sum()) for module in (network.up, network.down)) == 32


def test_a_scheduler_that_does_not_know_the_scores_is_refused():
    network = tiny.model("bert")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(SettingError, match="which a scheduler that was made before does not know"):
        make(network, Pruning(0.5, method="movement"), optimizers=(optimizer, scheduler))
    make(network, Pruning(0.5, method="movement"), optimizers=(optimizer, None))
