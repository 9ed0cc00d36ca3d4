"""Ranges of a graph's tensors, from running the float graph on calibration data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfshrink.errors import SettingError
from hfshrink.histograms import Histogram
from hfshrink.inputs import model_inputs
from hfshrink.quantization.graphs.exporting import quiet
from hfshrink.quantization.ranges import RANGE_METHODS
from hfshrink.terminal import progress


def collect_histograms(
    exported: Any, program: Any, tensors: Mapping[str, str], feed: Iterable[Mapping[str, Tensor]]
) -> dict[str, Histogram]:
    """Histograms of tensors of a float graph, batch by batch: memory does not grow with the number of batches.

    Padding does not count: where a batch has an `attention_mask` of shape (batch, sequence), positions whose mask is 0
    are left out of tensors of shape (batch, sequence, …) and (batch · sequence, …).

    Args:
        exported: The export that the graph belongs to; it says which inputs there are.
        program: The float graph; it is left as it was.
        tensors: Name of a float tensor -> the module that reads it, for messages.
        feed: Batches, as `hfshrink.calibration.batches` gives them.

    Returns:
        Name of a tensor -> its histogram.

    Raises:
        SettingError: NaN or infinite values, or inputs that the export lacks.
    """
    histograms = {name: Histogram() for name in tensors}
    for found in run_batches(exported, program, list(tensors), feed):
        for name, values in found.items():
            try:
                histograms[name].add(torch.from_numpy(values))
            except SettingError:
                raise SettingError(
                    f"The input of {tensors[name]} (tensor {name!r}) has NaN or infinite values on the calibration "
                    "data, so it has no range. Check the data, or keep the module in float with exclude."
                ) from None
    return histograms


def run_batches(
    exported: Any, program: Any, tensors: Sequence[str], feed: Iterable[Mapping[str, Tensor]]
) -> Iterator[dict[str, np.ndarray]]:
    """Tensors of a graph for each batch, without padding (see `collect_histograms`).

    Args:
        exported: The export that the graph belongs to.
        program: The graph; it is left as it was.
        tensors: Names of tensors in it.
        feed: Batches of inputs.

    Yields:
        Name of a tensor -> its values.
    """
    session = open_session(program, tensors)
    inputs = {given.name for given in session.get_inputs()}
    for batch in progress(feed, "calibrating"):
        taken = model_inputs(exported, batch)
        arrays = {name: value.cpu().numpy() for name, value in taken.items() if name in inputs}
        mask = batch.get("attention_mask")
        for_mask = None if mask is None else mask.cpu().numpy()
        outputs = _run(session, tensors, arrays)
        yield {name: drop_padding(value, for_mask) for name, value in zip(tensors, outputs, strict=True)}


def _run(session: Any, tensors: Sequence[str], arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

    try:
        return session.run(list(tensors), arrays)
    except InvalidArgument as error:  # an image of another size, or rows longer than the model has positions
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise SettingError(f"A batch of the calibration data does not fit the graph ({shapes}): {error}") from None


def open_session(program: Any, tensors: Sequence[str] = ()) -> Any:
    """An ONNX Runtime session on the processor of a graph with further tensors as outputs.

    Args:
        program: The graph; it is left as it was.
        tensors: Names of tensors to give out beside its own outputs.
    """
    graph = program.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    before = list(graph.outputs)
    there = {value.name for value in before}
    try:
        graph.outputs.extend(values[name] for name in tensors if name not in there)
        return _load(program)
    finally:
        graph.outputs.clear()
        graph.outputs.extend(before)


def _load(program: Any) -> Any:
    """A session, through a file: a graph of more than 2 GB fits into no message."""
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads would take the core
    with quiet(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        onnx_ir.save(program, path, external_data="weights")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def drop_padding(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Values where the mask is not 0, as (positions, …); all of them where the mask does not fit.

    Args:
        values: Shape (batch, sequence, …) or (batch · sequence, …) for a mask that fits; any other shape.
        mask: Shape (batch, sequence), or None.

    Example:
        >>> drop_padding(np.array([[[1.0], [2.0]]]), np.array([[1, 0]])).tolist()
        [[1.0]]
    """
    if mask is None or mask.ndim != 2:
        return values
    if values.ndim > 2 and values.shape[:2] == mask.shape:
        return values[mask != 0]
    if values.ndim == 2 and len(values) == mask.size != len(mask):
        return values[mask.reshape(-1) != 0]
    return values


def check_methods(ranges: str | Mapping[str, str], modules: Sequence[str] = ()) -> None:
    """Check the choice of range methods, and that it fits the modules where they are known already.

    Raises:
        SettingError: An unknown method, a wildcard without match, or modules that no wildcard matches.
    """
    chosen = {"*": ranges} if isinstance(ranges, str) else dict(ranges)
    for pattern, method in chosen.items():
        if method not in RANGE_METHODS:
            raise SettingError(f"ranges must be one of {', '.join(RANGE_METHODS)}, got {method!r} for {pattern!r}.")
        if modules and not any(fnmatchcase(module, pattern) for module in modules):
            raise SettingError(f"The wildcard {pattern!r} in ranges matches none of {', '.join(modules[:6])}.")
    for module in modules:
        method_of(ranges, module)


def method_of(ranges: str | Mapping[str, str], module: str) -> str:
    """The range method of a module: that of the first wildcard that matches.

    Raises:
        SettingError: None does.

    Example:
        >>> method_of({"*.output.dense": "percentile", "*": "min-max"}, "layer.0.output.dense")
        'percentile'
    """
    if isinstance(ranges, str):
        return ranges
    for pattern, method in ranges.items():
        if fnmatchcase(module, pattern):
            return method
    raise SettingError(f"ranges names no method for {module}. Add '*': 'min-max' for all that are left.")
