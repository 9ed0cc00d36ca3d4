"""The data card holds what the report of a subset holds, and nothing else; the text of others stays text."""

import copy
import json
import re

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from hfshrink.cards.dataset import dataset_card
from hfshrink.cards.dataset_tables import proof_tables
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.selection.groups import coverage
from hfshrink.selection.selection_report import SelectionReport, class_shares

PARTITION = {
    "by": "label",
    "factors": 1,
    "groups": [
        {"name": "good", "rows": 6000, "kept": 610, "ratio": 1.0167, "chance": None},
        {"name": "bad", "rows": 4000, "kept": 390, "ratio": 0.975, "chance": None},
    ],
    "group_count": 2,
    "lost_count": 0,
    "lost_rows": 0,
    "expected_lost": 0.0,
    "total_variation": 0.01,
    "expected_variation": 0.012,
    "chi_squared": 0.46,
    "p_value": None,
}
REPORT = {
    "format_version": 1,
    "method": "auto",
    "used": "ccs",
    "rows": 10_000,
    "size": 1000,
    "seed": 3,
    "why": "10 % are kept: coverage of all difficulties.",
    "source": "arXiv:2210.15809",
    "settings": {"stratify": "label", "cutoff": 0.3, "size": None},
    "score": "aum",
    "scored_by": "probes on embeddings",
    "model": "org/encoder",
    "data": "org/reviews",
    "split": "train",
    "revision": "abc123",
    "columns": {"text": "aa11"},
    "balance": [
        {"column": "label", "name": "good", "full": 6000, "kept": 610},
        {"column": "label", "name": "bad", "full": 4000, "kept": 390},
    ],
    "duplicates": {"rows": 12, "groups": 5, "conflicting": 2, "removed": 7},
    "held_out": {"rows": 2000, "overlap": 3},
    "seconds": {"embed": 12.34, "pick": 0.5},
    "notes": ["The class 'odd' has one row."],
    "versions": {"hfshrink": "0.1.0", "torch": "2.13.0"},
    "details": {
        "task": "text-classification",
        "coverage": {
            "rows": 10_000,
            "size": 1000,
            "partitions": [PARTITION],
            "radius": {
                "largest": 2.5,
                "mean": 0.51234,
                "random_largest": 2.0,
                "random_mean": 0.4,
                "measured_rows": 5000,
            },
            "warnings": ["by source: 1 of 3 groups are lost: letters (10 rows)."],
            "notes": ["lengths: no column of text."],
            "thresholds": {"min_rows": 10},
        },
        "proof": {
            "metric": "accuracy",
            "equal_epochs": [
                {"data": "full", "accuracy": {"value": 0.84, "low": 0.82, "high": 0.86}, "seconds": 95.0},
                {"data": "subset", "accuracy": {"value": 0.83, "low": None, "high": None}, "seconds": None},
            ],
            "warnings": ["The worst class fell."],
        },
    },
}
PATTERN = r"""---
language:
- en
license: mit
size_categories: 1K<n<10K
source_datasets:
- org/reviews
task_categories:
- text-classification
pretty_name: reviews-ccs-10-percent
tags:
- data-selection
- hfshrink
---

<!-- hfshrink:begin: [^\n]* -->

# reviews-ccs-10-percent

1,000 of the 10,000 rows \(10 %\) of org/reviews \(train\), picked by hfshrink with the method ccs\.

## How the rows were picked

\| what +\| value +\|
\|-+\|-+\|
\| method +\| auto, which chose ccs +\|
\| why +\| 10 % are kept: coverage of all difficulties\. \|
\| paper +\| arXiv:2210\.15809 +\|
\| settings +\| stratify=label, cutoff=0\.3 +\|
\| seed +\| 3 +\|
\| scores +\| aum, probes on embeddings +\|
\| model of the scores or embeddings +\| org/encoder +\|
\| source data +\| org/reviews +\|
\| split +\| train +\|
\| revision +\| abc123 +\|
\| fingerprints of the source's columns +\| text=aa11 +\|
\| exact duplicates in the source +\| 12 rows, 7 removed +\|
\| rows also in the held-out data +\| 3 +\|
\| seconds +\| embed 12\.3, pick 0\.5 +\|

## How to reproduce

```python
from datasets import load_dataset
from hfshrink import Subset

full = load_dataset\("org/reviews", split="train", revision="abc123"\)
subset = Subset\.load\("path/to/this/folder", full\)  # checks that these are the same rows
```

`indices\.npy` holds the numbers of the rows in SOURCE, split train, revision abc123, in its order\.

## Class balance

\| label \| full data \| share  \| subset \| share  \| kept   \|
\|-+\|-+\|-+\|-+\|-+\|-+\|
\| good  \| 6,000     \| 60\.0 % \| 610    \| 61\.0 % \| 10\.2 % \|
\| bad   \| 4,000     \| 40\.0 % \| 390    \| 39\.0 % \| 9\.8 %  \|

## Coverage

\| divided by \| groups \| lost \(rows\) \| lost by chance \| total variation \(by chance\) \| χ²  \| p +\|
\|-+\|-+\|-+\|-+\|-+\|-+\|-+\|
\| label +\| 2 +\| 0 \(0\) +\| 0\.0 +\| 0\.010 \(0\.012\) +\| 0\.5 \| too few rows +\|

\| divided by \| least kept groups, of 10 rows or more \| full data \| subset \| kept / overall share \|
\|-+\|-+\|-+\|-+\|-+\|
\| label +\| bad +\| 4,000 +\| 390 +\| 0\.97 +\|
\| label +\| good +\| 6,000 +\| 610 +\| 1\.02 +\|

\| distance to the nearest kept row, 5,000 rows sampled \| subset \| random subset \|
\|-+\|-+\|-+\|
\| mean +\| 0\.5123 \| 0\.4 +\|
\| largest +\| 2\.5 +\| 2 +\|

## Dangers

- Coverage: by source: 1 of 3 groups are lost: letters \(10 rows\)\.
- Thresholds of the warnings: min\\_rows=10\.
- Not measured: lengths: no column of text\.
- The class 'odd' has one row\.
- 2 rows say the same as another row with another label\.
- 3 rows of the full data are also in the held-out data: scores on it are too good\.

## Proof

\| what +\| value +\|
\|-+\|-+\|
\| metric \| accuracy \|

\*\*equal epochs\*\*

\| data +\| accuracy +\| seconds +\|
\|-+\|-+\|-+\|
\| full +\| 0\.8400 \\\[0\.8200, 0\.8600\\\] \| 95\.0000 +\|
\| subset \| 0\.8300 +\| not measured \|

The worst class fell\.

## Licence

This subset is under mit\. It derives from SOURCE, [^\n]+

## Versions

hfshrink 0\.1\.0, torch 2\.13\.0

<!-- hfshrink:end -->
""".replace("SOURCE", r"\[org/reviews\]\(https://huggingface\.co/datasets/org/reviews\)")


