"""Entities in sequences of tags (IOB2, IOBES or bare names).

The rule is the lenient one of seqeval and conlleval. A tag is a prefix and a type (`B-PER`); `O` is outside. `B-` and
`S-` start an entity. `I-` and `E-` continue the entity of the tag before when it has the same type and did not end
with `E-` or `S-`; otherwise they start one (so `O I-PER` is an entity). A tag without such a prefix is read as `I-`:
each run of equal tags is one entity.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

OUTSIDE = "O"


def find_entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first position, last position) of each entity, in order.

    Example:
        >>> find_entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"])
        [('PER', 0, 1), ('LOC', 3, 3), ('LOC', 4, 4)]
    """
    found: list[tuple[str, int, int]] = []
    is_open = False
    for position, tag in enumerate(tags):
        if tag == OUTSIDE:
            is_open = False
            continue
        prefix, kind = _parse(tag)
        if is_open and prefix in "IE" and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], position)
        else:
            found.append((kind, position, position))
        is_open = prefix not in "ES"
    return found


def tag_counts(predicted: Sequence[str], actual: Sequence[str]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Entities per type in both, in `predicted`, and in `actual`; a hit has the same type, first and last position."""
    ours, theirs = set(find_entities(predicted)), set(find_entities(actual))
    hits, predictions, references = (Counter(kind for kind, _, _ in side) for side in (ours & theirs, ours, theirs))
    return hits, predictions, references


def _parse(tag: str) -> tuple[str, str]:
    prefix, dash, kind = tag.partition("-")
    if prefix in ("B", "I", "E", "S"):
        return prefix, kind if dash else ""
    return "I", tag
