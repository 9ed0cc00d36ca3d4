"""What is kept is what the teacher is sure of, and as much of each class."""

import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers.modeling_outputs import SequenceClassifierOutput

import tiny
from hfshrink.distillation.texts.filtering import balanced_rows, filter_by_teacher
from hfshrink.errors import SettingError, UnsupportedModelError

TEXTS = ["a good film", "bad", "the very long boring movie was not good", "no sun", "fish", "the cat eats a bird"]


def reading():
    """A teacher of two classes whose logits are 0 and a number that it reads off the first word."""
    vocabulary = tiny.tokenizer().get_vocab()
    values = torch.zeros(tiny.VOCABULARY)
    for word, value in {"good": 3.0, "great": 2.0, "fine": 1.0, "bad": -1.0, "sad": -2.0, "dull": -4.0}.items():
        values[vocabulary[word]] = value
    model = tiny.model("bert", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})

    def forward(input_ids=None, attention_mask=None, token_type_ids=None):
        value = values[input_ids[:, 1]]
        return SequenceClassifierOutput(logits=torch.stack([torch.zeros_like(value), value], dim=-1))

    model.forward = forward
    return model


def sigmoid(value):
    return torch.tensor(value, dtype=torch.float64).sigmoid().item()


def rows(*texts):
    return Dataset.from_dict({"text": list(texts)})


def test_confidences_and_classes_are_the_hand_computed_ones():
    found = filter_by_teacher(
        rows("good", "bad film", "great", "sad", "fine"),
        reading(),
        tiny.tokenizer(),
        min_confidence=0.75,
        balance=False,
    )
    assert found["text"][:] == ["good", "great", "sad"]  # sigmoid(1) = 0.731 is too low
    assert found.features["teacher_label"] == ClassLabel(names=["bad", "good"])
    assert found["teacher_label"][:] == [1, 1, 0]
    assert found["teacher_confidence"][:] == pytest.approx([sigmoid(3.0), sigmoid(2.0), sigmoid(2.0)])


def test_the_most_confident_of_the_larger_class_stay_in_their_order():
    found = filter_by_teacher(rows("great", "good", "fine", "good film", "bad", "dull"), reading(), tiny.tokenizer())
    assert found["text"][:] == ["good", "good film", "bad", "dull"]
    assert found["teacher_label"][:] == [1, 1, 0, 0]


def test_a_bound_per_class_holds_with_and_without_balance():
    data = rows("great", "good", "fine", "bad", "dull", "sad")
    for balance in (True, False):
        found = filter_by_teacher(data, reading(), tiny.tokenizer(), max_per_class=1, balance=balance)
        assert found["text"][:] == ["good", "dull"]


def test_ties_go_to_the_first():
    labels, confidences = torch.tensor([0, 1, 0, 0, 1]), torch.full((5,), 0.9)
    assert balanced_rows(labels, confidences, confidences > 0).tolist() == [0, 1, 2, 4]
    assert balanced_rows(labels, confidences, confidences > 0, max_per_class=1).tolist() == [0, 1]


def test_many_ties_go_to_the_first_too():
    confidences = torch.full((40,), 0.9)  # beyond 16 rows a sort that is not stable mixes them
    kept = balanced_rows(torch.zeros(40).long(), confidences, confidences > 0, max_per_class=3)
    assert kept.tolist() == [0, 1, 2]


def test_where_no_row_is_allowed_none_is_kept():
    labels, confidences = torch.tensor([0, 1]), torch.tensor([0.3, 0.9])
    assert balanced_rows(labels, confidences, confidences > 1).tolist() == []


def test_without_balance_or_bound_all_allowed_rows_stay():
    labels, confidences = torch.tensor([2, 0, 2]), torch.tensor([0.3, 0.9, 0.8])
    assert balanced_rows(labels, confidences, confidences > 0.5, balance=False).tolist() == [1, 2]


