"""The scores that a method ranks by: which measure, and from where: given, a data map, or probes on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.methods import FREE_MEASURE, MEASURES, Choice
from hfshrink.selection.probing import train_probes
from hfshrink.selection.request import PROBE_OPTIONS, Request
from hfshrink.selection.subset import Subset

Scores = NDArray[np.float64]


def measure_name(request: Request, choice: Choice) -> str | None:
    """Which measure the rows are ranked by; None where none is needed.

    Args:
        request: The checked request.
        choice: What runs.

    Raises:
        SettingError: The scores or the data map given can't serve as it.
    """
    own, asked, given = choice.measure, request.settings.options.get("score"), request.sources.scores
    if own is None:
        return None
    is_free = request.settings.method in FREE_MEASURE
    if isinstance(given, Subset):
        found = str(given.report.score)
        fits = (found == (asked or found) and MEASURES[found].harder != 0) if is_free else found == own
        if not fits:
            raise SettingError(f"The subset given as scores= holds {found}; this call ranks by {asked or own}.")
        return found
    name = asked or ("hardness" if given is not None and is_free else own)
    if given is None and name == "hardness":
        raise SettingError(
            "score='hardness' is what given scores are called; pass scores=, or choose another measure."
        )
    if request.sources.data_map is not None and not hasattr(request.sources.data_map, _attribute(name)):
        held = [measure for measure, about in MEASURES.items() if about.in_maps]
        raise SettingError(f"A data map holds {', '.join(held)}, not {name!r}. Choose one of them, or pass scores=.")
    return name


def read_scores(
    request: Request, name: str | None, vectors: Callable[[], NDArray[Any]]
) -> tuple[Scores | None, str | None]:
    """The measure of all rows with its paper's sign, and where it comes from.

    Args:
        request: The checked request.
        name: The measure; None is none.
        vectors: Gives the embeddings, for probes.

    Returns:
        (n,) scores and their origin; both None without a measure.

    Raises:
        SettingError: Probes that were trained on other embeddings or labels.
    """
    source = request.sources
    if name is None:
        return None, None
    if isinstance(source.scores, Subset):
        return source.scores.scores, "given"
    if source.scores is not None:
        return source.scores, "given"
    if source.data_map is not None:
        check = getattr(source.data_map, "check_data", None)  # probes know what they were trained on
        if check is not None:
            check(source.embeddings, request.labels.values if request.labels.can_be_learnt else None)
        return np.asarray(getattr(source.data_map, _attribute(name)), dtype=np.float64), "data map"
    labels: Any = request.labels.values  # there are some: `check_needs` and `choose_method` see to it
    probes = train_probes(vectors(), labels, seed=request.settings.seed, **request.settings.given(*PROBE_OPTIONS))
    return np.asarray(getattr(probes, _attribute(name)), dtype=np.float64), "probes on embeddings"


def _attribute(name: str) -> str:
    """Name of a measure's array in a data map and in the dynamics of probes."""
    return MEASURES[name].in_maps or name
