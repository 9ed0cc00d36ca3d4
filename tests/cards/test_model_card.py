"""The model card holds what the record holds, and nothing else."""

import re

import pytest
from datasets import ClassLabel, Dataset
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

import tiny
from cards.records import full_report
from hfshrink import CompressionReport, dataset_card, model_card, select
from hfshrink.cards.reproduce import recipe
from hfshrink.errors import SettingError
from hfshrink.measurement import Latency, Measurement, Score
from hfshrink.record import StepRecord, append_step

PATTERN = r"""---
base_model: org/base
datasets:
- org/reviews
language: en
library_name: onnx
license: apache-2\.0
metrics:
- accuracy
pipeline_tag: text-classification
tags:
- distillation
- hfshrink
- quantized
base_model_relation: quantized
model-index:
- name: base-student-distilled-onnx-int8
  results:
  - task:
      type: text-classification
    dataset:
      name: org/reviews
      type: org/reviews
      split: test
      revision: abc123
    metrics:
    - type: accuracy
      value: 0\.841537
---

<!-- hfshrink:begin: [^\n]* -->

# base-student-distilled-onnx-int8

This text-classification model is \[org/base\]\(https://huggingface\.co/org/base\) made smaller with hfshrink: copied into a smaller student, then distilled \(logits\), then quantized \(onnx-int8\); its weight files take 17\.8 MB, those of the base 90\.9 MB\.

## Base against compressed

\| what +\| base +\| compressed +\| change +\| how +\|
\|-+\|-+\|-+\|-+\|-+\|
\| accuracy \(org/reviews, test, 2,000 rows\) +\| 0\.8435 +\| 0\.8415 \\\[0\.8250, 0\.8570\\\] +\| -0\.0020 +\| measured \|
\| accuracy \(2,000 rows, paired\) +\| 0\.8435 +\| 0\.8415 +\| -0\.0020 \\\[-0\.0100, \+0\.0060\\\] +\| measured \|
\| same answer as the base \(2,000 rows, paired\) +\| +\| 97\.2 % +\| +\| measured \|
\| recall of negative \(the class that falls most\) +\| 0\.8500 +\| 0\.8300 +\| -0\.0200 +\| measured \|
\| calibration error, 15 bins +\| 0\.0400 +\| 0\.0500 +\| \+0\.0100 +\| measured \|
\| parameters +\| 22,713,986 +\| 17,390,594 +\| 0\.766 × +\| computed \|
\| weight files +\| 90\.9 MB +\| 17\.8 MB +\| 0\.196 × +\| measured \|
\| memory that loading takes +\| 120\.0 MB +\| 30\.0 MB +\| 0\.25 × +\| measured \|
\| time of one pass: median / 95th percentile / CPU \(batch 1, 128 tokens, 1 thread, onnxruntime on Some CPU\) \| 10\.40 / 11\.80 / 10\.20 ms \| 5\.20 / 5\.90 / 5\.10 ms +\| 0\.5 × / 0\.5 × / 0\.5 × +\| measured \|

Change: compressed / base \(×\), or compressed − base \(\+, −\)\. In brackets: 95 % intervals\. Computed: counted from tensors and shapes; measured: read from files or by running the model\. MB: 10⁶ bytes\.

!\[Size against accuracy\]\(plots/size-metric\.png\)

## How it was made

\|   \| step +\| method +\| settings +\| parameters +\| seconds +\| source +\|
\|-+\|-+\|-+\|-+\|-+\|-+\|-+\|
\| 1 \| make\\_student +\| layers +\| num\\_layers=3 +\| 22,713,986 → 17,390,594 \| 0\.2 +\| \[arXiv:1910\.01108\]\(https://arxiv\.org/abs/1910\.01108\), Sanh et al\. \|
\| 2 \| distill +\| logits +\| label\\_weight=0\.5, seed=7 +\| not measured +\| 277\.5 +\| \[arXiv:1503\.02531\]\(https://arxiv\.org/abs/1503\.02531\) +\|
\| 3 \| quantize +\| onnx-int8 +\| defaults +\| not measured +\| not measured \| +\|

## How to load it

```python
from transformers import AutoTokenizer
from transformers\.exporters import ExportedModel

model = ExportedModel\.from_pretrained\("path/to/this/model"\)
processor = AutoTokenizer\.from_pretrained\("path/to/this/model"\)
outputs = model\(\*\*processor\("An example\.", return_tensors="pt"\)\)\.logits
```

It runs in ONNX Runtime: `pip install transformers torch onnx onnxscript onnxruntime`\.

## Training data

Data sets: \[org/reviews\]\(https://huggingface\.co/datasets/org/reviews\)\.

\| step \| technique \| examples \| optimizer steps \| epochs \| batch per device \| learning rate \|
\|-+\|-+\|-+\|-+\|-+\|-+\|-+\|
\| 2 +\| distill +\| 6,000 +\| 752 +\| 4 +\| not recorded +\| not recorded +\|

1,000 of the 10,000 rows \(10 %\) of org/reviews \(train\), picked by hfshrink with the method ccs\.

\| what +\| value +\|
\|-+\|-+\|
(?:\| [^\n]+ \|\n)+
\| label \| full data \| share  \| subset \| share  \| kept   \|
\|-+\|-+\|-+\|-+\|-+\|-+\|
(?:\| [^\n]+ \|\n){2}
Dangers of the subset:

- Coverage was not measured: which groups of rows were lost is not known\.
- The licence of the source is not recorded: look it up before you pass rows on\.

## Limits

- Of 2,000 rows, 30 \(1\.5 %\) that the base got right are wrong now, and 26 the other way round; McNemar's exact p 0\.689\.
- The class negative lost most: its recall fell from 0\.8500 to 0\.8300\.
- The sample can't rule out a fall of accuracy by 0\.0100\.
- The worst group is long: 0\.7500 \\\[0\.7000, 0\.8000\\\] against 0\.8415 of all rows\.
- onnx-int8 against the float model on 64 calibration rows: largest difference of an output 0\.123, same answer in 98\.4 % of cases\.
- quantize left as it was \(task head\): classifier\.
- quantize: Embeddings stay 8-bit\.

\| group \| rows  \| mean \\\[95 % interval\\\] +\|
\|-+\|-+\|-+\|
\| long  \| 150   \| 0\.7500 \\\[0\.7000, 0\.8000\\\] \|
\| short \| 1,850 \| 0\.8600 \\\[0\.8400, 0\.8800\\\] \|

## Licence

This model is under apache-2\.0\. It derives from \[org/base\]\(https://huggingface\.co/org/base\), whose licence must allow that: name its authors when you pass it on\.

## How to reproduce

```yaml
base: org/base
seed: 7
steps:
- make_student:
    num_layers: 3
- distill:
    label_weight: 0\.5
    num_train_epochs: 4
    seed: 7
- quantize:
    scheme: onnx-int8
```

\| data +\| fingerprint of the content \|
\|-+\|-+\|
\| column text \| aa11 +\|

### Versions

Step 1, 2: torch 2\.13\.0\.

Step 3: hfshrink 0\.1\.0, torch 2\.13\.0\.

<!-- hfshrink:end -->
"""


