"""The mixin before TRL's SFTTrainer: the teacher's part reaches the student's weights."""

import pytest
import torch
from datasets import Dataset

import tiny
from hfshrink import DistillationMixin, LogitLoss, report

trl = pytest.importorskip("trl", reason="needs trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # an option of TRL's own defaults
    pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning"),  # TRL 1.16 deprecates it
]
TEXTS = ["the cat is good", "a very long and boring movie", "the dog eats fish", "no sun"]


class Distilling(DistillationMixin, trl.SFTTrainer):
    """As in the docs."""


def trainer(rows, cls=Distilling, losses=None, label_weight=0.5, **settings):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    args = trl.SFTConfig(
        **{
            "output_dir": "out",
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "optim": "sgd",  # a step is the gradient then
            "max_steps": 1,
            "logging_steps": 1,
            "max_length": 16,
            **settings,
        }
    )
    student = tiny.model("llama", seed=1, num_hidden_layers=1)
    return cls(
        student,
        args,
        teacher=tiny.model("llama", seed=2),
        losses=losses,
        label_weight=label_weight,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
    )


def step(run):
    """What one step changes, and its log."""
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.train()
    return {name: value - before[name] for name, value in run.model.named_parameters()}, run.state.log_history[0]


def by_hand(rows, label_weight, weight):
    """Minus the gradient of the two parts, one row at a time."""
    student, teacher, terms = tiny.model("llama", seed=1, num_hidden_layers=1), tiny.model("llama", seed=2), []
    for row in rows["input_ids"]:
        ids = torch.tensor([row])
        ours = torch.log_softmax(student(ids).logits[0, :-1], -1)
        theirs = torch.log_softmax(teacher(ids).logits[0, :-1].detach(), -1)
        labels = -ours.gather(1, ids[0, 1:, None])[:, 0]
        terms.append(label_weight * labels + weight * (theirs.exp() * (theirs - ours)).sum(-1))
    torch.cat(terms).mean().backward()
    return {name: -value.grad for name, value in student.named_parameters()}


@pytest.mark.parametrize(("label_weight", "weight"), [(0.5, 1.0), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("chunk_size", [256, None], ids=["in chunks", "at once"])
def test_a_step_follows_the_gradient_of_both_parts(label_weight, weight, accumulation, chunk_size):
    losses = [LogitLoss(temperature=1.0, weight=weight, chunk_size=chunk_size)]
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    run = trainer({"text": TEXTS}, losses=losses, label_weight=label_weight, **sizes)
    found, _ = step(run)
    for name, change in by_hand(run.train_dataset, label_weight, weight).items():
        assert torch.allclose(found[name], change, rtol=1e-3, atol=1e-5), name


def test_parts_are_logged_and_the_step_is_recorded():
    run = trainer({"text": TEXTS}, losses=[LogitLoss(temperature=1.0)])
    _, log = step(run)
    assert log["loss"] == pytest.approx(0.5 * log["loss_labels"] + log["loss_logits"], rel=1e-4)
    assert report(run.model).steps[-1].technique == "distill"


def test_trls_own_label_loss_is_the_one_that_is_learned():
    """With loss_type="dft" each token's loss is weighted by its probability."""
    logs = []
    for chunk_size in (256, None):
        run = trainer({"text": TEXTS}, losses=[LogitLoss(chunk_size=chunk_size)], loss_type="dft")
        logs.append(step(run)[1]["loss_labels"])
    ids = [torch.tensor([row]) for row in run.train_dataset["input_ids"]]
    student = tiny.model("llama", seed=1, num_hidden_layers=1)
    chances = [torch.log_softmax(tiny.logits(student, {"input_ids": row})[0, :-1], -1) for row in ids]
    chosen = torch.cat([rows.gather(1, row[0, 1:, None])[:, 0] for rows, row in zip(chances, ids, strict=True)])
    assert logs == pytest.approx([-(chosen.exp() * chosen).mean().item()] * 2, rel=1e-3)


def test_only_completions_count_in_both_parts():
    rows = {"prompt": ["the cat", "a very long"], "completion": [" is good", " and boring movie"]}
    run = trainer(rows, losses=[LogitLoss(temperature=1.0)], per_device_train_batch_size=2)
    batch = next(iter(run.get_train_dataloader()))
    counted = (batch["labels"][:, 1:] != -100).sum().item()
    assert 0 < counted < batch["attention_mask"][:, 1:].sum().item()
    found, log = step(run)
    assert log["loss_logits"] > 0
    assert all(torch.isfinite(change).all() for change in found.values())


def test_evaluation_shows_the_students_own_loss():
    run = trainer({"text": TEXTS})
    metrics = run.evaluate(run.train_dataset)
    terms = []
    for row in run.train_dataset["input_ids"]:
        ids = torch.tensor([row])
        chances = torch.log_softmax(tiny.logits(run.model, {"input_ids": ids})[0, :-1], -1)
        terms.append(-chances.gather(1, ids[0, 1:, None])[:, 0])
    assert metrics["eval_loss"] == pytest.approx(torch.cat(terms).mean().item(), rel=1e-3)
