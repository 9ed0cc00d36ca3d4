"""The largest student under a target: a ladder of smaller and smaller students, and the first rung that fits."""

from __future__ import annotations

import bisect
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from hfshrink.distillation.students.width import Widths
from hfshrink.errors import SettingError
from hfshrink.evaluation import measure_latencies
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.measurement import Latency, Measurement
from hfshrink.modules import max_positions

TOKENS = 128
"""Length of the input that latencies are measured with; less where the model has fewer positions."""

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32"}
"""torch's names of types -> those in the header of a safetensors file; any other takes as many letters at most."""


@dataclass(frozen=True)
class Rung:
    """One size of a student; no widths mean the teacher's."""

    num_layers: int
    widths: Widths | None = None

    def to_dict(self) -> dict[str, int]:
        """As keywords of `make_student`."""
        return {"num_layers": self.num_layers, **(self.widths.to_dict() if self.widths else {})}


@dataclass(frozen=True)
class Search:
    """What a search needs to know.

    Attributes:
        rungs: From the largest to the smallest.
        build: Rung -> a model of that size with any weights; on the meta device in a block that says so.
        targets: Keyword -> value, such as `{"max_parameters": 1000}`.
    """

    rungs: Sequence[Rung]
    build: Callable[[Rung], Any]
    targets: Mapping[str, float] = field(default_factory=dict)


def check_targets(targets: Mapping[str, Any]) -> None:
    """Raise `SettingError` for a target that is no positive number (whole, but for milliseconds)."""
    for name, value in targets.items():
        kinds = (int, float) if name == "max_latency_ms" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
            what = "a positive number" if float in kinds else "a positive whole number"
            raise SettingError(f"{name} must be {what}, got {value!r}.")


def ladder(depth: int, widths: Widths | None, possible: Callable[[Rung], bool] = lambda rung: True) -> list[Rung]:
    """Smaller and smaller students, depth first, then width.

    1. All layers, one less, …, half of them (rounded up), at full width.
    2. At that depth one head less each time (in GQA one group), channels and neurons in proportion, to one head.
    3. At that width one layer less each time, to one layer.

    Args:
        depth: The teacher's layers.
        widths: The teacher's widths; None for families whose widths can't be cut, where depth alone goes to 1.
        possible: Whether a student of that size can be cut; rungs that can't are left out.

    Example:
        >>> [rung.num_layers for rung in ladder(6, None)]
        [6, 5, 4, 3, 2, 1]
        >>> [tuple(rung.to_dict().values()) for rung in ladder(4, Widths(12, 24, 3, 3))]
        [(4,), (3,), (2,), (2, 8, 16, 2), (2, 4, 8, 1), (1, 4, 8, 1)]
    """
    half = (depth + 1) // 2
    shallow = [Rung(number) for number in range(depth - 1, half - 1, -1)]
    narrow = (
        [Rung(half, _part(widths, left)) for left in range(widths.num_key_value_heads - 1, 0, -1)] if widths else []
    )
    rungs = [Rung(depth), *filter(possible, shallow + narrow)]
    return rungs + list(filter(possible, [Rung(number, rungs[-1].widths) for number in range(half - 1, 0, -1)]))


