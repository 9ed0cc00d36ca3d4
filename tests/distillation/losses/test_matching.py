"""`HiddenLoss(layers="nearest")`: the layers that are matched anew in every batch, as a student is pruned."""

import copy
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch

import tiny
import training
from hfshrink import CompressionTrainer, Pruning
from hfshrink.distillation import HiddenLoss, LogitLoss
from hfshrink.distillation.losses.capture import Features, Recorder
from hfshrink.distillation.losses.features import cosine_distance, first_tokens, hidden_mse, normalized_distance
from hfshrink.errors import SettingError

NEAREST = HiddenLoss(layers="nearest")
DEPTH, TEACHER_DEPTH = 6, 12
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]]).bool()


def fit(loss=NEAREST, student_depth=DEPTH, teacher_depth=TEACHER_DEPTH, **student):
    """The loss for two BERTs."""
    ours = tiny.model("bert", num_hidden_layers=student_depth, **student)
    return loss.prepare(ours, tiny.model("bert", num_hidden_layers=teacher_depth))


def states(names, width=16, seed=0):
    """Random outputs of the named layers, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(len(MASK), MASK.shape[1], width, generator=generator) for name in names}
    return {name: state.requires_grad_() for name, state in made.items()}


def side(outputs, inputs=()):
    return SimpleNamespace(features=Features(outputs, dict(inputs), mask=MASK))


def sides(part, width=16, seed=0):
    return (
        side(states(part.student_wants.outputs, width, seed)),
        side({k: v.detach() for k, v in states(part.teacher_wants.outputs, seed=seed + 100).items()}),
    )


def numbers(pairs):
    return [tuple(int(name.rsplit(".", 1)[1]) for name in pair) for pair in pairs]


def slow(part, student, teacher, distance):
    """The least mean distance of all rising matches, one by one."""
    ours, theirs = list(student.features.outputs.values()), list(teacher.features.outputs.values())
    return min(
        torch.stack([distance(part.layer_projection(ours[i]), theirs[j], MASK) for j, i in enumerate(match)]).mean()
        for match in combinations(range(len(ours)), len(theirs))
    )


def test_all_of_the_students_layers_are_recorded_and_four_of_the_teachers():
    part = fit()
    assert part.student_wants.outputs == tuple(f"bert.encoder.layer.{i}" for i in range(6))
    assert part.teacher_wants.outputs == tuple(f"bert.encoder.layer.{i}" for i in (2, 5, 8, 11))
    assert part.student_wants.inputs == part.teacher_wants.inputs == ()
    assert len(fit(HiddenLoss(layers="nearest", embeddings=True)).student_wants.inputs) == 1


@pytest.mark.parametrize(
    ("settings", "distance"),
    [
        ({}, hidden_mse),
        ({"distance": "cosine"}, cosine_distance),
        ({"normalize": True}, normalized_distance),
        ({"first_token": True}, lambda a, b, mask: hidden_mse(first_tokens(a, mask), first_tokens(b, mask))),
    ],
)
@pytest.mark.parametrize("width", [16, 8])
def test_the_loss_equals_a_slow_search_over_all_rising_matches(settings, distance, width):
    part = fit(HiddenLoss(layers="nearest", **settings), hidden_size=width)
    assert len(list(part.parameters())) == (width != 16)
    for seed in range(5):
        student, teacher = sides(part, width, seed)
        assert part(student, teacher).item() == pytest.approx(slow(part, student, teacher, distance).item(), rel=1e-5)


def test_the_match_follows_the_batch():
    part = fit()
    student, teacher = sides(part)
    names, taught = part.student_wants.outputs, part.teacher_wants.outputs
    for match in combinations(range(6), 4):
        outputs = dict(student.features.outputs)
        outputs |= {names[i]: teacher.features.outputs[name] for i, name in zip(match, taught, strict=True)}
        moved = side(outputs)
        assert numbers(part.pairs(moved.features, teacher.features)) == list(zip(match, (2, 5, 8, 11), strict=True))
        assert part(moved, teacher).item() == 0


def test_padding_does_not_decide_the_match():
    part = fit()
    student, teacher = sides(part)
    noisy = side({k: torch.where(MASK[..., None], v, 99.0) for k, v in student.features.outputs.items()})
    assert part.pairs(noisy.features, teacher.features) == part.pairs(student.features, teacher.features)
    assert part(noisy, teacher).item() == pytest.approx(part(student, teacher).item(), rel=1e-5)


@pytest.mark.parametrize("width", [16, 8])
def test_gradients_flow_through_the_chosen_layers_only(width):
    part = fit(hidden_size=width)
    student, teacher = sides(part, width)
    part(student, teacher).backward()
    chosen = dict(part.pairs(student.features, teacher.features))
    outputs = student.features.outputs
    assert {name for name, state in outputs.items() if state.grad is not None} == set(chosen)
    again = {name: state.detach().clone().requires_grad_() for name, state in outputs.items()}
    fixed = [hidden_mse(part.layer_projection(again[a]), teacher.features.outputs[b], MASK) for a, b in chosen.items()]
    torch.stack(fixed).mean().backward()
    assert all(torch.allclose(outputs[name].grad, again[name].grad) for name in chosen)
    assert all(p.grad.abs().sum() > 0 for p in part.parameters())


def ask(network, batch, wants):
    with Recorder(network, [wants]) as recorder:
        outputs = network(**batch)
        outputs.features = recorder.take(batch.get("attention_mask"))
    return outputs


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2", "vit"])
def test_a_student_equal_to_its_teacher_is_matched_layer_by_layer_without_loss(family):
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    teacher = tiny.model(family, **{depth: 6})
    student, batch = copy.deepcopy(teacher), tiny.inputs(family)
    part = NEAREST.prepare(student, teacher)
    ours, theirs = (ask(student, batch, part.student_wants), ask(teacher, batch, part.teacher_wants))
    assert numbers(part.pairs(ours.features, theirs.features)) == [(i, i) for i in (1, 2, 4, 5)]
    loss = part(ours, theirs)
    loss.backward()
    assert loss.item() == 0
    assert not list(part.parameters())
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in student.parameters())


@pytest.mark.parametrize(("student_depth", "taught"), [(1, (11,)), (2, (5, 11)), (3, (3, 7, 11)), (14, (2, 5, 8, 11))])
def test_students_of_any_depth_can_be_taught(student_depth, taught):
    part = fit(student_depth=student_depth)
    assert part.teacher_wants.outputs == tuple(f"bert.encoder.layer.{j}" for j in taught)
    assert part(*sides(part)).isfinite()


def test_a_run_that_diverged_gives_a_loss_that_says_so():
    part = fit()
    student, teacher = sides(part)
    broken = {name: state * torch.nan for name, state in student.features.outputs.items()}
    assert part(side(broken), teacher).isnan()


def test_half_precision_states_give_a_float32_loss():
    part = fit(hidden_size=8)
    student, teacher = sides(part, 8)
    halves = [side({k: v.bfloat16() for k, v in one.features.outputs.items()}) for one in (student, teacher)]
    assert part(*halves).dtype == torch.float32
    assert part(*halves).item() == pytest.approx(part(student, teacher).item(), rel=0.02)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(SettingError, match="student is 8 wide, the teacher 16"):
        fit(HiddenLoss(layers="nearest", projection=False), hidden_size=8)
    part = fit()
    student, _ = sides(part)
    longer = side({name: torch.zeros(2, 5, 16) for name in part.teacher_wants.outputs})
    with pytest.raises(SettingError, match=r"student's states.* = \(2, 4\), the teacher's of \(2, 5\)"):
        part(student, longer)


@pytest.mark.parametrize("size", [16, 8])
def test_a_student_that_is_pruned_is_taught_by_the_nearest_layers(size):
    """The whole run: heads and neurons go while the layers learn, and the cut student still computes."""
    sizes = training.no_dropout("bert") | {"num_hidden_layers": 5}
    teacher = tiny.model("bert", seed=2, **sizes)
    student = copy.deepcopy(teacher) if size == 16 else tiny.model("bert", seed=1, hidden_size=size, **sizes)
    trainer = CompressionTrainer(
        student,
        training.arguments(max_steps=4, logging_steps=1),
        train_dataset=training.rows(),
        data_collator=training.collate,
        teacher=teacher,
        losses=[LogitLoss(), NEAREST],
        pruning=Pruning(0.5, "heads+neurons"),
    )
    trainer.train()
    hidden = [row["loss_hidden"] for row in trainer.state.log_history if "loss_hidden" in row]
    assert len(hidden) == 4
    if size == 16:
        assert hidden[0] == pytest.approx(0, abs=1e-9)  # before anything is pruned
    assert hidden[-1] > 0
    neurons = [layer.output.dense.in_features for layer in student.bert.encoder.layer]
    assert sum(neurons) < 5 * 24
    assert torch.isfinite(tiny.logits(student.eval(), tiny.inputs("bert"))).all()
