"""A card rendered anew keeps what people wrote around it."""

import logging

import pytest
from huggingface_hub import ModelCard

from cards.records import full_report
from hfshrink.cards import dataset_card, merge_card, model_card
from hfshrink.cards.merging import BEGIN, END
from hfshrink.errors import CheckpointError

NEW = model_card(full_report(), base_card={"license": "apache-2.0", "language": "en"})


def generated(card):
    """The body between the markers."""
    text = card.content
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def edited(**changes):
    """An older card of ours, as a user left it."""
    text = model_card(full_report(), model_name="Old title", license="mit", tags="mine").content
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    return text


def test_text_around_the_markers_is_kept_and_what_is_between_is_replaced():
    old = edited(
        above=(BEGIN, f"# My model\n\nSee **below**.\n\n{BEGIN}"),
        inside=("## Limits", "## Limits\n\nWritten into the generated part."),
        below=(END, f"{END}\n\n## Contact\n\nme\n"),
    )
    merged = merge_card(old, NEW)
    assert "# My model\n\nSee **below**.\n\n" + generated(NEW) + "\n\n## Contact\n\nme\n" in merged.content
    assert "Old title" not in merged.content
    assert "Written into the generated part" not in merged.content
    assert isinstance(merged, ModelCard)


def test_metadata_of_users_are_kept_and_generated_ones_are_new():
    old = edited(
        more=("library_name: onnx", "library_name: hand\nthumbnail: https://e.org/x.png\nwidget:\n- text: Hi")
    )
    data = merge_card(old, NEW).data.to_dict()
    assert data["license"] == "mit"  # by hand, or of an earlier call: the base's does not go over it
    assert data["thumbnail"] == "https://e.org/x.png"
    assert data["widget"] == [{"text": "Hi"}]
    assert data["library_name"] == "onnx"
    assert data["tags"] == ["distillation", "hfshrink", "mine", "quantized"]
    assert data["model-index"] == NEW.data.to_dict()["model-index"]
    assert merge_card(old, NEW, keep=()).data.license == "apache-2.0"


def test_a_licence_by_hand_has_no_name_of_another():
    new = model_card(full_report(), license="other", license_name="ours", license_link="https://e.org")
    data = merge_card("---\nlicense: mit\n---\nx\n", new).data
    assert data.license == "mit"
    assert data.license_name is data.license_link is None


def test_old_results_go_when_there_are_no_new_ones():
    new = dataset_card(full_report().details["subset"])
    old = "---\nmodel-index:\n- name: x\n  results: []\nmetrics:\n- f1\npretty_name: y\nmine: 1\n---\n"
    data = merge_card(old, new).data.to_dict()
    assert "model-index" not in data
    assert "metrics" not in data
    assert data["mine"] == 1


@pytest.mark.parametrize("old", ["", "\n", NEW.content, NEW.content.replace("\n", "\r\n"), "\ufeff" + NEW.content])
def test_merging_with_nothing_and_with_itself_changes_nothing(old):
    assert merge_card(old, NEW).text.strip() == NEW.text.strip()
    assert merge_card(old, NEW).data.to_dict() == NEW.data.to_dict()


OLD_CARDS = {
    "no markers": "---\nlicense: mit\n---\n# By hand\n\nText.\n",
    "no metadata": "# By hand\n\nText.\n",
    "two rules": "---\nText between two rules\n---\nmore Text.\n",
    "begin alone": f"Text.\n{BEGIN}\nmore\n",
    "end alone": f"Text.\n\n{END}\nmore\n",
    "reversed": f"Text.\n{END}\nmiddle\n{BEGIN}\nmore\n",
    "begin twice": f"Text.\n{BEGIN}\nold\n{BEGIN}\nold\n{END}\nmore\n",
    "nested end": f"Text.\n{BEGIN}\nold\n{END}\nmiddle\n{END}\nmore\n",
}


@pytest.mark.parametrize("kind", OLD_CARDS)
def test_cards_without_whole_markers_are_kept_as_a_whole_below(kind, caplog):
    with caplog.at_level(logging.WARNING):
        merged = merge_card(OLD_CARDS[kind], NEW)
    again = merge_card(merged.content, NEW)
    assert again.content == merged.content
    assert merged.content.count("<!-- hfshrink:") == 2
    below = merged.content.partition(END)[2]
    body = OLD_CARDS[kind].replace("---\nlicense: mit\n---\n", "")
    lines = [[line for line in text.splitlines() if line and "hfshrink:" not in line] for text in (body, below)]
    assert lines[0] == lines[1]
    assert bool(caplog.records) == ("hfshrink:" in OLD_CARDS[kind])


def test_a_second_generated_part_goes_and_the_text_between_stays():
    old = f"a\n{BEGIN}\nold one\n{END}\nb\n{BEGIN}\nold two\n{END}\nc\n"
    text = merge_card(old, NEW).content
    assert f"a\n{generated(NEW)}\nb\nc\n" in text
    assert "old" not in text.partition(BEGIN)[0] + text.partition(END)[2]


def test_markers_with_other_spaces_or_text_are_found():
    old = "x\n  <!--hfshrink:begin-->  \nold\n<!-- hfshrink:end of it -->\ny\n"
    with pytest.raises(ValueError, match="substring not found"):
        merge_card(old, NEW).content.index("old")


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("---\nlicense: [mit\n---\nx\n", "are no YAML: while parsing a flow sequence"),
        ("---\n- a: 1\n---\nx\n", "must be a mapping, got list"),
        ("---\na: !!python/object:os.system x\n---\n", "are no YAML: could not determine a constructor"),
    ],
)
def test_metadata_that_can_not_be_read_are_told(old, message):
    with pytest.raises(CheckpointError, match=message):
        merge_card(old, NEW)
