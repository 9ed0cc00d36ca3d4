"""ONNX.

Export through transformers' exporters, dynamic int8 through ONNX Runtime, and the check against the float model.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import platform
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfshrink.calibration import batches
from hfshrink.errors import MissingDependencyError, SettingError
from hfshrink.inputs import eval_mode, model_inputs, random_inputs
from hfshrink.modules import max_positions

QUANTIZED_OPS = ("MatMul", "Gemm", "Gather")
"""Operators whose constant weights become int8. Gather is the embedding table.

Convolutions lose speed in dynamic mode.
"""
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
TOKEN_TASKS = ("token-classification", "question-answering", "fill-mask", "text-generation", "feature-extraction")
PARITY_ROWS = 64
RANDOM_LENGTHS = (4, 16, 64, 128)

logger = logging.getLogger(__name__)


def export_float(model: Any, processor: Any = None) -> Any:
    """Export a model as one float ONNX graph with free batch size and sequence length.

    Every input that the tokenizer makes and the model takes is traced (an untraced one would be dropped at run time,
    and sentence pairs come out wrong); without a tokenizer, all of the family's.

    Args:
        model: The model; its own config object stays apart from the export's.
        processor: Its tokenizer or image processor, or None.

    Returns:
        transformers' `ExportedModel` with one component, `model`.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = random_inputs(model, 2, 8, processor, pairs=True)
    axes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    if "pixel_values" in inputs:
        axes["pixel_values"] = {0: torch.export.Dim.AUTO}
    flags: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with _quiet(), eval_mode(model):
        try:
            exporter = OnnxExporter()
        except ImportError as error:  # it names the package and the version that it needs
            raise MissingDependencyError(f"{error} Or install: pip install 'hfshrink[onnx]'") from error
        exported = exporter.export(model, {**inputs, **flags}, OnnxConfig(dynamic=True, dynamic_shapes=axes))
    exported.config = copy.deepcopy(model.config)  # the exporter hands out the model's own object
    if hasattr(exported.config, "quantization_config"):  # a layer map describes PyTorch modules, not this graph
        del exported.config.quantization_config
    return exported


def quantize_dynamic(
    exported: Any, kept_float: Sequence[str] = (), *, reduce_range: bool = False
) -> tuple[Any, list[str]]:
    """Make the constant weights of an exported graph int8: symmetric per output channel, activations uint8 when run.

    Args:
        exported: A float export.
        kept_float: Names of PyTorch modules whose nodes stay float.
        reduce_range: 7-bit weights, for processors whose 8-bit products can overflow 16 bits (x86 without VNNI).

    Returns:
        The quantized export and the names of the modules that became int8.

    Raises:
        SettingError: No node was left to quantize, or none was quantized.
    """
    from onnxruntime.quantization import QuantType
    from transformers.exporters import ExportedComponent, ExportedModel, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    component = exported.components["model"]
    nodes = {node.name: _module_of(node) for node in _weight_nodes(component.program)}
    excluded = [name for name, module in nodes.items() if module in kept_float]
    changed = [module for name, module in nodes.items() if name not in excluded]
    if not changed:
        raise SettingError(
            f"There is nothing to quantize: no {', '.join(QUANTIZED_OPS)} with constant weights outside "
            f"{list(kept_float)}. Dynamic int8 is for transformers; convolutional networks need a static scheme."
        )
    config = OnnxRuntimeDynamicConfig(
        op_types_to_quantize=list(QUANTIZED_OPS),
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        # ONNX Runtime turns each Gemm into a MatMul under this name before it looks at the list
        nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],
    )
    with _quiet():
        program = OnnxRuntimeQuantizer(config).quantize(component.program, {}, exported.export_format)
    done = sum(node.op_type in ("MatMulInteger", "DequantizeLinear") for node in program.graph)
    if done == 0:
        raise SettingError(f"ONNX Runtime quantized none of {len(changed)} nodes: {', '.join(changed[:5])}.")
    if done < len(changed):
        logger.warning("ONNX Runtime quantized %d of %d nodes; the others stay float.", done, len(changed))
    components = {"model": ExportedComponent(program, component.metadata)}
    return ExportedModel(components, exported.export_format, config=exported.config), sorted(set(changed))


