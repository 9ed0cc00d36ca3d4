"""Losses inside the models, from end to end on tiny ones."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny
from hfshrink.distillation.losses.capture import AttentionStates, Features, Recorder
from hfshrink.distillation.losses.feature_losses import AttentionLoss, FeatureMapLoss, HiddenLoss, RelationLoss
from hfshrink.distillation.losses.features import attention_mse, feature_map_mse, hidden_mse, normalized_distance
from hfshrink.distillation.losses.matching import _attention_of, match_stages
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import random_inputs

PKD = HiddenLoss(layers="skip", first_token=True, normalize=True)
SEQUENCE_LOSSES = {
    "hidden": HiddenLoss(),
    "cosine": HiddenLoss(distance="cosine"),
    "pkd": PKD,
    "attention": AttentionLoss(),
    "relations": RelationLoss(),
}
LOSSES = [
    *((family, loss) for family in ("bert", "vit") for loss in SEQUENCE_LOSSES),
    *(("llama", loss) for loss in ("hidden", "attention", "relations")),
    ("resnet", "feature_maps"),
]
SMALLER = {
    "vit": {"hidden_size": 8},
    "bert": {"hidden_size": 8},
    "llama": {"hidden_size": 8, "num_key_value_heads": 1},
    "resnet": {"hidden_sizes": [8, 8]},
}
MANY = {"bert": {"num_hidden_layers": 4}, "vit": {"num_hidden_layers": 4}}


def loss_called(name):
    return SEQUENCE_LOSSES.get(name, FeatureMapLoss())


def ask(network, batch, wants):
    """The model's outputs with their features."""
    with Recorder(network, [wants]) as recorder:
        outputs = network(**batch)
        outputs.features = recorder.take(batch.get("attention_mask"))
    return outputs


def value_of(part, student, teacher, batch):
    with torch.no_grad():
        theirs = ask(teacher, batch, part.teacher_wants)
    return part(ask(student, batch, part.student_wants), theirs, head="single_label", mask=None, labels=None)