def test_whole_card():
    text = dataset_card(REPORT, source_card={"license": "mit", "language": ["en"]}).content
    assert re.fullmatch(PATTERN, text), text


def test_what_is_missing_is_not_measured():
    card = dataset_card({"method": "random", "rows": 10, "size": 5})
    assert card.data.to_dict() == {
        "size_categories": "n<1K",
        "pretty_name": "data-random-50-percent",
        "tags": ["data-selection", "hfshrink"],
    }
    for section in ("Class balance", "Coverage", "Proof"):
        assert f"\n## {section}\n\nNot measured.\n" in card.content
    assert re.search(r"\| revision +\| not recorded +\|", card.content)
    assert re.search(r"\| exact duplicates in the source +\| not measured +\|", card.content)
    assert "- Coverage was not measured: which groups of rows were lost is not known.\n" in card.content
    assert "- The licence of the source is not recorded" in card.content
    assert 'full = load_from_disk("path/to/the/full/data")' in card.content


def test_metadata_are_inherited_from_the_source_and_the_callers_go_before():
    source = DatasetCardData(
        license="cc-by-4.0", language="de", task_categories=["text-retrieval"], configs=[{"config_name": "x"}]
    )
    data = dataset_card(REPORT, source_card=source, language="en", tags=["reviews"], license=None).data
    assert data.license == "cc-by-4.0"
    assert data.language == "en"
    assert data.task_categories == ["text-retrieval"]
    assert data.tags == ["data-selection", "hfshrink", "reviews"]
    assert "configs" not in data.to_dict()  # of files that are not there
    assert "licence of the source is not recorded" not in dataset_card(REPORT, source_card=source).content


def test_card_is_valid_for_the_hub(tmp_path):
    dataset_card(REPORT, license="mit", dataset_name="my subset").save(tmp_path / "README.md")
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.source_datasets == ["org/reviews"]
    assert card.data.size_categories == "1K<n<10K"
    assert "\n# my subset\n" in card.content


@pytest.mark.parametrize(("size", "category"), [(999, "n<1K"), (1000, "1K<n<10K"), (2_000_000, "1M<n<10M")])
def test_size_categories(size, category):
    assert dataset_card({"method": "random", "rows": 10**7, "size": size}).data.size_categories == category


