"""What modules are fed, added up: Gram matrices and squares of their inputs, padding left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
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
HELD = 2
"""Inputs that wait for other modules that are fed the same tensor: of attention and of a parallel MLP."""
TOKENS_PER_FEATURE = 32
"""Tokens per input feature that are multiplied where a sample of them will do."""
GOLDEN = (math.sqrt(5) - 1) / 2
"""Token i is in a sample where i · GOLDEN mod 1 lies below the share: evenly spread as every k-th one is, but in step
with no row length, so that first tokens of rows, which are unlike all others, are neither missed nor taken too often.
"""


class InputCounter:
    """Adds up the inputs of modules while it is open; modules that are fed the same tensor share the product.

    Args:
        modules: Name -> Linear, Conv1D or Conv2d.
        what: `"input_gram"` or `"input_square"`, the field of the statistics that is filled.
        tokens: How many valid positions all batches have together. Given, a module with `in` features multiplies
            about TOKENS_PER_FEATURE · in of them only, evenly spread, and the sum is scaled up to all; inputs of other
            positions than the batch's, and patches, count in full. None counts all.

    Attributes:
        stats: Name -> statistics, once it is closed; `tokens` are those that the module saw.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with InputCounter({"a": layer}, "input_gram") as counter:
        ...     _ = layer(torch.tensor([[1.0, 2.0]]))
        >>> counter.stats["a"].input_gram.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __init__(self, modules: Mapping[str, nn.Module], what: str, tokens: int | None = None) -> None:
        self.modules, self.what = modules, what
        self.stats = {name: ModuleStatistics() for name in modules}
        self._sums: dict[tuple[str, ...], _Sum] = {}  # names of modules that are fed alike -> their sum
        self._waiting: dict[tuple[int, int], _Waiting] = {}  # id and version of an input -> its rows
        self._all = tokens
        self._valid: Tensor | None = None
        self._numbers = torch.arange(0)  # of the batch's valid positions, among those of all batches
        self._hooks = ExitStack()

    def start(self, valid: Tensor | None) -> None:
        """A batch begins, whose positions count where `valid` (batch, sequence) is true."""
        self._count_waiting()
        self._valid = valid
        if self._all is not None and valid is not None:
            begin = int(self._numbers[-1]) + 1 if len(self._numbers) else 0
            self._numbers = torch.arange(begin, begin + int(valid.sum()), device=valid.device)

    def __enter__(self) -> InputCounter:
        for name, module in self.modules.items():
            hook = lambda module, args, kwargs, name=name: self._see(  # noqa: E731
                name, module, (args or tuple(kwargs.values()))[0]
            )
            self._hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
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
            _check_finite(name, x, None)
            for images in _portions(module, x):
                rows = input_rows(module, images)
                self._sum((name,)).add(rows, len(rows))
            return
        key = id(x), 0 if x.is_inference() else x._version
        if key in self._waiting:
            self._waiting[key].names.append(name)
            return
        valid = self._valid if self._valid is not None and x.shape[:-1] == self._valid.shape else None
        _check_finite(name, x, valid)
        rows = self._sampled(x, valid) if valid is not None else input_rows(module, x)
        # its own: what comes next may change x in place
        own = rows if rows.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() else rows.clone()
        if len(self._waiting) == HELD:
            self._count(self._waiting.pop(next(iter(self._waiting))))
        self._waiting[key] = _Waiting(x, own, len(rows) if valid is None else int(valid.sum()), [name])

    def _sampled(self, x: Tensor, valid: Tensor) -> Tensor:
        """Rows (tokens, in) of the valid positions of x (…, in), or of a sample of them."""
        places = valid.flatten().nonzero().flatten()
        wanted = TOKENS_PER_FEATURE * x.shape[-1]
        if self._all is not None and wanted < self._all:
            places = places[self._numbers.double() * GOLDEN % 1 < wanted / self._all]
        return x.flatten(end_dim=-2).index_select(0, places.to(x.device))

    def _count_waiting(self) -> None:
        for waiting in self._waiting.values():
            self._count(waiting)
        self._waiting.clear()

    def _count(self, waiting: _Waiting) -> None:
        self._sum(tuple(waiting.names)).add(waiting.rows, waiting.tokens)

    def _sum(self, names: tuple[str, ...]) -> _Sum:
        return self._sums.setdefault(names, _Sum(self.what))


@dataclass
class _Waiting:
    """An input that other modules may be fed too."""

    x: Tensor  # kept alive, so that no other tensor gets its id
    rows: Tensor
    tokens: int
    names: list[str]


class _Sum:
    """The sum of one module's inputs: float32 over some thousand tokens, float64 over all."""

    def __init__(self, what: str) -> None:
        self.tokens = self._counted = 0
        self._is_gram = what == "input_gram"
        self._waiting = 0
        self._part: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, rows: Tensor, tokens: int) -> None:
        """Count vectors (counted, in) that stand for so many tokens."""
        self.tokens += tokens
        self._counted += len(rows)
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
        """Shape (in,), or (in, in) and symmetric; float64, scaled from what was counted to all tokens."""
        self._fold()
        total = self._total
        if total is None:  # pragma: no cover  a sum is made when there is something to add
            return torch.zeros(0, dtype=torch.float64)
        total = total.mul_(self.tokens / self._counted) if 0 < self._counted < self.tokens else total
        return total.triu_().add_(total.triu(1).T) if self._is_gram else total

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


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """The vectors that a module multiplies with its weight (out, in), one per row.

    Args:
        module: A Linear or Conv1D, or a Conv2d without groups.
        x: Its input, (…, in) or (batch, channels, height, width).

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
    return x.flatten(end_dim=-2)


def _portions(conv: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """Images (batch, channels, height, width) in portions whose patches are not too many."""
    patches = x[0].numel() * conv.kernel_size[0] * conv.kernel_size[1]
    yield from x.split(max(1, PATCHES // patches))


def _check_finite(name: str, x: Tensor, valid: Tensor | None) -> None:
    sums = x.sum(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))  # one pass: NaN and infinity stay in a sum
    if not bool((sums if valid is None else sums[valid]).isfinite().all()):
        raise SettingError(f"The input of {name} has NaN or infinite values. Check the data, or load in float32.")
