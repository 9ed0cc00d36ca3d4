"""What modules are fed, added up: Gram matrices and squares of their inputs, padding left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError

BLOCKS = 8
"""Parts into which the features of a Gram matrix fall: only blocks on and above its diagonal are multiplied."""
FOLDED = 4096
"""Tokens whose products are summed in float32 before they are added in float64."""
PATCHES = 2**24
"""Numbers in the patches of a convolution that are in memory at once."""


class InputCounter:
    """Adds up the inputs of modules while it is open; modules that are fed the same tensor share the product.

    Args:
        modules: Name -> Linear, Conv1D or Conv2d.
        what: `"input_gram"` or `"input_square"`, the field of the statistics that is filled.

    Attributes:
        stats: Name -> statistics, once it is closed.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with InputCounter({"a": layer}, "input_gram") as counter:
        ...     _ = layer(torch.tensor([[1.0, 2.0]]))
        >>> counter.stats["a"].input_gram.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, modules: Mapping[str, nn.Module], what: str) -> None:
        self.modules, self.what = modules, what
        self.stats = {name: ModuleStatistics() for name in modules}
        self._sums: dict[tuple[str, ...], _Sum] = {}  # names of modules that are fed alike -> their sum
        self._waiting: dict[int, tuple[Tensor, Tensor, list[str]]] = {}  # id -> input, kept alive; rows; names
        self._valid: Tensor | None = None
        self._hooks = ExitStack()

    def start(self, valid: Tensor | None) -> None:
        """A batch begins, whose positions count where `valid` (batch, sequence) is true."""
        self._count_waiting()
        self._valid = valid

    def __enter__(self) -> InputCounter:
        for name, module in self.modules.items():
            hook = lambda module, args, name=name: self._see(name, module, args[0])  # noqa: E731
            self._hooks.callback(module.register_forward_pre_hook(hook).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._count_waiting()
        while self._sums:
            names, found = self._sums.popitem()
            total = found.total()
            for number, name in enumerate(names):
                self._give(self.stats[name], found.tokens, total if number == len(names) - 1 else total.clone())

    def _give(self, stats: ModuleStatistics, tokens: int, total: Tensor) -> None:
        before = getattr(stats, self.what)
        setattr(stats, self.what, total if before is None else before.add_(total))
        stats.tokens += tokens

    def _see(self, name: str, module: nn.Module, x: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            _check_finite(name, x)
            for images in _portions(module, x):
                self._sum((name,)).add(input_rows(module, images))
        elif id(x) in self._waiting:
            self._waiting[id(x)][2].append(name)
        else:
            _check_finite(name, rows := input_rows(module, x, self._valid))
            own = rows if rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() else rows.clone()
            self._waiting[id(x)] = x, own, [name]  # its own: what comes next may change x in place

    def _count_waiting(self) -> None:
        for _, rows, names in self._waiting.values():
            self._sum(tuple(names)).add(rows)
        self._waiting.clear()

    def _sum(self, names: tuple[str, ...]) -> _Sum:
        return self._sums.setdefault(names, _Sum(self.what))


class _Sum:
    """The sum of one module's inputs: float32 over some thousand tokens, float64 over all."""

    def __init__(self, what: str) -> None:
        self.tokens = 0
        self._is_gram = what == "input_gram"
        self._waiting = 0
        self._part: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Count vectors (tokens, in)."""
        self.tokens += len(rows)
        if not self._is_gram:
            square = rows.double().square().sum(dim=0)
            self._total = square if self._total is None else self._total.add_(square)
            return
        rows = rows if rows.dtype == torch.float64 else rows.float()
        for some in rows.split(FOLDED):
            if self._part is None:
                self._part = rows.new_zeros(rows.shape[1], rows.shape[1])
            _add_upper(self._part, some)
            self._waiting += len(some)
            if self._waiting >= FOLDED:
                self._fold()

    def total(self) -> Tensor:
        """Shape (in,), or (in, in) and symmetric; float64."""
        self._fold()
        total = self._total
        if total is None:  # pragma: no cover  a sum is made when there is something to add
            return torch.zeros(0, dtype=torch.float64)
        return torch.triu(total) + torch.triu(total, 1).T if self._is_gram else total

    def _fold(self) -> None:
        if self._part is None:
            return
        self._total = self._part.to(torch.float64, copy=True) if self._total is None else self._total.add_(self._part)
        self._part.zero_()
        self._waiting = 0


def _add_upper(gram: Tensor, rows: Tensor) -> None:
    """Add Σ x xᵀ of rows (tokens, in) to the blocks on and above the diagonal, in place: little more than half."""
    size = -(-rows.shape[1] // BLOCKS)
    for begin in range(0, rows.shape[1], size):
        gram[begin : begin + size, begin:].addmm_(rows[:, begin : begin + size].T, rows[:, begin:])


def input_rows(module: nn.Module, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The vectors that a module multiplies with its weight (out, in), one per row.

    Args:
        module: A Linear or Conv1D, or a Conv2d without groups.
        x: Its input, (…, in) or (batch, channels, height, width).
        valid: Which positions count, booleans (batch, sequence); only for inputs (batch, sequence, in).

    Returns:
        Shape (tokens, in), or (batch·places, channels·kernel height·kernel width).

    Example:
        >>> input_rows(nn.Conv2d(1, 1, 2), torch.arange(6.0).view(1, 1, 2, 3)).tolist()
        [[0.0, 1.0, 3.0, 4.0], [1.0, 2.0, 4.0, 5.0]]
    """
    if isinstance(module, nn.Conv2d):
        border: Any = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, border, mode) if any(border) else x
        x = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)
    elif valid is not None and x.shape[:-1] == valid.shape:
        return x[valid]
    return x.flatten(end_dim=-2)


def _portions(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """Images (batch, channels, height, width) in portions whose patches are not too many."""
    patches = x[0].numel() * conv.kernel_size[0] * conv.kernel_size[1]
    yield from x.split(max(1, PATCHES // patches))


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise SettingError(f"The input of {name} has NaN or infinite values. Check the data, or load in float32.")
