"""The loss objects: what they compute for each head, what they refuse; and the older formulas, recomputed slowly."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

import tiny
from hfshrink import LogitLoss
from hfshrink.distillation.losses.divergences import (
    SparseTargets,
    binary_cross_entropy,
    decoupled_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    mean_squared_error,
    reverse_kl_divergence,
    skewed_kl_divergence,
    skewed_reverse_kl_divergence,
    sorted_distance,
    sparse_kl_divergence,
    standardize_logits,
)
from hfshrink.distillation.losses.logits import (
    DIVERGENCES,
    CrossTokenizerLoss,
    DecoupledLoss,
    check_weights,
    loss_mask,
)
from hfshrink.errors import SettingError


def softmax(row, temperature):
    powers = [math.exp(value / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def slow_kl(student, teacher, temperature):
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(theirs, temperature), softmax(ours, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kl_equals_a_slow_loop(temperature):
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(
        slow_kl(student, teacher, temperature), rel=1e-5
    )


def test_kl_by_hand():
    # teacher (1/2, 1/2), student (1/4, 3/4): KL = ½ ln 2 + ½ ln(2/3) = ½ ln(4/3)
    student, teacher = torch.tensor([[0.0, math.log(3.0)]]), torch.zeros(1, 2)
    assert kl_divergence(student, teacher).item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)


def test_kl_of_a_teacher_and_itself_is_zero():
    logits = torch.randn(6, 5) * 10
    assert kl_divergence(logits, logits.clone(), temperature=3.0).item() == 0.0


def test_gradient_keeps_its_size_at_every_temperature():
    teacher = torch.randn(64, 5) / 100  # nearly linear: T² undoes 1/T of the logits and 1/T of the probabilities
    norms = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(64, 5, requires_grad=True)
        kl_divergence(student, teacher, temperature).backward()
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


def test_masked_positions_do_not_count():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = slow_kl(student[mask], teacher[mask], 2.0)
    assert kl_divergence(student, teacher, 2.0, mask).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student, teacher, 2.0, torch.zeros_like(mask)).item() == 0.0


def test_binary_cross_entropy_equals_a_slow_loop():
    student, teacher, t = torch.randn(3, 4), torch.randn(3, 4), 2.0
    total = 0.0
    for z, w in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = 1 / (1 + math.exp(-w / t)), 1 / (1 + math.exp(-z / t))
        total -= p * math.log(q) + (1 - p) * math.log(1 - q)
    assert binary_cross_entropy(student, teacher, t).item() == pytest.approx(t**2 * total / 12, rel=1e-5)


def test_binary_cross_entropy_is_least_at_the_teacher():
    teacher = torch.randn(3, 4)
    student = teacher.clone().requires_grad_()
    binary_cross_entropy(student, teacher, 2.0).backward()
    assert student.grad.abs().max().item() < 1e-7


def test_mean_squared_error_by_hand():
    assert mean_squared_error(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [5.0]])).item() == pytest.approx(6.5)


def test_causal_heads_are_shifted():
    ids = torch.tensor([[5, 6, 7, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    mask = loss_mask(inputs, "causal_tokens")
    assert mask.tolist() == [[True, True, False]]
    student, teacher = (SimpleNamespace(logits=torch.randn(1, 4, 8)) for _ in range(2))
    got = LogitLoss(temperature=1.0)(student, teacher, head="causal_tokens", mask=mask)
    assert got.item() == pytest.approx(slow_kl(student.logits[0, :2], teacher.logits[0, :2], 1.0), rel=1e-5)


def test_labels_decide_over_padding():
    inputs = {"labels": torch.tensor([[-100, 1, -100]]), "attention_mask": torch.ones(1, 3)}
    assert loss_mask(inputs, "tokens").tolist() == [[False, True, False]]
    assert loss_mask(inputs, "single_label") is None


def test_padding_on_the_left_predicts_nothing():
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 5, 6, 7]])
    wanted = [[False, False, True, True]]  # position 1 is padding and has nothing to predict the 5 from
    assert loss_mask({"labels": labels, "attention_mask": mask}, "causal_tokens").tolist() == wanted
    assert loss_mask({"attention_mask": mask}, "causal_tokens").tolist() == wanted


def test_a_batch_of_embeddings_counts_every_position():
    embeddings = {"inputs_embeds": torch.zeros(2, 3, 8)}
    assert loss_mask(embeddings, "causal_tokens").tolist() == [[True, True]] * 2
    decoder = {"input_ids": torch.zeros(2, 3), "decoder_inputs_embeds": torch.zeros(2, 4, 8)}
    assert loss_mask(decoder, "tokens").shape == (2, 4)
    with pytest.raises(
        SettingError, match=r"Expected labels, .* or inputs_embeds in the batch, got \['pixel_values'\]"
    ):
        loss_mask({"pixel_values": torch.zeros(1)}, "tokens")


def test_labels_that_do_not_fit_are_refused():
    student, teacher = outputs(2, 3), outputs(2, 3, seed=1)
    for labels, message in (
        ([0, 5], "Labels must be -100 or from 0 to 2, got 5"),
        ([-1, 0], "Labels must be -100 or from 0 to 2, got -1"),
        ([[0], [1]], r"a label for each row of logits, of shape \(2,\), got \(2, 1\)"),
    ):
        with pytest.raises(SettingError, match=message):
            DecoupledLoss()(student, teacher, head="single_label", labels=torch.tensor(labels))


def test_question_answering_takes_the_mean_of_start_and_end():
    one, two = (tiny.model("bert", "question-answering", seed=seed) for seed in (0, 1))
    batch = tiny.inputs("bert")
    with torch.no_grad():
        a, b = one(**batch), two(**batch)
    expected = (
        kl_divergence(a.start_logits, b.start_logits, 2.0) + kl_divergence(a.end_logits, b.end_logits, 2.0)
    ) / 2
    assert LogitLoss()(a, b, head="span", mask=None).item() == pytest.approx(expected.item())


NUMBERS = {"temperature": 0, "weight": -1, "final_weight": -0.1, "beta": 1.1, "skew": 1.0}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("bad", ["out of range", True, "2", math.nan, math.inf, [1.0]], ids=str)
def test_bad_numbers_are_refused_with_their_name(name, bad):
    bad = NUMBERS[name] if bad == "out of range" else bad
    with pytest.raises(SettingError, match=rf"^{name} must be a number .*, got {re.escape(repr(bad))}\.$"):
        LogitLoss(**{name: bad})


def test_other_bad_settings():
    with pytest.raises(SettingError, match="divergence must be one of forward_kl, reverse_kl, .*mse, got 'kl'"):
        LogitLoss(divergence="kl")
    with pytest.raises(SettingError, match="standardize must be True or False, got 1"):
        LogitLoss(standardize=1)
    with pytest.raises(SettingError, match="divergence must be one of forward_kl, .*got \\['mse'\\]"):
        LogitLoss(divergence=["mse"])
    for bad in (2.5, 0, True):
        with pytest.raises(SettingError, match=f"chunk_size must be a whole number from 1 on, got {bad}"):
            LogitLoss(chunk_size=bad)
    for settings in ({"beta": 0.1}, {"divergence": "skewed_kl", "beta": 0.1}, {"divergence": "jsd", "skew": 0.2}):
        name = next(key for key in settings if key != "divergence")
        with pytest.raises(SettingError, match=f"divergence='.*' does not read {name}: leave out {name}="):
            LogitLoss(**settings)
    for name in ("temperature", "weight", "final_weight", "target_weight", "other_weight"):
        with pytest.raises(SettingError, match=f"^{name} must be a number"):
            DecoupledLoss(**{name: -1.0})
    with pytest.raises(SettingError, match="final_weight must be a number of at least 0, got '1'"):
        CrossTokenizerLoss(final_weight="1")
    with pytest.raises(SettingError, match="weight must be a number of at least 0, got None"):
        check_weights(None, None)
    check_weights(0, 0.0)


def test_different_shapes_name_both_sides():
    student, teacher = SimpleNamespace(logits=torch.zeros(2, 3)), SimpleNamespace(logits=torch.zeros(2, 4))
    with pytest.raises(SettingError, match=r"student's logits have shape \(2, 3\), the teacher's \(2, 4\)"):
        LogitLoss()(student, teacher, head="single_label", mask=None)


def outputs(*shape, seed=0, **others):
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(logits=torch.randn(*shape, generator=generator), **others)


EXPECTED = {
    "forward_kl": kl_divergence,
    "reverse_kl": reverse_kl_divergence,
    "jsd": lambda *given: jensen_shannon_divergence(*given, beta=0.2),
    "skewed_kl": lambda *given: skewed_kl_divergence(*given, skew=0.3),
    "skewed_reverse_kl": lambda *given: skewed_reverse_kl_divergence(*given, skew=0.3),
    "mse": lambda student, teacher, temperature, mask: mean_squared_error(student, teacher, mask),
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("head", ["single_label", "tokens", "causal_tokens"])
def test_each_name_computes_its_function(name, head):
    shape = (4, 5) if head == "single_label" else (2, 4, 5)
    student, teacher = outputs(*shape), outputs(*shape, seed=1)
    ids = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = loss_mask({"input_ids": ids, "attention_mask": ids}, head)
    settings = {"jsd": {"beta": 0.2}, "skewed_kl": {"skew": 0.3}, "skewed_reverse_kl": {"skew": 0.3}}.get(name, {})
    loss = LogitLoss(3.0, divergence=name, **settings)
    cut = slice(None, -1) if head == "causal_tokens" else slice(None)
    pair = [side.logits[:, cut] if head != "single_label" else side.logits for side in (student, teacher)]
    got = loss(student, teacher, head=head, mask=mask, labels=None)
    assert got.item() == EXPECTED[name](*pair, 3.0, mask).item()
    standard = LogitLoss(3.0, divergence=name, standardize=True, **settings)
    got = standard(student, teacher, head=head, mask=mask, labels=None)
    assert got.item() == EXPECTED[name](*map(standardize_logits, pair), 3.0, mask).item()


def test_heads_without_a_softmax_have_their_own_loss():
    student, teacher = outputs(4, 3), outputs(4, 3, seed=1)
    squares = mean_squared_error(student.logits, teacher.logits).item()
    entropy = binary_cross_entropy(student.logits, teacher.logits, 2.0).item()
    assert LogitLoss()(student, teacher, head="multi_label").item() == entropy
    assert LogitLoss(divergence="mse")(student, teacher, head="multi_label").item() == squares
    for divergence in ("forward_kl", "mse"):
        assert LogitLoss(divergence=divergence)(student, teacher, head="regression").item() == squares


@pytest.mark.parametrize("head", ["multi_label", "regression"])
def test_heads_without_a_softmax_refuse_what_needs_one(head):
    one = outputs(4, 3)
    with pytest.raises(SettingError, match=f"divergence='jsd' needs a head with a softmax, not '{head}'"):
        LogitLoss(divergence="jsd")(one, one, head=head)
    with pytest.raises(SettingError, match=f"standardize=True needs a head with a softmax, not '{head}'"):
        LogitLoss(standardize=True)(one, one, head=head)
    with pytest.raises(SettingError, match=f"DecoupledLoss needs one label and a softmax per row.*'{head}'"):
        DecoupledLoss()(one, one, head=head, labels=torch.zeros(4).long())


def test_two_classes_are_refused():
    one, labels = outputs(4, 2), torch.zeros(4).long()
    with pytest.raises(SettingError, match="standardize=True needs at least 3 classes, the student has 2: .*sign"):
        LogitLoss(standardize=True)(one, one, head="single_label")
    with pytest.raises(SettingError, match="DecoupledLoss needs at least 3 classes, the student has 2: .*one other"):
        DecoupledLoss()(one, one, head="single_label", labels=labels)


def test_span_logits_may_come_from_a_cache():
    student, teacher = (
        SimpleNamespace(start_logits=outputs(2, 5, seed=seed).logits, end_logits=outputs(2, 5, seed=seed + 7).logits)
        for seed in (0, 1)
    )
    parts = [
        reverse_kl_divergence(getattr(student, name), getattr(teacher, name), 2.0).item()
        for name in ("start_logits", "end_logits")
    ]
    got = LogitLoss(divergence="reverse_kl")(student, teacher, head="span")
    assert got.item() == pytest.approx(sum(parts) / 2)


def targets(batch=2, length=4, tail=True, **others):
    values, ids = outputs(batch, length, 9, seed=5).logits.softmax(-1).topk(3, dim=-1)
    return SparseTargets(ids, values, tail, **others)


@pytest.mark.parametrize("head", ["tokens", "causal_tokens"])
def test_a_sparse_teacher_is_compared_by_its_kept_tokens(head):
    student, kept = outputs(2, 4, 9), targets()
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    if head == "tokens":
        expected = sparse_kl_divergence(student.logits, kept, mask=mask)
    else:
        mask = mask[:, 1:]
        cut = SparseTargets(kept.ids[:, :-1], kept.probabilities[:, :-1], tail=True)
        expected = sparse_kl_divergence(student.logits[:, :-1], cut, mask=mask)
    got = LogitLoss(temperature=1.0)(student, SimpleNamespace(sparse=kept), head=head, mask=mask, labels=None)
    assert got.item() == expected.item()


def test_a_sparse_teacher_is_refused_where_all_logits_are_needed():
    student, teacher = outputs(2, 4, 9), SimpleNamespace(sparse=targets())
    for settings in ({"divergence": "jsd"}, {"standardize": True}, {"divergence": "mse"}):
        with pytest.raises(SettingError, match="hold 3 tokens per position; LogitLoss with divergence=.* needs all"):
            LogitLoss(1.0, **settings)(student, teacher, head="causal_tokens")
    with pytest.raises(SettingError, match="needs all of the teacher's logits, not kept probabilities"):
        DecoupledLoss()(student, teacher, head="causal_tokens", labels=torch.zeros(2, 4).long())
    with pytest.raises(SettingError, match=r"taken at temperature 1\.0, LogitLoss has temperature=2\.0"):
        LogitLoss()(student, teacher, head="causal_tokens")
    same = SimpleNamespace(sparse=targets(temperature=2.0))
    assert LogitLoss()(student, same, head="causal_tokens").item() > 0
    with pytest.raises(SettingError, match=r"student's logits have shape \(2, 4, 9\), .* probabilities \(2, 5, 3\)"):
        LogitLoss(1.0)(student, SimpleNamespace(sparse=targets(2, 5)), head="tokens")


def test_decoupled_loss_shifts_causal_heads_and_leaves_ignored_labels_out():
    student, teacher = outputs(2, 4, 9), outputs(2, 4, 9, seed=1)
    labels = torch.tensor([[1, 2, 3, -100], [4, -100, 5, 6]])
    mask = loss_mask({"labels": labels}, "causal_tokens")
    got = DecoupledLoss(3.0, other_weight=2.0)(student, teacher, head="causal_tokens", mask=mask, labels=labels)
    rows = mask.nonzero().tolist()
    pairs = [torch.stack([side.logits[i, j] for i, j in rows]) for side in (student, teacher)]
    wanted = torch.tensor([labels[i, j + 1] for i, j in rows])
    assert got.item() == pytest.approx(decoupled_divergence(*pairs, wanted, 3.0, other_weight=2.0).item(), rel=1e-6)
    rows = DecoupledLoss()(
        outputs(2, 3), outputs(2, 3, seed=1), head="single_label", mask=None, labels=torch.tensor([-100, -100])
    )
    assert rows.item() == 0.0
    with pytest.raises(SettingError, match="DecoupledLoss needs labels"):
        DecoupledLoss()(student, teacher, head="tokens", mask=mask, labels=None)


def test_cross_tokenizer_loss_takes_paired_positions_of_any_two_vocabularies():
    student, teacher = outputs(4, 9), outputs(4, 12, seed=1)
    got = CrossTokenizerLoss()(student, teacher, head="causal_tokens", mask=None, labels=None)
    assert got.item() == sorted_distance(student.logits, teacher.logits).item()
    none = CrossTokenizerLoss()(outputs(0, 9), outputs(0, 12), head="causal_tokens", mask=None, labels=None)
    assert none.item() == 0.0
    with pytest.raises(SettingError, match=r"student's have \(4, 9\), the teacher's \(5, 12\)"):
        CrossTokenizerLoss()(student, outputs(5, 12), head="causal_tokens")
    with pytest.raises(SettingError, match="for language models, not for a head of kind 'single_label'"):
        CrossTokenizerLoss()(student, teacher, head="single_label")