def _part(full: Widths, left: int) -> Widths:
    groups = full.num_key_value_heads
    queries = full.num_attention_heads // groups
    neurons = max(1, full.intermediate_size * left // groups)
    return Widths(full.hidden_size * left // groups, neurons, left * queries, left)


def find_rung(search: Search) -> int:
    """The number of the first rung that fits all targets, by bisection: sizes from shapes, latencies measured.

    Raises:
        SettingError: Not even the last one fits.
    """
    count = len(search.rungs)
    sizes = {name: value for name, value in search.targets.items() if name != "max_latency_ms"}
    limits = {name: value for name, value in search.targets.items() if name == "max_latency_ms"}

    def small(number: int) -> bool:
        return fits(_computed(search, search.rungs[number]), sizes)

    def fast(number: int) -> bool:
        return fits(measure(search.build(search.rungs[number]), limits), limits)

    first = bisect.bisect_left(range(count), True, key=small) if sizes else 0
    if first < count and limits:
        first = bisect.bisect_left(range(count), True, lo=first, key=fast)
    if first == count:
        refuse(search)
    return first


def refuse(search: Search) -> NoReturn:
    """Raise `SettingError` with what the smallest rung reaches."""
    last = search.rungs[-1]
    reached = values(measure(search.build(last), search.targets))
    missed = [f"{name}={value:,}" for name, value in search.targets.items() if reached[name] > value]
    best = [f"{_name(name)} {reached[name]:,}" for name in search.targets]
    sizes = ", ".join(f"{name}={value}" for name, value in last.to_dict().items())
    raise SettingError(
        f"No student of this teacher fits {' and '.join(missed or map(str, search.targets))}. The smallest "
        f"({sizes}) has {', '.join(best)}. Allow at least that, or give architecture= for a smaller family."
    )


def measure(model: Any, targets: Mapping[str, float]) -> Measurement:
    """What the targets speak of: parameters counted, size of the saved files, latency of one example on this machine.

    The latency is the median of `measure_latencies`, at batch 1, `TOKENS` tokens and one thread.
    """
    size: int | None = None
    latency: tuple[Latency, ...] = ()
    if "max_size_bytes" in targets:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            size = weight_bytes(folder)
    if "max_latency_ms" in targets:
        tokens = min(TOKENS, max_positions(model) or TOKENS)
        latency = measure_latencies({"student": model}, sequence_length=tokens, batch_sizes=(1,))["student"]
    parameters = sum(weight.numel() for weight in model.parameters())
    return Measurement(parameters=parameters, size_bytes=size, latency=latency)


def values(found: Measurement) -> dict[str, float]:
    """Target -> what was found for it."""
    known: dict[str, Any] = {"max_parameters": found.parameters, "max_size_bytes": found.size_bytes}
    if found.latency:
        known["max_latency_ms"] = round(found.latency[0].latency_ms_p50, 3)
    return {name: value for name, value in known.items() if value is not None}


def reached(found: Measurement, targets: Mapping[str, float]) -> dict[str, float]:
    """What was reached, for the record: `parameters`, `size_bytes` and `latency_ms_p50`, as far as targets asked."""
    return {_name(name): value for name, value in values(found).items() if name in targets}


def fits(found: Measurement, targets: Mapping[str, float]) -> bool:
    """Whether every target is met."""
    known = values(found)
    return all(known[name] <= value for name, value in targets.items())


def file_bytes(model: Any) -> int:
    """Bytes of a model's safetensors file, from shapes and types alone: tied weights once, and the header.

    The file begins with 8 bytes and a JSON header, filled up to a multiple of 8. It is exact where the model is saved
    under its own names of weights; families that keep older names on disk differ by some bytes per weight.

    Example:
        >>> file_bytes(torch.nn.Linear(2, 1))  # 8 + 152 of header, 12 of weights
        172
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in sorted(_saved(model).items()):
        end = start + tensor.numel() * tensor.element_size()
        kind = str(tensor.dtype).removeprefix("torch.")
        header[name] = {"dtype": DTYPES.get(kind, kind), "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + start


def _saved(model: Any) -> dict[str, Tensor]:
    """The tensors of `state_dict`, tied ones under their first name only."""
    weights = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(weights)
    return weights | {n: tensor for n, tensor in model.state_dict().items() if n not in weights and n not in tied}


def _computed(search: Search, rung: Rung) -> Measurement:
    with torch.device("meta"):
        sketch = search.build(rung)
    parameters = sum(weight.numel() for weight in sketch.parameters())
    return Measurement(parameters=parameters, size_bytes=file_bytes(sketch))


def _name(target: str) -> str:
    return {"max_latency_ms": "latency_ms_p50"}.get(target, target.removeprefix("max_"))
