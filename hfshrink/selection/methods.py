"""The methods of `select` as a table: what each needs, the paper, the pure function; and how `"auto"` chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.budgets import by_class, check_size, random_subset
from hfshrink.selection.coresets import facility_location, herding, k_center, kmeans_subset, moderate
from hfshrink.selection.strata import CUTOFF, KEPT, ccs, check_scores, closest_to, easiest

Indices = NDArray[np.int64]
Scores = NDArray[np.float64]
FEW_ROWS = 20  # rows a class up to which clustering gains most over random rows (table of arXiv:2404.00264)
MANY = 0.2  # share of rows from which on random rows are hard to beat; 10 and 30 % are measured, not 20 %
MOST_DROPPED = 0.05  # of the rows, the hardest, where `MANY` or more are kept


@dataclass(frozen=True)
class Method:
    """One row of the table `METHODS`.

    Attributes:
        pick: `pick(data, size, labels=…, **options) -> indices`; `data` is what it needs: the number of rows, the
            embeddings, or scores of which the higher is the harder.
        source: Where it comes from.
        embeddings: Whether it needs embeddings.
        measure: The measure that it ranks by, a key of `MEASURES`; None where it needs no scores.
        takes: The keywords of `pick` that the caller may give as options.
        seeded: Whether `pick` draws, and takes a seed.
        normalized: Whether `pick` takes `normalize`.
    """

    pick: Callable[..., Indices]
    source: str
    embeddings: bool = False
    measure: str | None = None
    takes: tuple[str, ...] = ()
    seeded: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Measure:
    """What a score says.

    Attributes:
        harder: 1 where the higher is the harder, −1 where the lower is, 0 where neither end is.
        low: The least value that it can have.
        high: The largest; infinite where a row that never was right has that.
        in_maps: Name of the data map's array that holds it; None where a data map has none.
    """

    harder: int = 1
    low: float = -np.inf
    high: float = np.inf
    in_maps: str | None = None

    def towards_harder(self, scores: Scores) -> Scores:
        """The scores with the sign that the methods expect, infinite ones one above the largest other.

        Raises:
            SettingError: NaN, −∞, or values that this measure can't have.
        """
        finite = scores[np.isfinite(scores)]
        if len(finite) and not (finite.min() >= self.low - 1e-6 and finite.max() <= self.high + 1e-6):
            raise SettingError(
                f"These scores must lie in {self.low:g}..{self.high:g}, got {finite.min():g}..{finite.max():g}. "
                "Are they another measure? Name it with score=."
            )
        never = np.isposinf(scores) & (self.harder > 0)
        top = finite.max() + 1 if len(finite) else 0.0
        return check_scores(np.where(never, top, scores * (self.harder or 1)))


@dataclass(frozen=True)
class Choice:
    """What runs: a method of the table, and what `"auto"` decided besides.

    Attributes:
        method: Key of `METHODS`.
        why: Why `"auto"` chose it; empty where the caller did.
        deduplicate: Whether near-duplicates leave first.
        cutoff: Share of the hardest rows (of each class) that leaves before a method that ranks by nothing.
    """

    method: str
    why: str = ""
    deduplicate: bool = False
    cutoff: float = 0.0

    @property
    def measure(self) -> str | None:
        """The measure that rows are ranked by; None where none is needed."""
        return METHODS[self.method].measure or ("el2n" if self.cutoff else None)


def hardest_rows(scores: ArrayLike, size: int, cutoff: float = 0.0, labels: ArrayLike | None = None) -> Indices:
    """The rows of the highest scores, without the very highest: those are label errors above all (arXiv:2107.07075).

    Args:
        scores: (n,), the higher, the harder.
        size: Rows to keep.
        cutoff: Share in [0, 1) of the hardest rows (of each class) that is left out, as far as enough rows stay.
        labels: (n,) classes; None takes all rows as one.

    Returns:
        (size,) rising row numbers.

    Raises:
        SettingError: A size or cutoff out of range, NaN, labels that don't match.

    Example:
        >>> hardest_rows([0.1, 0.9, 0.5, 0.3], 2, cutoff=0.25).tolist()
        [2, 3]
    """
    if not 0 <= cutoff < 1:
        raise SettingError(f"cutoff must be a share in [0, 1) of the rows, got {cutoff!r}.")
    array = check_scores(scores)
    check_size(size, len(array))

    def pick(rows: Indices, budget: int) -> Indices:
        dropped = min(int(cutoff * len(rows) + 1e-9), len(rows) - budget)
        return np.argsort(-array[rows], kind="stable")[dropped : dropped + budget]

    return by_class(len(array), size, labels, pick)


def random_rows(n: int, size: int, labels: ArrayLike | None = None, seed: int = 0) -> Indices:
    """`random_subset` with the arguments in the order of the other methods."""
    return random_subset(n, size, seed, labels)


def _coreset(pick: Callable[..., Indices], source: str, *takes: str, seeded: bool = False) -> Method:
    return Method(pick, source, True, None, takes, seeded, pick is not facility_location)


METHODS: dict[str, Method] = {
    "random": Method(random_rows, "baseline: rows drawn with equal chances", seeded=True),
    "kmeans": _coreset(kmeans_subset, "arXiv:2404.00264", "clusters", seeded=True),
    "herding": _coreset(herding, "arXiv:1611.07725", seeded=True),
    "k-center": _coreset(k_center, "arXiv:1708.00489", "outliers", seeded=True),
    "facility": _coreset(facility_location, "Nemhauser et al. 1978; Minoux 1978", "references", seeded=True),
    "moderate": _coreset(moderate, "Xia et al., ICLR 2023"),
    "el2n": Method(hardest_rows, "arXiv:2107.07075", measure="el2n", takes=("cutoff",)),
    "grand": Method(hardest_rows, "arXiv:2107.07075", measure="grand", takes=("cutoff",)),
    "forgetting": Method(hardest_rows, "arXiv:1812.05159", measure="forgetting", takes=("cutoff",)),
    "aum": Method(hardest_rows, "arXiv:2001.10528", measure="aum", takes=("cutoff",)),
    "ambiguous": Method(hardest_rows, "arXiv:2009.10795", measure="variability", takes=("cutoff",)),
    "easy": Method(easiest, "arXiv:2009.10795", measure="confidence"),
    "hard": Method(hardest_rows, "arXiv:2009.10795", measure="confidence", takes=("cutoff",)),
    "h-score": Method(closest_to, "arXiv:2407.08887", measure="h-score", takes=("value",), seeded=True),
    "ccs": Method(ccs, "arXiv:2210.15809", measure="el2n", takes=("cutoff", "strata"), seeded=True),
}
"""method -> what it needs and the pure function behind it; `"auto"` is one of them, see `choose_method`."""

FREE_MEASURE = ("easy", "hard", "ccs", "auto")  # methods that any measure of hardness serves: the option `score`

MEASURES: dict[str, Measure] = {
    "el2n": Measure(low=0, high=2**0.5, in_maps="el2n"),
    "grand": Measure(low=0),
    "forgetting": Measure(low=0, in_maps="forgetting"),
    "aum": Measure(-1, in_maps="aum"),
    "confidence": Measure(-1, 0, 1, in_maps="confidence"),
    "variability": Measure(0, 0, 0.5, in_maps="variability"),
    "h-score": Measure(0, 0, 1, in_maps="correctness"),
    "hardness": Measure(),
}
"""measure -> its direction and bounds; "hardness" is what given scores are where nothing else is said."""

NAMES = (*METHODS, "auto")


def percent(share: float) -> str:
    """A share in words.

    Example:
        >>> percent(0.055)
        '5.5 %'
    """
    return f"{100 * share:.3g} %"


def choose_method(kept: float, per_class: float, *, has_scores: bool, has_embeddings: bool) -> Choice:
    """The method of `"auto"`: by the share of rows that is kept, and by what there is to judge rows with.

    From a fifth of the rows on, random rows are hard to beat: the few hardest (label errors) leave, from half of the
    rows on those that say the same as others too, and the rest is drawn. Below that coverage-centric selection
    (arXiv:2210.15809), since hardest rows alone lose to random ones there. Below 10 %, or at few rows a class, the
    rows nearest to the centroids of k-means (arXiv:2404.00264: 10 points above random rows at 20 a class and fewer).
    A wrong label among so few rows weighs much, and k-means does not see it: where there are scores the hardest rows
    leave first, as many as coverage-centric selection drops at that share.

    Args:
        kept: Share of rows kept, in (0, 1].
        per_class: Rows kept of a class, on average.
        has_scores: Whether scores are given or can be made (that takes embeddings and labels).
        has_embeddings: Whether embeddings are given or can be made.

    Raises:
        SettingError: There is neither.

    Example:
        >>> choice = choose_method(0.3, 500, has_scores=True, has_embeddings=True)
        >>> choice.method, choice.cutoff
        ('random', 0.05)
        >>> choose_method(0.01, 10, has_scores=True, has_embeddings=True).method
        'kmeans'
    """
    if not (has_scores or has_embeddings):
        raise SettingError(
            "method='auto' needs something to judge rows by: pass model= (a model, folder or Hub id that embeds the "
            "rows), embeddings= (an array of one vector a row), data_map= or scores=. method='random' needs none."
        )
    share = f"{percent(kept)} of the rows are kept"
    if has_embeddings and (kept < 0.1 or (per_class < FEW_ROWS and kept < 0.5)):
        few = f"{share}, below 10 %" if kept < 0.1 else f"{share}, under {FEW_ROWS} a class"
        why = f"{few}: the rows nearest to the centroids of each class stand for the others"
        if not has_scores:
            return Choice("kmeans", why)
        cutoff = float(np.interp(kept, KEPT, CUTOFF))
        return Choice(
            "kmeans",
            f"{why}, after the hardest {percent(cutoff)} of each class, label errors above all, have left",
            cutoff=cutoff,
        )
    if has_scores and kept < MANY:
        return Choice("ccs", f"{share}, below {percent(MANY)}: coverage of the scores, without the hardest rows")
    if not has_scores and kept < 0.5:
        return Choice("kmeans", f"{share}, and without labels there are no scores: the rows nearest to the centroids")
    many = "half or more" if kept >= 0.5 else f"{percent(MANY)} or more"
    cutoff = min(MOST_DROPPED, (1 - kept) / 2) if has_scores else 0.0
    leave = [f"the hardest {percent(cutoff)} of each class"] if cutoff else []
    if kept >= 0.5:
        leave.append("near-duplicates" if has_embeddings else "equal rows (near-duplicates need embeddings)")
    why = f"{share}, {many}: {' and '.join(leave)} leave first, the others are drawn"
    return Choice("random", why, deduplicate=kept >= 0.5, cutoff=cutoff)
