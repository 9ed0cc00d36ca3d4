"""One-shot sparsity of real models: counts, scopes, dtypes, layouts, and the order of the methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.criteria.thresholds import keep_largest_per_row
from hfshrink.pruning.oneshot.obs import sparsegpt
from hfshrink.pruning.oneshot.weights import SCOPES, apply_masks, choose_masks, prune_weights, weight_scores
from hfshrink.pruning.units.weights import matrix, prunable

FIRST = "bert.encoder.layer.0.attention.self.query"


def data(family: str) -> list[dict[str, torch.Tensor]]:
    """Two batches with labels."""
    found = []
    for batch in (tiny.inputs(family), tiny.inputs(family, batch=2, length=5, seed=1)):
        rows = len(next(iter(batch.values())))
        is_language = tiny.TASK[family] == "text-generation"
        labels = batch["input_ids"] if is_language else torch.arange(rows) % 2
        found.append({**batch, "labels": labels})
    return found


def weights(modules: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: matrix(module, module.weight.detach()).clone() for name, module in modules.items()}


def zeros(modules: dict[str, nn.Module]) -> int:
    return sum(int((module.weight == 0).sum()) for module in modules.values())


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("method", SCOPES)
def test_families_and_methods(family: str, method: str) -> None:
    network = tiny.model(family)
    modules = prunable(network)
    before, others = weights(modules), {n: p.clone() for n, p in network.named_parameters()}
    masks = prune_weights(network, modules, 0.5, method, data(family))
    assert list(masks) == list(modules)
    size = sum(mask.numel() for mask in masks.values())
    assert abs(zeros(modules) - size / 2) <= (len(modules) if method != "wanda" else 0.05 * size)
    for name, weight in weights(modules).items():
        assert torch.equal(weight != 0, masks[name])
        if method != "sparsegpt":
            assert torch.equal(weight, before[name] * masks[name])
    touched = {f"{name}.weight" for name in modules}
    assert all(torch.equal(p, others[n]) for n, p in network.named_parameters() if n not in touched)
    assert tiny.logits(network, tiny.inputs(family)).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("method", SCOPES)
def test_n_of_m(family: str, method: str) -> None:
    network = tiny.model(family)
    modules = prunable(network)
    prune_weights(network, modules, (2, 4), method, data(family))
    for weight in weights(modules).values():
        assert bool(((weight.unflatten(1, (-1, 4)) != 0).sum(dim=2) == 2).all())


@pytest.mark.parametrize("method", SCOPES)
@pytest.mark.parametrize("sparsity", [0.0, (4, 4)])
def test_sparsity_0_changes_nothing(method: str, sparsity: Any) -> None:
    network = tiny.model("bert")
    modules = prunable(network)
    before = weights(modules)
    masks = prune_weights(network, modules, sparsity, method, data("bert"))
    assert all(bool(mask.all()) for mask in masks.values())
    assert all(torch.equal(weight, before[name]) for name, weight in weights(modules).items())


def test_scopes_have_exact_counts() -> None:
    for scope in ("global", "module", "row"):
        network = tiny.model("bert")
        modules = prunable(network)
        masks = prune_weights(network, modules, 0.3, scope=scope)
        size = sum(mask.numel() for mask in masks.values())
        lost = [int((~mask).sum()) for mask in masks.values()]
        if scope == "global":
            assert sum(lost) == round(0.3 * size)
            assert len(set(lost)) > 3
        elif scope == "module":
            assert lost == [round(0.3 * mask.numel()) for mask in masks.values()]
        else:
            assert all(bool(((~m).sum(dim=1) == round(0.3 * m.shape[1])).all()) for m in masks.values())


def test_global_scope_spares_small_weights_by_the_cap() -> None:
    network = tiny.model("bert")
    modules = prunable(network)
    modules[FIRST].weight.data *= 1e-6
    masks = prune_weights(network, modules, 0.5)
    assert int((~masks[FIRST]).sum()) == round(0.98 * 256)


def test_wanda_uses_inputs_of_the_pruned_model() -> None:
    """By hand: prune the first layer, run the model again, prune the second."""
    network, slow = tiny.model("bert"), tiny.model("bert")
    modules = {name: module for name, module in prunable(network).items() if "layer." in name}
    prune_weights(network, modules, 0.5, "wanda", data("bert"))
    for layer in (0, 1):
        names = [name for name in modules if f"layer.{layer}." in name]
        inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        handles = [
            slow.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            for name, seen in inputs.items()
        ]
        for batch in data("bert"):
            tiny.logits(slow, batch)
        for handle in handles:
            handle.remove()
        for name in names:
            kept = [x[b["attention_mask"] != 0] for x, b in zip(inputs[name], data("bert"), strict=True)]
            weight = slow.get_submodule(name).weight.data
            weight *= keep_largest_per_row(weight.abs() * torch.cat(kept).double().norm(dim=0), 0.5)
    assert all(torch.equal(module.weight, slow.get_submodule(name).weight) for name, module in modules.items())


def test_sparsegpt_updates_the_weights_of_the_first_layer_as_the_maths_says() -> None:
    network, slow = tiny.model("gpt2"), tiny.model("gpt2")
    name = "transformer.h.0.attn.c_attn"
    seen: list[torch.Tensor] = []
    slow.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in data("gpt2"):
        tiny.logits(slow, batch)
    rows = torch.cat([x[b["attention_mask"] != 0] for x, b in zip(seen, data("gpt2"), strict=True)]).double()
    expected, _ = sparsegpt(slow.get_submodule(name).weight.T, rows.T @ rows, 0.5)
    prune_weights(network, {name: network.get_submodule(name)}, 0.5, "sparsegpt", data("gpt2"))
    torch.testing.assert_close(network.get_submodule(name).weight.T, expected.float())


def test_gradient_scores_are_means_over_batches() -> None:
    network = tiny.model("bert")
    modules = {FIRST: network.get_submodule(FIRST)}
    gradients = []
    for batch in data("bert"):
        network.zero_grad()
        network(**batch).loss.backward()
        gradients.append(modules[FIRST].weight.grad.clone())
    network.zero_grad()
    weight = modules[FIRST].weight.detach()
    taylor = weight_scores(network, modules, "taylor", data("bert"))[FIRST]
    fisher = weight_scores(network, modules, "fisher", data("bert"))[FIRST]
    torch.testing.assert_close(taylor, (weight * sum(gradients) / 2).abs())
    torch.testing.assert_close(fisher, 0.25 * weight.square() * sum(g.square() for g in gradients))
    assert modules[FIRST].weight.grad is None


def test_random_scores_differ_by_module_and_seed() -> None:
    network = tiny.model("bert")
    modules = prunable(network)
    first, again, other = (weight_scores(network, modules, "random", seed=seed) for seed in (0, 0, 1))
    key = FIRST.replace("query", "key")
    assert torch.equal(first[FIRST], again[FIRST])
    assert not torch.equal(first[FIRST], other[FIRST])
    assert not torch.equal(first[FIRST], first[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_dtypes_are_kept(method: str, dtype: torch.dtype) -> None:
    network = tiny.model("llama").to(dtype)
    modules = prunable(network)
    masks = prune_weights(network, modules, 0.5, method, data("llama"))
    assert {module.weight.dtype for module in modules.values()} == {dtype}
    assert all(bool((weights(modules)[name][~mask] == 0).all()) for name, mask in masks.items())


def test_convolutions_in_channels_last() -> None:
    plain, other = tiny.model("resnet"), tiny.model("resnet").to(memory_format=torch.channels_last)
    for network in (plain, other):
        prune_weights(network, prunable(network), 0.5, "sparsegpt", data("resnet"))
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(p.is_contiguous(memory_format=torch.channels_last) for p in other.parameters() if p.ndim == 4)


def test_sparsegpt_disturbs_the_model_least() -> None:
    batches = [tiny.inputs("gpt2", batch=16, length=12, seed=seed) for seed in range(4)]
    dense = tiny.model("gpt2")
    errors = {}
    for method, scope in (("sparsegpt", None), ("wanda", None), ("magnitude", "row"), ("random", "row")):
        network = tiny.model("gpt2")
        prune_weights(network, prunable(network), 0.3, method, batches, scope=scope)
        errors[method] = sum(float((tiny.logits(network, b) - tiny.logits(dense, b)).norm()) for b in batches)
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"] < errors["random"]


def test_modes_and_hooks_are_put_back() -> None:
    network = tiny.model("bert").train()
    prune_weights(network, prunable(network), 0.5, "sparsegpt", iter(data("bert")))
    assert all(module.training for module in network.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_masks_can_be_chosen_and_applied_by_hand() -> None:
    network = tiny.model("gpt2")
    modules = prunable(network)
    masks = choose_masks(weight_scores(network, modules, "magnitude"), 0.7, max_sparsity=0.7)
    apply_masks(modules, masks)
    assert all(abs(int((~m).sum()) - 0.7 * m.numel()) <= 1 for m in masks.values())
    assert all(torch.equal(weight != 0, masks[name]) for name, weight in weights(modules).items())


class TestErrors:
    def test_settings(self) -> None:
        network, batches = tiny.model("bert"), data("bert")
        modules = prunable(network)
        before = weights(modules)
        without = [{name: tensor for name, tensor in batch.items() if name != "labels"} for batch in batches]
        for arguments, keywords, match in (
            ((0.5, "best"), {}, "method must be one of magnitude, .*sparsegpt, got 'best'"),
            ((1.0,), {}, r"sparsity must lie in \[0, 1\).*got 1.0"),
            (((2, 5),), {}, r"that 5 divides, got 16.* \(bert.encoder.layer.0"),
            (((5, 4),), {}, "got 5:4"),
            ((0.99,), {}, "sparsity 0.99 can't be reached .* max_sparsity 0.98"),
            ((0.99,), {"scope": "row"}, r"sparsity 0.99 leaves nothing of 16 weights.*\(bert.encoder"),
            ((0.99, "wanda", batches), {}, "leaves nothing of 16 weights"),
            ((0.9999, "sparsegpt", batches), {}, "leaves nothing of 256 weights"),
            ((0.5,), {"scope": "block"}, "scope must be 'global' or 'module' or 'row' .* got 'block'"),
            ((0.5, "wanda", batches), {"scope": "global"}, "scope must be 'row' or 'module'"),
            (((2, 4),), {"scope": "row"}, "scope must be None for N:M"),
            ((0.5, "wanda"), {}, '"wanda" needs calibration data, got none'),
            ((0.5, "taylor"), {}, '"taylor" needs calibration data'),
            ((0.5, "fisher", []), {}, "The calibration data is empty"),
            ((0.5, "sparsegpt", []), {}, "The calibration data is empty"),
            ((0.5, "fisher", without), {}, "Batch 0 gives no loss: gradients need labels"),
        ):
            with pytest.raises(SettingError, match=match):
                prune_weights(network, modules, *arguments, **keywords)
        with pytest.raises(SettingError, match="No module was selected"):
            prune_weights(network, {}, 0.5)
        assert all(torch.equal(weight, before[name]) for name, weight in weights(modules).items())

    def test_weights(self) -> None:
        network = tiny.model("bert")
        modules = prunable(network)
        modules[FIRST].weight.requires_grad_(False)
        with pytest.raises(SettingError, match=f"1 weights get no gradient, they are frozen: {FIRST}"):
            prune_weights(network, modules, 0.5, "taylor", data("bert"))
        parametrizations.weight_norm(modules[FIRST])
        with pytest.raises(SettingError, match=f"{FIRST}.weight is parametrized"):
            prune_weights(network, modules, 0.5)
        modules[FIRST.replace("query", "key")].weight.data[0, 0] = float("nan")
        with pytest.raises(SettingError, match="key.weight has NaN"):
            prune_weights(network, modules, 0.5)

    def test_gradients(self) -> None:
        network = tiny.model("bert")
        network.classifier.weight.data[0, 0] = float("inf")
        with pytest.raises(SettingError, match="The gradient of bert.* has NaN or infinite values"):
            prune_weights(network, prunable(network), 0.5, "taylor", data("bert"))

    def test_convolutions(self) -> None:
        for conv in (nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding="same")):
            with pytest.raises(UnsupportedModelError, match='0 is a convolution .* the method "wanda" does not know'):
                prune_weights(nn.Sequential(conv), {"0": conv}, 0.5, "wanda", [])
