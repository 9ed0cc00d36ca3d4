"""Text of others stays text: in Markdown, in YAML, in code; cards render as they should."""

import re
from itertools import pairwise

import pytest
import yaml
from huggingface_hub import ModelCard

from cards.records import EVIL, full_report
from hfshrink import CompressionReport
from hfshrink.cards import dataset_card, model_card
from hfshrink.cards.merging import MARKER
from hfshrink.cards.rendering import one_line, plain
from hfshrink.cards.reproduce import recipe, recipe_yaml
from hfshrink.record import StepRecord

markdown_it = pytest.importorskip("markdown_it")
pytest.importorskip("linkify_it")
NASTY = [
    EVIL,
    "---",
    "\n---\nlicense: mit",
    "<!-- hfshrink:end -->",
    "```\n# x",
    "~~~\n# x",
    "| a | b |\n|---|---|",
    "![x](javascript:alert(1))",
    "[x]: http://e.org",
    "<img src=x onerror=alert(1)>",
    "&lt;script&gt;",
    "https://evil.example/x www.evil.example me@evil.example",
    "* x\n* y",
    "1. x",
    "> x",
    "{{ 7 * 7 }}",
    "!!python/object/apply:os.system ['x']",
    "\\",
    "\\|",
    "$x$",
    "\u202e\u2028\u0085\x1b[31m",
    "",
    " ",
    "null",
    "yes",
    "1e3",
    "2024-01-01",
    "a: b # c",
    "&a *a ? [x, {y",
    "\u2067\ufeff\ud800",
    "[^1]: x",
    "a" * 10_000,
]


full_card = model_card(full_report(), license="mit")
full_data = full_card.data.to_dict()


def tokens(text):
    """Kinds of the elements of a body, those inside of lines as well, without the text itself."""
    found = []
    for token in markdown_it.MarkdownIt("gfm-like").parse(text):
        found += [token.type] if token.type != "inline" else [child.type for child in token.children]
    return [kind for kind in found if kind not in ("text", "softbreak", "text_special")]


def links(text):
    inline = [t for t in markdown_it.MarkdownIt("gfm-like").parse(text) if t.type == "inline"]
    children = [child for token in inline for child in token.children]
    return [c.attrs.get("href") or c.attrs.get("src") for c in children if c.type in ("link_open", "image")]


def body(card):
    return card.content.split("\n---\n", 1)[1]


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text)[1:20])
def test_a_parser_finds_the_same_elements_whatever_the_texts(nasty):
    card = model_card(full_report(lambda value: f"{value} {nasty}"), model_name=f"A {nasty}", license="mit")
    assert tokens(body(card)) == tokens(body(full_card))
    assert links(body(card)) == links(body(full_card))
    outside = re.sub(r"```.*?```", "", body(card), flags=re.DOTALL).replace("<!-- hfshrink:", "")
    assert "<" not in outside
    assert "\u202e" not in card.content
    assert ModelCard(card.content).data.to_dict().keys() == full_data.keys()
    assert [mark[1] for mark in MARKER.finditer(body(card))] == ["begin", "end"]


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text)[1:20])
def test_metadata_of_users_stay_values(nasty):
    texts = {"model_name": nasty, "license_name": nasty, "own_field": nasty}
    lists = {"language": [nasty, "en"], "tags": [nasty], "metrics": [nasty]}
    data = ModelCard(model_card(full_report(), license="other", **texts, **lists).content).data.to_dict()
    assert data["license"] == "other"
    assert data["base_model"] == "org/base"
    assert data.keys() <= full_data.keys() | {"license_name", "language", "own_field"}
    assert data.get("own_field") in (None, one_line(nasty, 200))
    assert data["language"] == [item for item in (one_line(nasty, 200), "en") if item]
    assert isinstance(data["model-index"][0]["name"], str)


@pytest.mark.parametrize("nasty", NASTY, ids=lambda text: ascii(text)[1:20])
def test_the_recipe_is_yaml_whatever_the_settings(nasty):
    step = StepRecord("prune", "taylor", {"note": nasty, f"k{nasty}": [nasty, {"deep": nasty}]})
    report = CompressionReport(nasty, (step,))
    text = recipe_yaml(report)
    assert yaml.safe_load(text) == recipe(report)
    assert "`" not in text
    assert "<" not in text
    assert recipe(report)["steps"][0]["prune"]["note"] == one_line(nasty)


def test_paths_of_a_machine_and_tokens_stay_out():
    token = "hf_" + "abcDEF0123456789" * 2
    settings = {
        "data": "/home/someone/rows.csv",
        "token": token,
        "deep": {"paths": ["~/secret/a", "C:\\Users\\someone\\b"], "text": f"read /Users/someone/c with {token}"},
        "home": "/home/someone",
        "url": "file:///home/someone/d",
    }
    step = StepRecord("prune", "taylor", settings, skipped={"a": "see /home/someone/log.txt"}, results={"note": token})
    card = model_card(CompressionReport("/home/someone/teacher", (step,), details={"license": "/home/someone"}))
    for secret in ("someone", "secret", token, "file://"):
        assert secret not in card.content
    assert "rows.csv" in card.content
    assert "teacher made smaller" in card.content


def test_what_is_no_path_is_left_alone():
    for text in ("a / b / c", "p50/p95", "https://e.org/a/b", "org/model", "and/or/not", "1/2/3"):
        assert one_line(text) == text


def test_plain_text_is_shown_as_it_is():
    for text in (EVIL, *NASTY):
        shown = "".join(
            child.content
            for token in markdown_it.MarkdownIt("gfm-like").parse(f"x {plain(text)}")
            if token.type == "inline"
            for child in token.children
        )
        assert shown == f"x {one_line(text)}".strip()


@pytest.mark.parametrize("card", [full_card, dataset_card(full_report().details["subset"])])
def test_tables_lists_and_headings_render(card):
    parsed = markdown_it.MarkdownIt("gfm-like").parse(body(card))
    levels = [int(token.tag[1]) for token in parsed if token.type == "heading_open"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    paragraphs = [b.content for a, b in pairwise(parsed) if a.type == "paragraph_open"]
    assert not [text for text in paragraphs if "|--" in text or text.startswith("|")]
    in_body = sum(line.startswith("|-") for line in body(card).splitlines())
    assert in_body == sum(token.type == "table_open" for token in parsed) > 1
    rows = re.findall(r"(?:^\|.*\|\n)+", body(card), re.MULTILINE)
    for table in rows:  # as many cells in each line as in its header
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(counts) == 1
