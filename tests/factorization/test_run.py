"""`factorize` on tiny models: the factored model is the dense one with the products put in, and its record says so."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
import transformers

import tiny
import training
from factored import FAMILIES, batches, gram_matrices, is_unchanged, parameters, state, with_products
from hfshrink import CompressionTrainer, LogitLoss, load, report, to_dense
from hfshrink.checkpoint import compressed_layers, layer_map
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.factorization.run import factorize
from hfshrink.factorization.sites import matrix


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_model_computes_what_the_dense_products_do(family, weighted):
    dense = tiny.model(family)
    model, data = copy.deepcopy(dense), batches(family) if weighted else None
    factorize(model, 0.5, rank_multiple=1, calibration=data)
    step = report(model).steps[-1]
    ranks = step.results["ranks"]
    assert (step.method, len(ranks) > 4) == ("activation" if weighted else "none", True)
    slow = with_products(dense, ranks, gram_matrices(dense, ranks, data) if weighted else None)
    batch = tiny.inputs(family, seed=99)
    torch.testing.assert_close(tiny.logits(model, batch), tiny.logits(slow, batch), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(tiny.logits(to_dense(model), batch), tiny.logits(slow, batch), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_whitened_factors_lose_less_of_each_modules_output(family):
    """And the error in the record is that of the outputs on the calibration rows."""
    dense, data = tiny.model(family), batches(family)
    made = {
        how: factorize(copy.deepcopy(dense), 0.5, rank_multiple=1, calibration=data, weighting=how)
        for how in ("none", "activation")
    }
    errors = report(made["activation"]).steps[-1].results["relative_errors"]
    grams = gram_matrices(dense, errors, data)
    for name, told in errors.items():
        weight = matrix(dense.get_submodule(name)).double()
        lost = {}
        for how, model in made.items():
            rest = weight - matrix(model.get_submodule(name).to_dense()).double()
            lost[how] = float((rest @ grams[name] @ rest.T).trace() / (weight @ grams[name] @ weight.T).trace())
        assert lost["activation"] <= lost["none"] * (1 + 1e-4), name
        assert lost["activation"] == pytest.approx(told, rel=1e-3, abs=1e-6), name


def test_padding_changes_no_factor():
    dense, padded = tiny.model("bert"), batches("bert")
    rows = [
        {"input_ids": ids[: int(mask.sum())][None], "attention_mask": mask[: int(mask.sum())][None]}
        for batch in padded
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    made = [factorize(copy.deepcopy(dense), 0.5, rank_multiple=1, calibration=data) for data in (padded, rows)]
    assert len({report(model).steps[-1].results["tokens"] for model in made}) == 1
    for ours, theirs in zip(*(to_dense(model).state_dict().values() for model in made), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_saved_comes_back_bitwise(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path / "dense")
    made = factorize(tmp_path / "dense", 0.5, rank_multiple=1, output_dir=tmp_path / "small")
    assert made == tmp_path / "small"
    model = factorize(load(tmp_path / "dense")[0], 0.5, rank_multiple=1, output_dir=tmp_path / "other")
    again, _ = load(tmp_path / "small")
    assert is_unchanged(again, state(model))
    assert layer_map(again) == layer_map(model) != {}
    batch = tiny.inputs(family)
    torch.testing.assert_close(tiny.logits(again, batch), tiny.logits(model, batch))  # convolutions are not bitwise
    step = report(tmp_path / "small").steps[-1]
    assert step.after.size_bytes < step.before.size_bytes
    assert step.after.parameters == parameters(again)
    assert (tmp_path / "small" / "model.safetensors").stat().st_size == step.after.size_bytes


def test_the_record_holds_what_was_asked_and_what_came(tmp_path):
    model = tiny.model("bert")
    before = parameters(model)
    factorize(model, 0.5, calibration=batches("bert"), rank_multiple=1, exclude=["*pooler*", "classifier"])
    model.save_pretrained(tmp_path)
    step = report(tmp_path).steps[-1]
    assert step.settings == {
        "rank_ratio": 0.5,
        "rank_multiple": 1,
        "exclude": ["*pooler*", "classifier"],
        "calibration": "list",
    }
    assert (step.technique, step.method, step.source) == (
        "factorize",
        "activation",
        "Wang et al. 2024, arXiv:2403.07378",
    )
    assert (step.before.parameters, step.after.parameters) == (before, parameters(model))
    assert step.modules == list(compressed_layers(model))
    assert step.results["tokens"] == 7 * 18
    for what in ("ranks", "kept_ratios", "relative_errors"):
        assert set(step.results[what]) == set(step.modules)
    dense = sum(matrix(tiny.model("bert").get_submodule(name)).numel() for name in step.modules)
    assert step.results["kept_ratio"] == pytest.approx(1 - (before - parameters(model)) / dense, abs=1e-6)
    assert "an embedding" in step.skipped["bert.embeddings.word_embeddings"]
    json.dumps(step.results)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_factored_language_models_generate_as_without_a_cache(family):
    model = factorize(tiny.model(family), 0.5, rank_multiple=1)
    prompt = torch.tensor([[5, 6, 7]])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **how)
    ids = prompt
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == ids.tolist()


def test_modules_can_be_factored_one_group_after_the_other():
    model = factorize(tiny.model("bert"), 0.5, include="*attention*", rank_multiple=1)
    factorize(model, 0.6, rank_multiple=1, calibration=batches("bert"))
    steps = report(model).steps
    assert not set(steps[0].modules) & set(steps[1].modules)
    assert all("is compressed already" in steps[1].skipped[name] for name in steps[0].modules)
    with pytest.raises(SettingError, match="no module left to factor"):
        factorize(model, 0.5)


def test_a_model_without_factorable_modules_is_refused():
    model = tiny.model("bert")
    with pytest.raises(SettingError, match="no module left to factor: 1 modules match and are left out"):
        factorize(model, 0.5, include="classifier")
    with pytest.raises(SettingError, match=r"rank must be in 1..9 to make any of 13 modules smaller, got 40"):
        factorize(model, rank=40)
    assert "quantization_config" not in vars(model.config)


def test_what_goes_wrong_on_the_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny.model("llama")
    before = state(model)
    model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),))
    with pytest.raises(SettingError, match="layers.1.mlp.* has NaN or infinite values"):
        factorize(model, 0.5, calibration=batches("llama"), update_inputs=True, rank_multiple=1)
    assert is_unchanged(model, before)
    model = tiny.model("llama")
    monkeypatch.setattr("hfshrink.factorization.run.append_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        factorize(model, 0.5, rank_multiple=1)
    assert is_unchanged(model, before)
    assert "quantization_config" not in vars(model.config)
    assert "hfshrink" not in vars(model.config)


def test_a_folder_that_cannot_be_put_in_place_leaves_the_model_as_it_was(monkeypatch, tmp_path):
    model = tiny.model("bert")
    before = state(model)

    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr("hfshrink.saving._move_into_place", fail)
    with pytest.raises(CheckpointError, match="Can't move the finished files"):
        factorize(model, 0.5, rank_multiple=1, output_dir=tmp_path / "small")
    assert is_unchanged(model, before)
    assert not {"quantization_config", "hfshrink"} & set(vars(model.config))
    assert not list(tmp_path.iterdir())


def test_little_gained_and_much_lost_are_said(caplog):
    with caplog.at_level(logging.WARNING):
        model = factorize(tiny.model("bert"), energy=0.9999, rank_multiple=1)
    assert "all 13 modules stay dense" in caplog.text
    assert report(model).steps[-1].modules == []
    caplog.clear()
    factorize(tiny.model("bert"), 0.1, rank_multiple=1)
    assert "lose more than half of their energy" in caplog.text


def test_training_recovers_what_was_lost():
    """A few steps of distillation lower the divergence of a factored student from its dense teacher."""
    teacher = tiny.model("bert", **training.no_dropout("bert"))
    student = factorize(copy.deepcopy(teacher), 0.3, rank_multiple=1)
    data = training.rows(16)

    batch = {name: tensor for name, tensor in training.collate(list(data)).items() if name != "labels"}

    def distance():
        ours, theirs = (tiny.logits(model.eval(), batch).log_softmax(-1) for model in (student, teacher))
        return float((theirs.exp() * (theirs - ours)).sum())

    before, layers = distance(), layer_map(student)
    how = {"cls": CompressionTrainer, "losses": [LogitLoss()], "label_weight": 0.0}
    training.trainer(student, teacher, data, **how, max_steps=12, learning_rate=0.5).train()
    assert distance() < 0.9 * before
    assert layer_map(student) == layers


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
def test_low_rank_adapters_train_on_the_factors_and_merge_into_them(tmp_path):
    peft = pytest.importorskip("peft")
    model = factorize(tiny.model("bert"), 0.5, rank_multiple=1)
    before, layers, batch = state(model), layer_map(model), tiny.inputs("bert")
    how = {"target_modules": [], "target_parameters": ["query.weight", "query.up"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **how))
    assert all("lora_" in name for name, parameter in adapted.named_parameters() if parameter.requires_grad)
    arguments = training.arguments(max_steps=3, learning_rate=0.1)
    data = {"train_dataset": training.rows(8), "data_collator": training.collate}
    transformers.Trainer(model=adapted, args=arguments, **data).train()
    expected = tiny.logits(adapted.eval(), batch)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    changed = {name for name, tensor in state(merged).items() if not torch.equal(tensor, before[name])}
    factors = {f"{name}.{part}" for name in layers if name.endswith("query") for part in ("weight", "up")}
    assert changed == factors
    merged.save_pretrained(tmp_path)
    again, _ = load(tmp_path)
    assert layer_map(again) == layer_map(merged) == layers
    assert is_unchanged(again, state(merged))
