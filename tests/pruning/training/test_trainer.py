"""Gradual pruning in the Trainer: schedule, masks, checkpoints, resuming, and the cut at the end."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

import tiny
import training
from hfshrink import report
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.trainer import STATE_FILE, PruningMixin, PruningTrainer
from hfshrink.pruning.units.groups import find_units, used_units
from hfshrink.pruning.units.weights import prunable

METHODS = ("magnitude", "movement", "soft-movement", "taylor", "fisher", "random")


def model(family="bert", **config):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family != "resnet" else {}
    return tiny.model(family, seed=1, **dropout, **config)


def model_for(structure):
    return model("resnet" if structure == "channels" else "bert")


def run(network, pruning, resume=None, rows=32, cls=PruningTrainer, callbacks=None, **arguments):
    settings = {"max_steps": 8, "logging_steps": 1, **arguments}
    images = network.main_input_name == "pixel_values"
    trainer = cls(
        network,
        training.arguments(**settings),
        pruning=pruning,
        train_dataset=_rows("vit", None) if images else training.rows(rows),
        data_collator=None if images else training.collate,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def zeros(network):
    weights = [module.weight for module in prunable(network).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["global", "module"])
def test_the_asked_sparsity_is_reached_and_kept(method, scope):
    network = model()
    run(network, Pruning(0.75, method=method, scope=scope), optim="adamw_torch", weight_decay=0.1)
    assert zeros(network) == pytest.approx(0.75, abs=1e-3)
    sizes = [float((m.weight == 0).float().mean()) for m in prunable(network).values()]
    assert (max(sizes) - min(sizes) < 0.01) == (scope == "module")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


@pytest.mark.parametrize("structure", ["unstructured", "neurons"])
def test_a_run_that_is_stopped_by_hand_leaves_dense_weights(structure):
    network = model()
    before = {name: value.clone() for name, value in network.named_parameters()}
    settings = Pruning(0.75, structure, cooldown=0.4, update_steps=1)
    with pytest.raises(KeyboardInterrupt):
        run(network, settings, learning_rate=0.0, weight_decay=0.0, callbacks=[Stop()])
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_heads_embeddings_and_norms_are_left_alone():
    network = model()
    before = {name: value.clone() for name, value in network.named_parameters()}
    run(network, Pruning(0.5), learning_rate=0.0)
    changed = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {f"{name}.weight" for name in prunable(network)}
    assert not any("classifier" in name or "embeddings" in name for name in changed)


def test_magnitude_hides_the_smallest_weights():
    network = model()
    before = {name: module.weight.detach().clone() for name, module in prunable(network).items()}
    run(network, Pruning(0.5), learning_rate=0.0)
    limit = torch.cat([value.abs().flatten() for value in before.values()]).median()
    for name, module in prunable(network).items():
        assert torch.equal(module.weight.detach(), before[name] * (before[name].abs() > limit)), name


@pytest.mark.parametrize("structure", ["2:4", "1:4"])
def test_the_pattern_holds_everywhere(structure):
    network = model()
    run(network, Pruning(structure=structure))
    n, m = map(int, structure.split(":"))
    for module in prunable(network).values():
        left = (module.weight != 0).unflatten(1, (-1, m)).sum(-1)
        assert (left == n).all()


def test_a_run_without_pruning_is_the_trainers():
    ours, theirs = model(), model()
    run(ours, None)
    run(theirs, None, cls=lambda *args, pruning, **kwargs: Trainer(*args, **kwargs))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


class _Straight(torch.autograd.Function):
    """w·m, whose gradient reaches the scores as if the mask were the score itself."""

    @staticmethod
    def forward(ctx, weight, scores, mask):
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx, gradient):
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


@pytest.mark.parametrize("start", ["zero", "magnitude"])
def test_movement_equals_autograd_through_parametrized_weights(start):
    """The slow way: every weight is computed in the forward pass, and the scores get their gradient by autograd."""
    ours, slow = model(), model()
    how = {"scope": "global", "warmup": 0.0, "cooldown": 0.25, "update_steps": 1, "scores_learning_rate": 0.5}
    pruning = Pruning(0.5, method="movement", initial_scores=start, **how)
    run(ours, pruning, max_grad_norm=0.0, lr_scheduler_type="constant", train_sampling_strategy="sequential")

    names = list(prunable(slow))
    dense = {name: nn.Parameter(slow.get_submodule(name).weight.detach().clone()) for name in names}
    mean = torch.cat([weight.detach().abs().flatten() for weight in dense.values()]).mean()
    first = {name: weight.detach().abs() / mean * (start == "magnitude") for name, weight in dense.items()}
    scores = {name: nn.Parameter(first[name].clone()) for name in names}
    masks = {name: torch.ones_like(dense[name]) for name in names}
    others = [p for n, p in slow.named_parameters() if n.removesuffix(".weight") not in names]
    for name in names:
        del slow.get_submodule(name).weight
    optimizer = torch.optim.SGD(
        [{"params": [*others, *dense.values()], "lr": 1e-2}, {"params": list(scores.values()), "lr": 0.5}]
    )
    slow.train()
    rows = training.rows(32)
    for step in range(1, 9):
        for name in names:
            slow.get_submodule(name).weight = _Straight.apply(dense[name], scores[name], masks[name])
        batch = training.collate([rows[i] for i in range(4 * step - 4, 4 * step)])
        slow(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step <= 6:
            sparsity = pruning.at(step / 8)
            flat = torch.cat([value.detach().flatten() for value in scores.values()])
            limit = flat.sort().values[round(sparsity * len(flat))]
            masks = {name: (value.detach() >= limit).float() for name, value in scores.items()}
    for name in names:
        expected = dense[name].detach() * masks[name]
        assert torch.allclose(ours.get_submodule(name).weight.detach(), expected, atol=1e-6), name


@pytest.mark.parametrize("method", ["magnitude", "movement", "taylor"])
def test_accumulated_batches_equal_one_large_batch(method):
    large, small = model(), model()
    pruning = Pruning(0.5, method=method)
    how = {"train_sampling_strategy": "sequential", "max_steps": 4}
    run(large, pruning, per_device_train_batch_size=8, **how)
    run(small, pruning, per_device_train_batch_size=2, gradient_accumulation_steps=4, **how)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "heads+neurons", "channels"])
def test_an_interrupted_run_goes_on_exactly(method, structure, tmp_path):
    pruning = Pruning(0.5, structure, method, cut=False)
    how = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1}
    whole, again = model_for(structure), model_for(structure)
    run(whole, pruning, output_dir=str(tmp_path), **how)
    run(again, pruning, resume=str(tmp_path / "checkpoint-3"), output_dir=str(tmp_path / "again"), **how)
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_every_checkpoint_is_a_plain_pruned_model(method, tmp_path):
    network = model()
    keys = set(network.state_dict())
    how = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path)}
    trainer = run(network, Pruning(0.8, method=method), **how)
    logged = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    shares = []
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert set(load_file(folder / "model.safetensors")) == keys
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        shares.append(zeros(loaded))
        assert shares[-1] == pytest.approx(logged[step], abs=1e-3)
        state = load_file(folder / STATE_FILE)
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        assert torch.equal(state[f"hidden.{name}"], loaded.get_parameter(name) == 0)
        assert (state[f"aside.{name}"][state[f"hidden.{name}"]] != 0).all()
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == pytest.approx(0.8, abs=1e-3)


class EachStep(TrainerCallback):
    """Keeps what a function finds in the model when a step ends."""

    def __init__(self, look):
        self.look, self.found = look, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.found[state.global_step] = self.look(model)


def share_hidden(network, structure):
    if structure in ("unstructured", "2:4"):
        return zeros(network)
    used = torch.cat([used_units(network, group) for group in find_units(network, structure)])
    return 1 - float(used.float().mean())


@pytest.mark.parametrize("structure", ["neurons", "heads+neurons", "2:4", "channels"])
def test_checkpoints_hold_the_plain_model_as_it_trains_before_anything_is_cut(structure, tmp_path):
    network = model_for(structure)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    watch = EachStep(lambda m: {name: tensor.clone() for name, tensor in m.state_dict().items()})
    how = {"save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path), "callbacks": [watch]}
    trainer = run(network, Pruning(None if structure == "2:4" else 0.5, structure), **how)
    logged = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry}
    shares = []
    for step in (2, 4, 6, 8):
        loaded = type(network).from_pretrained(tmp_path / f"checkpoint-{step}")
        assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == shapes
        assert all(torch.equal(tensor, watch.found[step][name]) for name, tensor in loaded.state_dict().items())
        shares.append(share_hidden(loaded, structure))
        assert shares[-1] == pytest.approx(logged[step], abs=1e-6)
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] == pytest.approx(0.5, abs=0.02)
    assert (sum(p.numel() for p in network.parameters()) < sum(map(torch.Size.numel, shapes.values()))) == (
        structure != "2:4"
    )


@pytest.mark.parametrize("structure", ["unstructured", "neurons"])
@pytest.mark.parametrize(
    ("schedule", "jumps"), [("one-shot", [0.75]), ("iterative", [1 - 0.25 ** (1 / 3), 1 - 0.25 ** (2 / 3), 0.75])]
)
def test_schedules_that_jump_reach_the_sparsity_and_no_zero_grows_back_in_the_cool_down(schedule, jumps, structure):
    network = model()
    watch = EachStep(lambda m: {name: module.weight == 0 for name, module in prunable(m).items()})
    pruning = Pruning(0.75, structure, schedule=schedule, rounds=3, cut=False, warmup=0.2, cooldown=0.4)
    how = {"max_steps": 20, "optim": "adamw_torch", "weight_decay": 0.1, "callbacks": [watch]}
    trainer = run(network, pruning, **how)
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged[:3] == [0, 0, 0]
    assert sorted({*logged} - {0}) == pytest.approx(jumps, abs=0.02)
    assert logged[11:] == pytest.approx([0.75] * 9, abs=1e-3)
    hidden = watch.found[12]
    for step in range(13, 21):
        assert all(torch.equal(mask, hidden[name]) for name, mask in watch.found[step].items()), step
    assert share_hidden(network, structure) == pytest.approx(0.75, abs=1e-3)


def test_hidden_weights_may_come_back():
    """Random ranks change with the seed; what comes back has the value that it was hidden with."""
    from hfshrink.pruning.training.state import TrainingMasks

    network = model()
    before = {name: module.weight.detach().clone() for name, module in prunable(network).items()}
    masks = TrainingMasks(network, Pruning(0.5))
    masks.update(0.5)
    assert zeros(network) == pytest.approx(0.5, abs=1e-3)
    masks.update(0.0)
    for name, module in prunable(network).items():
        assert torch.equal(module.weight.detach(), before[name])


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize("structure", ["heads", "neurons", "heads+neurons"])
def test_units_are_cut_when_training_ends(family, structure):
    if family in ("vit", "gpt2", "llama"):
        network, labels = tiny.model(family), None
    else:
        network, labels = tiny.model(family), "class"
    pruning = Pruning(0.5, structure, cut=True)
    masked, cut = copy.deepcopy(network), network
    for one, cuts in ((masked, False), (cut, True)):
        trainer = PruningTrainer(
            one,
            training.arguments(max_steps=4),
            pruning=replace(pruning, cut=cuts),
            train_dataset=_rows(family, labels),
            data_collator=None if family == "vit" else (training.collate if labels else _language),
        )
        torch.manual_seed(0)
        trainer.train()
    batch = tiny.inputs(family)
    assert torch.allclose(tiny.logits(masked.eval(), batch), tiny.logits(cut.eval(), batch), atol=1e-5)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("method", ["magnitude", "movement", "taylor"])
def test_channels_are_cut_when_training_ends(method):
    masked, cut = tiny.model("resnet"), tiny.model("resnet")
    for one, cuts in ((masked, False), (cut, True)):
        torch.manual_seed(0)
        PruningTrainer(
            one,
            training.arguments(max_steps=4),
            pruning=Pruning(0.5, "channels", method, scope="module", cut=cuts),
            train_dataset=_rows("vit", None),
        ).train()
    batch = tiny.inputs("resnet")
    assert torch.allclose(tiny.logits(masked.eval(), batch), tiny.logits(cut.eval(), batch), atol=1e-4)
    assert sum(p.numel() for p in cut.parameters()) < 0.8 * sum(p.numel() for p in masked.parameters())


def _language(rows):
    batch = training.collate(rows)
    return {**batch, "labels": batch["input_ids"]}


def _rows(family, labels):
    if family == "vit":
        from datasets import Dataset

        images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return Dataset.from_dict({"pixel_values": images.tolist(), "labels": [i % 2 for i in range(16)]}).with_format(
            "torch"
        )
    return training.rows(16, labels)


def test_a_cut_model_trains_on_with_a_new_optimizer():
    network = model()
    trainer = run(network, Pruning(0.5, "neurons"))
    trainer.pruning = None
    trainer.train()
    assert network.bert.encoder.layer[0].intermediate.dense.out_features < 24


def test_an_optimizer_of_cut_parameters_is_refused():
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    how = {"train_dataset": training.rows(16), "data_collator": training.collate}
    given = (optimizer, scheduler)
    trainer = PruningTrainer(network, training.arguments(), pruning=Pruning(0.5, "neurons"), optimizers=given, **how)
    trainer.train()
    again = PruningTrainer(network, training.arguments(), pruning=None, optimizers=given, **how)
    with pytest.raises(SettingError, match="parameters of the SGD are not the model's any more"):
        again.train()


def test_the_record_says_what_zeros_are_not(caplog):
    network = model()
    run(network, Pruning(0.5))
    step = report(network).steps[-1]
    assert (step.technique, step.method) == ("prune", "magnitude")
    assert step.results["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "neither the file nor the latency" in step.results["note"]
    assert "neither the file nor the latency" in caplog.text
    assert step.after.parameters == step.before.parameters
    assert step.after.nonzero_parameters < step.before.nonzero_parameters


def test_the_record_of_a_cut_says_what_is_left():
    network = model()
    run(network, Pruning(0.5, "neurons"))
    step = report(network).steps[-1]
    assert step.after.parameters < step.before.parameters
    assert sum(step.results["kept"].values()) == 24
    assert "note" not in step.results


def test_no_checkpoint_is_the_best_before_the_sparsity_is_reached(tmp_path):
    network = model()
    trainer = PruningTrainer(
        network,
        training.arguments(
            max_steps=10,
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
            output_dir=str(tmp_path),
            learning_rate=1.0,
        ),
        pruning=Pruning(0.9, cooldown=0.4),
        train_dataset=training.rows(32),
        eval_dataset=training.rows(8, seed=1),
        data_collator=training.collate,
    )
    trainer.train()
    assert trainer.state.best_global_step >= 6
    assert zeros(network) == pytest.approx(0.9, abs=1e-3)


def test_half_precision_trains():
    network = model()
    run(network, Pruning(0.5, method="movement"), bf16=True)
    assert zeros(network) == pytest.approx(0.5, abs=1e-3)


def test_any_trainer_can_prune():
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    class Mine(PruningMixin, Seq2SeqTrainer): ...

    network = model()
    settings = training.arguments(max_steps=4).to_dict()
    args = Seq2SeqTrainingArguments(
        **{k: v for k, v in settings.items() if k in ("output_dir", "max_steps", "use_cpu")}
    )
    args.report_to, args.disable_tqdm, args.save_strategy = [], True, "no"
    trainer = Mine(
        network, args, pruning=Pruning(0.5), train_dataset=training.rows(16), data_collator=training.collate
    )
    trainer.train()
    assert zeros(network) == pytest.approx(0.5, abs=1e-3)


def test_what_cannot_work_is_told_before_training():
    def make(network, pruning):
        return PruningTrainer(network, training.arguments(), pruning=pruning, train_dataset=training.rows())

    with pytest.raises(SettingError, match="must be a Pruning"):
        make(model(), 0.5)
    broken = model()
    broken.bert.encoder.layer[0].intermediate.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(SettingError, match="intermediate.dense.weight has NaN"):
        make(broken, Pruning(0.5))
    with pytest.raises(SettingError, match="5 divides.*layer.0"):
        make(model(), Pruning(structure="2:5"))
    frozen = model()
    frozen.bert.requires_grad_(False)
    with pytest.raises(SettingError, match="is frozen"):
        make(frozen, Pruning(0.5))


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_weights_are_refused(flag):
    class Sharded(PruningTrainer):
        """Finds sharding switched on, as under accelerate's launcher."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, flag, True)

    with pytest.raises(SettingError, match="one process or DDP, not FSDP or DeepSpeed"):
        Sharded(model(), training.arguments(), pruning=Pruning(0.5), train_dataset=training.rows())


def test_quantized_weights_are_refused():
    network = model()
    network.quantization_method, network.is_quantized = "gptq", True
    network._hf_peft_config_loaded = True  # the Trainer itself lets only quantized models with adapters through
    with pytest.raises(UnsupportedModelError, match="Prune the float model, then quantize it"):
        PruningTrainer(network, training.arguments(), pruning=Pruning(0.5), train_dataset=training.rows())


def test_what_cannot_be_cut_is_told_before_training():
    network = model()
    network.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(SettingError, match="quantized by gptq"):
        PruningTrainer(network, training.arguments(), pruning=Pruning(0.5, "neurons"), train_dataset=training.rows())


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    how = {"save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}
    run(model(), Pruning(0.5), **how)
    with pytest.raises(CheckpointError, match="don't fit this run"):
        run(model(), Pruning(0.5, method="movement"), resume=str(tmp_path / "checkpoint-3"))
    Path(tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match="has no readable pruning_state"):
        run(model(), Pruning(0.5), resume=str(tmp_path / "checkpoint-3"))