def made(**kwargs):
    return model_card(full_report(), base_card={"license": "apache-2.0", "language": "en"}, **kwargs)


def test_whole_card():
    text = made().content
    for part, found in zip(PATTERN.split("\n## "), text.split("\n## "), strict=True):  # tells where it differs
        assert re.fullmatch(part, found), found
    assert re.fullmatch(PATTERN, text)


def test_card_is_valid_for_the_hub(tmp_path):
    made().save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/base"
    assert data.base_model_relation == "quantized"
    assert data.eval_results[0].metric_value == 0.841537
    assert ModelCardData(**metadata_load(tmp_path / "README.md")).to_dict() == data.to_dict()


def test_card_without_measurements_says_so():
    text = model_card(CompressionReport("a/b", (StepRecord("quantize", "onnx-int8"),))).content
    assert "\n## Base against compressed\n\nNot measured.\n" in text
    assert "model-index" not in text
    assert not re.search(r"\| 0", text)


def test_sizes_of_the_steps_stand_in_where_nothing_else_was_measured():
    step = StepRecord("prune", "magnitude", before=Measurement(parameters=100), after=Measurement(parameters=90))
    text = model_card(CompressionReport("a/b", (step,))).content
    assert re.search(r"\| parameters +\| 100 +\| 90 +\| 0.9 × +\| computed \|", text)
    for what in ("score on held-out data", "weight files", "memory when loaded", "latency"):
        assert re.search(rf"\| {what} +\| not measured \| not measured \| +\| +\|", text)


def test_times_of_other_runtimes_or_processors_have_no_ratio():
    ours = Latency(9.0, 9.0, 9.0, "torch", "Some CPU", 1, 1, 128)
    theirs = Latency(3.0, 3.0, 3.0, "onnxruntime", "Some CPU", 1, 1, 128)
    sides = {"base": Measurement(latency=(ours,)), "compressed": Measurement(latency=(theirs,))}
    text = model_card(CompressionReport("a/b", (StepRecord("quantize", "onnx-int8"),), **sides)).content
    assert "0.333 ×" not in text
    assert text.count("9.00 / 9.00 / 9.00 ms") == text.count("3.00 / 3.00 / 3.00 ms") == 1


