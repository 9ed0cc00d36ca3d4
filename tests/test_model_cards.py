"""The cards of model_cards/ say what their records say, and show well on the Hub."""

import importlib.util
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from hfshrink.cards.limits import SHOWN_MODULES

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = importlib.util.spec_from_file_location("model_cards", ROOT / "benchmarks" / "model_cards.py")
model_cards = importlib.util.module_from_spec(SCRIPT)
SCRIPT.loader.exec_module(model_cards)
MODELS = [name for name in model_cards.CARDS if name != model_cards.SUBSET]
FILE_LIMIT = 60_000  # bytes of an image
NUMBER = re.compile(r"(?<![\w.,-])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?![\w,]*\w)")
CONSTANTS = {"95", "10", "15"}  # 95 % intervals, 95th percentile, 10⁶ bytes, 15 bins
MODULE = re.compile(r"(?<!\S)[\w\\]*(?:\.\w[\w\\]*){2,}")  # bert.encoder.layer.0.output

every_card = pytest.mark.parametrize("name", list(model_cards.CARDS))
every_model = pytest.mark.parametrize("name", MODELS)


def text_of(name, file="README.md"):
    return (model_cards.FOLDER / name / file).read_text(encoding="utf-8")


def body(name):
    return text_of(name).split("\n---\n", 1)[1]


