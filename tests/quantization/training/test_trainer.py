"""Quantization-aware training in the Trainer: forward pass, checkpoints, resuming, folding, and what is refused."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

import tiny
import training
from hfshrink import report
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.quantization.training import fake
from hfshrink.quantization.training.folding import fake_quantized, learned_ranges, weight_scales
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.trainer import STATE_FILE, QATMixin, QATTrainer

LSQ = {"weight_ranges": "lsq", "activation_ranges": "lsq", "scale_learning_rate": 1e-3}
VARIANTS = {
    "int8": QAT(),
    "4-bit groups, weights alone": QAT(4, None, group_size=4),
    "learned 4-bit": QAT(4, **LSQ),
    "learned later": QAT(4, start=0.4, **LSQ),
    "tables too": QAT(4, embeddings=True),
}
OFTEN = ("int8", "learned later")
CASES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
NAME = "bert.encoder.layer.0.intermediate.dense"


def model(**config):
    return tiny.model("bert", seed=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **config)


def run(network, quantization, resume=None, cls=QATTrainer, **arguments):
    settings = {"max_steps": 8, "logging_steps": 1, **arguments}
    evaluated = {"eval_dataset": training.rows(8, seed=1)} if "eval_strategy" in settings else {}
    trainer = cls(
        network,
        training.arguments(**settings),
        quantization=quantization,
        train_dataset=training.rows(32),
        data_collator=training.collate,
        **evaluated,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one, other, **close):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.allclose(a, b, **close) if close else torch.equal(a, b) for a, b in pairs)


def linears(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n != "classifier"}


def test_a_run_without_quantization_is_the_trainers():
    ours, theirs = model(), model()
    run(ours, None)
    run(theirs, None, cls=lambda *args, quantization, **kwargs: Trainer(*args, **kwargs))
    assert same(ours, theirs)
    assert report(ours).steps == ()


def _slow_weight(weight):
    largest = weight.detach().gather(1, weight.detach().abs().argmax(1, keepdim=True))
    codes = (weight / (largest / -8)).detach()
    straight = _slow_grid(weight, largest / -8, -8, 7)
    return torch.where(codes > 7 + 1e-4, straight.detach(), straight)


def _slow_grid(values, scale, low, high):
    return (torch.round(values / scale).clamp(low, high) * scale - values).detach() + values


class _Slow(nn.Module):
    """A Linear that computes as the papers say, from running ranges that it keeps itself."""

    def __init__(self, dense):
        super().__init__()
        self.weight, self.bias, self.range, self.seen = dense.weight, dense.bias, None, []

    def forward(self, x):
        self.seen.append((x.detach().min(), x.detach().max()))
        weight = _slow_weight(self.weight)
        if self.range is not None:
            scale, zero_point = fake.affine(*self.range)
            inside = (x / scale).detach().clamp(-zero_point, 255 - zero_point) == (x / scale).detach()
            x = (
                _slow_grid(x, scale, -zero_point, 255 - zero_point) * inside
                + (~inside) * (torch.round(x / scale).clamp(-zero_point, 255 - zero_point) * scale).detach()
            )
        return nn.functional.linear(x, weight, self.bias)

    def move(self):
        (low, high), self.seen = self.seen[0], []
        before = (low, high) if self.range is None else self.range
        self.range = (0.9 * before[0] + 0.1 * low, 0.9 * before[1] + 0.1 * high)


def test_training_equals_the_slow_formulation():
    """Rows of one length, so that there is no padding; SGD, six steps, the ranges then stand still."""
    ours, slow = model(), model()
    rows = training.rows(32).map(lambda row: {"input_ids": (row["input_ids"] * 6)[:6], "attention_mask": [1] * 6})
    how = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    args = training.arguments(max_steps=8, learning_rate=0.1, **how)
    quantization = QAT(4, freeze=0.2)
    QATTrainer(ours, args, quantization=quantization, train_dataset=rows, data_collator=training.collate).train()

    layers = {name: _Slow(module) for name, module in linears(slow).items()}
    for name, layer in layers.items():
        slow.set_submodule(name, layer)
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.1)
    slow.train()
    for step in range(8):
        batch = training.collate([rows[i] for i in range(4 * step, 4 * step + 4)])
        slow(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in layers.values() if step < 7 else ():
            layer.move()
    ranges = learned_ranges(ours)[0]
    for name, layer in layers.items():
        on_grid = _slow_weight(layer.weight)
        assert torch.allclose(ours.get_submodule(name).weight, on_grid, atol=1e-5), name
        scale, zero_point = fake.affine(*layer.range)
        assert ranges[name] == pytest.approx((float(-zero_point * scale), float((255 - zero_point) * scale)), rel=1e-4)
    assert torch.allclose(ours.classifier.weight, slow.classifier.weight, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_end_on_their_grid_and_the_head_stays_float(variant):
    network, quantization = model(), VARIANTS[variant]
    run(network, quantization, optim="adamw_torch", learning_rate=1e-3)
    step = report(network).steps[-1]
    assert step.method == quantization.method
    assert set(step.modules) >= set(linears(network))
    assert ("bert.embeddings.word_embeddings" in step.modules) == quantization.embeddings
    assert set(step.skipped) == {"classifier"}
    for name in step.modules:
        scale = weight_scales(network.get_submodule(name), step.settings)
        assert scale is not None, name
    assert weight_scales(network.classifier, step.settings) is None
    ranges, scales = learned_ranges(network)
    assert set(ranges) == (set(linears(network)) if quantization.activation_bits else set())
    assert set(scales) == set(step.modules)


@pytest.mark.parametrize("variant", CASES)
def test_accumulated_batches_equal_one_large_batch(variant):
    large, small = model(), model()
    how = {"train_sampling_strategy": "sequential", "max_steps": 4}
    run(large, VARIANTS[variant], per_device_train_batch_size=8, **how)
    run(small, VARIANTS[variant], per_device_train_batch_size=2, gradient_accumulation_steps=4, **how)
    assert same(large, small, atol=1e-4)


@pytest.mark.parametrize("variant", CASES)
@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_exactly(variant, step, tmp_path):
    how = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole, again = model(), model()
    run(whole, VARIANTS[variant], output_dir=str(tmp_path), **how)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    run(again, VARIANTS[variant], resume=checkpoint, output_dir=str(tmp_path / "again"), **how)
    assert same(whole, again)
    assert learned_ranges(whole)[0] == learned_ranges(again)[0]


@pytest.mark.parametrize("variant", CASES)
def test_every_checkpoint_is_a_plain_model_on_its_grid(variant, tmp_path):
    network, quantization = model(), VARIANTS[variant]
    keys = set(network.state_dict())
    run(network, quantization, save_strategy="steps", save_steps=4, output_dir=str(tmp_path))
    assert set(network.state_dict()) == keys
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert set(load_file(folder / "model.safetensors")) == keys
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert weight_scales(loaded.get_submodule(NAME), quantization.given()) is not None
        latent = load_file(folder / STATE_FILE)[f"latent.{NAME}"]
        assert not torch.equal(latent, loaded.get_submodule(NAME).weight)
    assert torch.equal(loaded.get_submodule(NAME).weight, network.get_submodule(NAME).weight)


def test_before_the_start_it_is_float_training():
    ours, theirs = model(), model()
    how = {"max_steps": 4, "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential"}
    trainer = run(ours, QAT(start=0.5, freeze=0.0), **how)
    assert [entry["quantized"] > 0 for entry in trainer.state.log_history[:4]] == [False, True, True, True]
    run(theirs, None, **how)
    losses = [[entry["loss"] for entry in t.state.log_history[:4]] for t in (trainer, run(model(), None, **how))]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]


def test_ranges_stand_still_in_the_end_and_in_evaluations(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path), "max_steps": 6}
    run(model(), QAT(4, freeze=0.5, **LSQ), eval_strategy="steps", eval_steps=1, **how)
    states = [load_file(tmp_path / f"checkpoint-{step}" / STATE_FILE) for step in range(1, 7)]
    moved = [a[f"input_scale.{NAME}"] != b[f"input_scale.{NAME}"] for a, b in itertools.pairwise(states)]
    assert moved == [True, True, False, False, False]
    for a, b in itertools.pairwise(states[2:]):  # they shrink with the largest weight, and don't grow
        assert (a[f"weight_scale.{NAME}"] >= b[f"weight_scale.{NAME}"]).all()
    run(model(), QAT(4, freeze=0.5, **LSQ), **{**how, "output_dir": str(tmp_path / "unseen")})
    unseen = load_file(tmp_path / "unseen" / "checkpoint-6" / STATE_FILE)
    assert all(torch.equal(value, unseen[name]) for name, value in states[-1].items())


@pytest.mark.parametrize("variant", CASES)
def test_evaluations_are_of_the_quantized_model(variant):
    network = model()
    trainer = run(network, VARIANTS[variant], eval_strategy="steps", eval_steps=8)
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(seen[0], abs=1e-5)
    batch = training.collate([training.rows(8, seed=1)[i] for i in range(8)])
    with fake_quantized(network), torch.no_grad():
        assert float(network(**batch).loss) == pytest.approx(seen[0], abs=1e-5)
    if VARIANTS[variant].activation_bits:
        with torch.no_grad():
            assert float(network(**batch).loss) != pytest.approx(seen[0], abs=1e-6)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_gradient_checkpointing_changes_nothing():
    plain, again = model(), model()
    run(plain, QAT(4, **LSQ))
    for reentrant in (False, True):
        other = copy.deepcopy(again)
        how = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        run(other, QAT(4, **LSQ), activation_checkpointing=True, **how)
        assert same(plain, other, atol=1e-6)
        assert not any("weight" in module.__dict__ for module in other.modules())


def test_half_precision_trains():
    network = model()
    run(network, QAT(4, **LSQ), bf16=True)
    assert learned_ranges(network) is not None


def test_any_trainer_can_train_for_quantization():
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Mine(QATMixin, Seq2SeqTrainer): ...

    network = model()
    settings = training.arguments(max_steps=4).to_dict()
    args = Seq2SeqTrainingArguments(
        **{k: v for k, v in settings.items() if k in ("output_dir", "max_steps", "use_cpu")}
    )
    args.report_to, args.disable_tqdm, args.save_strategy = [], True, "no"
    how = {"train_dataset": training.rows(16), "data_collator": training.collate}
    Mine(network, args, quantization=QAT(4), **how).train()
    assert learned_ranges(network) is not None


@pytest.mark.parametrize(
    "family",
    ["gpt2", "resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "distilbert", "vit"))],
)
def test_other_families_end_on_their_grid(family):
    network = tiny.model(family)
    images = family in ("vit", "resnet")
    labels = "class" if family == "distilbert" else None
    QATTrainer(
        network,
        training.arguments(max_steps=4),
        quantization=QAT(4),
        train_dataset=_images() if images else training.rows(16, labels),
        data_collator=None if images else (training.collate if labels else _language),
    ).train()
    ranges, scales = learned_ranges(network)
    assert set(ranges) == set(scales)
    assert len(ranges) > 3
    assert not {"lm_head", "classifier", "classifier.1"} & set(ranges)


def _language(rows):
    batch = training.collate(rows)
    return {**batch, "labels": batch["input_ids"]}


def _images():
    from datasets import Dataset

    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = {"pixel_values": images.tolist(), "labels": [i % 2 for i in range(16)]}
    return Dataset.from_dict(rows).with_format("torch")


def test_the_best_checkpoint_comes_with_its_ranges(tmp_path):
    network = model()
    how = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1, "learning_rate": 1.0}
    quantization = QAT(4, start=0.5, **LSQ)
    trainer = run(network, quantization, load_best_model_at_end=True, output_dir=str(tmp_path), **how)
    assert trainer.state.best_global_step >= 4
    saved = load_file(Path(trainer.state.best_model_checkpoint) / STATE_FILE)
    low, high = learned_ranges(network)[0][NAME]
    assert (high - low) / 255 == pytest.approx(float(saved[f"input_scale.{NAME}"]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-4)


def test_a_module_that_never_runs_stays_float(caplog):
    """An expert that no token chose: the others are quantized all the same."""
    network = model()
    network.bert.idle = nn.Linear(4, 4)
    before = network.bert.idle.weight.detach().clone()
    run(network, QAT(4))
    assert "bert.idle never ran in training and stay float" in caplog.text
    assert torch.equal(network.bert.idle.weight, before)
    assert set(learned_ranges(network)[0]) == set(linears(network)) - {"bert.idle"}


def test_a_run_that_ends_too_early_leaves_a_float_model(caplog):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    network = model()
    how = {"train_dataset": training.rows(16), "data_collator": training.collate, "callbacks": [Stop()]}
    QATTrainer(network, training.arguments(max_steps=8), quantization=QAT(start=0.5), **how).train()
    assert "before fake quantization had begun" in caplog.text
    assert learned_ranges(network) is None


def test_what_cannot_work_is_told_before_training():
    def make(network, quantization=None, arguments=None, **how):
        args = training.arguments(**(arguments or {}))
        how = {"train_dataset": training.rows(), **how}
        return QATTrainer(network, args, quantization=quantization or QAT(), **how)

    with pytest.raises(SettingError, match="must be a QAT"):
        make(model(), 4)
    broken = model()
    broken.get_submodule(NAME).weight.data[0, 0] = float("nan")
    with pytest.raises(SettingError, match="intermediate.dense.weight has NaN"):
        make(broken)
    with pytest.raises(SettingError, match="float32 weights, got torch.bfloat16"):
        make(model().bfloat16())
    with pytest.raises(SettingError, match="group_size 5 does not divide the 16 inputs of bert.encoder.layer.0"):
        make(model(), QAT(4, None, group_size=5))
    with pytest.raises(SettingError, match="matches none"):
        make(model(), QAT(include="*.nowhere"))
    with pytest.raises(SettingError, match="nothing to quantize in BertFor"):
        make(model(), QAT(exclude="*"))
    with pytest.raises(SettingError, match="one tied weight"):
        make(tiny.model("gpt2"), QAT(embeddings=True))
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"}
    with pytest.raises(SettingError, match="save_only_model leaves out the ranges"):
        make(model(), arguments={**best, "save_only_model": True}, eval_dataset=training.rows())
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(SettingError, match="a scheduler that was made before"):
        make(network, QAT(**LSQ), optimizers=(optimizer, scheduler))
    with pytest.raises(SettingError, match="which torch_compile=True can't trace"):
        make(model(), arguments={"torch_compile": True})
    several = training.arguments()
    several.n_gpu  # noqa: B018 - found once, kept in _n_gpu
    several._n_gpu = 2
    with pytest.raises(SettingError, match="one process per device: start with torchrun"):
        QATTrainer(model(), several, quantization=QAT(), train_dataset=training.rows())
    for flag in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        with pytest.raises(SettingError, match="one process or DDP, not FSDP or DeepSpeed"):
            _sharded(flag)(model(), training.arguments(), quantization=QAT(), train_dataset=training.rows())
    adapted = model()
    adapted.peft_config = {}
    with pytest.raises(UnsupportedModelError, match="merge them first"):
        make(adapted)


def _sharded(flag):
    """A trainer that finds sharding switched on, as under accelerate's launcher."""

    class Sharded(QATTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, flag, True)

    return Sharded


def test_a_diverged_run_is_told():
    network = model()
    trainer = QATTrainer(
        network,
        training.arguments(max_steps=2, learning_rate=float("inf"), max_grad_norm=0.0),
        quantization=QAT(),
        train_dataset=training.rows(16),
        data_collator=training.collate,
    )
    with pytest.raises(SettingError, match="training diverged"):
        trainer.train()


def test_a_checkpoint_without_ranges_is_refused(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 4, "output_dir": str(tmp_path)}
    run(model(), QAT(4), **how)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        run(model(), QAT(4, **LSQ), resume=str(tmp_path / "checkpoint-4"))
    Path(tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no readable quantization_state"):
        run(model(), QAT(4), resume=str(tmp_path / "checkpoint-4"))


def test_a_second_run_starts_anew_on_the_folded_model():
    network = model()
    trainer = run(network, QAT(4, **LSQ), optim="adamw_torch")
    trainer.train()
    assert [step.method for step in report(network).steps] == ["qat-w4a8"] * 2
    assert learned_ranges(network) is not None