def test_undefined_scores_are_neither_zero_nor_in_the_model_index():
    scores = (Score("pearson", None, dataset="d"), Score("f1", 0.5))
    card = model_card(CompressionReport("a/b", (StepRecord("prune", "x"),), compressed=Measurement(scores=scores)))
    assert re.search(r"\| pearson \(d\) +\| not measured \| undefined +\|", card.content)
    assert [result.metric_type for result in card.data.eval_results] == ["f1"]


def test_zeros_in_dense_tensors_are_told():
    after = Measurement(parameters=1000, nonzero_parameters=100)
    step = StepRecord("prune", "magnitude", after=after, results={"note": "Zeros in dense tensors."})
    text = model_card(CompressionReport("a/b", (step,))).content
    assert "- 90.0 % of the parameters are zero but stored as numbers" in text
    assert "- prune: Zeros in dense tensors.\n" in text


def test_folder_names_are_no_links():
    step = (StepRecord("distill", "logits"),)
    card = model_card(CompressionReport("my-teacher", step))
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert "\nThis model is my-teacher made smaller with hfshrink: distilled (logits).\n" in card.content
    card = model_card(CompressionReport("my-teacher", step), base_model="org/base")
    assert card.data.base_model_relation == "finetune"
    assert "is my-teacher, which comes from [org/base](https://huggingface.co/org/base), made smaller" in card.content


def test_without_a_base_the_sentence_names_none():
    text = model_card(CompressionReport(None, (StepRecord("own_method", "x"),))).content
    assert "\n# model-x\n\nThis model was made smaller with hfshrink: own\\_method (x).\n" in text


def test_the_title_is_the_repositorys_name_unless_one_is_given():
    report = CompressionReport("org/base", (StepRecord("distill", "logits"), StepRecord("prune", "taylor")))
    assert "\n# base-distilled-pruned\n" in model_card(report).content
    assert "\n# small\n" in model_card(report, repo_id="me/small").content
    assert "\n# Mine\n" in model_card(report, repo_id="me/small", model_name="Mine").content


def at_once(**changes):
    """What a Trainer that prunes and distils at once appends; `changes` to its second step."""
    arguments = {"num_train_epochs": 3, "max_steps": 470, "learning_rate": 1e-4, "seed": 0}
    before, after = Measurement(parameters=100), Measurement(parameters=80)
    prune = {"method": "taylor", "structure": "heads", "training": arguments}
    distill = {"label_weight": 0.5, "gradient_accumulation_steps": 1, **arguments}
    results = {"train_examples": 3000, "steps": 470}
    second = {"before": before, "after": after, "seconds": 9.5, "results": results, "settings": distill, **changes}
    first = StepRecord("prune", "taylor", prune, before=before, after=after, seconds=9.0)
    return CompressionReport("a/b", (first, StepRecord("distill", "logits", **second)))


def test_steps_of_one_training_are_one_run():
    text = model_card(at_once()).content
    assert "pruned (heads by taylor) and distilled (logits); it has 80 parameters, the base 100." in text
    assert re.search(r"\| 1, 2 +\| prune, distill +\| 3,000 +\| 470 +\| set by steps +\|", text)
    train = recipe(at_once())["steps"][0]["train"]
    assert train == {
        "max_steps": 470,
        "learning_rate": 1e-4,
        "seed": 0,
        "prune": {"method": "taylor", "structure": "heads"},
        "distill": {"label_weight": 0.5},
    }


@pytest.mark.parametrize(
    "changes", [{"seconds": 99.0}, {"seconds": None}, {"before": Measurement(parameters=80)}, {"settings": {}}]
)
def test_steps_of_other_trainings_are_runs_of_their_own(changes):
    assert [list(entry) for entry in recipe(at_once(**changes))["steps"]] == [["train"], ["distill"]]
    assert "pruned (heads by taylor), then distilled (logits)" in model_card(at_once(**changes)).content


def test_data_that_the_recipe_can_not_name_are_told():
    step = StepRecord("quantize", "onnx-int8", {"calibration": "Dataset"})
    text = model_card(CompressionReport("a/b", (step,))).content
    assert "\nIn place of data that were given as an object, the recipe has its kind: Dataset.\n" in text
    step = StepRecord("quantize", "onnx-int8", {"calibration": "org/reviews"})
    assert "In place of data" not in model_card(CompressionReport("a/b", (step,))).content


