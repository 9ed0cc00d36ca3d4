"""`evaluate` on tiny models: every task against a slow loop, its errors, and what it leaves as it was."""

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn import metrics as sk
from transformers import BartConfig, BartForConditionalGeneration

import tiny
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation import evaluate
from hfshrink.evaluation.metrics import Accuracy


def classes_one_by_one(model, tokenizer, rows):
    return [int(tiny.logits(model, tokenizer(text, return_tensors="pt")).argmax()) for text in rows["text"]]


def score(found, name):
    return next(score.value for score in found.scores if score.metric == name)


def test_classification_equals_sklearn_row_by_row(sentences, tokenizer, varied):
    model = varied(labels=3, id2label={0: "good", 1: "bad", 2: "odd"})
    found = evaluate(model, sentences, processor=tokenizer)
    expected = classes_one_by_one(model, tokenizer, sentences)
    assert found.predictions.tolist() == expected
    assert found.main.metric == "accuracy"
    assert found.main.value == sk.accuracy_score(sentences["label"], expected)
    assert found.main.low < found.main.value < found.main.high
    assert found.main.examples == 40
    macro = sk.precision_recall_fscore_support(sentences["label"], expected, average="macro", zero_division=0)[:3]
    assert [s.value for s in found.scores[1:]] == pytest.approx(macro)
    each = sk.precision_recall_fscore_support(sentences["label"], expected, labels=[0, 1, 2], zero_division=0)
    assert [(c.precision, c.recall, c.f1, c.support) for c in found.per_class] == [
        pytest.approx(row) for row in zip(*each, strict=False)
    ]
    assert [c.name for c in found.per_class] == ["good", "bad", "odd"]
    assert found.to_measurement().scores == found.scores


def test_printed_evaluation_is_tables(sentences, tokenizer):
    text = str(evaluate(tiny.model("bert"), sentences, processor=tokenizer))
    assert "text-classification: 40 examples" in text
    assert "| metric    | value [95 % interval]" in text
    assert "| LABEL_0 |" in text


def test_a_folder_is_evaluated_as_the_model(sentences, tokenizer, tmp_path):
    model = tiny.model("bert")
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    sentences.save_to_disk(str(tmp_path / "rows"))
    found = evaluate(tmp_path / "m", tmp_path / "rows")
    assert found.main.value == evaluate(model, sentences, processor=tokenizer).main.value
    assert found.main.dataset == "rows"


