"""Licences: the Hub's identifiers, which of them let a smaller model be passed on freely, and what a card says."""

from __future__ import annotations

import difflib
from typing import Any

from hfshrink.cards.rendering import one_line, plain
from hfshrink.errors import SettingError

PERMISSIVE = frozenset(
    """
    afl-3.0 apache-2.0 artistic-2.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 ecl-2.0 etalab-2.0 isc mit ms-pl ncsa
    odc-by openmdw-1.0 pddl postgresql unlicense wtfpl zlib
    """.split()  # noqa: SIM905 # as many lines as words otherwise
)
"""Licences that let anyone change a work and pass it on, also for money, when its authors are named."""
LICENSES = PERMISSIVE | frozenset(
    """
    agpl-3.0 apple-amlr apple-ascl bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m c-uda cc
    cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-sharing-1.0 creativeml-openrail-m
    deepfloyd-if-license epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0
    gpl-3.0 grok2-community h-research intel-research lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2
    llama3.3 llama4 lppl-1.3c mpl-2.0 odbl ofl-1.1 openrail openrail++ osl-3.0 other unknown
    """.split()  # noqa: SIM905 # as many lines as words otherwise
)
"""The identifiers that the Hub accepts in a card's metadata."""


def check_license(name: Any) -> None:
    """Refuse what the Hub would refuse.

    Raises:
        SettingError: No identifier of the Hub's; the message names the nearest.

    Example:
        >>> check_license("apache-2.0")
    """
    for one in name if isinstance(name, list | tuple) else [name]:
        if one not in LICENSES:
            near = difflib.get_close_matches(str(one).lower().replace(" ", "-"), sorted(LICENSES), 1, 0.4)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise SettingError(
                f"license={one_line(one, 80)!r} is no identifier that the Hub knows. {hint}For any other licence give "
                "license='other' with license_name= and license_link=."
            )


def known_license(name: Any) -> dict[str, Any]:
    """The metadata of a licence from another's card: what is no identifier of the Hub becomes `other` with a name.

    Example:
        >>> known_license("MIT"), known_license("Our own licence, v2")
        ({'license': 'mit'}, {'license': 'other', 'license_name': 'our-own-licence-v2'})
    """
    names = [str(one).lower() for one in (name if isinstance(name, list | tuple) else [name]) if one]
    if all(one in LICENSES for one in names):
        return {"license": names[0] if len(names) == 1 else names} if names else {}
    words = "".join(c if c.isascii() and (c.isalnum() or c in ".+") else " " for c in one_line(names[0], 80)).split()
    return {"license": "other", "license_name": "-".join(words) or "unnamed"}


def is_permissive(name: Any) -> bool:
    """Whether a licence, or each of several, lets the model be passed on freely; False where it is missing.

    Example:
        >>> is_permissive("mit"), is_permissive("cc-by-nc-4.0"), is_permissive(None), is_permissive(["mit", "gpl"])
        (True, False, False, False)
    """
    names = name if isinstance(name, list | tuple) else [name]
    return bool(names) and all(one in PERMISSIVE for one in names)


def license_sentences(data: Any, origin: str, thing: str = "model") -> list[str]:
    """What a card says of its licence: the name where it is permissive, else what a user must look up.

    Args:
        data: The card's metadata.
        origin: What the licence comes from, as Markdown: the base model, the source data.
        thing: What the card is of.
    """
    name = data.get("license")
    if not name or name == "unknown":
        return [
            f"**No licence is recorded.** Without one nobody may use this {thing} or pass it on: look up the licence "
            f"of {origin}, and add `license:` to the metadata of this card."
        ]
    names = ", ".join(plain(one) for one in (name if isinstance(name, list | tuple) else [name]))
    if is_permissive(name):
        return [
            f"This {thing} is under {names}. It derives from {origin}, whose licence must allow that: name its "
            "authors when you pass it on."
        ]
    link, title = str(data.get("license_link") or ""), data.get("license_name")
    found = [
        f"**{names} is not among the permissive licences.** This {thing} is derived work: what the licence of "
        f"{origin} asks and forbids holds for it too. Read it before you use it or pass it on."
    ]
    if title:
        found.append(f"Its name: {plain(title)}.")
    if link.startswith("https://"):
        found.append(f"Its text: {plain(link)}")
    return found
