"""Rescaling: least squares as written out in full, exact where dropped units are copies of kept ones."""

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import tiny
from hfshrink.blocks import layer_blocks
from hfshrink.errors import SettingError
from hfshrink.modules import layer_stack
from hfshrink.pruning.criteria.fisher import reader
from hfshrink.pruning.oneshot.replay import record_layers
from hfshrink.pruning.search.rescaling import _place_of_norms, block_sums, rescale_units, unit_multipliers
from hfshrink.pruning.units.groups import find_units, mask_units, used_units, weight_axis

FAMILIES = ("bert", "roberta", "electra", "distilbert", "llama", "gpt2", "vit")


def gemma2():
    """Norms before and behind each block."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4}
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, vocab_size=tiny.VOCABULARY)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def random_masks(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = {group.name: torch.rand(group.units, generator=generator) < 0.6 for group in groups}
    for mask in kept.values():
        mask[0], mask[-1] = True, False
    return kept


def reading(model, groups, batches):
    """Group -> batch -> input and output (batch, sequence, features) of its reading module."""
    seen, handles = {group.name: [] for group in groups}, []
    for group in groups:
        module, _ = reader(model, group)
        hook = lambda _, args, y, name=group.name: seen[name].append((args[0].detach(), y.detach()))  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    for batch in batches:
        tiny.logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def added_to(model, groups, batches):
    """Group -> batch -> what its block's output is added to, (batch, sequence, hidden), for each style.

    Heads are added to the layer's input. Neurons are added to the sum so far, the layer's input and the heads' output;
    in post-norm families (BERT and its kin) to that sum behind a norm, which the neurons read as well.
    """
    stack, layers = layer_stack(model)
    attention, feed_forward = layer_blocks(model)
    found, handles = {group.name: [] for group in groups}, []
    post_norm = model.config.model_type in ("bert", "roberta", "electra", "distilbert")
    for number, layer in enumerate(layers):
        heads, neurons = found.get(f"{stack}.{number}.heads", []), found.get(f"{stack}.{number}.neurons", [])
        o, up = layer.get_submodule(attention.o), layer.get_submodule(feed_forward.ups[0])
        handles.append(layer.register_forward_pre_hook(lambda _, args, to=heads: to.append(args[0].detach())))
        if post_norm:
            handles.append(up.register_forward_pre_hook(lambda _, args, to=neurons: to.append(args[0].detach())))
        else:
            handles.append(
                o.register_forward_hook(lambda _, __, y, to=neurons, x=heads: to.append(x[-1] + y.detach()))
            )
    for batch in batches:
        tiny.logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


def copy_unit(model, group, source, copied, factor):
    """Make a unit the copy of another one, read with `factor` times its weights."""
    for axis in group.writes:
        module = model.get_submodule(axis.module)
        at = weight_axis(module, "out")
        for tensor, dim in ((module.weight, at), (module.bias, 0)):
            if tensor is not None:
                tensor.data.index_copy_(
                    dim, axis.positions[copied], tensor.data.index_select(dim, axis.positions[source])
                )
    module, axis = reader(model, group)
    at = weight_axis(module, "in")
    taken = module.weight.data.index_select(at, axis.positions[source])
    module.weight.data.index_copy_(at, axis.positions[copied], factor * taken)


@pytest.mark.parametrize("damping", [0.3, 1.0, 20.0])
def test_multipliers_solve_the_damped_problem(damping):
    """argmin ‖A y − r‖² + λ‖y‖² is plain least squares with √λ·I below A."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    b = torch.randn(50, generator=generator, dtype=torch.float64)
    below = damping**0.5 * torch.eye(6, dtype=torch.float64)
    rest = torch.cat([b - a.sum(dim=1), torch.zeros(6, dtype=torch.float64)])
    expected = 1 + torch.linalg.lstsq(torch.cat([a, below]), rest[:, None]).solution[:, 0]
    assert torch.allclose(unit_multipliers(a.T @ a, a.T @ b, damping), expected)