def test_labels_follow_names_not_numbers(sentences, tokenizer):
    swapped = sentences.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    model = tiny.model("bert", id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    found = evaluate(model, swapped, processor=tokenizer)
    assert found.references.tolist() == [1 - label for label in sentences["label"]]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_changes_nothing(sentences, tokenizer, token_rows, questions, varied, batch_size):
    model = varied()
    whole, parts = (evaluate(model, sentences, processor=tokenizer, batch_size=n) for n in (40, batch_size))
    assert whole.scores == parts.scores
    np.testing.assert_allclose(whole.output.confidences, parts.output.confidences, atol=1e-6)
    language = tiny.model("gpt2")
    left = tiny.tokenizer()
    left.padding_side = "left"
    found = [evaluate(language, token_rows, batch_size=n, processor=left).main.value for n in (30, batch_size)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    reader = tiny.model("bert", "question-answering")
    found = [evaluate(reader, questions, processor=tokenizer, batch_size=n).predictions for n in (30, batch_size)]
    assert found[0] == found[1]


def test_training_flags_are_put_back(sentences, tokenizer):
    model = tiny.model("bert").train()
    model.bert.pooler.eval()
    before = {name: module.training for name, module in model.named_modules()}
    first = evaluate(model, sentences, processor=tokenizer).output.confidences
    assert {name: module.training for name, module in model.named_modules()} == before
    np.testing.assert_array_equal(first, evaluate(model, sentences, processor=tokenizer).output.confidences)


def test_several_labels(sentences, tokenizer):
    rows = np.random.default_rng(0).integers(0, 2, (40, 3))
    data = sentences.remove_columns("label").add_column("labels", rows.astype(float).tolist())
    model = tiny.model("bert", num_labels=3, problem_type="multi_label_classification")
    found = evaluate(model, data, processor=tokenizer)
    expected = np.stack([tiny.logits(model, tokenizer(t, return_tensors="pt"))[0].numpy() > 0 for t in data["text"]])
    assert score(found, "f1_micro") == pytest.approx(sk.f1_score(rows, expected, average="micro"))
    assert score(found, "f1_macro") == pytest.approx(sk.f1_score(rows, expected, average="macro"))
    assert score(found, "subset_accuracy") == sk.accuracy_score(rows, expected)
    assert found.per_class[0].support == rows[:, 0].sum()


def test_regression(sentences, tokenizer):
    values = np.random.default_rng(0).normal(size=40)
    data = sentences.remove_columns("label").add_column("label", values)
    model = tiny.model("bert", num_labels=1)
    found = evaluate(model, data, processor=tokenizer)
    expected = [float(tiny.logits(model, tokenizer(t, return_tensors="pt"))) for t in data["text"]]
    assert [s.metric for s in found.scores] == ["pearson", "spearman", "mse"]
    assert score(found, "mse") == pytest.approx(sk.mean_squared_error(values, expected), rel=1e-5)
    assert score(found, "pearson") == pytest.approx(np.corrcoef(values, expected)[0, 1], rel=1e-4)


def test_undefined_correlation_is_none(sentences, tokenizer):
    data = sentences.remove_columns("label").add_column("label", [1.0] * 40)
    found = evaluate(tiny.model("bert", num_labels=1), data, processor=tokenizer)
    assert (found.main.value, found.main.low) == (None, None)
    assert "undefined" in str(found)


def test_tokens(tokenizer):
    names = {0: "O", 1: "B-X", 2: "I-X"}
    words = [["the", "cat", "eats"], ["sun"], ["a", "red", "fish", "sings"]]
    data = datasets.Dataset.from_dict({"tokens": words, "ner_tags": [[0, 1, 2], [1], [0, 0, 1, 2]]})
    model = tiny.model("bert", "token-classification", num_labels=3, id2label=names)
    found = evaluate(model, data, processor=tokenizer)
    for row, row_words in enumerate(words):
        classes = tiny.logits(model, tokenizer(row_words, is_split_into_words=True, return_tensors="pt")).argmax(-1)[
            0, 1:-1
        ]
        assert found.predictions[row] == [names[number] for number in classes.tolist()]
    assert found.references[0] == ["O", "B-X", "I-X"]
    assert [s.metric for s in found.scores] == ["f1", "precision", "recall", "token_accuracy"]
    flat = [
        (p, r) for ps, rs in zip(found.predictions, found.references, strict=True) for p, r in zip(ps, rs, strict=True)
    ]
    assert score(found, "token_accuracy") == pytest.approx(np.mean([p == r for p, r in flat]))
    assert [(c.name, c.support) for c in found.per_class] == [("X", 3)]


class Reader(torch.nn.Module):
    """Answers with the words that it was told: the logits are 9 at the first and the last of them."""

    def __init__(self, model, first, last, null=0.0):
        super().__init__()
        self.config, self.device, self.ids, self.null = model.config, model.device, (first, last), null
        self.base_model_prefix = ""

    def forward(self, input_ids, attention_mask):
        sides = [9.0 * (input_ids == number) for number in self.ids]
        for side in sides:
            side[:, 0] = self.null
        outputs = type("Outputs", (), {})()
        outputs.start_logits, outputs.end_logits = sides
        return outputs


def reader(tokenizer, first, last, **options):
    first, last = tokenizer.convert_tokens_to_ids([first, last])
    return Reader(tiny.model("bert", "question-answering"), first, last, **options)


def test_question_answering_finds_told_words(questions, tokenizer):
    found = evaluate(reader(tokenizer, "red", "fish"), questions, processor=tokenizer, task="question-answering")
    assert found.predictions[0] == "red fish"
    assert found.correct().tolist() == [True, False, False]
    assert (found.main.metric, found.main.value) == ("exact_match", 1 / 3)
    late = evaluate(reader(tokenizer, "warm", "warm"), questions, processor=tokenizer, task="question-answering")
    assert late.predictions[1] == "warm"  # in the last window of a long context


def test_questions_without_answer(questions, tokenizer):
    none = questions.map(
        lambda row, i: {"answers": {"text": [], "answer_start": []}} if i == 2 else {}, with_indices=True
    )
    sure = evaluate(reader(tokenizer, "warm", "warm", null=5.0), none, processor=tokenizer, task="question-answering")
    assert sure.predictions == ["", "warm", ""]
    assert sure.correct().tolist() == [False, True, True]
    told = evaluate(
        reader(tokenizer, "warm", "warm", null=5.0), questions, processor=tokenizer, task="question-answering"
    )
    assert told.predictions[2] != ""  # where each question has an answer one must be given


def negative_log_likelihoods(model, rows):
    sums, counts = 0.0, 0
    for ids in rows:
        logs = tiny.logits(model, {"input_ids": torch.tensor([ids])})[0].double().log_softmax(-1)
        sums -= sum(float(logs[t, ids[t + 1]]) for t in range(len(ids) - 1))
        counts += len(ids) - 1
    return sums / counts


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_perplexity_of_a_causal_model(token_rows, family):
    model = tiny.model(family)
    found = evaluate(model, token_rows)
    expected = np.exp(negative_log_likelihoods(model, token_rows["input_ids"]))
    assert found.main.value == pytest.approx(expected, rel=1e-5)
    assert found.main.low <= found.main.value <= found.main.high


def test_a_class_label_is_no_label_of_tokens(token_rows):
    model = tiny.model("gpt2")
    labelled = token_rows.add_column("label", [0] * len(token_rows))
    assert evaluate(model, labelled).main.value == evaluate(model, token_rows).main.value


def test_perplexity_of_labelled_tokens_only(token_rows):
    model = tiny.model("gpt2")
    prompt = token_rows.map(lambda row: {"labels": [-100, *row["input_ids"][1:]]})
    assert evaluate(model, prompt).main.value == pytest.approx(evaluate(model, token_rows).main.value, rel=1e-6)


def test_perplexity_of_a_masked_model():
    model = tiny.model("bert", "fill-mask")
    data = datasets.Dataset.from_dict(
        {"input_ids": [[2, 4, 8, 3], [2, 9, 4]], "labels": [[-100, 7, -100, -100], [-100, -100, 6]]}
    )
    logs = [tiny.logits(model, {"input_ids": torch.tensor([ids])})[0].log_softmax(-1) for ids in data["input_ids"]]
    expected = np.exp(-(logs[0][1, 7] + logs[1][2, 6]).item() / 2)
    assert evaluate(model, data).main.value == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_an_encoder_decoder(token_rows):
    sizes = {
        "d_model": 16,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "vocab_size": 60,
        "max_position_embeddings": 32,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers, **tokens)).eval()
    data = token_rows.add_column("labels", [ids[::-1][:4] for ids in token_rows["input_ids"]])
    sums = counts = 0
    for row in data:
        with torch.no_grad():
            loss = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        sums, counts = sums + float(loss) * len(row["labels"]), counts + len(row["labels"])
    found = evaluate(model, data, batch_size=7, task="text2text-generation")
    assert found.main.value == pytest.approx(np.exp(sums / counts), rel=1e-5)


def test_pictures():
    pixels = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = np.random.default_rng(0).integers(0, 8, 20)
    data = datasets.Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels})
    model = tiny.model("vit", num_labels=8)
    found = evaluate(model, data, batch_size=6)
    logits = tiny.logits(model, {"pixel_values": pixels}).numpy()
    assert [s.metric for s in found.scores] == ["accuracy", "top_5_accuracy", "precision", "recall", "f1"]
    assert score(found, "top_5_accuracy") == sk.top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert "top_2_accuracy" in [
        s.metric
        for s in evaluate(tiny.model("vit", num_labels=3), data.map(lambda r: {"labels": r["labels"] % 3})).scores
    ]


