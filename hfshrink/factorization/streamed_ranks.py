"""The ranks of a checkpoint that is factored file to file: by shapes alone, or by spectra that are read first."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.factorization.allocation import Allocation, Size, budget_ranks, energy_ranks, fixed_ranks, uniform_ranks
from hfshrink.factorization.deciding import budget_left, factor, sizes_in_bytes
from hfshrink.factorization.sites import size_of
from hfshrink.factorization.tails import comparable_tails
from hfshrink.record import versions
from hfshrink.streaming.skeleton import Skeleton, count_names
from hfshrink.streaming.sources import fingerprint, weight_files

PIECE = 2**21  # values looked at at once, when weights are checked
KEYWORDS = ("rank_ratio", "rank", "energy", "max_parameters", "max_size_bytes")
WHOLE = ("rank", "max_parameters", "max_size_bytes")


@dataclass(frozen=True)
class Sizing:
    """How small the model shall get.

    Attributes:
        keyword: One of `KEYWORDS`.
        value: What was given for it.
        multiple: Of ranks.

    Raises:
        SettingError: A number that must be whole is not, or below 1.
    """

    keyword: str
    value: Any
    multiple: int

    def __post_init__(self) -> None:
        whole = {"rank_multiple": self.multiple, **({self.keyword: self.value} if self.keyword in WHOLE else {})}
        for name, number in whole.items():
            if type(number) is not int or number < 1:
                raise SettingError(f"{name} must be a whole number of at least 1, got {number!r}.")

    @classmethod
    def of(cls, multiple: int, **given: Any) -> Sizing:
        """That of the one keyword that is not None.

        Raises:
            SettingError: None or several are given.
        """
        found = {name: value for name, value in given.items() if value is not None}
        if len(found) != 1:
            shown = ", ".join(f"{name}={value!r}" for name, value in found.items())
            raise SettingError(f"Give exactly one of {', '.join(given)}, got {shown or 'none'}.")
        return cls(*next(iter(found.items())), multiple)

    @property
    def by_tails(self) -> bool:
        """Whether ranks come from the tails of all factors that save parameters, which are read first."""
        return self.keyword not in ("rank_ratio", "rank")


@dataclass(frozen=True)
class Sites:
    """The modules of a checkpoint that can be factored.

    Attributes:
        skeleton: Of the checkpoint.
        modules: Name -> the dense module, on meta.
        skipped: Name -> why a module can't be, or shall not be.
    """

    skeleton: Skeleton
    modules: dict[str, Any]
    skipped: dict[str, str]

    def sizes(self) -> dict[str, Size]:
        """What each module's weight costs dense and per rank."""
        return {name: size_of(module) for name, module in self.modules.items()}

    def read(self, title: str, of: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Name of a module and its weight, mapped from its file."""
        names = [f"{name}.weight" for name in self.modules if name in of]
        for name, weight in self.skeleton.read(names, title):
            yield name.removesuffix(".weight"), weight
            del weight  # its mapping goes before the next one comes

    def loaded(self, name: str, weight: Tensor) -> nn.Module:
        """A module with its weight, in the dtype that a load would give it."""
        module = copy.copy(self.modules[name])
        values = nn.Parameter(weight.to(self.skeleton.dtypes[f"{name}.weight"]), requires_grad=False)
        module._parameters = {**module._parameters, "weight": values}
        return module

    def check_dtypes(self) -> None:
        """Refuse weights that are stored as integers or in 8 bits."""
        for name in self.modules:
            if f"{name}.weight" not in self.skeleton.dtypes:
                stored = self.skeleton.places[f"{name}.weight"].dtype
                raise UnsupportedModelError(f"{name}.weight is stored as {stored}; floats of 16 to 64 bits factor.")

    def check_finite(self) -> None:
        """Look through all weights: a day of decompositions shall not end in a NaN."""
        for name, weight in self.read("check", self.modules):
            dtype = self.skeleton.dtypes[f"{name}.weight"]
            if not all(bool(piece.to(dtype).isfinite().all()) for piece in weight.reshape(-1).split(PIECE)):
                raise SettingError(
                    f"{name}.weight has NaN or infinite values as {dtype}. Is the checkpoint corrupt? Otherwise leave "
                    f"it out: exclude={name!r}."
                )


@dataclass
class Notes:
    """What is known of single modules, line by line in a file: a call after a kill goes on from there.

    Attributes:
        path: Beside the output.
        key: Of the weights; what was noted with another one does not count.
        known: (what, module) -> value.
    """

    path: Path
    key: Any
    known: dict[tuple[str, str], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, skeleton: Skeleton) -> Notes:
        """Those of a checkpoint, with what an earlier call left."""
        key = [fingerprint(weight_files(skeleton.folder)), str(skeleton.model.config.dtype), versions()]
        notes = cls(path, key)
        for line in notes._lines():
            try:
                what, name, value = json.loads(line)
                notes.known[str(what), str(name)] = value
            except (ValueError, TypeError, RecursionError):
                continue  # half a line, of a call that was killed
        return notes

    def add(self, what: str, name: str, value: Any) -> None:
        """Know a JSON-safe value, and append it to the file.

        Raises:
            CheckpointError: It can't be written.
        """
        try:
            if not self.known:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.write_text(json.dumps(self.key) + "\n", encoding="utf-8")
            self.known[what, name] = value
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([what, name, value]) + "\n")
        except OSError as error:
            raise CheckpointError(f"Can't write {self.path}: {error}. Choose another output_dir.") from error

    def tails(self, name: str, size: Size) -> Tensor | None:
        """The tails of a module up to its largest rank that saves parameters, where they are known."""
        found = self.known.get(("tails", name))
        if not isinstance(found, list) or len(found) != size.largest_rank + 1:
            return None
        return torch.tensor(found, dtype=torch.float64) if all(type(value) is float for value in found) else None

    def error(self, name: str, rank: int) -> float:
        """The relative error of a module at a rank; NaN where it is not known."""
        found = self.known.get(("error", name))
        if not isinstance(found, list) or len(found) != 2 or found[0] != rank or type(found[1]) is not float:
            return float("nan")
        return found[1]

    def _lines(self) -> list[str]:
        """The lines below the key, where it is ours."""
        try:
            key, *lines = self.path.read_text(encoding="utf-8").splitlines()
            return lines if json.loads(key) == json.loads(json.dumps(self.key)) else []
        except (OSError, ValueError, RecursionError):
            return []  # none, or not ours


def known_ranks(sites: Sites, sizing: Sizing) -> Allocation | None:
    """The ranks that shapes decide; None where tails decide, after the value was checked.

    Raises:
        SettingError: A value out of range, or a rank that saves parameters nowhere.
        BudgetError: Not even the smallest ranks fit.
    """
    sizes, multiple = sites.sizes(), sizing.multiple
    if sizing.keyword == "rank_ratio":
        return uniform_ranks(sizes, sizing.value, multiple)
    if sizing.keyword == "rank":
        return _checked(fixed_ranks(sizes, sizing.value))
    if sizing.keyword == "energy":  # as of a spectrum that falls evenly
        even = {name: torch.arange(size.full_rank, -1, -1).double() for name, size in sizes.items()}
        energy_ranks(even, sizes, sizing.value, multiple)
    else:
        _budget(sites, sizing)
    return None


def ranks_by_tails(sites: Sites, sizing: Sizing, notes: Notes) -> Allocation:
    """The ranks by energy or by a budget, as `factorize` chooses them; all weights are decomposed for that."""
    sizes = sites.sizes()
    useful = {name: size for name, size in sizes.items() if size.largest_rank}
    reasons = uniform_ranks(sizes, 0.5, sizing.multiple).reasons  # of those that no rank makes smaller
    tails = {name: notes.tails(name, size) for name, size in useful.items()}
    unread = {name for name, found in tails.items() if found is None}
    for name, weight in sites.read("ranks", unread) if unread else ():
        most = useful[name].largest_rank
        found = factor(name, sites.loaded(name, weight), most, ModuleStatistics()).tails[: most + 1]
        notes.add("tails", name, found.tolist())
        tails[name] = found
        del weight
    known = {name: found for name, found in tails.items() if found is not None}
    if not known:
        return Allocation(dict.fromkeys(sizes), sizes, reasons)
    if sizing.keyword == "energy":
        ranks = energy_ranks(known, useful, sizing.value, sizing.multiple)
    else:
        costs, budget = _budget(sites, sizing)
        budget -= sum(costs.pop(name).dense_parameters for name in sizes if name not in useful)
        ranks = budget_ranks(comparable_tails(known, "none"), costs, max(budget, 1), sizing.multiple)
    return Allocation({name: ranks.get(name) for name in sizes}, sizes, reasons | ranks.reasons)


def _budget(sites: Sites, sizing: Sizing) -> tuple[dict[str, Size], int]:
    """The modules' sizes in the unit of a budget, and their part of it."""
    skeleton, sizes, in_bytes = sites.skeleton, sites.sizes(), sizing.keyword == "max_size_bytes"
    total = sum(skeleton.loaded_bytes(name) for name in skeleton.places) if in_bytes else count_names(skeleton.model)
    if in_bytes:
        sizes = sizes_in_bytes(sizes, {name: skeleton.dtypes[f"{name}.weight"].itemsize for name in sizes})
    return sizes, budget_left(total, sizes, sizing.value, sizing.multiple, in_bytes=in_bytes)


def _checked(ranks: Allocation) -> Allocation:
    if all(rank is None for rank in ranks.values()):
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(ranks.reasons.items())[:3])
        raise SettingError(f"No module would become smaller, all {len(ranks)} stay dense ({shown}).")
    return ranks
