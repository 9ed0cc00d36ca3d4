"""The masks of a run: when they change, what they hide, and what is saved of them."""

import pytest
import torch

import tiny
from hfshrink.errors import CheckpointError
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.state import TrainingMasks
from hfshrink.pruning.units.weights import matrix, prunable


def updates(pruning, steps):
    masks = TrainingMasks(tiny.model("bert"), pruning)
    found = {}
    for step in range(1, steps + 1):
        if masks.is_due(step, steps):
            masks.sparsity = found[step] = pruning.at(step / steps)
    return found


def test_masks_change_between_warm_up_and_cool_down():
    found = updates(Pruning(0.5, schedule="linear", warmup=0.2, cooldown=0.4, update_steps=2), 20)
    assert list(found) == [6, 8, 10, 12]
    assert list(found.values()) == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_a_rare_update_still_reaches_the_target():
    assert updates(Pruning(0.5, update_steps=1000), 20) == {14: 0.5}
    assert updates(Pruning(0.5, cooldown=0.0, update_steps=1000), 20) == {20: 0.5}


def test_the_initial_sparsity_is_there_from_the_first_step_on():
    found = updates(Pruning(0.8, initial_sparsity=0.4, warmup=0.5, cooldown=0.3, update_steps=1000), 20)
    assert found == {1: 0.4, 14: 0.8}


def test_random_masks_of_equal_shapes_differ_in_all_layers():
    masks = TrainingMasks(tiny.model("distilbert", n_layers=6), Pruning(0.5, method="random", scope="module"))
    masks.update(0.5)
    hidden = [mask.hidden for target in masks.targets for mask in target.masks]
    squares = [tuple(mask.flatten().tolist()) for mask in hidden if mask.shape == hidden[0].shape]
    assert len(squares) == len(set(squares)) == 24  # q, k, v and out of six layers


def test_a_sparsity_of_0_changes_nothing():
    assert updates(Pruning(0.0), 20) == {}


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet"])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_pattern_runs_along_the_inputs(family, method):
    """Also in Conv1D, which holds (in, out), where a square one shows no difference in its shape."""
    model = tiny.model(family)
    exclude = "*embedder*" if family == "resnet" else ()
    pruning = Pruning(structure="2:4", method=method, exclude=exclude)
    before = {name: module.weight.detach().clone() for name, module in prunable(model, "*", exclude).items()}
    masks = TrainingMasks(model, pruning)
    masks.update(0.5)
    for name, module in prunable(model, "*", exclude).items():
        groups, old = (
            matrix(module, values.detach()).unflatten(1, (-1, 4)) for values in (module.weight, before[name])
        )
        assert ((groups != 0).sum(-1) == 2).all(), name
        if method == "magnitude":
            largest = old.abs().sort(-1).values[..., 2:]
            assert torch.equal(groups.abs().sort(-1).values[..., 2:], largest), name


def test_all_can_be_brought_back():
    model = tiny.model("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = TrainingMasks(model, Pruning(0.5, "heads+neurons"))
    masks.update(0.5)
    assert masks.measured() == pytest.approx(0.5)
    masks.reveal()
    assert masks.measured() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "heads+neurons"])
def test_a_saved_state_is_restored(structure):
    pruning = Pruning(0.5, structure, "movement")
    one, two = tiny.model("bert"), tiny.model("bert")
    saved, fresh = TrainingMasks(one, pruning), TrainingMasks(two, pruning)
    for scores in saved.learned():
        scores.data.normal_(generator=torch.Generator().manual_seed(0))
    saved.update(0.25)
    two.load_state_dict(one.state_dict())
    fresh.load_state(saved.state())
    assert fresh.sparsity == 0.25
    assert fresh.measured() == saved.measured()
    for masks in (saved, fresh):
        masks.reveal()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_state_of_another_run_is_refused():
    masks = TrainingMasks(tiny.model("bert"), Pruning(0.5))
    with pytest.raises(CheckpointError, match="don't fit this run: aside"):
        masks.load_state(TrainingMasks(tiny.model("bert"), Pruning(0.5, "neurons")).state())