def test_the_report_of_a_selection_with_its_coverage():
    labels = np.array([0, 0, 0, 1, 1, 1])
    rows = np.array([0, 1, 2])
    found = coverage(Dataset.from_dict({"text": ["a"] * 3 + ["bb"] * 3, "label": labels}), rows)
    report = SelectionReport(
        "easy", "easy", 6, 3, balance=class_shares("label", labels, rows), details={"coverage": found.to_dict()}
    )
    text = dataset_card(report).content
    assert text == dataset_card(json.loads(json.dumps(report.to_dict()))).content
    assert re.search(r"\| 1 +\| 3 +\| 50.0 % \| 0 +\| 0.0 % +\| 0.0 % +\|", text)
    assert "- Coverage: by label: 1 of 2 groups are lost: 1 (3 rows)." in text


EVIL = (
    "x\n---\nlicense: mit\n---\n# Fake <script>alert(1)</script> [link](http://evil.example) ![i](http://e.org) "
    "`code` a\\|b | c www.evil.example\r\n```\n- *b* __c__ ~~d~~ $x$ &lt;b&gt; \u202e\x00 {{ 7 - 7 }} {% raw %}"
)


def poisoned(value):
    """The report with every text in it, values and names of settings alike, replaced by one full of markup."""
    if isinstance(value, str):
        return f"{value} {EVIL}"
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {name: poisoned(item) for name, item in value.items()}
    return value


def test_text_of_a_report_can_not_become_markup():
    report = poisoned(copy.deepcopy(REPORT))
    report["settings"] = {EVIL: EVIL}
    report["versions"] = {EVIL: EVIL}
    card = dataset_card(report, dataset_name=EVIL, source_card={"license": EVIL, "language": [EVIL]})
    again = DatasetCard(card.content)
    assert again.data.license == "other"
    assert again.data.license_name.startswith("x-license-mit-fake-script")
    known = {"license", "license_name", "language", "size_categories", "pretty_name", "tags"}
    assert set(again.data.to_dict()) <= known
    body = again.text.replace("<!-- hfshrink:", "")
    headings = [line for line in body.splitlines() if line.startswith("#")]
    plain = dataset_card(REPORT, license="other").text
    assert headings[1:] == [line for line in plain.splitlines() if line.startswith("#")][1:]
    assert "<" not in body
    assert "\u202e" not in body
    assert "{{ 7 - 7 }}" in body
    assert body.count("```") == 2


def rendered(text):
    """Kinds of the elements of a card's body, table cells counted; the code blocks apart."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(text):
        found += [token.type] if token.type != "inline" else [child.type for child in token.children]
    return [kind for kind in found if kind not in ("text", "softbreak", "text_special")]


def test_a_parser_finds_the_same_elements_whatever_the_texts():
    report = poisoned(copy.deepcopy(REPORT))
    report["data"] = REPORT["data"]
    report["details"]["task"] = REPORT["details"]["task"]
    report["balance"] = [{**share, "column": EVIL} for share in report["balance"]]
    assert rendered(dataset_card(report, license="mit").text) == rendered(dataset_card(REPORT, license="mit").text)


def test_code_of_a_card_is_python_whatever_the_revision():
    texts = ['"); import os  #', "'", '"', "\\", "a\nb", "`" * 3, "\u2028x"]
    for revision in texts:
        code = re.findall(
            r"```python\n(.*?)\n```\n", dataset_card({**REPORT, "revision": revision}).content, re.DOTALL
        )
        calls = []
        names = {"load_dataset": lambda *args, calls=calls, **kwargs: calls.append((args, kwargs))}
        exec(code[0].partition("\n\n")[2].splitlines()[0], names)
        assert calls == [(("org/reviews",), {"split": "train", "revision": revision})]


def test_folders_of_a_machine_stay_out():
    report = {
        **REPORT,
        "data": "/home/me/reviews",
        "model": "C:\\Users\\me\\encoder",
        "settings": {"cache_dir": "~/cache/x", "options": {"paths": ["/home/me/a"]}},
    }
    text = dataset_card(report).content
    assert "me" not in re.findall(r"[\w]+", text)
    assert "cache\\_dir=x" in text


def test_values_of_the_wrong_kind_are_shown_as_text():
    report = {**REPORT, "seconds": 3, "columns": [1], "duplicates": "many", "versions": None, "notes": "none"}
    report["balance"] = [{"column": "label", "name": 3, "full": "six", "kept": None}, 7]
    report["details"] = {"coverage": {"partitions": [{"by": None, "groups": [{"ratio": "x"}]}], "radius": 4}}
    text = dataset_card(report).content
    assert re.search(r"\| 3 +\| six +\| not measured \| not measured \|", text)
    assert "\n## Versions\n\nNot recorded.\n" in text


def test_the_card_says_whether_rows_are_published_and_how_to_get_them():
    text = dataset_card(REPORT, repo_id="me/few", with_rows=True).content
    assert "\nThe rows themselves are published here.\n" in text
    assert 'subset = load_dataset("me/few")\n' in text
    text = dataset_card(REPORT, repo_id="me/few", with_rows=False).content
    assert "\nOnly the numbers of the rows and their scores are published here" in text
    assert 'full = load_dataset("org/reviews", split="train", revision="abc123")\n' in text
    assert 'Subset.load(snapshot_download("me/few", repo_type="dataset"), full)' in text
    assert "published here" not in dataset_card(REPORT).content
    with pytest.raises(SettingError, match="repo_id must be a Hub id"):
        dataset_card(REPORT, repo_id="few")


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ({}, "Expected the report of a subset, with its method, got '{}'"),
        ("random", "Expected the report of a subset"),
        ({"method": "random"}, "how many rows were kept of how many, got None of None"),
        ({"method": "random", "rows": 3, "size": 4}, "got 4 of 3"),
        ({"method": "random", "rows": True, "size": True}, "got True of True"),
    ],
)
def test_what_is_no_report_is_refused(report, message):
    with pytest.raises(CheckpointError, match=message):
        dataset_card(report)


SCORED = {
    **{name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("accuracy", "precision", "recall", "f1")},
    "worst_class": "bad",
    "worst_recall": 0.25,
}
TRAINED = {
    "format_version": 1,
    "model": "org/model",
    "trainer": "Trainer",
    "seeds": [0, 1, 2],
    "settings": {"learning_rate": 5e-05},
    "test": {"name": "org/reviews", "rows": 1200, "overlap": 3, "removed": 3},
    "out_of_distribution": {"name": None, "rows": 300, "overlap": 0, "removed": 0},
    "selection_seconds": None,
    "machine": {"device": "cpu"},
    "arms": [
        {"data": "full", "equal": None, "rows": 5000, "epochs": 3.0, "steps": 471, "seconds": 95.04, "gap": 0.1}
        | {"test": SCORED, "out_of_distribution": SCORED},
        {"data": "subset", "equal": "steps", "rows": 500, "epochs": 29.4, "steps": 471, "seconds": None, "gap": None}
        | {"test": SCORED, "out_of_distribution": None, "steps_saved": 0, "seconds_saved": -1.25},
    ],
    "differences": [
        {"against": "random", "equal": "steps", "data": "test", "metric": "f1", "verdict": "not told apart"}
        | {"difference": {"value": 0.01, "low": -0.02, "high": 0.04}}
    ],
    "notes": ["One seed."],
}
TRAINED_PATTERN = r"""\| what +\| value +\|
\|-+\|-+\|
\| model +\| org/model +\|
\| trained with +\| Trainer +\|
\| settings +\| learning\\_rate=5e-05 +\|
\| seeds +\| 0, 1, 2 +\|
\| test rows +\| 1,200 of org/reviews, 3 training rows among them left out \|
\| rows of another source +\| 300 +\|
\| seconds to pick the rows \| not measured +\|
\| machine +\| device=cpu +\|