def test_a_few_zeros_have_no_row():
    after = Measurement(parameters=1000, nonzero_parameters=999)
    text = model_card(CompressionReport("a/b", (StepRecord("distill", "logits", after=after),))).content
    assert "zero" not in text


def test_models_that_need_hfshrink_name_it_as_their_library():
    for technique, library in (("factorize", "hfshrink"), ("distill", "transformers")):
        assert model_card(CompressionReport("a/b", (StepRecord(technique, "x"),))).data.library_name == library


def test_records_of_any_length_make_cards_that_end():
    many = {f"name {number}": [number] * 3 for number in range(1500)}
    scores = tuple(Score(f"metric {number}", 0.5) for number in range(60))
    skipped = {name: f"reason {name}" for name in many}
    step = StepRecord("prune", "taylor", many, skipped=skipped, results={"notes": list(many)}, versions={})
    details = {"fingerprints": many, "groups": {"groups": [{"name": name} for name in many]}}
    steps = (step, *(StepRecord("distill", "logits", versions={}) for _ in range(60)))
    text = model_card(CompressionReport("a/b", steps, Measurement(scores=scores), details=details)).content
    assert len(text) < 60_000
    for cut in ("and 10 more rows.", "and 11 more steps.", "more lines: the record holds them"):
        assert cut in text


def test_settings_nested_without_end_are_cut():
    deep = {}
    for _ in range(300):
        deep = {"a": deep}
    assert len(model_card(CompressionReport("a/b", (StepRecord("prune", "taylor", deep),))).content) < 5000


def test_numbers_that_no_machine_counts_to_are_not_measured():
    huge = 10**400
    sides = {"base": Measurement(size_bytes=huge), "compressed": Measurement(scores=(Score("f1", huge),))}
    step = StepRecord("distill", "logits", seconds=huge)
    report = CompressionReport("a/b", (step,), **sides, details={"comparison": {"difference": huge}})
    assert "000000000" not in model_card(report).content


def test_card_of_a_model_of_its_folder_and_of_its_record_are_the_same(tmp_path):
    from hfshrink import make_student, report

    student = make_student(tiny.model("bert"), num_layers=1)
    student.save_pretrained(tmp_path)
    assert model_card(tmp_path).content == model_card(student).content == model_card(report(student)).content


def test_a_subset_that_can_not_be_read_is_told():
    report = CompressionReport("a/b", (StepRecord("distill", "logits"),), details={"subset": {"method": 3}})
    assert "The record of the subset can't be read: Expected the report of a subset" in model_card(report).content


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"base_model_relation": "distilled"}, "must be one of finetune, adapter, merge, quantized, got 'distilled'"),
        ({"base_model": "../secret"}, "base_model must be a Hub id, namespace/name, got '../secret'"),
        ({"license": "Apache 2.0"}, "Did you mean 'apache-2.0'"),
        ({"repo_id": "a/b\n# x"}, "repo_id must be a Hub id"),
        ({"tier": "zip"}, "tier must be one of native, layer-map"),
        ({"eval_results": [3]}, "are none of a model card"),
    ],
)
def test_metadata_that_the_hub_would_refuse_are_refused(keywords, message):
    with pytest.raises(SettingError, match=message):
        made(**keywords)


@pytest.mark.parametrize("step", [StepRecord("distill", "logits"), None])
def test_card_of_a_model_trained_on_a_subset_links_to_it_and_shows_its_tables(tmp_path, step):
    classes = ClassLabel(names=["bad", "good"])
    rows = Dataset.from_dict({"text": [f"a film {row}" for row in range(40)], "label": [0, 1] * 20})
    subset = select(rows.cast_column("label", classes), 0.25, "random")
    model = tiny.model("bert")
    model.config._name_or_path = "org/base"
    subset.attach(model, "me/ten")
    if step is not None:
        append_step(model, step)
    model.save_pretrained(tmp_path / "model")
    card, data_card = model_card(tmp_path / "model"), dataset_card(subset)
    assert card.data.datasets == ["me/ten"]
    assert card.data.base_model == "org/base"
    assert "[me/ten](https://huggingface.co/datasets/me/ten)" in card.content
    tables = [part for part in data_card.content.split("\n\n") if part.startswith("| ")]
    assert sum(part in card.content for part in tables) >= 3  # of classes, of coverage, of the least kept groups
    assert ("trained on rows that hfshrink picked" in card.content) == (step is None)
    assert ("## How it was made" in card.content) == (step is not None)


def test_untouched_model_has_no_card():
    with pytest.raises(SettingError, match="has no steps: hfshrink did nothing"):
        model_card(tiny.model("bert"))
