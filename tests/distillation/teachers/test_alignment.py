"""Teacher and student are aligned before training, or an error names both sides."""

import pytest
import torch
from transformers import BertConfig

import tiny
from hfshrink.distillation.teachers.alignment import align, head_kind, label_order
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.loading import infer_task


def named(*names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def test_labels_in_another_order_are_permuted():
    student, teacher = BertConfig(**named("a", "B", "c")), BertConfig(**named("C", "a", "b"))
    order = label_order(student, teacher)
    assert order.tolist() == [1, 2, 0]
    logits = torch.tensor([[30.0, 10.0, 20.0]])  # of C, a, b
    assert logits[..., order].tolist() == [[10.0, 20.0, 30.0]]


def test_equal_labels_need_no_permutation():
    assert label_order(BertConfig(**named("a", "b")), BertConfig(**named("a", "b"))) is None
    assert label_order(BertConfig(num_labels=1), BertConfig(**named("score"))) is None


@pytest.mark.parametrize("names", [("a", "x"), ("a",), ("a", "b", "c")])
def test_other_labels_show_both_maps(names):
    with pytest.raises(SettingError, match=r"student's labels \{'a': 0, 'b': 1\} are not the teacher's \{'a': 0"):
        label_order(BertConfig(**named("a", "b")), BertConfig(**named(*names)))


def test_other_heads_are_refused():
    with pytest.raises(SettingError, match="student does text-classification, the teacher token-classification"):
        align(tiny.model("bert"), tiny.model("bert", "token-classification"))


def test_other_vocabularies_are_refused():
    small = tiny.model("bert", vocab_size=30)
    with pytest.raises(SettingError, match=f"vocabulary has 30 entries, the teacher's {tiny.VOCABULARY}"):
        align(small, tiny.model("bert"))
    with pytest.raises(SettingError, match=f"student predicts 30 tokens, the teacher {tiny.VOCABULARY}"):
        align(tiny.model("bert", "fill-mask", vocab_size=30), tiny.model("bert", "fill-mask"))


def test_padded_vocabulary_passes_with_the_same_tokenizer():
    padded = tiny.model("bert", vocab_size=64, num_hidden_layers=3)
    assert align(tiny.model("bert"), padded, tiny.tokenizer(), tiny.tokenizer()) is None


def test_other_tokenizers_are_named():
    other = tiny.tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(
        SettingError, match=r"different tokenizers \(\d+ and \d+ entries; .*'zebra' is None .* and \d+ for"
    ):
        align(tiny.model("bert"), tiny.model("bert"), tiny.tokenizer(), other)


def test_student_larger_than_its_teacher_warns(caplog):
    align(tiny.model("bert"), tiny.model("bert"))  # as large: born-again students are
    assert not caplog.text
    align(tiny.model("bert", num_hidden_layers=3), tiny.model("bert"))
    assert "is larger than its teacher" in caplog.text


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (("bert", "text-classification", {"num_labels": 3}), "single_label"),
        (("bert", "text-classification", {"num_labels": 1}), "regression"),
        (("bert", "text-classification", {"problem_type": "multi_label_classification"}), "multi_label"),
        (("vit", None, {}), "single_label"),
        (("bert", "token-classification", {}), "tokens"),
        (("bert", "fill-mask", {}), "tokens"),
        (("bert", "question-answering", {}), "span"),
        (("llama", None, {}), "causal_tokens"),
    ],
)
def test_head_kind(made, kind):
    family, task, config = made
    model = tiny.model(family, task, **config)
    assert head_kind(infer_task(model), model.config) == kind


def test_float_labels_mean_multi_label():
    config = tiny.model("bert", num_labels=3).config
    assert head_kind("text-classification", config, labels=torch.zeros(2, 3)) == "multi_label"
    assert head_kind("text-classification", config, labels=torch.zeros(2).long()) == "single_label"


def test_model_without_head_is_refused():
    with pytest.raises(SettingError, match=r"student \(BertConfig\) has no head and so no logits"):
        head_kind("feature-extraction", tiny.model("bert").config)


def test_unknown_class_is_refused():
    from transformers import BertForPreTraining

    with pytest.raises(UnsupportedModelError, match="BertForPreTraining fits no task"):
        align(BertForPreTraining(tiny.model("bert").config), tiny.model("bert"))
