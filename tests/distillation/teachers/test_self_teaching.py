"""The student as its own teacher: moving averages, and deep layers that teach shallow ones."""

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
from hfshrink.distillation.losses.capture import Features, Wanted
from hfshrink.distillation.teachers.self_teaching import DeepToShallowLoss, MovingAverage
from hfshrink.errors import SettingError, UnsupportedModelError


def shaken(model, seed):
    """The model after a step: all parameters moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_average_equals_a_loop_over_the_steps():
    student = tiny.model("bert")
    average = MovingAverage(student, decay=0.5)
    expected = {name: value.clone().double() for name, value in student.named_parameters()}
    for step in range(20):
        average.update(shaken(student, step))
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in student.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    assert int(average.step) == 20
    for name, value in average.model.named_parameters():
        assert torch.allclose(value.double(), expected[name], atol=1e-5), name


def test_decay_zero_follows_the_student_exactly():
    student = tiny.model("gpt2")
    average = MovingAverage(student, decay=0.0)
    average.update(shaken(student, 1))
    batch = tiny.inputs("gpt2")
    assert torch.equal(tiny.logits(average.model, batch), tiny.logits(student, batch))


def test_the_average_is_frozen_in_eval_mode_and_leaves_the_student_alone():
    student = tiny.model("bert").train()
    before = copy.deepcopy(student.state_dict())
    average = MovingAverage(student)
    average.update(student)
    assert not any(module.training for module in average.model.modules())
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_buffers_are_copied_not_averaged():
    student = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    average = MovingAverage(student, decay=0.9)
    student(torch.randn(4, 2))
    average.update(student)
    assert torch.equal(average.model[0].running_mean, student[0].running_mean)
    assert int(average.model[0].num_batches_tracked) == 1


@pytest.mark.parametrize("bound", [True, False])
def test_a_patched_forward_of_the_student_does_not_answer_for_the_average(bound):
    student, batch = tiny.model("bert"), tiny.inputs("bert")
    plain = student.forward

    def patched(*args, **kwargs):
        return plain(*args[bound:], **kwargs)

    student.forward = MethodType(patched, student) if bound else patched  # bound is TRL's way
    average = MovingAverage(student, decay=0.0)
    before = tiny.logits(average.model, batch)
    shaken(student, 1)
    assert torch.equal(tiny.logits(average.model, batch), before)
    assert not torch.allclose(tiny.logits(student, batch), before)


def test_tied_weights_stay_tied_and_move_once():
    student = tiny.model("gpt2")
    average = MovingAverage(student, decay=0.9)
    start = student.lm_head.weight.detach().clone()
    average.update(shaken(student, 1))
    assert average.model.lm_head.weight is average.model.transformer.wte.weight
    assert torch.allclose(average.model.lm_head.weight, 0.1 * start + 0.9 * student.lm_head.weight, atol=1e-6)


def test_small_steps_of_half_precision_weights_are_not_lost():
    student = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.constant_(student.weight, 1.0)
    average = MovingAverage(student, decay=0.999)
    average.step += 100_000
    nn.init.constant_(student.weight, 1.0078125)  # the next bfloat16
    for _ in range(1000):
        average.update(student)
    assert average.model.weight.dtype == torch.float32
    assert average.model.weight.item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**1000), rel=1e-5)


def test_a_resumed_average_continues(tmp_path):
    from safetensors.torch import load_file, save_file

    student = tiny.model("bert")
    whole = MovingAverage(student, decay=0.9)
    for step in range(3):
        whole.update(shaken(student, step))
    save_file({name: value.detach() for name, value in whole.state().items()}, tmp_path / "average.safetensors")
    resumed = MovingAverage(student, decay=0.9)
    saved = load_file(tmp_path / "average.safetensors")
    with torch.no_grad():
        for name, value in resumed.state().items():
            value.copy_(saved[name])
    for average in (whole, resumed):
        average.update(student)
    assert int(resumed.step) == 4
    for (name, one), other in zip(whole.state().items(), resumed.state().values(), strict=True):
        assert torch.equal(one, other), name


def test_wrong_averages():
    with pytest.raises(SettingError, match=r"decay must be a number in \[0, 1\), got 1.0"):
        MovingAverage(nn.Linear(1, 1), decay=1.0)
    with pytest.raises(SettingError, match="not those of its average: bias differ"):
        MovingAverage(nn.Linear(1, 1)).update(nn.Linear(1, 1, bias=False))
    quantized = nn.Linear(1, 1)
    quantized.weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="quantized: they have no average"):
        MovingAverage(quantized)


def recorded(model, names, batch):
    """The outputs of a forward pass with gradients, and what the named modules gave."""
    found = {}

    def keep(name):
        def hook(_, __, output):
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    outputs = model(**batch)
    for handle in handles:
        handle.remove()
    mask = batch.get("attention_mask")
    return SimpleNamespace(logits=outputs.logits, features=Features(found, mask=None if mask is None else mask.bool()))


@pytest.mark.parametrize(
    ("depth", "expected"), [(2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (6, [1, 2, 3]), (12, [2, 5, 8])]
)
def test_default_layers_stand_at_the_quarters_below_the_last(depth, expected):
    heads = DeepToShallowLoss().prepare(tiny.model("bert", num_hidden_layers=depth))
    assert heads.student_wants == Wanted(outputs=tuple(f"bert.encoder.layer.{i}" for i in expected))
    assert heads.teacher_wants == Wanted()


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_loss_on_classes_equals_a_slow_recomputation(pooling):
    model, batch = tiny.model("bert", num_hidden_layers=4, num_labels=3), tiny.inputs("bert")
    labels = torch.tensor([0, 2, 1])
    loss = DeepToShallowLoss(layers=[0, 2], temperature=2.0, label_weight=0.7, hint_weight=0.1, pooling=pooling)
    heads = loss.prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    found = heads(student, None, head="single_label", mask=None, labels=labels)

    def pooled(layer, row):
        states = student.features.outputs[f"bert.encoder.layer.{layer}"][row]
        return states[0] if pooling == "first" else states[batch["attention_mask"][row].bool()].mean(0)

    parts = []
    for number, layer in enumerate((0, 2)):
        rows = []
        for row in range(3):
            logits = heads.heads[number](pooled(layer, row))
            p, q = (torch.softmax(z / 2.0, -1) for z in (student.logits[row], logits))
            distance = (heads.hints[number](pooled(layer, row)) - pooled(3, row)).pow(2).mean()
            labelled = -torch.log_softmax(logits, -1)[labels[row]]
            rows.append(4 * (p * (p / q).log()).sum() + 0.7 * labelled + 0.1 * distance)
        parts.append(torch.stack(rows).mean())
    assert found.item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-4)


def test_token_heads_learn_at_the_positions_that_count():
    model, batch = tiny.model("llama", num_hidden_layers=3), tiny.inputs("llama")
    heads = DeepToShallowLoss(layers=[1], temperature=1.0).prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    mask = labels[:, 1:] != -100
    found = heads(student, None, head="causal_tokens", mask=mask, labels=labels)
    rows = []
    for row in range(3):
        for position in range(6):
            if mask[row, position]:
                logits = heads.heads[0](student.features.outputs["model.layers.1"][row, position])
                p, q = (torch.softmax(z, -1) for z in (student.logits[row, position], logits))
                rows.append((p * (p / q).log()).sum() - torch.log_softmax(logits, -1)[labels[row, position + 1]])
    assert found.item() == pytest.approx(torch.stack(rows).mean().item(), rel=1e-4)


def test_the_final_logits_and_the_last_layer_get_no_gradient():
    model, batch = tiny.model("bert", num_hidden_layers=3), tiny.inputs("bert")
    heads = DeepToShallowLoss(layers=[0], hint_weight=1.0).prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    heads(student, None, head="single_label", mask=None, labels=torch.tensor([0, 1, 1])).backward()
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("layer.0." in name for name in touched)
    assert not any("layer.1." in name or "layer.2." in name or "classifier" in name for name in touched)
    assert all(parameter.grad is not None for parameter in heads.parameters())


def test_the_loss_is_zero_where_the_shallow_head_answers_like_the_last():
    model, batch = tiny.model("bert", num_hidden_layers=2), tiny.inputs("bert")
    heads = DeepToShallowLoss().prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    student.logits = heads.heads[0](heads._states(student, "bert.encoder.layer.0", "single_label"))
    assert heads(student, head="single_label").item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_of_the_shallow_heads():
    model, batch = tiny.model("bert", num_hidden_layers=2), tiny.inputs("bert")
    heads = DeepToShallowLoss().prepare(model).double()
    student = recorded(model, heads.student_wants.outputs, batch)
    states = heads._states(student, "bert.encoder.layer.0", "single_label").detach()
    target = torch.softmax(student.logits.detach().double() / 3, -1)
    heads(student, head="single_label").backward()
    chance = torch.softmax(heads.heads[0](states) / 3, -1)
    expected = 3 * (chance - target).T @ states / len(states)  # of T² KL by hand
    assert torch.allclose(heads.heads[0].weight.grad, expected, atol=1e-6)


def test_examples_without_label_learn_from_the_last_layer_alone():
    model, batch = tiny.model("bert", num_hidden_layers=2), tiny.inputs("bert")
    heads = DeepToShallowLoss().prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    logits = heads.heads[0](heads._states(student, "bert.encoder.layer.0", "single_label"))
    expected = heads(student, head="single_label") - torch.log_softmax(logits[1], -1)[1] / 3
    found = heads(student, head="single_label", labels=torch.tensor([-100, 1, -100]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_label_and_regression_by_hand():
    batch = tiny.inputs("bert")
    model = tiny.model("bert", num_labels=2)
    heads = DeepToShallowLoss(temperature=2.0).prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    logits = heads.heads[0](heads._states(student, "bert.encoder.layer.0", "multi_label"))
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = heads(student, head="multi_label", labels=labels).item()
    soft = F.binary_cross_entropy(torch.sigmoid(logits / 2), torch.sigmoid(student.logits / 2)) * 4
    assert found == pytest.approx((soft + F.binary_cross_entropy(torch.sigmoid(logits), labels)).item(), rel=1e-4)

    model = tiny.model("bert", num_labels=1)
    heads = DeepToShallowLoss().prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    logits = heads.heads[0](heads._states(student, "bert.encoder.layer.0", "regression"))
    labels = torch.tensor([0.5, 1.0, 2.0])
    expected = (logits - student.logits).pow(2).mean() + (logits[:, 0] - labels).pow(2).mean()
    assert heads(student, head="regression", labels=labels).item() == pytest.approx(expected.item(), rel=1e-5)


def test_hints_of_token_heads_count_the_same_positions():
    model, batch = tiny.model("llama", num_hidden_layers=2), tiny.inputs("llama")
    plain = DeepToShallowLoss(label_weight=0).prepare(model)
    heads = DeepToShallowLoss(label_weight=0, hint_weight=0.5).prepare(model)
    heads.heads.load_state_dict(plain.heads.state_dict())
    student = recorded(model, heads.student_wants.outputs, batch)
    mask = batch["attention_mask"][:, 1:].bool()
    hint = heads.hints[0](student.features.outputs["model.layers.0"]) - student.features.outputs["model.layers.1"]
    expected = plain(student, head="causal_tokens", mask=mask) + 0.5 * hint[:, :-1][mask].pow(2).mean()
    assert heads(student, head="causal_tokens", mask=mask).item() == pytest.approx(expected.item(), rel=1e-5)


def test_token_classes_where_no_position_counts_give_zero_not_nan():
    model, batch = tiny.model("bert", "token-classification"), tiny.inputs("bert")
    heads = DeepToShallowLoss().prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    labels = torch.full((3, 7), -100)
    assert heads(student, head="tokens", mask=labels != -100, labels=labels).item() == 0.0


def test_feature_maps_of_images_are_averaged():
    model, batch = tiny.model("resnet"), tiny.inputs("resnet")
    heads = DeepToShallowLoss(layers=["resnet.encoder.stages.0"], temperature=1.0).prepare(model)
    student = recorded(model, heads.student_wants.outputs, batch)
    states = student.features.outputs["resnet.encoder.stages.0"].mean((2, 3))
    expected = F.kl_div(
        torch.log_softmax(heads.heads[0](states), -1), torch.softmax(student.logits, -1), reduction="batchmean"
    )
    assert heads(student, head="single_label").item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("family", ["vit", "gpt2", "distilbert"])
def test_prepare_leaves_the_model_as_it_was(family):
    model = tiny.model(family).train()
    before = copy.deepcopy(model.state_dict())
    DeepToShallowLoss().prepare(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "temperature must be a number above 0, got 0"),
        ({"weight": -1.0}, "weight must be a number of at least 0"),
        ({"label_weight": -1.0}, "label_weight must be a number of at least 0"),
        ({"hint_weight": float("nan")}, "hint_weight must be a number of at least 0"),
        ({"pooling": "last"}, "pooling must be one of mean, first, got 'last'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SettingError, match=message):
        DeepToShallowLoss(**settings)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([1], r"must lie below the last, in 0..0, got \[1\]"),
        ([0, 0], "list of different layers"),
        ([], "list of different layers"),
        (["bert.encoder.stage"], "BertForSequenceClassification has no modules called bert.encoder.stage"),
    ],
)
def test_wrong_layers(layers, message):
    with pytest.raises(SettingError, match=message):
        DeepToShallowLoss(layers=layers).prepare(tiny.model("bert"))


def test_models_and_heads_that_do_not_fit():
    with pytest.raises(SettingError, match="a single layer"):
        DeepToShallowLoss().prepare(tiny.model("bert", num_hidden_layers=1))
    with pytest.raises(SettingError, match="hint_weight needs layers by number"):
        DeepToShallowLoss(layers=["resnet.encoder.stages.0"], hint_weight=1.0).prepare(tiny.model("resnet"))
    with pytest.raises(UnsupportedModelError, match="expected exactly one"):
        DeepToShallowLoss().prepare(tiny.model("resnet"))
    with pytest.raises(UnsupportedModelError, match="has no logits"):
        DeepToShallowLoss().prepare(tiny.model("bert", "question-answering"))
    with pytest.raises(UnsupportedModelError, match=r"bert.pooler gives Tensor"):
        DeepToShallowLoss(layers=["bert.pooler"]).prepare(tiny.model("bert"))
    heads = DeepToShallowLoss().prepare(tiny.model("bert"))
    student = SimpleNamespace(logits=torch.zeros(1, 2), features=Features())
    with pytest.raises(SettingError, match="not 'span'"):
        heads(student, head="span")
    with pytest.raises(SettingError, match="lack the outputs of bert.encoder.layer.0"):
        heads(student, head="single_label")