def test_features_need_a_metric(token_rows):
    model = tiny.model("bert", "feature-extraction")
    data = token_rows.add_column("label", [0, 1] * 15)
    with pytest.raises(SettingError, match="Pass metric="):
        evaluate(model, data)
    found = evaluate(
        model, data, lambda vectors, labels: float(vectors.shape == (30, 16) and len(labels) == 30), batch_size=7
    )
    assert found.main.value == 1
    with torch.no_grad():
        expected = model(torch.tensor([data["input_ids"][3]])).last_hidden_state[0].mean(dim=0)
    np.testing.assert_allclose(found.predictions[3], expected.numpy(), atol=1e-5)


def test_metrics_of_the_user(sentences, tokenizer, varied):
    model = varied()
    expected = evaluate(model, sentences, processor=tokenizer)
    own = evaluate(model, sentences, [sk.accuracy_score, Accuracy(), "f1"], processor=tokenizer)
    assert [s.metric for s in own.scores] == ["accuracy_score", "accuracy", "f1"]
    assert own.scores[0].value == own.scores[1].value == expected.main.value
    assert (own.main.low, own.main.high) == pytest.approx((expected.main.low, expected.main.high))

    class Slow:
        def compute(self, *, predictions, references):
            return {"right": np.mean(predictions == references), "table": [1, 2]}

    slow = evaluate(model, sentences, Slow(), processor=tokenizer)
    assert (slow.main.metric, slow.main.value, slow.main.low) == ("right", expected.main.value, None)


