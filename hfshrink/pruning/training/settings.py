"""`Pruning`: what a training run removes, when, and by which criterion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.pruning.training.schedule import SCHEDULES, sparsity_at
from hfshrink.pruning.units.groups import STRUCTURES

METHODS = ("magnitude", "movement", "soft-movement", "taylor", "fisher", "random")
INITIAL_SCORES = {"magnitude": 1e-3, "zero": 1e-2}
"""Where learned scores start -> their learning rate."""
LEARNED = ("movement", "soft-movement")
"""Methods whose scores are trained beside the weights."""


@dataclass(frozen=True)
class Pruning:
    """Settings of gradual pruning, for `PruningTrainer` and `CompressionTrainer`.

    Attributes:
        sparsity: Share that is removed in the end, in [0, 1): of the weights, or of the units of each kind. For N:M it
            follows from the structure and can be left out.
        structure: "unstructured", N:M such as "2:4" (2 of 4 neighbours stay), "heads", "neurons", "heads+neurons" or
            "channels".
        method: "magnitude"; "movement" (scores learned by the straight-through gradient w·∂L/∂w, arXiv:2005.07683;
            ahead of magnitude at 90 % in papers' long runs; docs/pruning.md measures short ones);
            "soft-movement" (the same with the paper's penalty on σ(scores); what goes is decided by rank, so that the
            sparsity is reached, and not by the paper's fixed threshold); "taylor" or "fisher" (running means of the
            scores of single steps, each step with a weight of 0.1); "random", the baseline.
        schedule: "cubic", "linear", "one-shot" or "iterative", see `sparsity_at`.
        warmup: Share of all steps at the start, which keep `initial_sparsity`: with 0 nothing is removed yet.
        cooldown: Share of all steps after the last change, to recover.
        initial_sparsity: Sparsity where the schedule starts.
        rounds: Jumps of the iterative schedule.
        update_steps: Optimizer steps between two updates of the masks; None makes about 25 updates in a run.
        scope: "global" ranks all modules together, "module" gives each the same sparsity; None takes "module" for
            learned scores that start from zero, which drift apart between early and late layers, else "global".
        max_sparsity: With the global scope, no module or group loses more than this share.
        initial_scores: Where learned scores start: "magnitude", in units of the mean of all that compete, so that
            learning corrects the order of magnitudes; or "zero", the paper's start, which needs long training.
        scores_learning_rate: Of learned scores; it follows the Trainer's learning rate schedule. None: 1e-3 from
            magnitudes, 1e-2 from zero, as in the paper.
        penalty: Weight of the mean of σ(scores) in soft movement, a mean over each module and then over all.
        include: Wildcards of the modules, or of the groups of units.
        exclude: Wildcards of names to leave out.
        cut: Whether units are removed for real when training ends; if not, they stay as zeros.
        seed: Of the method "random".

    Raises:
        SettingError: A value out of range, or settings that do not go together.

    Example:
        >>> Pruning(0.9, method="movement").at(0.5) < 0.9
        True
        >>> Pruning(structure="2:4").sparsity
        0.5
    """

    sparsity: float | None = None
    structure: str = "unstructured"
    method: str = "magnitude"
    schedule: str = "cubic"
    warmup: float = 0.1
    cooldown: float = 0.3
    initial_sparsity: float = 0.0
    rounds: int = 4
    update_steps: int | None = None
    scope: str | None = None
    max_sparsity: float = 0.98
    initial_scores: str = "magnitude"
    scores_learning_rate: float | None = None
    penalty: float = 1.0
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    cut: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_structure(self.structure, ("unstructured", *STRUCTURES))
        for name, known in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("scope", (None, "global", "module")),
            ("initial_scores", tuple(INITIAL_SCORES)),
        ):
            if getattr(self, name) not in known:
                raise SettingError(_unknown(name, getattr(self, name), known))
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity, self.structure))
        for name in ("warmup", "cooldown", "initial_sparsity"):
            check_share(name, getattr(self, name))
        check_share("max_sparsity", self.max_sparsity)
        self._check_together()
        self._check_numbers()

    def _check_together(self) -> None:
        if self.warmup + self.cooldown > 1:
            raise SettingError(
                f"warmup and cooldown are shares of all steps: {self.warmup} + {self.cooldown} is more than 1."
            )
        if self.initial_sparsity > self.final:
            raise SettingError(f"initial_sparsity {self.initial_sparsity} is above sparsity {self.final}.")
        if self.ranked == "global" and self.pattern is None and self.final > self.max_sparsity:
            raise SettingError(
                f"sparsity {self.final} is above max_sparsity {self.max_sparsity}, what a single module may lose. "
                "Raise max_sparsity, or take scope='module'."
            )

    def _check_numbers(self) -> None:
        for name in ("rounds", "update_steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SettingError(f"{name} must be a whole number of at least 1, got {value!r}.")
        for name in ("scores_learning_rate", "penalty"):
            value = getattr(self, name)
            if value is None and name == "scores_learning_rate":
                continue
            if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise SettingError(f"{name} must be a number of at least 0, got {value!r}.")

    @property
    def final(self) -> float:
        """The sparsity at the end, a number also for N:M."""
        return float(self.sparsity or 0.0)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) of an N:M structure, else None."""
        return read_pattern(self.structure)

    @property
    def ranked(self) -> str:
        """What is ranked together: "global" or "module"."""
        return self.scope or ("module" if self.is_learned and self.initial_scores == "zero" else "global")

    @property
    def scores_rate(self) -> float:
        """The learning rate of learned scores."""
        rate = self.scores_learning_rate
        return INITIAL_SCORES[self.initial_scores] if rate is None else rate

    @property
    def is_structured(self) -> bool:
        """Whether whole units go."""
        return self.structure in STRUCTURES

    @property
    def is_learned(self) -> bool:
        """Whether the scores are trained."""
        return self.method in LEARNED

    def at(self, progress: float) -> float:
        """The sparsity when this share of training is done."""
        return sparsity_at(
            progress,
            self.final,
            self.schedule,
            initial_sparsity=self.initial_sparsity,
            warmup=self.warmup,
            cooldown=self.cooldown,
            rounds=self.rounds,
        )

    def given(self) -> dict[str, Any]:
        """For the record: what differs from the defaults, and what names the run."""
        defaults = asdict(Pruning(0.0))
        always = ("sparsity", "structure", "method", "schedule")
        return {name: value for name, value in asdict(self).items() if name in always or value != defaults[name]}


def check_structure(structure: Any, known: Sequence[str]) -> None:
    """Raise `SettingError` for what is neither N:M nor a known structure."""
    if structure in known or (isinstance(structure, str) and read_pattern(structure) is not None):
        return
    hint = ""
    if structure in ("layers", "vocabulary"):
        verb = {"layers": "prune(model, structure='layers')", "vocabulary": "trim_vocabulary"}[structure]
        hint = f" {structure.capitalize()} go at once: call {verb} before training."
    raise SettingError(_unknown("structure", structure, (*known, "N:M such as 2:4")) + hint)


def read_pattern(structure: str) -> tuple[int, int] | None:
    """(n, m) of "n:m"; None for other structures.

    Raises:
        SettingError: n is not in 1..m − 1.

    Example:
        >>> read_pattern("2:4"), read_pattern("heads")
        ((2, 4), None)
    """
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", structure)
    if found is None:
        return None
    n, m = int(found[1]), int(found[2])
    if not 1 <= n < m:
        raise SettingError(f"N:M keeps n of m neighbouring weights, with 1 ≤ n < m, got {structure!r}.")
    return n, m


def check_sparsity(sparsity: Any, structure: str) -> float:
    """The sparsity as a number in [0, 1); of N:M what the pattern says.

    Raises:
        SettingError: None or out of range, or another sparsity than the pattern's.
    """
    pattern = read_pattern(structure)
    if pattern is not None:
        own = 1 - pattern[0] / pattern[1]
        if sparsity is not None and sparsity != own:
            raise SettingError(f"{structure} means a sparsity of {own:g}, got {sparsity!r}. Leave sparsity out.")
        return own
    check_share("sparsity", sparsity)
    return float(sparsity)


def check_share(name: str, value: Any) -> None:
    """Raise `SettingError` for what is no number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        hint = f" For {value:g} percent give {float(value) / 100:g}." if _is_percent(value) else ""
        meaning = "the share that goes, " if name.endswith("sparsity") else ""
        raise SettingError(f"{name} must be {meaning}a number in [0, 1), got {value!r}.{hint}")


def _is_percent(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 < value < 100


def _unknown(name: str, value: Any, known: Sequence[str | None]) -> str:
    return f"{name} must be one of {', '.join(map(str, known))}, got {value!r}."