def leaves(value):
    """All texts and numbers of a record."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_each_folder_is_a_card_and_holds_nothing_else():
    found = {folder.name for folder in model_cards.FOLDER.iterdir() if folder.is_dir()}
    assert found == set(model_cards.CARDS)
    for name in found:
        record = model_cards.read(name)
        plots = {plot["file"] for plot in record["details"].get("plots", ())}
        folder = model_cards.FOLDER / name
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == {"README.md", "record.json", *plots}


@every_card
def test_the_stored_record_renders_to_the_stored_card(name):
    assert model_cards.card_text(name, model_cards.read(name)) == text_of(name)


def test_writing_a_stored_record_again_changes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    name, stored = MODELS[0], model_cards.FOLDER
    record = model_cards.read(name)
    monkeypatch.setattr(model_cards, "FOLDER", tmp_path)
    model_cards.write(name, record)
    for file in ("README.md", "record.json"):
        assert (tmp_path / name / file).read_bytes() == (stored / name / file).read_bytes()
    for plot in record["details"]["plots"]:
        assert (tmp_path / name / plot["file"]).stat().st_size < FILE_LIMIT


def test_the_list_of_cards_is_that_of_the_records():
    records = {name: model_cards.read(name) for name in model_cards.CARDS}
    text = (model_cards.FOLDER / "README.md").read_text(encoding="utf-8")
    assert text == model_cards.index_text(records)
    for link in re.findall(r"\]\((.*?)\)", text):
        assert (model_cards.FOLDER / link).is_file()
    assert text.count("](") == len(records)


@every_card
def test_metadata_parse_and_the_hub_accepts_their_form(name):
    card, data = (DatasetCard, DatasetCardData) if name == model_cards.SUBSET else (ModelCard, ModelCardData)
    metadata = yaml.safe_load(text_of(name).split("---\n")[1])
    read = card(text_of(name), ignore_metadata_errors=False).data
    assert read.to_dict() == data(**metadata).to_dict()
    assert read.license == model_cards.CARDS[name]["license"]
    assert read.language == model_cards.CARDS[name].get("language")
    assert "hfshrink" in read.tags


@every_model
def test_metadata_hold_the_base_and_the_scores_of_the_record(name):
    data, record = ModelCard(text_of(name)).data, model_cards.read(name)
    base = model_cards.CARDS[name].get("base_model")
    assert data.base_model == base
    assert data.to_dict().get("base_model_relation") == (None if base is None else data.base_model_relation)
    scores = {score["metric"]: score["value"] for score in record["compressed"]["scores"]}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == pytest.approx(scores, abs=1e-6)


@every_card
def test_tables_and_images_show(name):
    markdown_it = pytest.importorskip("markdown_it")
    pytest.importorskip("linkify_it")
    tokens = markdown_it.MarkdownIt("gfm-like").parse(body(name))
    rows = [line for line in body(name).splitlines() if line.startswith("|") and not re.match(r"[|\-]+$", line)]
    assert sum(token.type == "tr_open" for token in tokens) == len(rows) > 10
    for row, after in pairwise(tokens):
        if row.type == "inline" and after.type in ("td_close", "th_close"):
            assert "|" not in re.sub(r"\\\|", "", row.content)
    images = [child.attrs["src"] for token in tokens for child in token.children or () if child.type == "image"]
    assert images == [plot["file"] for plot in model_cards.read(name)["details"].get("plots", ())]
    for image in images:
        content = (model_cards.FOLDER / name / image).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) < FILE_LIMIT
    headings = [token.content for token in tokens if token.type == "inline" and token.level == 1 and token.map]
    assert len(headings) > 3


@every_card
def test_neither_record_nor_card_holds_a_path_a_token_or_a_host(name):
    import platform

    for text in (text_of(name), text_of(name, "record.json")):
        assert not re.search(r"(?<![\w.:/)])/(?:home|root|work|tmp|usr|Users|mnt|var|opt)\b", text)
        assert not re.search(r"[A-Za-z]:\\\\|~/|file://|\bhf_[A-Za-z0-9]{8,}", text)
        assert platform.node() not in text or len(platform.node()) < 5


@every_model
def test_both_sides_were_measured_on_the_same_rows_and_the_same_machine(name):
    record = model_cards.read(name)
    base, compressed = record["base"], record["compressed"]
    setting = ("runtime", "device", "threads", "batch_size", "sequence_length", "repeats")
    for ours, theirs in zip(base["latency"], compressed["latency"], strict=True):
        assert [ours.get(key) for key in setting] == [theirs.get(key) for key in setting]
        assert ours["cpu_ms"] > 0
    assert [latency["batch_size"] for latency in base["latency"]] == list(model_cards.BATCHES)
    data = ("metric", "dataset", "split", "examples")
    assert [[s[key] for key in data] for s in base["scores"]] == [
        [s[key] for key in data] for s in compressed["scores"]
    ]
    comparison = record["details"]["comparison"]
    assert comparison["a"] == base["scores"][0]["value"]
    assert comparison["b"] == compressed["scores"][0]["value"]
    assert comparison["examples"] == base["scores"][0]["examples"]
    assert comparison["low"] <= comparison["difference"] <= comparison["high"]
    assert compressed["size_bytes"] < base["size_bytes"]


def written(value):
    """A number as a card may write it."""
    forms = ["{:,}", "{:.1f}", "{:.2f}", "{:.3f}", "{:.4f}", "{:+.4f}", "{:.3g}", "{:.4g}", "{:.2g}", "{:,.1f}"]
    scaled = (value, 100 * value, value / 1e6)
    found = {form.format(one) for one in scaled for form in forms} | {str(value), f"{round(value, 6)}"}
    return {text.lstrip("+") for text in found}


def allowed(record):
    """All numbers that a card can have from its record: its own ones, and changes from base to compressed."""
    found = set()
    for leaf in leaves(record):
        if isinstance(leaf, str):
            found |= {number.lstrip("+") for number in NUMBER.findall(leaf)}
        elif leaf is not None and not isinstance(leaf, bool):
            found |= written(leaf)
    for step in record.get("history", ()):
        reasons = Counter(reason.partition(":")[0] for reason in step.get("skipped", {}).values())
        found |= {str(count - SHOWN_MODULES) for count in reasons.values()}
    for a, b in changes(record):
        if a is not None and b is not None:
            found |= written(b - a) | (written(b / a) if a else set())
    return found


def changes(record):
    """Pairs of numbers whose difference or ratio a card may show."""
    if "history" not in record:
        sides = [(part["full"], part["kept"]) for part in record["balance"]]
        totals = [sum(side[place] for side in sides) for place in (0, 1)]
        yield from [(record["rows"], record["size"]), *sides]
        yield from [(totals[place], side[place]) for side in sides for place in (0, 1)]
        return
    sides = [record["history"][0]["before"] | record["base"], record["history"][-1]["after"] | record["compressed"]]
    for name in set(sides[0]) & set(sides[1]):
        if isinstance(sides[0][name], int | float):
            yield sides[0][name], sides[1][name]
    for kind, keys in (("latency", ("latency_ms_p50", "latency_ms_p95", "cpu_ms")), ("scores", ("value",))):
        for ours, theirs in zip(*(side[kind] for side in sides), strict=True):
            yield from [(ours[key], theirs[key]) for key in keys]
    comparison = record["details"]["comparison"]
    yield from [(comparison[f"{n}_a"], comparison[f"{n}_b"]) for n in ("calibration_error",) if f"{n}_a" in comparison]
    worst = comparison.get("worst_class")
    if worst:
        yield worst["recall_a"], worst["recall_b"]
    for n in ("right_to_wrong", "wrong_to_right"):
        if comparison.get(n) is not None:
            yield comparison["examples"], comparison[n]
    yield 0, -comparison["low"]


@every_card
def test_numbers_of_the_card_come_from_the_record(name):
    record = model_cards.read(name)
    text = re.sub(r"^```python\n.*?^```", "", body(name), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\(\S+\)|&#\d+;|\\", lambda found: ")" if found[0].startswith("]") else "", text)
    text = MODULE.sub("", text)
    known = allowed(record) | CONSTANTS
    numbers = {number.lstrip("+") for number in NUMBER.findall(text)}
    places = {str(place) for place in range(1, 1 + len(record.get("history", ())))}
    assert sorted(numbers - known - places) == []


def test_a_number_typed_by_hand_is_found():
    name = MODELS[0]
    record = model_cards.read(name)
    assert "0.9999" not in allowed(record)
    assert f"{record['compressed']['scores'][0]['value']:.4f}" in allowed(record)
    assert NUMBER.findall("| 0.9999 [0.1, +2,000] 12 %; 3.5 MB") == ["0.9999", "0.1", "+2,000", "12", "3.5"]


def test_records_are_json_that_any_reader_takes():
    for name in model_cards.CARDS:
        text = text_of(name, "record.json")
        assert "NaN" not in text
        assert "Infinity" not in text
        assert json.loads(text)["details"]["about"]["data"]