@pytest.mark.parametrize("encoded", [False, True])
def test_answers_are_a_plain_forwards(encoded):
    teacher, tokenizer = tiny.model("bert", num_labels=3).train(), tiny.tokenizer()
    data = Dataset.from_dict({"text": TEXTS, "label": ["nonsense"] * 6})
    if encoded:
        data = data.map(lambda row: tokenizer(row["text"]))
    found = filter_by_teacher(data, teacher, tokenizer, min_confidence=0.0, balance=False, batch_size=2)
    assert all(module.training for module in teacher.modules())
    assert found.column_names == [*data.column_names, "teacher_label", "teacher_confidence"]
    assert found["label"][:] == ["nonsense"] * 6
    for text, label, confidence in zip(TEXTS, found["teacher_label"], found["teacher_confidence"], strict=True):
        probabilities = tiny.logits(teacher.eval(), tokenizer(text, return_tensors="pt"))[0].softmax(-1)
        assert label == int(probabilities.argmax())
        assert confidence == pytest.approx(float(probabilities.max()), abs=1e-6)


def test_pairs_are_read_as_pairs():
    teacher, tokenizer = tiny.model("bert"), tiny.tokenizer()
    data = Dataset.from_dict({"first": ["the cat"], "second": ["a dog"]})
    found = filter_by_teacher(data, teacher, tokenizer, min_confidence=0.0, balance=False)
    logits = tiny.logits(teacher, tokenizer("the cat", "a dog", return_tensors="pt"))[0]
    assert found["teacher_confidence"][0] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-6)


def test_a_class_that_is_never_sure_is_an_error_with_counts():
    data = rows("good", "great", "fine", "bad")
    with pytest.raises(
        SettingError, match=r"confidence of 0.75 or more. Per class predicted: bad: 0 of 1, good: 2 of 3"
    ):
        filter_by_teacher(data, reading(), tiny.tokenizer(), min_confidence=0.75)
    assert len(filter_by_teacher(data, reading(), tiny.tokenizer(), min_confidence=0.75, balance=False)) == 2


def test_nothing_left_is_an_error_with_counts():
    with pytest.raises(SettingError, match=r"Per class predicted: bad: 0 of 1, good: 0 of 0\. Lower min_confidence"):
        filter_by_teacher(rows("bad"), reading(), tiny.tokenizer(), min_confidence=1, balance=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_confidence": 1.01}, r"min_confidence must be a number in \[0, 1\], got 1.01"),
        ({"min_confidence": float("nan")}, r"min_confidence must be a number in \[0, 1\], got nan"),
        ({"max_per_class": 0}, "max_per_class must be a whole number from 1 on, got 0"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        filter_by_teacher(rows("good", "bad"), reading(), tiny.tokenizer(), **settings)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"text": ["good", ""]}, "column 'text' has an empty text in row 1"),
        ({"number": [1]}, "Found 0 columns of text"),
        ({"text": ["good"], "teacher_label": [1]}, "has a column 'teacher_label' already"),
    ],
)
def test_bad_rows_are_refused(data, message):
    with pytest.raises(SettingError, match=message):
        filter_by_teacher(Dataset.from_dict(data), reading(), tiny.tokenizer())


@pytest.mark.parametrize(
    ("made", "kind"),
    [
        (("bert", "token-classification", {}), "token-classification"),
        (("bert", "text-classification", {"num_labels": 1}), "regression"),
        (("bert", "text-classification", {"problem_type": "multi_label_classification"}), "multi_label"),
        (("llama", None, {}), "text-generation"),
        (("vit", None, {}), "image-classification"),
    ],
)
def test_other_heads_are_refused(made, kind):
    family, task, config = made
    with pytest.raises(UnsupportedModelError, match=rf"picks one class per text, got \w+ \({kind}\)"):
        filter_by_teacher(rows("good"), tiny.model(family, task, **config), tiny.tokenizer())


def test_broken_teacher_is_named():
    teacher = tiny.model("bert")
    teacher.classifier.bias.data[0] = float("nan")
    with pytest.raises(SettingError, match="teacher's logits hold NaN"):
        filter_by_teacher(rows("good"), teacher, tiny.tokenizer())


def test_generated_texts_go_through_the_filter():
    from hfshrink.distillation.texts.synthesis import generate_texts

    texts = generate_texts(tiny.model("llama"), 20, tiny.tokenizer(), prompts=["the", "no"], max_new_tokens=5)
    found = filter_by_teacher(texts, tiny.model("bert"), tiny.tokenizer(), min_confidence=0.0, balance=False)
    assert found.column_names == ["text", "prompt", "teacher_label", "teacher_confidence"]
    assert found["text"][:] == texts["text"][:]