def test_broken_weights_name_the_row(sentences, tokenizer):
    model = tiny.model("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tokenizer.convert_tokens_to_ids("cat")] = torch.nan
    row = next(i for i, text in enumerate(sentences["text"]) if "cat" in text.split())
    with pytest.raises(SettingError, match=f"logits for row {row} are NaN"):
        evaluate(model, sentences, processor=tokenizer, batch_size=64)
    with torch.no_grad():
        language = tiny.model("gpt2")
        language.lm_head.weight[7] = torch.inf
    with pytest.raises(SettingError, match="logits for row 0 are NaN"):
        evaluate(language, datasets.Dataset.from_dict({"input_ids": [[8, 9, 10]]}))


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"input_ids": [[1]], "text": ["a"]}, {}, "no labels: expected a column .* got input_ids, text"),
        ({"input_ids": [[1]], "label": [2]}, {}, r"must lie in 0\.\.1"),
        ({"input_ids": [[1]], "label": [-1]}, {}, r"must lie in 0\.\.1"),
        ({"input_ids": [[1]], "label": [-100]}, {}, "Row 0 has the label -100"),
        ({"input_ids": [[1]], "label": [None]}, {}, "without label"),
        ({"input_ids": [[1]], "label": [0.5]}, {}, "got 0.5 .float.*int64"),
        ({"input_ids": [[1]], "label": [[0, 1, 0]]}, {}, "list of 2 numbers 0 or 1"),
        ({"input_ids": [[1]], "label": [[0.0, 0.5]]}, {}, "list of 2 numbers 0 or 1"),
        ({"input_ids": [[1]], "label": [float("nan")]}, {"num_labels": 1}, "finite number"),
        ({"input_ids": [[1]], "label": [1.0]}, {"problem_type": "regression"}, "measured for one output"),
    ],
)
def test_labels_are_checked_before_the_model_runs(columns, config, message, monkeypatch):
    model = tiny.model("bert", **config)
    monkeypatch.setattr(model, "forward", lambda input_ids: pytest.fail("the model ran"))
    with pytest.raises(SettingError, match=message):
        evaluate(model, datasets.Dataset.from_dict(columns))


def test_bad_data_and_settings(sentences, token_rows, tokenizer):
    model = tiny.model("bert")
    with pytest.raises(SettingError, match="empty"):
        evaluate(model, sentences.select([]))
    with pytest.raises(SettingError, match="batch_size must be at least 1, got 0"):
        evaluate(model, sentences, batch_size=0)
    with pytest.raises(SettingError, match="fill-mask needs the column 'labels'.*DataCollatorForLanguageModeling"):
        evaluate(tiny.model("bert", "fill-mask"), token_rows)
    with pytest.raises(SettingError, match="No token has a label"):
        evaluate(tiny.model("gpt2"), datasets.Dataset.from_dict({"input_ids": [[5], [6]]}))
    with pytest.raises(UnsupportedModelError, match="no head for this task"):
        evaluate(tiny.model("bert", "feature-extraction"), sentences, processor=tokenizer, task="text-classification")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"input_ids": [[5] * 40], "labels": [0]}, "Row 0 has 40 tokens, but the model reads at most 34"),
        ({"input_ids": [[5], []], "labels": [0, 1]}, "Row 1 has no tokens"),
        ({"input_ids": [[5, 999]], "labels": [0]}, r"input_ids must lie in 0\.\.\d+ for this model, got 5\.\.999"),
        ({"text": ["good", None], "label": [0, 1]}, r"column 'text' must hold text, got None \(NoneType\)"),
        ({"text": ["good"], "label": [None]}, "row without label"),
    ],
)
def test_rows_that_the_model_can_not_read_are_named(data, message):
    with pytest.raises(SettingError, match=message):
        evaluate(tiny.model("bert"), Dataset.from_dict(data), processor=tiny.tokenizer())


def test_empty_lines_of_a_text_are_skipped():
    model = tiny.model("gpt2")
    full = evaluate(model, Dataset.from_dict({"input_ids": [[5, 6, 7], [8, 9]]}))
    gaps = evaluate(model, Dataset.from_dict({"input_ids": [[], [5, 6, 7], [], [8, 9]]}))
    assert gaps.main.value == full.main.value


def test_padding_side_of_the_tokenizer_changes_nothing():
    model, tokenizer = tiny.model("gpt2", "text-classification"), tiny.tokenizer()
    rows = Dataset.from_dict(
        {"text": ["a good film", "bad", "the very long boring movie was not good"], "label": [0, 1, 0]}
    )
    found = []
    for side, size in (("right", 1), ("left", 3)):
        tokenizer.padding_side = side
        found.append(evaluate(model, rows, processor=tokenizer, batch_size=size).output.confidences)
    assert np.allclose(found[0], found[1], atol=1e-5)