def check_parity(model: Any, exported: Any, processor: Any, task: str, calibration: Any = None) -> dict[str, Any]:
    """Compare an export with the PyTorch model on the same inputs.

    Args:
        model: The float model.
        exported: The export.
        processor: Tokenizer or image processor for raw rows.
        task: The model's task.
        calibration: Rows to compare on; None takes seeded random inputs of several lengths and batch sizes.

    Returns:
        `inputs` (which were used), `rows`, `max_difference` and `mean_difference` of the outputs, `agreement` (share
        of rows, or positions, with the same largest output; None for outputs without classes).

    Raises:
        SettingError: One of the two gives NaN or infinity.
    """
    source, rows, differences, same = "seeded random inputs", 0, [], []
    if calibration is None:
        feed: Iterable[dict[str, Tensor]] = _random_feed(model, processor)
    else:
        source = "calibration rows"
        feed = batches(calibration, model, processor, batch_size=8, samples=PARITY_ROWS)
    with torch.inference_mode(), eval_mode(model):
        for batch in feed:
            inputs = model_inputs(exported, batch)
            outputs, got = model(**inputs), exported(**inputs)
            for name in (name for name in OUTPUTS if name in outputs):
                expected, found = (side[name].float().cpu() for side in (outputs, got))
                _check_finite(expected, found, source)
                difference, equal = _compare(expected, found, inputs.get("attention_mask"), task)
                differences.append(difference)
                same.append(equal)
            rows += len(next(iter(inputs.values())))
    difference = torch.cat(differences)
    return {
        "inputs": source,
        "rows": rows,
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(torch.cat(same).mean()) if sum(map(len, same)) else None,
    }


def supports_vnni() -> bool:
    """Whether 8-bit products are summed in 32 bits here: x86 with VNNI, or a processor that is not x86."""
    if platform.machine().lower() not in ("x86_64", "amd64", "i686"):
        return True
    with contextlib.suppress(OSError):
        return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def _random_feed(model: Any, processor: Any) -> Iterator[dict[str, Tensor]]:
    longest = max_positions(model) or max(RANDOM_LENGTHS)
    for seed, length in enumerate(sorted({min(length, longest) for length in RANDOM_LENGTHS})):
        yield random_inputs(model, seed + 1, length, processor, seed, pairs=True)


def _weight_nodes(program: Any) -> list[Any]:
    """Nodes whose weight operand is a constant float table or matrix, as ONNX Runtime's quantizer takes them."""
    import onnx_ir

    found = []
    for node in program.graph:
        if node.op_type not in QUANTIZED_OPS:
            continue
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        constant = None if weight is None else weight.const_value
        if constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and len(constant.shape) == 2:
            found.append(node)
    return found


def _module_of(node: Any) -> str:
    """The PyTorch module that a node came from: the last scope before the operator's own."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 else node.name


def _check_finite(expected: Tensor, got: Tensor, source: str) -> None:
    for who, value in (("PyTorch model", expected), ("export", got)):
        if not torch.isfinite(value).all():
            raise SettingError(f"The {who}'s outputs hold NaN or infinity on {source}. Check the model's weights.")


def _compare(expected: Tensor, got: Tensor, mask: Any, task: str) -> tuple[Tensor, Tensor]:
    """Differences of the outputs that mean something, and which answers are the same (none without classes)."""
    per_token = task in TOKEN_TASKS and mask is not None and mask.shape == expected.shape[:2]
    real = mask.bool().cpu() if per_token else torch.ones(expected.shape[: 2 if per_token else 1], dtype=torch.bool)
    if task == "question-answering" and per_token:  # one answer per row: the position with the largest score
        lowest = torch.finfo(expected.dtype).min
        answers = [side.masked_fill(~real, lowest).argmax(-1) for side in (expected, got)]
        return (expected - got)[real].abs(), (answers[0] == answers[1]).float()
    if task == "feature-extraction" or expected.shape[-1] == 1:
        return (expected - got)[real].abs().flatten(), torch.empty(0)
    return (expected - got)[real].abs().flatten(), (expected.argmax(-1) == got.argmax(-1))[real].float()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter (prints, version drift, fake operators) off the user's screen.

    Errors still raise.
    """
    loggers = [
        logging.getLogger(name) for name in ("transformers", "torch.onnx", "torch.export", "onnxscript", "root", "")
    ]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
