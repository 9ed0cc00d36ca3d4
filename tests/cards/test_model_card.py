"""The model card holds what the record holds, and nothing else."""

import re

import pytest
from huggingface_hub import ModelCard

import tiny
from hfshrink import CompressionReport, model_card
from hfshrink.errors import SettingError
from hfshrink.measurement import Latency, Measurement, Score
from hfshrink.record import StepRecord

PARITY = {
    "inputs": "calibration rows",
    "rows": 64,
    "max_difference": 0.123,
    "mean_difference": 0.01,
    "agreement": 0.984,
}


def made(**kwargs):
    latency = Latency(5.2, 5.9, 5.1, "onnxruntime", "Some CPU", 1, 1, 128, 40)
    score = Score("accuracy", 0.8415, 0.825, 0.857, "reviews", "test", 2000)
    steps = (
        StepRecord(
            "make_student", "layers", {"num_layers": 3}, source="arXiv:1910.01108", versions={"torch": "2.13.0"}
        ),
        StepRecord(
            "distill", "logits", {"label_weight": 0.5}, source="arXiv:1503.02531", versions={"torch": "2.13.0"}
        ),
        StepRecord(
            "quantize", "onnx-int8", results={"parity": PARITY}, versions={"hfshrink": "0.1.0", "torch": "2.13.0"}
        ),
    )
    base = Measurement(
        parameters=22_713_986,
        size_bytes=90_900_000,
        scores=(Score("accuracy", 0.8435, dataset="reviews", split="test", examples=2000),),
    )
    compressed = Measurement(parameters=17_390_594, size_bytes=17_800_000, latency=(latency,), scores=(score,))
    report = CompressionReport("org/base", steps, base, compressed, {"task": "text-classification"})
    return model_card(report, **kwargs)


PATTERN = r"""---
base_model: org/base
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
- name: base-onnx-int8
  results:
  - task:
      type: text-classification
    dataset:
      name: reviews
      type: reviews
      split: test
    metrics:
    - type: accuracy
      value: 0\.8415
---

# base-onnx-int8

org/base made smaller with hfshrink: make\\_student \(layers\), then distill \(logits\), then quantize \(onnx-int8\)\.

## Base against compressed

\| what +\| base +\| compressed +\| how +\|
\|-+\|-+\|-+\|-+\|
\| parameters +\| 22,713,986 +\| 17,390,594 +\| computed \|
\| size_bytes +\| 90\.9 MB +\| 17\.8 MB +\| measured \|
\| accuracy \(reviews, test, 2,000 rows\) +\| 0\.8435 +\| 0\.8415 \[0\.8250, 0\.8570\] +\| measured \|
\| p50 / p95 / CPU \(batch 1, 128 tokens, 1 thread, onnxruntime\) \| not measured \| 5\.20 / 5\.90 / 5\.10 ms +\| measured \|

Intervals are 95 %\. "Computed" was counted from tensors and shapes; "measured" was run on the named device\.

## How it was made

\|   \| step +\| method +\| settings +\| source +\|
\|-+\|-+\|-+\|-+\|-+\|
\| 1 \| make_student \| layers +\| num_layers=3 +\| arXiv:1910\.01108 \|
\| 2 \| distill +\| logits +\| label_weight=0\.5 \| arXiv:1503\.02531 \|
\| 3 \| quantize +\| onnx-int8 \| +\| +\|

- `onnx-int8` against the float model on 64 calibration rows: largest difference of an output 0\.123, same answer in 98\.4 % of cases\.

## How to load it

```python
from transformers import AutoTokenizer
from transformers\.exporters import ExportedModel

folder = "path/to/this/model"
model = ExportedModel\.from_pretrained\(folder\)
processor = AutoTokenizer\.from_pretrained\(folder\)
outputs = model\(\*\*processor\("An example\.", return_tensors="pt"\)\)\.logits
```

It runs in ONNX Runtime: `pip install transformers torch onnx onnxscript onnxruntime`\.

## Versions

hfshrink 0\.1\.0, torch 2\.13\.0
"""


def test_whole_card():
    text = made(license="apache-2.0").content
    assert re.fullmatch(PATTERN, text), text


def test_card_is_valid_for_the_hub(tmp_path):
    made(license="apache-2.0").save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "org/base"
    assert data.base_model_relation == "quantized"
    assert data.eval_results[0].metric_value == 0.8415


def test_card_without_measurements_says_so():
    text = model_card(CompressionReport("a/b", (StepRecord("quantize", "onnx-int8"),))).content
    assert "\n## Base against compressed\n\nNot measured.\n" in text
    assert "model-index" not in text


def test_folder_names_are_no_links():
    data = model_card(CompressionReport("my-teacher", (StepRecord("distill", "logits"),))).data
    assert data.base_model is None
    assert "finetune" in str(model_card(CompressionReport("a/b", (StepRecord("distill", "logits"),))).data)


def test_native_models_load_with_their_auto_class(tmp_path):
    from hfshrink import make_student

    student = make_student(tiny.model("bert"), num_layers=1)
    student.save_pretrained(tmp_path)
    code = re.findall(r"```python\n(.*?)```", model_card(tmp_path).content, flags=re.DOTALL)[0]
    exec(code.replace("path/to/this/model", str(tmp_path)), shared := {})
    assert type(shared["model"]) is type(student)


def test_untouched_model_has_no_card():
    with pytest.raises(SettingError, match="has no steps: hfshrink did nothing"):
        model_card(tiny.model("bert"))


def test_text_of_a_record_can_not_become_markup():
    evil = "x/y\n---\nlicense: mit\n---\n# Fake <script>alert(1)</script> [link](http://a)"
    step = StepRecord("quantize", "onnx-int8 | <b>", {"a|b": "<img>"}, versions={"torch": "<i>"})
    scores = (Score("accuracy<hr>", 0.5, dataset="d\n# e"),)
    card = model_card(CompressionReport(evil, (step,), compressed=Measurement(scores=scores)))
    body = card.content.partition("\n# ")[2]
    assert "<" not in body
    assert "\n# " not in body.partition("\n")[2].replace("\n## ", "")
    assert ModelCard(card.content).data.to_dict().get("license") is None
