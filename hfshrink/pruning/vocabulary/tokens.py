"""The pieces of a fast tokenizer: which ones must stay, and the tokenizer's state with the others taken out.

A state is what `tokenizers.Tokenizer.to_str()` writes, read as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from hfshrink.errors import SettingError, UnsupportedModelError

KINDS = ("WordLevel", "WordPiece", "BPE", "Unigram")
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")  # how sentencepiece spells the bytes of a character that it does not know

State = dict[str, Any]


def model_pieces(state: State) -> list[str]:
    """The pieces of the tokenizer's model; added tokens are not among them where they have ids of their own.

    Raises:
        UnsupportedModelError: The model is none of `KINDS`.
    """
    model = state["model"]
    if model.get("type") not in KINDS:
        raise UnsupportedModelError(
            f"The vocabulary of a tokenizer of type {model.get('type')!r} can't be trimmed, expected one of "
            f"{', '.join(KINDS)}."
        )
    return [piece for piece, _ in model["vocab"]] if model["type"] == "Unigram" else list(model["vocab"])


def necessary_pieces(state: State) -> set[str]:
    """The pieces that must stay so that every text is still read, and read by the same rules.

    These are the added tokens, those of the post-processor and of the padding, the unknown token, the bytes and the
    single characters. WordPiece and Unigram also keep
    the pieces with a character that is no piece of its own. Unigram keeps its least likely piece besides, from whose
    score the one of unknown characters follows.

    Raises:
        UnsupportedModelError: An unknown type of tokenizer.
        SettingError: Whole words without an unknown token, so that other words could not be read.

    Example:
        >>> vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "ab": 3, "abc": 4}
        >>> model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocabulary}
        >>> sorted(necessary_pieces({"model": model, "added_tokens": []}))  # "abc" is the only one with a c
        ['##b', '[UNK]', 'a', 'abc']
    """
    model, pieces = state["model"], set(model_pieces(state))
    found = {token["content"] for token in state["added_tokens"]} | {piece for piece in pieces if _is_byte(piece)}
    padding = (state.get("padding") or {}).get("pad_token")
    found |= pieces & {padding, *_placed(state.get("post_processor"))}
    unknown = _unknown_piece(model)
    if unknown in pieces:
        found.add(str(unknown))
    elif model["type"] == "WordLevel":
        raise SettingError(
            "This tokenizer knows whole words and no unknown token: what the corpus lacks could not be read at all. "
            "Give it an unk_token first."
        )
    if model["type"] != "WordLevel":
        found |= {piece for piece in pieces if len(_body(piece, model)) <= 1}
    if model["type"] in ("WordPiece", "Unigram"):
        found |= {piece for piece in pieces if not _spelling(piece, model) <= pieces}
    if model["type"] == "Unigram":
        found.add(min(model["vocab"], key=lambda entry: entry[1])[0])
    return found


def piece_parts(state: State) -> dict[str, list[str]]:
    """Piece -> all pieces that it is merged from in one step, in any way; empty for models without merges."""
    parts: dict[str, list[str]] = {}
    for first, second, merged in _merges(state):
        parts.setdefault(merged, []).extend((first, second))
    return parts


def with_parts(pieces: Iterable[str], parts: Mapping[str, Iterable[str]]) -> set[str]:
    """The pieces and all that they are merged from, step by step.

    With them byte-pair encoding takes exactly the merges that it took before in every text made of these pieces.

    Example:
        >>> sorted(with_parts(["abc"], {"abc": ["ab", "c"], "ab": ["a", "b"], "d": ["e", "f"]}))
        ['a', 'ab', 'abc', 'b', 'c']
    """
    found: set[str] = set()
    waiting = list(pieces)
    while waiting:
        piece = waiting.pop()
        if piece not in found:
            found.add(piece)
            waiting.extend(parts.get(piece, ()))
    return found


def trim_state(state: State, ids: Mapping[str, int]) -> State:
    """The state with the pieces in `ids` only, under their new ids.

    Merges stay whose three pieces stay. Ids in the added tokens, the post-processor and the padding follow.

    Args:
        state: The tokenizer's state; left as it is.
        ids: Piece or added token -> new id, in the old order.
    """
    model = dict(state["model"])
    if model["type"] == "Unigram":
        model["unk_id"] = ids.get(_unknown_piece(model) or "")
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in ids]
    else:
        model["vocab"] = {piece: ids[piece] for piece in model["vocab"] if piece in ids}
    if model["type"] == "BPE":
        kept = zip(_merges(state), model["merges"], strict=True)
        model["merges"] = [merge for merged, merge in kept if all(piece in ids for piece in merged)]
    padding = state.get("padding")
    return {
        **state,
        "model": model,
        "added_tokens": sorted(
            ({**token, "id": ids[token["content"]]} for token in state["added_tokens"]), key=lambda token: token["id"]
        ),
        "post_processor": _renumbered(state.get("post_processor"), ids),
        "padding": padding and {**padding, "pad_id": ids.get(padding["pad_token"], padding["pad_id"])},
    }


def most_frequent(
    counts: Mapping[str, int], necessary: Collection[str], parts: Mapping[str, Iterable[str]], most: int
) -> set[str]:
    """The necessary pieces and the most frequent others with their parts, as many as fit into `most`.

    Raises:
        SettingError: The necessary pieces alone are more.
    """
    found = set(necessary)
    if len(found) > most:
        raise SettingError(
            f"max_tokens must be at least {len(found)} for this tokenizer, got {most}: its special tokens, its single "
            "characters and what keep= names always stay."
        )
    for piece in sorted(counts, key=lambda piece: (-counts[piece], piece)):
        new = with_parts([piece], parts) - found
        if len(found) + len(new) > most:
            break
        found |= new
    return found


def _unknown_piece(model: State) -> str | None:
    if model["type"] != "Unigram":
        return model.get("unk_token")
    return None if model.get("unk_id") is None else model["vocab"][model["unk_id"]][0]


def _is_byte(piece: str) -> bool:
    return BYTE_PIECE.fullmatch(piece) is not None


def _body(piece: str, model: State) -> str:
    """A piece without the marks of its place in the word."""
    return piece.removeprefix(model.get("continuing_subword_prefix") or "").removesuffix(
        model.get("end_of_word_suffix") or ""
    )


def _spelling(piece: str, model: State) -> set[str]:
    """The pieces of one character each that a piece can be written with."""
    prefix = model.get("continuing_subword_prefix") or ""
    inside = bool(prefix) and piece.startswith(prefix)
    return {
        prefix + letter if number or inside else letter
        for number, letter in enumerate(piece.removeprefix(prefix) if inside else piece)
    }


def _merges(state: State) -> list[tuple[str, str, str]]:
    """(first, second, merged) of each merge of byte-pair encoding, in order."""
    if state["model"]["type"] != "BPE":
        return []
    prefix = state["model"].get("continuing_subword_prefix") or ""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    return [(first, second, first + second.removeprefix(prefix)) for first, second in pairs]


def _placed(post_processor: Any) -> Iterator[str]:
    """The tokens that a post-processor puts around a text."""
    if isinstance(post_processor, dict):
        yield from (post_processor[end][0] for end in ("sep", "cls") if end in post_processor)
        for entry in post_processor.get("special_tokens", {}).values():
            yield from entry["tokens"]
        for part in post_processor.get("processors", ()):
            yield from _placed(part)


def _renumbered(post_processor: Any, ids: Mapping[str, int]) -> Any:
    """The post-processor with the new ids of its special tokens."""
    if not isinstance(post_processor, dict):
        return post_processor
    new = dict(post_processor)
    for end in ("sep", "cls"):  # RobertaProcessing, BertProcessing: [token, id]
        if end in new:
            new[end] = [new[end][0], ids[new[end][0]]]
    if "special_tokens" in new:  # TemplateProcessing
        new["special_tokens"] = {
            name: {**entry, "ids": [ids[token] for token in entry["tokens"]]}
            for name, entry in new["special_tokens"].items()
        }
    if "processors" in new:  # Sequence
        new["processors"] = [_renumbered(part, ids) for part in new["processors"]]
    return new
