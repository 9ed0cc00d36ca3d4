"""Licences: under which terms a smaller model, or a copy of rows, may be published, and when the user is asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hfshrink.cards.licences import check_license, is_permissive, known_license
from hfshrink.errors import SettingError
from hfshrink.hub.bases import read_base

SHARE_ALIKE = frozenset(
    """
    agpl-3.0 cc-by-sa-3.0 cc-by-sa-4.0 cdla-sharing-1.0 epl-1.0 epl-2.0 eupl-1.1 eupl-1.2 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 lgpl-lr mpl-2.0 odbl osl-3.0
    """.split()  # noqa: SIM905 # as many lines as words otherwise
)
"""Licences under which anyone may pass copies on, as they are and under the same licence."""
UNSTATED: tuple[Any, ...] = (None, "", "unknown", [])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """What the user says of licences.

    Attributes:
        license: Identifier of the Hub for what is published; None inherits.
        accepted: Whether terms that are not permissive were read and let this be published.
        base_card: Fields of the base's or the source's card, or a card; None reads them from the Hub.
    """

    license: str | None = None
    accepted: bool = False
    base_card: Any = None

    def fields(self, api: Any, name: str | None, repo_type: str = "model") -> dict[str, Any] | None:
        """The metadata of the base's card; None where it can't be read."""
        if self.base_card is None:
            return read_base(api, name, repo_type)
        data = getattr(self.base_card, "data", self.base_card)
        return dict(data.to_dict() if hasattr(data, "to_dict") else data)


def check_terms(base: Mapping[str, Any] | None, given: Any, accepted: bool, name: str | None) -> None:
    """Ask about a base whose licence does not let everybody publish what is made of it; warn where it is not known.

    Args:
        base: Fields of the base model's card; None where it could not be read.
        given: What the user passed as `license=`.
        accepted: What the user passed as `accept_license=`.
        name: The base model; None without one.

    Raises:
        SettingError: `license=` is no identifier of the Hub's; or the base's licence is not a permissive one, and the
            user did not say that its terms were read.

    Example:
        >>> check_terms({"license": "mit"}, None, False, "org/base")
    """
    if given is not None:
        check_license(given)
    theirs = (base or {}).get("license")
    if name is None or accepted:
        return
    if theirs in UNSTATED:
        if given is None:
            why = "its card can't be read" if base is None else "its card states none"
            logger.warning(
                "The licence of the base %s is not known (%s), so none is inherited. Look it up and pass license=.",
                name,
                why,
            )
        return
    known = known_license(theirs)["license"]
    if is_permissive(known) or given == known:
        return
    title = (base or {}).get("license_name") or theirs
    link = str((base or {}).get("license_link") or "")
    where = f" ({link[:200]})" if link.startswith("https://") else ""
    raise SettingError(
        f"The base {name} is under {str(title)[:80]!r}{where}, which is not a permissive licence: the smaller model "
        f"comes under it too{'' if given is None else f', whatever license={given!r} says'}. Read its terms; where "
        f"they let you publish, pass license={known!r}, or accept_license=True for what you agreed otherwise."
    )


def may_copy(source: Mapping[str, Any] | None, rows: bool | None, accepted: bool) -> tuple[bool, str]:
    """Whether rows of a data set are published, and why not.

    Args:
        source: Fields of the source data set's card; None where it could not be read.
        rows: What the user asked for; None leaves it to the licence.
        accepted: What the user passed as `accept_license=`.

    Returns:
        Whether to publish rows, and a sentence where they are left out; empty where they are not.

    Raises:
        SettingError: Rows were asked for that the licence does not let everybody copy.

    Example:
        >>> may_copy({"license": "cc-by-nc-nd-4.0"}, None, False)
        (False, "The source is under 'cc-by-nc-nd-4.0', so its rows are not copied here.")
    """
    if rows is False:
        return False, "The rows themselves are not part of this repository."
    theirs = (source or {}).get("license")
    if accepted:
        return True, ""
    if theirs in UNSTATED:
        if rows:
            logger.warning("The licence of the source data is not known: make sure that its rows may be passed on.")
            return True, ""
        return False, "The licence of the source is not known, so its rows are not copied here."
    known = known_license(theirs)["license"]
    if all(is_permissive(one) or one in SHARE_ALIKE for one in (known if isinstance(known, list) else [known])):
        return True, ""
    shown = ", ".join(repr(one) for one in (known if isinstance(known, list) else [known]))
    if rows:
        raise SettingError(
            f"The source data are under {shown}, which does not let everybody pass copies on. Leave rows= out to "
            "publish only indices and scores, or pass accept_license=True where you may publish the rows."
        )
    return False, f"The source is under {shown}, so its rows are not copied here."
