"""What can be measured of a model: sizes, times and scores, each with its unit and its circumstances."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hfshrink.terminal import table

COMPUTED = frozenset({"parameters", "nonzero_parameters", "macs", "memory_bytes"})
"""Fields of `Measurement` that are counted from tensors and shapes; all others are measured by running."""


LOWER_IS_BETTER = {"perplexity", "mse", "rmse", "mae", "loss", "wer", "cer", "error", "distance", "divergence"}
"""Words in the names of metrics that fall when a model gets better; all others rise."""


@dataclass(frozen=True)
class Score:
    """One metric on one data set, with its 95 % interval where one was computed."""

    metric: str
    value: float | None = None  # None where it is undefined, such as the correlation with a constant
    low: float | None = None
    high: float | None = None
    dataset: str | None = None
    split: str | None = None
    examples: int | None = None
    seed: int | None = None

    @property
    def title(self) -> str:
        """The metric with the data that it was measured on, as far as they are known."""
        rows = None if self.examples is None else f"{self.examples:,} rows"
        where = ", ".join(part for part in (self.dataset, self.split, rows) if part)
        return f"{self.metric} ({where})" if where else self.metric

    def __str__(self) -> str:
        if self.value is None:
            return "undefined"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4f}, {self.high:.4f}]"
        return f"{self.value:.4f}{interval}"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass of a batch: wall clock (p50, p95), and CPU time of the whole process."""

    latency_ms_p50: float
    latency_ms_p95: float
    cpu_ms: float
    runtime: str
    device: str
    threads: int
    batch_size: int
    sequence_length: int | None = None  # None for images
    repeats: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Sizes, times and scores of one model. `None` and the empty tuple mean "not measured", never zero.

    Attributes:
        parameters: Number of parameters, tied ones once (computed).
        nonzero_parameters: Parameters that are not exactly zero (computed).
        size_bytes: Bytes of the weight files on disk (measured).
        packed_bytes: Bytes after entropy coding (measured).
        memory_bytes: Bytes of the loaded parameters and buffers (computed).
        loaded_bytes: Growth of the process's resident memory by loading the model (measured).
        peak_memory_bytes: Highest growth of resident memory during loading and one forward pass (measured).
        macs: Multiply-accumulate operations of one example at `sequence_length` (computed).
        energy_joules: Energy of one forward pass of one example, where the machine has a counter (measured).
        sequence_length: Tokens per example for `macs` and `energy_joules`; None for images.
        latency: One `Latency` per batch size and runtime (measured).
        scores: One `Score` per metric (measured).
        device: The processor's name.
    """

    parameters: int | None = None
    nonzero_parameters: int | None = None
    size_bytes: int | None = None
    packed_bytes: int | None = None
    memory_bytes: int | None = None
    loaded_bytes: int | None = None
    peak_memory_bytes: int | None = None
    macs: int | None = None
    energy_joules: float | None = None
    sequence_length: int | None = None
    latency: tuple[Latency, ...] = ()
    scores: tuple[Score, ...] = ()
    device: str | None = None

    def merged(self, other: Measurement) -> Measurement:
        """This measurement with every field that `other` has measured taken from `other`."""
        known = {f.name: getattr(other, f.name) for f in dataclasses.fields(other)}
        return dataclasses.replace(self, **{name: value for name, value in known.items() if value not in (None, ())})

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, measured or computed) of all that is known, for a table."""
        found = []
        for name, show in _SHOWN.items():
            value = getattr(self, name)
            if value is not None:
                found.append((name, show(value), "computed" if name in COMPUTED else "measured"))
        for latency in self.latency:
            setting = f"batch {latency.batch_size}"
            if latency.sequence_length is not None:
                setting += f", {latency.sequence_length} tokens"
            setting += f", {latency.threads} thread{'s' * (latency.threads != 1)}, {latency.runtime}"
            times = f"{latency.latency_ms_p50:.2f} / {latency.latency_ms_p95:.2f} / {latency.cpu_ms:.2f} ms"
            found.append((f"p50 / p95 / CPU ({setting})", times, "measured"))
        found.extend((score.title, str(score), "measured") for score in self.scores)
        return found

    def __str__(self) -> str:
        return table(("what", "value", "how"), self.rows())


def is_lower_better(metric: str) -> bool:
    """Whether a metric falls when a model gets better, by a word of its name that is in `LOWER_IS_BETTER`.

    Example:
        >>> is_lower_better("eval_loss"), is_lower_better("accuracy")
        (True, False)
    """
    return not LOWER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


def megabytes(size: float) -> str:
    """Bytes as text, in units of 10⁶."""
    return f"{size / 1e6:.1f} MB"


_SHOWN: dict[str, Callable[[Any], str]] = {
    "parameters": lambda n: f"{n:,}",
    "nonzero_parameters": lambda n: f"{n:,}",
    "size_bytes": megabytes,
    "packed_bytes": megabytes,
    "memory_bytes": megabytes,
    "loaded_bytes": megabytes,
    "peak_memory_bytes": megabytes,
    "macs": lambda n: f"{n / 1e6:,.1f} M",
    "energy_joules": lambda joules: f"{joules:.3f} J",
    "device": str,
}
