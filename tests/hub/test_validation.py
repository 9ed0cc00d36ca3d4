"""What the Hub says to a README's metadata."""

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hub.client import work_on
from hub.validation import card_problems


def problems(yaml):
    return card_problems(f"---\n{yaml}\n---\n# Title\n")


GOOD = """
license: apache-2.0
language: [en, de, multilingual]
library_name: transformers
pipeline_tag: text-classification
tags: [int8, pruned]
datasets: [stanfordnlp/sst2]
metrics: [accuracy]
base_model: distilbert/distilbert-base-uncased
base_model_relation: quantized
model-index:
- name: tiny
  results:
  - task: {type: text-classification}
    dataset: {name: SST-2, type: stanfordnlp/sst2}
    metrics: [{type: accuracy, value: 0.0}]
"""


def test_a_whole_card_is_good():
    assert (problems(GOOD).errors, problems(GOOD).warnings) == ([], [])


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("license: MIT", '"license" must be one of'),
        ("license: [mit, mine]", '"license[1]" must be one of'),
        ("license: 3", '"license" must be a string'),
        ("language: English", "ISO 639"),
        ("language: [en, EN]", '"language[1]" with value "EN" is not valid'),
        ("language: no", '"language" must be a string'),
        ("tags: int8", '"tags" must be an array'),
        ("tags: [1]", '"tags[0]" must be a string'),
        ("datasets: [a b]", "Use a dataset id"),
        ("base_model: https://hf.co/a/b", "Use a model id"),
        ("base_model: /home/me/model", "Use a model id"),
        ("base_model_relation: distilled", "must be one of [finetune, adapter, merge, quantized]"),
        ("library_name: [a]", '"library_name" must be a string'),
        ("pipeline_tag: [fill-mask]", '"pipeline_tag" must be a string'),
        ("model-index: {name: a}", '"model-index" must be an array'),
        ("model-index: [{results: []}]", '"model-index[0].name" is required'),
        ("model-index: [{name: a}]", '"model-index[0].results" is required'),
        ("model-index: [{name: a, results: [{}]}]", '"model-index[0].results[0].task" is required'),
        (
            "model-index: [{name: a, results: [{task: {type: x}, dataset: {type: y}, metrics: [{type: z}]}]}]",
            '"model-index[0].results[0].dataset.name" is required',
        ),
        (
            "model-index: [{name: a, results: [{task: {type: x}, dataset: {type: y, name: z}, metrics: [{}]}]}]",
            '"model-index[0].results[0].metrics[0].type" is required',
        ),
        ("license: mit\nlicense: mit", "duplicated mapping key 'license'"),
        ("a: [", "YAML Metadata Error"),
        ("- a", "expected a mapping, got list"),
        ("a: !!python/object/apply:os.system [ls]", "YAML Metadata Error"),
    ],
)
def test_bad_metadata_is_named(yaml, message):
    assert any(message in error for error in problems(yaml).errors), problems(yaml).errors


def test_what_is_only_unusual_is_a_warning():
    assert problems("pipeline_tag: compressing").warnings == [
        'The pipeline_tag "compressing" is not in the official list'
    ]
    assert problems("pipeline_tag: compressing").errors == []
    assert card_problems("# No metadata").warnings == ["empty or missing yaml metadata in repo card"]
    assert card_problems(None).warnings == []


def test_a_readme_is_utf8():
    assert card_problems(b"---\nlicense: mit\n---\n\xff").errors == ["README.md must be UTF-8"]


def test_the_clients_own_card_passes(hub, monkeypatch, tmp_path):
    work_on(hub, monkeypatch, tmp_path / "home")
    result = EvalResult("text-classification", "stanfordnlp/sst2", "SST-2", "accuracy", 0.9)
    data = ModelCardData(
        license="mit", language="en", model_name="tiny", eval_results=[result], base_model="some/base", tags=["int8"]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n# Tiny\n")
    card.validate()
    card.data.license = "mine"
    with pytest.raises(ValueError, match="license.* must be one of"):
        card.validate()


def test_missing_metadata_warns_through_the_client(api, repo):
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Tiny", path_in_repo="README.md", repo_id=repo)