@pytest.mark.parametrize(("family", "name"), LOSSES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(family, name):
    teacher = tiny.model(family, **MANY.get(family, {}))
    student = copy.deepcopy(teacher)
    part = loss_called(name).prepare(student, teacher)
    loss = value_of(part, student, teacher, tiny.inputs(family))
    loss.backward()
    assert not list(part.parameters())
    assert loss.item() == pytest.approx(0.0, abs=1e-9)
    assert all(p.grad is None or p.grad.abs().max() < 1e-6 for p in student.parameters())


@pytest.mark.parametrize(("family", "name"), LOSSES)
def test_the_loss_falls_in_a_few_steps(family, name):
    teacher, student = tiny.model(family, **MANY.get(family, {})), tiny.model(family, seed=1, **SMALLER[family])
    part, batch = loss_called(name).prepare(student, teacher), tiny.inputs(family)
    optimizer = torch.optim.Adam([*student.parameters(), *part.parameters()], lr=3e-3)
    values = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = value_of(part, student, teacher, batch)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.95 * values[0]
    assert all(p.grad.abs().sum() > 0 for p in part.parameters())


@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_more_padding_changes_nothing(name):
    teacher, student = tiny.model("bert", num_hidden_layers=4), tiny.model("bert", seed=1)
    part, batch = loss_called(name).prepare(student, teacher), tiny.inputs("bert")
    longer = {key: nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    noisy = {**longer, "input_ids": torch.where(longer["attention_mask"].bool(), longer["input_ids"], 7)}
    expected = value_of(part, student, teacher, batch).item()
    assert value_of(part, student, teacher, longer).item() == pytest.approx(expected, rel=1e-4)
    assert value_of(part, student, teacher, noisy).item() == pytest.approx(expected, rel=1e-4)


def test_hidden_loss_is_the_mean_over_layers_and_embeddings():
    teacher, student = tiny.model("bert", num_hidden_layers=4), tiny.model("bert", seed=1)
    batch = tiny.inputs("bert")
    ours = student(**batch, output_hidden_states=True).hidden_states
    theirs = teacher(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    terms = [hidden_mse(ours[a], theirs[b], mask).item() for a, b in ((0, 0), (1, 2), (2, 4))]
    loss = value_of(HiddenLoss().prepare(student, teacher), student, teacher, batch)
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-5)
    loss = value_of(HiddenLoss(embeddings=False).prepare(student, teacher), student, teacher, batch)
    assert loss.item() == pytest.approx(sum(terms[1:]) / 2, rel=1e-5)


def test_pkd_reads_the_first_token_and_leaves_out_the_last_layer():
    teacher, student = tiny.model("bert", num_hidden_layers=4), tiny.model("bert", seed=1)
    batch = tiny.inputs("bert")
    ours = student(**batch, output_hidden_states=True).hidden_states[1][:, 0]
    theirs = teacher(**batch, output_hidden_states=True).hidden_states[2][:, 0]
    part = PKD.prepare(student, teacher)
    assert value_of(part, student, teacher, batch).item() == pytest.approx(
        normalized_distance(ours, theirs).item(), rel=1e-5
    )
    assert part.student_wants.inputs == ()


def test_attention_loss_compares_scores_before_the_softmax():
    teacher, student = tiny.model("bert"), tiny.model("bert", seed=1, hidden_size=8)
    batch, part = tiny.inputs("bert"), AttentionLoss(layers={-1: 0}).prepare(student, teacher)
    scores = []
    for network, number in ((student, 1), (teacher, 0)):
        attention = network.bert.encoder.layer[number].attention.self
        states = network(**batch, output_hidden_states=True).hidden_states[number]
        query, key = (
            linear(states).unflatten(-1, (4, -1)).transpose(1, 2) for linear in (attention.query, attention.key)
        )
        scores.append(query @ key.mT / query.shape[-1] ** 0.5)
    expected = attention_mse(*scores, batch["attention_mask"].bool())
    assert value_of(part, student, teacher, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_causal_students_future_does_not_count():
    teacher, student = tiny.model("llama"), tiny.model("llama", seed=1)
    for loss in (AttentionLoss(), RelationLoss()):
        part, batch = loss.prepare(student, teacher), tiny.inputs("llama", batch=1)
        with_mask = value_of(part, student, teacher, batch)
        without = value_of(part, student, teacher, {"input_ids": batch["input_ids"]})
        assert with_mask.item() == pytest.approx(without.item(), rel=1e-5)


@pytest.mark.parametrize("causal", ["student", "teacher", "both"])
def test_what_one_of_both_may_not_look_at_does_not_count(causal):
    part = AttentionLoss(layers={0: 0}).prepare(tiny.model("bert"), tiny.model("llama"))
    past = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()

    def side(name, scores):
        states = SimpleNamespace(query=torch.zeros(1, 4, 3, 4), scores=scores, pairs=past if name else None)
        return SimpleNamespace(features=Features(attention={0: states}))

    ours, theirs = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    window = past & torch.ones(3, 3, dtype=torch.bool).triu(-1)
    student = side(causal != "teacher", ours)
    if causal == "both":
        student.features.attention[0].pairs, past = past, window
    before, future, earlier = (
        part(student, side(causal != "student", theirs + change)).item() for change in (0.0, ~past * 9.0, past * 9.0)
    )
    assert before == future != earlier
    assert before == pytest.approx((ours - theirs).square()[past.expand_as(ours)].mean().item())


def test_pairs_go_to_the_students_device():
    ours = AttentionStates(*torch.zeros(3, 1, 2, 5, 4, device="meta"), 1.0)
    theirs = AttentionStates(*torch.zeros(3, 1, 2, 5, 4), 1.0, torch.ones(1, 1, 5, 5, dtype=torch.bool))
    features = Features(attention={0: ours}), Features(attention={0: theirs})
    assert _attention_of(features[0], 0, features[1], 0)[2].device.type == "meta"


def test_the_first_token_is_the_first_that_is_not_padding():
    teacher, student = tiny.model("bert", num_hidden_layers=4), tiny.model("bert", seed=1)
    part, batch = PKD.prepare(student, teacher), tiny.inputs("bert", batch=2)
    batch["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    ours = student(**batch, output_hidden_states=True).hidden_states[1][[0, 1], [2, 0]]
    theirs = teacher(**batch, output_hidden_states=True).hidden_states[2][[0, 1], [2, 0]]
    expected = normalized_distance(ours, theirs).item()
    assert value_of(part, student, teacher, batch).item() == pytest.approx(expected, rel=1e-5)


def test_layers_whose_states_have_the_positions_first_are_refused():
    from transformers import XLNetConfig, XLNetModel

    network = XLNetModel(XLNetConfig(vocab_size=20, d_model=8, n_layer=2, n_head=2, d_inner=8)).eval()
    with pytest.raises(UnsupportedModelError, match=r"shape \(batch, sequence, width\).* of one row, .*\(4, 1, 8\)"):
        HiddenLoss().prepare(network, network)


def test_relations_fit_models_that_share_no_size():
    teacher, student = tiny.model("bert"), tiny.model("llama", task="text-classification", hidden_size=24, head_dim=6)
    part = RelationLoss(relation_heads=2, key_weight=0.0).prepare(student, teacher)
    assert value_of(part, student, teacher, tiny.inputs("bert")).item() > 0


def test_shares_of_relations_are_a_weighted_mean():
    teacher, student, batch = tiny.model("bert"), tiny.model("bert", seed=1), tiny.inputs("bert")

    def loss(query, key, value):
        settings = {"query_weight": query, "key_weight": key, "value_weight": value}
        return value_of(RelationLoss(**settings).prepare(student, teacher), student, teacher, batch).item()

    assert loss(1, 2, 5) == pytest.approx((loss(1, 0, 0) + 2 * loss(0, 1, 0) + 5 * loss(0, 0, 1)) / 8, rel=1e-5)


def test_stages_of_feature_maps_are_matched_by_size():
    sizes = {"layer_type": "basic", "embedding_size": 4}
    student = tiny.model("resnet", **sizes, depths=[1, 1, 1], hidden_sizes=[4, 8, 16])
    teacher = tiny.model("resnet", **sizes, depths=[2, 3, 1], hidden_sizes=[8, 16, 16])
    images = random_inputs(student, 1, 1)
    stages = {f"resnet.encoder.stages.{i}": f"resnet.encoder.stages.{i}" for i in range(3)}
    assert match_stages(student, teacher, images) == stages
    part = FeatureMapLoss().prepare(student, teacher)
    assert [tuple(p.shape) for p in part.parameters()] == [(8, 4, 1, 1), (16, 8, 1, 1)]  # the third has 16 in both


def test_feature_maps_of_other_families_are_found_too():
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("mobilenet_v2", depth_multiplier=0.1, image_size=32, min_depth=4)
    teacher = AutoModel.from_config(config).eval()
    student = tiny.model("resnet")
    stages = match_stages(student, teacher, {"pixel_values": torch.zeros(1, 3, 64, 64)})
    assert list(stages) == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]  # 16 and 8 places wide
    assert set(stages.values()) <= {name for name, _ in teacher.named_modules()}


def test_feature_map_loss_is_the_mean_over_named_stages():
    teacher, student, batch = tiny.model("resnet"), tiny.model("resnet", seed=1), tiny.inputs("resnet")
    name = "resnet.encoder.stages.0"
    part = FeatureMapLoss(stages={name: name}).prepare(student, teacher)
    maps = [network(**batch, output_hidden_states=True).hidden_states[1] for network in (student, teacher)]
    assert value_of(part, student, teacher, batch).item() == pytest.approx(feature_map_mse(*maps).item(), rel=1e-5)


def test_projections_are_seeded_float32_and_leave_the_random_state_alone():
    teacher, student = tiny.model("bert"), tiny.model("bert", hidden_size=8).bfloat16()
    state = torch.random.get_rng_state()
    first, second = (dict(HiddenLoss().prepare(student, teacher).named_parameters()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(first) == ["layer_projection.weight", "embedding_projection.weight"]
    for name, weight in first.items():
        assert weight.shape == (16, 8)
        assert weight.dtype == torch.float32
        assert torch.equal(weight, second[name])
    assert not torch.equal(*first.values())


def test_half_precision_models_give_a_float32_loss():
    teacher, student = tiny.model("bert").bfloat16(), tiny.model("bert", seed=1, hidden_size=8).bfloat16()
    for loss in (HiddenLoss(), AttentionLoss(), RelationLoss()):
        value = value_of(loss.prepare(student, teacher), student, teacher, tiny.inputs("bert"))
        assert value.dtype == torch.float32
        assert value.isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenLoss(distance="l1"), "distance must be one of mse, cosine, got 'l1'"),
        (lambda: HiddenLoss(distance="cosine", normalize=True), "ignores lengths already"),
        (lambda: HiddenLoss(distance=["mse"]), "distance must be one of mse, cosine, got \\['mse'\\]"),
        (lambda: HiddenLoss(first_token="yes"), "first_token must be True or False, got 'yes'"),
        (lambda: HiddenLoss(embeddings=1), "embeddings must be True or False, got 1"),
        (lambda: FeatureMapLoss(projection="x"), "projection must be True or False, got 'x'"),
        (lambda: HiddenLoss(weight=-1.0), "weight must be a number of at least 0, got -1"),
        (lambda: AttentionLoss(final_weight=-1.0), "final_weight must be a number of at least 0"),
        (lambda: RelationLoss(relation_heads=0), "relation_heads must be a whole number from 1 on, got 0"),
        (lambda: RelationLoss(query_weight=-1), "query_weight must be a number of at least 0, got -1"),
        (lambda: RelationLoss(query_weight=0, key_weight=0, value_weight=0), "are all 0"),
        (lambda: FeatureMapLoss(stages={}), "stages must be a mapping"),
    ],
)
def test_wrong_settings_are_refused_at_once(make, message):
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "student", "error", "message"),
    [
        (
            HiddenLoss(projection=False),
            {"hidden_size": 8},
            SettingError,
            r"student is 8 wide, the teacher 16, which Hidd",
        ),
        (HiddenLoss(), {"num_hidden_layers": 3}, SettingError, "student has 3 layers, the teacher only 2"),
        (HiddenLoss(layers={0: 5}), {}, SettingError, "teacher has 2 layers.*got layer 5"),
        (
            AttentionLoss(),
            {"num_attention_heads": 2},
            SettingError,
            "layer 0 of the student has 2, layer 0 of the teacher 4. Use RelationLoss",
        ),
        (RelationLoss(relation_heads=3), {}, SettingError, "got 3; the student's query states are 16 wide"),
        (RelationLoss(student_layer=2), {}, SettingError, "student has 2 layers.*got layer 2"),
        (
            FeatureMapLoss(),
            {},
            UnsupportedModelError,
            r"student \(BertFor.* has no list of blocks that make feature maps",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused_before_training(loss, student, error, message):
    with pytest.raises(error, match=message):
        loss.prepare(tiny.model("bert", **student), tiny.model("bert"))


def test_convolutional_models_that_do_not_fit_are_refused():
    student, teacher = tiny.model("resnet"), tiny.model("resnet", hidden_sizes=[8, 8])
    with pytest.raises(
        SettingError, match=r"student is 16 wide, the teacher 8, which FeatureMapLoss\(projection=False"
    ):
        FeatureMapLoss(projection=False).prepare(student, teacher)
    with pytest.raises(SettingError, match="no module called 'nowhere'"):
        FeatureMapLoss(stages={"nowhere": "resnet"}).prepare(student, teacher)
    with pytest.raises(UnsupportedModelError, match="'resnet'.* has 0 stacks"):
        HiddenLoss().prepare(student, teacher)


def test_an_encoder_decoder_is_refused_by_name():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    network = T5ForConditionalGeneration(T5Config(**sizes))
    for loss in (HiddenLoss(), AttentionLoss(), RelationLoss()):
        with pytest.raises(UnsupportedModelError, match="'t5'.* has 2 stacks"):
            loss.prepare(network, network)


@pytest.mark.parametrize("loss", [HiddenLoss(), RelationLoss()])
def test_other_lengths_of_teacher_or_mask_are_refused(loss):
    student, teacher, batch = tiny.model("bert", seed=1), tiny.model("bert"), tiny.inputs("bert")
    part = loss.prepare(student, teacher)
    ours = ask(student, batch, part.student_wants)
    shorter = {name: value[:, :5] for name, value in batch.items()}
    with pytest.raises(SettingError, match=r"student's states.* = \(3, 7\), the teacher's of \(3, 5\)"):
        part(ours, ask(teacher, shorter, part.teacher_wants), head="single_label", mask=None, labels=None)
    seen = ours.features
    wrong = SimpleNamespace(features=Features(seen.outputs, seen.inputs, seen.attention, torch.ones(3, 6).bool()))
    with pytest.raises(SettingError, match=r"mask of padding is of .* = \(3, 6\), the states of \(3, 7\)"):
        part(wrong, ask(teacher, batch, part.teacher_wants), head="single_label", mask=None, labels=None)
