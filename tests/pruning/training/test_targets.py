"""What competes, and the scores that gradients give."""

import pytest
import torch

import tiny
from hfshrink.errors import SettingError
from hfshrink.pruning.training.settings import Pruning
from hfshrink.pruning.training.targets import competitors, gather_gradients, make_targets, scores_of


def with_gradients(pruning, seed=0):
    model = tiny.model("bert")
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model, make_targets(model, pruning)


def test_only_the_same_kinds_compete():
    targets = make_targets(tiny.model("bert"), Pruning(0.5, "heads+neurons"))
    assert [{target.kind for target in rivals} for rivals in competitors(targets)] == [{"heads"}, {"neurons"}]


@pytest.mark.parametrize("method", ["movement", "soft-movement"])
def test_the_gradient_of_scores_equals_autograd(method):
    pruning = Pruning(0.5, method=method, penalty=3.0)
    _, targets = with_gradients(pruning)
    expected = []
    for target in targets:
        scores = target.learned.detach().uniform_(-1, 1).requires_grad_()
        weight = target.masks[0].weight
        target.learned.data.copy_(scores.detach())
        # straight through: w′ = w·s with the mask for s, so that dL/ds = dL/dw′·w
        expected.append((scores, (weight.grad * weight.detach() * scores).sum()))
    loss = sum(part for _, part in expected)
    if method == "soft-movement":
        loss = loss + 3.0 * torch.stack([scores.sigmoid().mean() for scores, _ in expected]).mean()
    loss.backward()
    for target, (scores, _) in zip(targets, expected, strict=True):
        gather_gradients(target, pruning, modules=len(targets))
        assert torch.allclose(target.learned.grad, scores.grad, atol=1e-6)


def test_hidden_weights_have_no_gradient_but_their_scores_have():
    pruning = Pruning(0.5, method="movement")
    _, [target, *_] = with_gradients(pruning)
    mask = target.masks[0]
    dense, gradient = mask.full(), mask.weight.grad.clone()
    mask.hide(torch.rand_like(mask.weight) < 0.5)
    gather_gradients(target, pruning)
    assert torch.equal(target.learned.grad, dense * gradient)
    assert torch.equal(mask.weight.grad, gradient * ~mask.hidden)


@pytest.mark.parametrize("method", ["taylor", "fisher"])
@pytest.mark.parametrize("structure", ["unstructured", "neurons"])
def test_the_scale_of_mixed_precision_leaves_no_trace(method, structure):
    pruning = Pruning(0.5, structure, method)
    (_, [plain, *_]), (scaled_model, [scaled, *_]) = with_gradients(pruning), with_gradients(pruning)
    for parameter in scaled_model.parameters():
        parameter.grad *= 1024
    gather_gradients(plain, pruning)
    gather_gradients(scaled, pruning, 1024.0)
    assert torch.allclose(plain.gathered, scaled.gathered)
    before = scaled.gathered.clone()
    scaled.masks[0].weight.grad.view(-1)[0] = float("inf")  # the optimizer skips this step
    gather_gradients(scaled, pruning, 1024.0)
    assert torch.equal(scaled.gathered, before)


def test_running_means_by_hand():
    pruning = Pruning(0.5, method="fisher")
    _, [target, *_] = with_gradients(pruning)
    weight = target.masks[0].weight
    for value in (1.0, 2.0):
        weight.grad = torch.full_like(weight, value)
        gather_gradients(target, pruning)
    assert torch.allclose(target.gathered, torch.tensor(0.9 * 1 + 0.1 * 4))


@pytest.mark.parametrize("structure", ["unstructured", "neurons"])
@pytest.mark.parametrize("method", ["taylor", "fisher"])
def test_what_no_gradient_reaches_is_worth_nothing(structure, method):
    model = tiny.model("bert")
    pruning = Pruning(0.5, structure, method)
    target = make_targets(model, pruning)[0]
    gather_gradients(target, pruning)
    assert (scores_of(target, model, pruning) == 0).all()


@pytest.mark.parametrize("scope", ["global", "module"])
def test_an_empty_group_is_refused_before_training(scope):
    with pytest.raises(SettingError, match="leaves .* empty|can't be reached"):
        make_targets(tiny.model("bert"), Pruning(0.9, "heads", scope=scope))


@pytest.mark.parametrize("structure", ["unstructured", "heads+neurons"])
def test_scores_that_start_from_magnitudes_rank_as_magnitudes_do(structure):
    model = tiny.model("bert")
    learned, plain = (make_targets(model, Pruning(0.5, structure, method)) for method in ("movement", "magnitude"))
    for rivals, others in zip(competitors(learned), competitors(plain), strict=True):
        ours = torch.cat([target.learned.detach().flatten() for target in rivals])
        theirs = torch.cat([scores_of(target, model, Pruning(0.5, structure)).flatten() for target in others])
        assert ours.mean() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(ours * theirs.mean(), theirs, atol=1e-6)