\| arm +\| rows +\| epochs \| steps \| accuracy +\| macro F1 +\| worst class \| train - test +\| other source: accuracy +\| seconds +\| saved +\|
[|-]+
\| full +\| 5,000 \| 3 +\| 471 +\| (0\.5000 \\\[0\.4000, 0\.6000\\\]) +\| \1 +\| bad: 0\.2500 \| \+0\.1000 +\| \1 +\| 95\.0 +\| +\|
\| subset, equal steps \| 500 +\| 29\.4 +\| 471 +\| \1 +\| \1 +\| bad: 0\.2500 \| not measured \| not measured +\| not measured \| 0 steps, -1\.2 s \|

\| difference +\| metric +\| value \\\[95 % interval\\\] +\| the interval says \|
[|-]+
\| subset - random, equal steps \| f1 \(test\) \| \+0\.0100 \\\[-0\.0200, \+0\.0400\\\] \| not told apart +\|

One seed\."""  # noqa: E501


def test_proof_of_evaluate_subset_has_its_arms_and_differences():
    text = "\n\n".join(proof_tables(TRAINED))
    assert re.fullmatch(TRAINED_PATTERN, text), text


@pytest.mark.parametrize("value", [None, 3, "x", [], [1, None], {"value": "x", "low": []}, {"name": {}}, True])
def test_proofs_of_others_are_shown_whatever_they_hold(value):
    for name in TRAINED:
        assert "\n\n".join(proof_tables({**TRAINED, name: value}))
    for name in TRAINED["arms"][0]:
        assert "\n\n".join(proof_tables({**TRAINED, "arms": [{**TRAINED["arms"][0], name: value}]}))
    for name in TRAINED["differences"][0]:
        assert "\n\n".join(proof_tables({**TRAINED, "differences": [{**TRAINED["differences"][0], name: value}]}))


def test_text_of_a_proof_can_not_become_markup():
    text = "\n\n".join(proof_tables(poisoned(copy.deepcopy(TRAINED))))
    assert "<" not in text
    assert "\n#" not in text
    assert rendered(text) == rendered("\n\n".join(proof_tables(TRAINED)))
