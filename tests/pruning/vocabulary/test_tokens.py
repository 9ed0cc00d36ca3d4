"""Pieces and states of tokenizers, by hand."""

import json

import pytest
from tokenizers import Tokenizer, models, processors

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.pruning.vocabulary.tokens import most_frequent, necessary_pieces, piece_parts, trim_state, with_parts

MERGES = [["a", "b"], "ab c", ["b", "c"], ["a", "bc"]]
PAIRS = {"type": "BPE", "vocab": {p: n for n, p in enumerate(("a", "b", "c", "ab", "bc", "abc"))}, "merges": MERGES}
STATE = {"model": PAIRS, "added_tokens": []}


def test_unigram_keeps_characters_without_a_piece_and_the_least_likely_piece():
    vocabulary = [["<unk>", 0.0], ["a", -1.0], ["ab", -2.0], ["xa", -3.0], ["b", -1.5], ["bab", -9.0], ["aa", -4.0]]
    state = {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocabulary}, "added_tokens": []}
    assert necessary_pieces(state) == {"<unk>", "a", "b", "xa", "bab"}


def test_byte_pairs_keep_characters_and_bytes():
    model = {"type": "BPE", "unk_token": None, "end_of_word_suffix": "</w>", "merges": []}
    model["vocab"] = dict.fromkeys(("a", "a</w>", "ab", "ab</w>", "<0x0A>", "<0x0a>"), 0)
    assert necessary_pieces({"model": model, "added_tokens": [{"content": "<s>"}]}) == {"<s>", "a", "a</w>", "<0x0A>"}


def test_parts_are_those_of_all_ways_to_a_piece():
    parts = piece_parts(STATE)
    assert parts == {"ab": ["a", "b"], "abc": ["ab", "c", "a", "bc"], "bc": ["b", "c"]}
    assert with_parts(["abc"], parts) == {"a", "b", "c", "ab", "bc", "abc"}
    assert with_parts(["bc"], parts) == {"bc", "b", "c"}


def test_the_most_frequent_pieces_come_with_their_parts():
    parts, letters = piece_parts(STATE), {"a", "b", "c"}
    assert most_frequent({"abc": 3, "ab": 9, "bc": 1}, letters, parts, 5) == {*letters, "ab"}
    assert most_frequent({"abc": 3, "ab": 9, "bc": 1}, letters, parts, 6) == {*letters, "ab", "bc", "abc"}
    with pytest.raises(SettingError, match="max_tokens must be at least 3"):
        most_frequent({}, letters, parts, 2)


def test_a_state_loses_pieces_and_their_merges():
    assert trim_state(STATE, {"b": 0, "c": 1, "bc": 2})["model"] == {
        "type": "BPE",
        "vocab": {"b": 0, "c": 1, "bc": 2},
        "merges": [["b", "c"]],
    }
    assert len(PAIRS["vocab"]) == 6


@pytest.mark.parametrize(
    "processor",
    [
        processors.BertProcessing(("z", 2), ("a", 0)),
        processors.RobertaProcessing(("z", 2), ("a", 0)),
        processors.TemplateProcessing(single="a $A z", pair=None, special_tokens=[("a", 0), ("z", 2)]),
    ],
)
def test_the_post_processor_follows(processor):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "z": 2}, "a"))
    backend.post_processor = processors.Sequence([processor])
    backend.enable_padding(pad_id=2, pad_token="z")
    state = trim_state(json.loads(backend.to_str()), {"a": 0, "z": 1})
    new = Tokenizer.from_str(json.dumps(state))
    assert new.encode("z").ids == [0, 1, 1]
    assert new.padding["pad_id"] == 1


def test_what_is_put_around_a_text_and_behind_it_stays():
    """Also where it is no added token."""
    backend = Tokenizer(models.WordLevel({"?": 0, "begin": 1, "end": 2, "pad": 3, "word": 4}, "?"))
    template = processors.TemplateProcessing(
        single="begin $A end", pair=None, special_tokens=[("begin", 1), ("end", 2)]
    )
    backend.post_processor = processors.Sequence([template])
    backend.enable_padding(pad_id=3, pad_token="pad")
    assert necessary_pieces(json.loads(backend.to_str())) == {"?", "begin", "end", "pad"}
    backend.post_processor = processors.BertProcessing(("end", 2), ("begin", 1))
    assert necessary_pieces(json.loads(backend.to_str())) == {"?", "begin", "end", "pad"}


def test_errors():
    with pytest.raises(
        UnsupportedModelError, match="type None can't be trimmed, expected one of WordLevel, WordPiece"
    ):
        necessary_pieces({"model": {}, "added_tokens": []})
    words = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"a": 0}}
    with pytest.raises(SettingError, match="whole words and no unknown token"):
        necessary_pieces({"model": words, "added_tokens": []})
