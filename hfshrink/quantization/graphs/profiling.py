"""Where the time of an ONNX graph goes: the nodes that ONNX Runtime really runs, by operator."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hfshrink.errors import SettingError, require
from hfshrink.inputs import random_inputs
from hfshrink.terminal import table

WARM_UP = 5


@dataclass(frozen=True)
class OpTime:
    """The time of all nodes of one operator in one call.

    Attributes:
        op_type: The operator, after ONNX Runtime's own fusions.
        calls: Nodes of it.
        share: Its part of the time of all nodes, 0 to 1.
        microseconds: Wall-clock time of one call of the model, each node at its fastest.
    """

    op_type: str
    calls: int
    share: float
    microseconds: float


def profile_nodes(
    exported: Any, inputs: Mapping[str, Tensor] | None = None, *, repeats: int = 30, threads: int = 1
) -> list[OpTime]:
    """Time the nodes of an ONNX export with ONNX Runtime's profiler.

    Args:
        exported: The export, or the path of an `.onnx` file.
        inputs: Name -> tensor, as for a call; None takes seeded random inputs of (1, 128).
        repeats: Counted calls, after five of warm-up. Of each node its fastest call is kept.
        threads: Threads of the computation.

    Returns:
        One row per operator, the slowest first.

    Raises:
        SettingError: Not one graph of ONNX, an input that the graph needs is missing, or `repeats` below 1.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from hfshrink.quantization.graphs.exporting import export_float
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> rows = profile_nodes(export_float(BertModel(BertConfig(**sizes)).eval()), repeats=2)
        >>> round(sum(row.share for row in rows), 6)
        1.0
    """
    require("onnxruntime", extra="onnx")
    if repeats < 1 or threads < 1:
        raise SettingError(f"repeats and threads must be 1 or more, got {repeats} and {threads}.")
    with tempfile.TemporaryDirectory() as folder:
        path = _file_of(exported, Path(folder))
        if inputs is None:
            if isinstance(exported, (str, Path)):
                raise SettingError("A file does not tell its inputs' sizes: pass inputs (name -> tensor).")
            inputs = random_inputs(exported, 1, 128)
        events = _events(path, inputs, repeats, threads, Path(folder))
    return _rows(events, repeats)


def node_table(rows: Sequence[OpTime], largest: int = 12) -> str:
    """The rows as a table: the slowest operators, the rest in one line.

    Args:
        rows: Of `profile_nodes`.
        largest: How many operators get their own line.

    Example:
        >>> print(node_table([OpTime("MatMul", 6, 0.75, 300.0), OpTime("Add", 2, 0.25, 100.0)], 1))
        | operator | nodes | share  | µs  |
        |----------|-------|--------|-----|
        | MatMul   | 6     | 75.0 % | 300 |
        | 1 others | 2     | 25.0 % | 100 |
    """
    shown, rest = list(rows[:largest]), rows[largest:]
    if rest:
        share, time = (sum(getattr(row, name) for row in rest) for name in ("share", "microseconds"))
        shown.append(OpTime(f"{len(rest)} others", sum(row.calls for row in rest), share, time))
    cells = [(row.op_type, str(row.calls), f"{row.share:.1%}"[:-1] + " %", f"{row.microseconds:.0f}") for row in shown]
    return table(("operator", "nodes", "share", "µs"), cells)


def _file_of(exported: Any, folder: Path) -> Path:
    if isinstance(exported, (str, Path)):
        return Path(exported)
    components = getattr(exported, "components", {})
    kind = getattr(exported, "export_format", None)  # a string, or an enumeration of strings
    if list(components) != ["model"] or kind != "onnx":
        raise SettingError(
            f"profile_nodes takes an ONNX export of one graph, got {type(exported).__name__} "
            f"with components {list(components)}."
        )
    import onnx_ir

    path = folder / "model.onnx"
    onnx_ir.save(components["model"].program, path, external_data="model.onnx.data")
    return path


def _events(
    path: Path, inputs: Mapping[str, Tensor], repeats: int, threads: int, folder: Path
) -> list[dict[str, Any]]:
    """What ONNX Runtime's profiler wrote about each node of each counted call, in order."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    missing = [name for name in names if name not in inputs]
    if missing:
        raise SettingError(f"The graph takes {', '.join(names)}; inputs lacks {', '.join(missing)}.")
    feed = {name: inputs[name].numpy(force=True) for name in names}
    for _ in range(WARM_UP + repeats):
        session.run(None, feed)
    written = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in written if event["name"].endswith("_kernel_time") and "op_name" in event["args"]]
    each = len(kernels) // (WARM_UP + repeats)
    return kernels[WARM_UP * each :]


def _rows(events: list[dict[str, Any]], repeats: int) -> list[OpTime]:
    """The time of each node in its fastest call, summed by operator: whatever interrupts a call only adds to it."""
    times: dict[str, float] = defaultdict(float)
    nodes: dict[str, int] = defaultdict(int)
    each = len(events) // repeats
    for place, event in enumerate(events[:each]):
        name = event["args"]["op_name"]
        times[name] += min(events[place + call * each]["dur"] for call in range(repeats))
        nodes[name] += 1
    total = sum(times.values()) or 1.0  # a graph of a few tiny nodes may take no whole microsecond
    rows = [OpTime(name, nodes[name], time / total, time) for name, time in times.items()]
    return sorted(rows, key=lambda row: -row.microseconds)