def test_units_without_any_output_keep_one():
    assert unit_multipliers(torch.zeros(3, 3), torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_block_sums_are_a_loop():
    matrix, numbers = torch.randn(6, 6), torch.tensor([0, 2, 1, 0, 2, 2])
    expected = [[matrix[numbers == i][:, numbers == j].sum() for j in range(3)] for i in range(3)]
    assert torch.allclose(block_sums(matrix, numbers, 3), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_group_solves_its_own_least_squares(family):
    """Contributions (tokens, out, units) written out: inputs of the pruned model, outputs of the dense one.

    What the outputs are added to differs as well, and the multipliers make up for that.
    """
    model, batches = tiny.model(family), [tiny.inputs(family, seed=seed) for seed in (0, 1)]
    dense, groups = copy.deepcopy(model), find_units(model, "heads+neurons")
    kept, layers = random_masks(groups), list(layer_stack(model)[1])
    calls = record_layers(model, layers, batches)
    found = rescale_units(model, groups, kept, batches, limit=1e9)
    wanted, inputs = reading(dense, groups, batches), reading(model, groups, batches)
    before, now_before = added_to(dense, groups, batches), added_to(model, groups, batches)
    for group in groups:
        positions = calls.read if f".{len(layers) - 1}." in group.name else calls.valid
        module, axis = reader(dense, group)
        weight = module.weight.detach() if weight_axis(module, "in") == 1 else module.weight.detach().T
        bias = 0 if module.bias is None else module.bias.detach()
        a, b = [], []
        sums = zip(before[group.name], now_before[group.name], strict=True)
        for (x, _), (_, y), (r, r_now), rows in zip(
            inputs[group.name], wanted[group.name], sums, positions, strict=True
        ):
            units = [x[rows][:, unit] @ weight[:, unit].T for unit in axis.positions[kept[group.name]]]
            a.append(torch.stack(units, dim=-1).flatten(end_dim=-2).double())
            b.append((y[rows] - bias + r[rows] - r_now[rows]).flatten().double())
        a, b = torch.cat(a), torch.cat(b)
        x = unit_multipliers(a.T @ a, a.T @ b)
        factors = torch.zeros(axis.positions.numel())
        factors[axis.positions[kept[group.name]]] = x.float()[:, None]
        now, _ = reader(model, group)
        expected = weight * factors
        expected = expected if weight_axis(module, "in") == 1 else expected.T
        assert torch.allclose(now.weight, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), group.name
        result = found[group.name]
        assert result.error_after == pytest.approx(float((a @ x - b).square().sum() / b.square().sum()), abs=1e-4)
        assert result.error_before == pytest.approx(float((a.sum(1) - b).square().sum() / b.square().sum()), rel=1e-3)
        assert result.error_after <= result.error_before
        assert result.largest == pytest.approx(float(x.abs().max()), rel=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("structure", ["heads", "neurons"])
def test_copies_of_kept_units_are_made_up_for(family, structure):
    model, batch = tiny.model(family), tiny.inputs(family)
    groups = find_units(model, structure)
    kept = {}
    for group in groups:
        copy_unit(model, group, source=0, copied=1, factor=0.5)
        kept[group.name] = torch.arange(group.units) != 1
    before, masked = tiny.logits(model, batch), copy.deepcopy(model)
    for group in groups:
        mask_units(masked, group, kept[group.name])
    found = rescale_units(model, groups, kept, [batch], damping=1e-8)
    assert all(result.accepted and result.error_after < 1e-6 for result in found.values())
    error, masked_error = ((tiny.logits(m, batch) - before).abs().max() for m in (model, masked))
    assert error < 0.02 * masked_error
    assert all(torch.equal(used_units(model, group), kept[group.name]) for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "place"),
    [("bert", "last"), ("distilbert", "last"), ("llama", "first"), ("gpt2", "first"), ("gemma2", "between")],
)
def test_it_is_seen_what_blocks_are_added_to(family, place, dtype):
    """Also in bfloat16, where the sum of three numbers goes by their order."""
    model = (gemma2() if family == "gemma2" else tiny.model(family)).to(dtype)
    layers = layer_stack(model)[1]
    calls = record_layers(model, list(layers), [tiny.inputs("gpt2" if family == "gemma2" else family)])
    with torch.no_grad():
        assert _place_of_norms(model, calls.hidden[0], calls.others[0][0]) == place


def test_blocks_behind_a_norm_aim_at_their_own_output():
    model = gemma2()
    groups, batch = find_units(model, "neurons"), tiny.inputs("gpt2")
    kept = random_masks(groups)
    outputs = [
        y[batch["attention_mask"] != 0].double() for _, y in reading(model, groups[:1], [batch])[groups[0].name]
    ]
    masked = copy.deepcopy(model)
    mask_units(masked, groups[0], kept[groups[0].name])
    zeroed = [y[batch["attention_mask"] != 0] for _, y in reading(masked, groups[:1], [batch])[groups[0].name]]
    done = rescale_units(model, groups, kept, [batch])[groups[0].name]
    expected = (outputs[0] - zeroed[0]).square().sum() / outputs[0].square().sum()
    assert done.error_before == pytest.approx(float(expected), rel=1e-3)
    assert done.error_after <= done.error_before


def test_nothing_dropped_changes_nothing():
    model, batch = tiny.model("bert").train(), tiny.inputs("bert")
    before = copy.deepcopy(model.state_dict())
    groups = find_units(model, "heads+neurons")
    everything = {group.name: torch.ones(group.units, dtype=torch.bool) for group in groups}
    assert rescale_units(model, groups, everything, [batch]) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_too_large_multipliers_leave_one_group_out_and_later_ones_go_on():
    """The copy carries 300 times its source: a large x in layer 0; layer 1 is rescaled all the same."""
    model, batch = tiny.model("bert"), tiny.inputs("bert")
    first, second = find_units(model, "neurons")
    copy_unit(model, first, 0, 1, factor=300.0)
    copy_unit(model, second, 0, 1, factor=0.5)
    weights = {group.name: reader(model, group)[0].weight.detach().clone() for group in (first, second)}
    kept = {group.name: torch.arange(24) != 1 for group in (first, second)}
    found = rescale_units(model, [first, second], kept, [batch], damping=0.1)
    assert not found[first.name].accepted
    assert found[first.name].largest > 10
    assert found[second.name].accepted
    expected = weights[first.name] * kept[first.name]
    assert torch.equal(reader(model, first)[0].weight, expected)
    assert not torch.allclose(reader(model, second)[0].weight, weights[second.name] * kept[second.name])


def test_milder_masks_can_be_the_target():
    """Aiming at what is there already leaves it there; and the target's masks are taken off again."""
    model, batch = tiny.model("bert"), tiny.inputs("bert")
    groups = find_units(model, "heads+neurons")
    kept, masked = random_masks(groups), copy.deepcopy(model)
    for group in groups:
        mask_units(masked, group, kept[group.name])
    found = rescale_units(model, groups, kept, [batch], target=kept)
    assert all(result.error_before < 1e-6 for result in found.values())
    assert torch.allclose(tiny.logits(model, batch), tiny.logits(masked, batch), atol=1e-4)
    again = tiny.model("bert")
    mild = {name: torch.ones_like(mask) for name, mask in kept.items()}
    other = rescale_units(again, groups, kept, [batch], target=mild)
    plain = rescale_units(tiny.model("bert"), groups, kept, [batch])
    assert other == plain


def test_padding_does_not_count():
    ids = torch.tensor([[7, 8, 9, 10]])
    bare = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in bare.items()}
    weights = []
    for batch in (bare, padded):
        model = tiny.model("bert", "token-classification")
        groups = find_units(model, "heads+neurons")
        rescale_units(model, groups, random_masks(groups), [batch])
        weights.append(model.state_dict())
    assert all(torch.allclose(value, weights[1][name], atol=1e-4) for name, value in weights[0].items())


def test_numbers_that_are_none_are_refused():
    model, batch = tiny.model("bert"), tiny.inputs("bert")
    groups = find_units(model, "neurons")
    model.bert.encoder.layer[0].intermediate.dense.weight.data[0, 0] = torch.nan
    with pytest.raises(SettingError, match="layer.0.output.dense reads or writes NaN"):
        rescale_units(model, groups, random_masks(groups), [batch])
