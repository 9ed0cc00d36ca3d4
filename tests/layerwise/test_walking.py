"""The walk's statistics against those of whole forward passes, before and after layers change."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D

import tiny
from hfshrink.calibration import collect
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.layerwise import input_rows, walk
from hfshrink.layerwise.walking import _is_same
from hfshrink.modules import layer_stack
from hfshrink.pruning.units.weights import prunable

TRANSFORMERS = [family for family in tiny.CONFIGS if family != "resnet"]


def given(family: str) -> list[dict[str, torch.Tensor]]:
    return [tiny.inputs(family), *(tiny.inputs(family, batch=2, length=5, seed=seed) for seed in (1, 2))]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_each_layer_is_fed_what_the_pruned_layers_before_it_make(family: str) -> None:
    """After each layer its weights are halved; a full pass of the model at that moment must agree."""
    network, batches = tiny.model(family), given(family)
    modules = {name: m for name, m in prunable(network).items() if not isinstance(m, nn.Conv2d)}
    seen: list[str] = []
    with torch.no_grad():
        for stats in walk(network, modules, "input_gram", batches):
            with collect(network, "input_gram", include=list(stats)) as whole:
                for batch in batches:
                    network(**batch)
            for name, found in stats.items():
                assert found.tokens == whole[name].tokens
                torch.testing.assert_close(found.input_gram, whole[name].input_gram, rtol=1e-5, atol=1e-4)
                modules[name].weight.mul_(0.5)
            seen += stats
    assert sorted(seen) == sorted(modules)
    assert len(seen) == len(set(seen)) >= 8
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network.modules())


def test_squares_are_the_diagonal() -> None:
    network = tiny.model("bert")
    modules = prunable(network)
    with torch.no_grad():
        grams = {k: v for stats in walk(network, modules, "input_gram", given("bert")) for k, v in stats.items()}
        squares = {k: v for stats in walk(network, modules, "input_square", given("bert")) for k, v in stats.items()}
    for name, found in grams.items():
        torch.testing.assert_close(squares[name].input_square, found.input_gram.diagonal(), rtol=1e-5, atol=1e-5)


def test_padding_does_not_count() -> None:
    network, batch = tiny.model("bert"), tiny.inputs("bert")
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 9, batch["input_ids"])}
    names = [name for name in prunable(network) if "layer.1" in name]
    found = []
    for one in (batch, other):
        with torch.no_grad():
            stats = next(walk(network, {n: network.get_submodule(n) for n in names}, "input_gram", [one]))
        assert list(stats) == names
        assert {stat.tokens for stat in stats.values()} == {18}
        found.append(stats[names[0]].input_gram)
    torch.testing.assert_close(*found)


def test_modules_with_one_input_do_not_share_one_tensor() -> None:
    network = tiny.model("bert")
    with torch.no_grad():
        stats = next(walk(network, prunable(network), "input_gram", given("bert")))
    query, key = (stats[f"bert.encoder.layer.0.attention.self.{name}"].input_gram for name in ("query", "key"))
    assert torch.equal(query, key)
    assert query is not key


def test_a_model_without_a_stack_is_counted_as_a_whole() -> None:
    network, batch = tiny.model("resnet"), tiny.inputs("resnet")
    modules = prunable(network)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, args, out, name=name: inputs.update({name: (args[0], out)}))
    with torch.no_grad():
        [stats] = walk(network, modules, "input_gram", [batch])
    for name, module in modules.items():
        x, out = inputs[name]
        rows = input_rows(module, x)
        places = out - (0 if module.bias is None else module.bias[:, None, None])
        torch.testing.assert_close(rows @ module.weight.flatten(1).T, places.flatten(2).transpose(1, 2).flatten(0, 1))
        torch.testing.assert_close(stats[name].input_gram, rows.double().T @ rows.double(), rtol=1e-5, atol=1e-4)
        assert stats[name].tokens == len(rows)


def test_rows() -> None:
    x = torch.randn(2, 3, 4)
    assert input_rows(Conv1D(2, 4), x).shape == (6, 4)
    assert input_rows(nn.Linear(4, 1), x[:, 0]).shape == (2, 4)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_layers_that_do_not_change_run_once(family: str) -> None:
    network, batches = tiny.model(family), given(family)
    modules = {name: m for name, m in prunable(network).items() if not isinstance(m, nn.Conv2d)}
    runs: list[object] = []
    first = layer_stack(network)[1][0]
    plain = first.forward
    with torch.no_grad(), collect(network, "input_gram", include=list(modules)) as whole:
        for batch in batches:
            network(**batch)
    handle = first.register_forward_hook(lambda *_: runs.append(first.forward == plain))
    with torch.no_grad():
        found = {
            n: s for stats in walk(network, modules, "input_gram", batches, rerun=False) for n, s in stats.items()
        }
    handle.remove()
    outside = any("layer" not in name and ".h." not in name for name in modules)
    assert sum(runs) == 1 + len(batches) + outside * 2  # recorded, each batch, compared
    assert first.forward == plain
    assert "forward" not in vars(first)
    for name, stats in found.items():
        torch.testing.assert_close(stats.input_gram, whole[name].input_gram, rtol=1e-5, atol=1e-4)


def test_heads_that_read_more_than_the_last_layer_see_whole_passes() -> None:
    """A pooler that is fed the first layer's output too can't do with the last one's."""
    network, batches = tiny.model("bert"), given("bert")
    seen: list[torch.Tensor] = []
    network.bert.encoder.layer[0].register_forward_hook(lambda _, __, out: seen.append(out))
    network.bert.pooler.register_forward_pre_hook(lambda _, args: (args[0] + seen[-1],))
    with torch.no_grad(), collect(network, "input_gram", include=["bert.pooler.dense"]) as whole:
        for batch in batches:
            network(**batch)
    with torch.no_grad():
        *_, last = walk(network, prunable(network), "input_gram", batches)
    ours, theirs = (found["bert.pooler.dense"].input_gram for found in (last, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_layers_that_need_to_run_to_be_recorded_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer is called with may depend on what ran before it; then the first batch tells, and all run."""
    network, batches = tiny.model("llama"), given("llama")
    with torch.no_grad():
        quick = list(walk(network, prunable(network), "input_gram", batches, rerun=False))
        monkeypatch.setattr("hfshrink.layerwise.walking._is_same", lambda *_: False)
        sure = list(walk(network, prunable(network), "input_gram", batches, rerun=False))
    for some, same in zip(quick, sure, strict=True):
        assert all(torch.equal(some[name].input_gram, same[name].input_gram) for name in some)


def test_structures_are_compared_by_value() -> None:
    ones = {"mask": torch.ones(2), "pair": (torch.zeros(1), None), "flag": True}
    assert _is_same(ones, {"mask": torch.ones(2), "pair": (torch.zeros(1), None), "flag": True})
    assert not _is_same(ones, {**ones, "mask": torch.zeros(2)})
    assert not _is_same(ones, {**ones, "pair": (torch.zeros(1), 1)})
    assert not _is_same([1], [1, 2])


def test_errors() -> None:
    network = tiny.model("bert")
    modules = prunable(network)
    with pytest.raises(SettingError, match="calibration data is empty"):
        next(walk(network, modules, "input_gram", []))
    resnet = tiny.model("resnet")
    resnet.spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(SettingError, match="1 modules saw no input: spare. Exclude them"), torch.no_grad():
        next(walk(resnet, prunable(resnet), "input_gram", given("resnet")))
    spare = tiny.model("bert")
    spare.bert.spare = nn.Linear(1, 1)
    with pytest.raises(SettingError, match="1 modules saw no input: bert.spare"), torch.no_grad():
        next(walk(spare, prunable(spare), "input_gram", given("bert")))  # before the first layer is handed out
    assert not any(module._forward_pre_hooks for module in spare.modules())
    layer = network.bert.encoder.layer[0]
    layer.intermediate.dense.bias.data.fill_(float("inf"))
    with pytest.raises(SettingError, match="layer.0.output.dense has NaN or infinite values"), torch.no_grad():
        next(walk(network, modules, "input_gram", given("bert")))


def test_layers_that_do_not_follow_each_other_are_refused() -> None:
    network = tiny.model("bert")
    encoder = network.bert.encoder
    encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
    with pytest.raises(UnsupportedModelError, match="Layer 1 of BertForSequenceClassification is not called with"):
        next(walk(network, prunable(network), "input_gram", given("bert")))
    network = tiny.model("bert")
    network.bert.encoder.forward = lambda hidden, **_: BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden
    )
    with pytest.raises(UnsupportedModelError, match="Only 0 of the 2 layers of BertForSequenceClassification ran"):
        next(walk(network, prunable(network), "input_gram", given("bert")))
