"""The scheme `onnx-int4`: 4-bit weights in groups, for ONNX Runtime's MatMulNBits; activations stay float."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfshrink.calibration import batches, collect
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.quantization.graphs.decoder import export_graph
from hfshrink.quantization.graphs.nodes import fold_transposes, module_of, weight_nodes
from hfshrink.quantization.graphs.pairs import PairInserter
from hfshrink.quantization.graphs.rounding import (
    Rounded,
    dequantized,
    gptq,
    hqq,
    output_error,
    round_clipped,
    round_to_nearest,
)
from hfshrink.terminal import progress

ROUNDINGS = {"rtn": round_to_nearest, "clip": round_clipped, "hqq": hqq}  # those that need no data
EMBEDDING_BITS = {"int8": 8, "int4": 4, "fp32": None}
GRAM_BYTES = 2**30  # Gram matrices that are held at a time; more modules take more passes over the data
DOMAIN = "com.microsoft"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """How a weight is stored: bits, groups, and what its kernel computes with."""

    bits: int
    group_size: int
    symmetric: bool
    accuracy_level: int


def make_four_bit(  # noqa: PLR0913 - the keywords are the scheme's options
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    group_size: int = 32,
    symmetric: bool = True,
    rounding: str | None = None,
    accuracy_level: int = 4,
    samples: int = 128,
    embeddings: str = "int8",
    head_bits: int = 8,
    generation: bool | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-int4`.

    Args:
        model: A float32 model; it is left as it was.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of modules that stay float.
        calibration: Rows for GPTQ; any form that `hfshrink.calibration.batches` takes.
        group_size: Weights in a row that share a scale: 16, 32, 64, 128 or 256. 32 costs 5 bits a weight, 128 4.25.
        symmetric: Whether 0 is the middle code; else each group has a zero point.
        rounding: `"gptq"` (by the error of the layer's output; needs `calibration`), `"clip"`, `"hqq"`, `"rtn"`; None
            takes GPTQ where there is calibration, else `"clip"`.
        accuracy_level: What the kernel computes with: 4 = 8-bit activations, 1 = float32 (slower).
        samples: Rows of the calibration that GPTQ reads.
        embeddings: `"int8"`, `"int4"` or `"fp32"`.
        head_bits: Of the output layer over the vocabulary of a language model, 8 or 4.
        generation: Whether the export generates; None means wherever the model is a causal language model.

    Returns:
        The export, the names of the modules in few bits, and what there is to report.

    Raises:
        SettingError: A value out of range, GPTQ without calibration, nothing to quantize.
    """
    rounding = rounding or ("clip" if calibration is None else "gptq")
    _check(rounding, calibration, group_size, accuracy_level, embeddings, head_bits)
    exported = export_graph(model, processor, generation)
    grid = Grid(4, group_size, symmetric, accuracy_level)
    writer = FourBitWriter(exported.program, kept_float)
    names = sorted({module_of(node) for node in writer.matrices})
    head = head_name(model)
    rounded: dict[str, Rounded] = {}
    ratios: dict[str, float] = {}
    if rounding == "gptq":
        rest = [name for name in names if name != head]
        rounded, ratios = _round_by_output(model, processor, calibration, samples, rest, grid)
    writer.write_matrices(grid, ROUNDINGS.get(rounding, round_clipped), rounded, {head: head_bits} if head else {})
    if EMBEDDING_BITS[embeddings] is not None:
        writer.write_tables(Grid(EMBEDDING_BITS[embeddings] or 8, group_size, True, accuracy_level))
    return exported, writer.finish(), _results(writer, rounding, names, rounded, ratios, exported.program)


class FourBitWriter:
    """Replaces the weights of one graph by codes.

    Attributes:
        matrices: MatMul and Gemm nodes to change.
        tables: Gather nodes, the embeddings.
        changed: Modules that were changed.
    """

    def __init__(self, program: Any, kept_float: Collection[str]) -> None:
        """Find what there is to quantize.

        Raises:
            SettingError: There is nothing.
        """
        fold_transposes(program)
        self.program, self.edit = program, PairInserter(program)
        nodes = [node for node in weight_nodes(program, ("MatMul", "Gemm")) if module_of(node) not in kept_float]
        self.matrices = [node for node in nodes if _is_plain(node)]
        tables = [node for node in weight_nodes(program, ("Gather",)) if module_of(node) not in kept_float]
        self.tables = [node for node in tables if _attribute(node, "axis", 0) == 0]
        self.changed: list[str] = []
        self._stored: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}
        self._heads: list[tuple[Tensor, Grid, Any, Any]] = []
        if not self.matrices:
            raise SettingError(
                f"There is nothing to quantize: no MatMul or Gemm with constant weights outside {list(kept_float)}. "
                "4-bit weights are for transformers; convolutions stay float, they need onnx-int8-static."
            )

    def write_matrices(
        self, grid: Grid, rounding: Any, rounded: dict[str, Rounded], other_bits: dict[str, int]
    ) -> None:
        """Turn each MatMul or Gemm into MatMulNBits, with the codes given by module, or made by `rounding`."""
        for node in progress(self.matrices, "4-bit weights"):
            module = module_of(node)
            bits = other_bits.get(module, grid.bits)
            its = Grid(bits, grid.group_size, grid.symmetric or bits == 8, grid.accuracy_level)
            key = (id(node.inputs[1]), bits)
            if key not in self._stored:
                weight = _weight(node)
                made = rounded.get(module)
                if made is None or made.codes.shape != weight.shape:
                    made = _named(module, rounding, weight, bits, its.group_size, its.symmetric)
                self._stored[key] = self._store(node.inputs[1].name, made, its)
                if module in other_bits:
                    self._heads.append((weight, its, *self._stored[key][:2]))
            self._replace_matrix(node, its, *self._stored[key])
            self.changed.append(module)

    def write_tables(self, grid: Grid) -> None:
        """Turn each Gather of a table into GatherBlockQuantized; a table tied to the head shares its codes."""
        for node in self.tables:
            table = torch.from_numpy(np.array(node.inputs[0].const_value.numpy()))
            shared = self._shared(table, grid)
            if shared is None:
                rounding = round_to_nearest if grid.bits == 8 else round_clipped
                made = _named(module_of(node), rounding, table, grid.bits, grid.group_size, True)
                codes, scales, _ = self._store(node.inputs[0].name, made, grid, flat=True)
            else:
                codes, scales = shared
            attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": grid.group_size, "bits": grid.bits}
            self._replace(node, "GatherBlockQuantized", [codes, node.inputs[1], scales], attributes)
            self.changed.append(module_of(node))

    def finish(self) -> list[str]:
        """Drop the float weights that no node reads any more; the names of what was changed."""
        self.edit.drop_unused()
        self.program.opset_imports.setdefault(DOMAIN, 1)
        return sorted(set(self.changed))

    def _shared(self, table: Tensor, grid: Grid) -> tuple[Any, Any] | None:
        for weight, its, codes, scales in self._heads:
            whole = table.shape[1] % its.group_size == 0
            if whole and its.bits == grid.bits and its.symmetric and torch.equal(weight, table):
                shape = self.edit.constant(self.edit.free("table_shape"), np.array([table.shape[0], -1]))
                flat = self.edit.node("Reshape", [codes, shape], "tied_table", self.program.graph[0], codes)
                flat.shape = None  # not that of the codes in groups
                return flat, scales
        return None

    def _store(self, name: str, made: Rounded, grid: Grid, flat: bool = False) -> tuple[Any, Any, Any]:
        """Constants of codes, scales and zero points (None if symmetric)."""
        packed = pack(made.codes, grid.bits, grid.group_size)
        if flat:  # (rows, bytes), without the padding of the last group
            width = -(-made.codes.shape[1] * grid.bits // 8)
            packed = np.ascontiguousarray(packed.reshape(len(packed), -1)[:, :width])
        codes = self.edit.constant(self.edit.free(f"{name}_Q{grid.bits}"), packed)
        scales = self.edit.constant(self.edit.free(f"{name}_scales"), made.scales.numpy())
        if made.zero_points is None:
            return codes, scales, None
        zeros = pack(made.zero_points, grid.bits, made.zero_points.shape[1] + made.zero_points.shape[1] % 2)[:, 0]
        return codes, scales, self.edit.constant(self.edit.free(f"{name}_zero_points"), zeros)

    def _replace_matrix(self, node: Any, grid: Grid, codes: Any, scales: Any, zeros: Any) -> None:
        width, outputs = _weight_shape(node)
        inputs = [node.inputs[0], codes, scales, zeros]
        if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
            inputs += [None, node.inputs[2]]  # the fifth would be the order of the columns
        attributes = {"K": width, "N": outputs, "bits": grid.bits, "block_size": grid.group_size}
        self._replace(node, "MatMulNBits", inputs, {**attributes, "accuracy_level": grid.accuracy_level})

    def _replace(self, node: Any, op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> None:
        import onnx_ir

        made = onnx_ir.node(op_type, inputs, attributes, domain=DOMAIN, name=f"{node.name}_{op_type}")
        made.metadata_props.update(node.metadata_props)
        result, old = made.outputs[0], node.outputs[0]
        result.name, result.type, result.shape = self.edit.free(f"{old.name}_{op_type}"), old.type, old.shape
        self.program.graph.insert_before(node, made)
        self.edit.take_place(old, result)


def pack(codes: Tensor, bits: int, group_size: int) -> np.ndarray:
    """Codes as MatMulNBits reads them: in groups, two 4-bit codes to a byte, the first one in the low half.

    Args:
        codes: Shape (out, in), uint8.
        bits: 4 or 8.
        group_size: Neighbours in a group; the last one is filled up with zeros.

    Returns:
        Shape (out, groups, group_size · bits / 8), uint8.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4, 2).tolist()
        [[[33], [3]]]
    """
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % group_size)).unflatten(1, (-1, group_size))
    if bits == 4:
        padded = padded[..., ::2] | (padded[..., 1::2] << 4)
    return np.ascontiguousarray(padded.numpy())


def _round_by_output(
    model: Any, processor: Any, calibration: Any, samples: int, names: list[str], grid: Grid
) -> tuple[dict[str, Rounded], dict[str, float]]:
    """GPTQ's codes by module, and each one's output error as a share of that of rounding to the nearest."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    known = [name for name in names if isinstance(modules.get(name), nn.Linear | Conv1D)]  # `collect` sees no others
    rounded, ratios, setting = {}, {}, (grid.bits, grid.group_size, grid.symmetric)
    for chunk in _passes(modules, known):
        with torch.inference_mode(), eval_mode(model), collect(model, "input_gram", include=chunk) as stats:
            rows = batches(calibration, model, processor, samples=samples)
            for batch in progress(rows, "calibration"):
                model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
        for name, its in progress(stats.items(), "GPTQ", total=len(stats)):
            weight, gram = _module_weight(modules[name]), torch.as_tensor(its.input_gram).cpu()
            rounded[name] = _named(name, gptq, weight, gram, *setting)
            near = round_to_nearest(weight, *setting)
            errors = [output_error(weight - dequantized(*r, grid.group_size), gram) for r in (rounded[name], near)]
            ratios[name] = float(errors[0] / errors[1]) if errors[1] > 0 else 1.0
    return rounded, ratios


def _passes(modules: dict[str, Any], names: list[str]) -> list[list[str]]:
    """Names in chunks whose Gram matrices fit into `GRAM_BYTES`, at least one each."""
    chunks: list[list[str]] = [[]]
    used = 0
    for name in names:
        size = 8 * _module_weight(modules[name]).shape[1] ** 2
        if chunks[-1] and used + size > GRAM_BYTES:
            chunks.append([])
            used = 0
        chunks[-1].append(name)
        used += size
    return [chunk for chunk in chunks if chunk]


def _module_weight(module: Any) -> Tensor:
    """A Linear's or GPT-2 Conv1D's weight as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    weight = module.weight.detach().float().cpu()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def head_name(model: Any) -> str | None:
    """The output layer over the vocabulary, None where there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None) if head is not None else None


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def _is_plain(node: Any) -> bool:
    """Whether MatMulNBits can do the same: x W + b."""
    factors = [_attribute(node, name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and not _attribute(node, "transA", 0)


def _weight_shape(node: Any) -> tuple[int, int]:
    rows, columns = (int(size) for size in node.inputs[1].const_value.shape)
    return (columns, rows) if _attribute(node, "transB", 0) else (rows, columns)


def _weight(node: Any) -> Tensor:
    """A node's weight as (out, in)."""
    weight = torch.from_numpy(np.array(node.inputs[1].const_value.numpy()))
    return weight if _attribute(node, "transB", 0) else weight.T.contiguous()


def _named(module: str, rounding: Any, *args: Any) -> Rounded:
    try:
        return rounding(*args)
    except SettingError as error:
        raise SettingError(f"{error} ({module})") from None


def _check(
    rounding: str, calibration: Any, group_size: int, accuracy_level: int, embeddings: str, head_bits: int
) -> None:
    choices = {
        "rounding": (rounding, (*ROUNDINGS, "gptq")),
        "group_size": (group_size, (16, 32, 64, 128, 256)),
        "accuracy_level": (accuracy_level, (0, 1, 2, 3, 4)),
        "embeddings": (embeddings, tuple(EMBEDDING_BITS)),
        "head_bits": (head_bits, (4, 8)),
    }
    for name, (value, allowed) in choices.items():
        if isinstance(value, bool) or value not in allowed:
            raise SettingError(f"{name} must be one of {', '.join(map(str, allowed))}, got {value!r}.")
    if rounding == "gptq" and calibration is None:
        raise SettingError("GPTQ rounds by the layers' inputs and needs calibration=; without data use 'clip'.")


def _results(
    writer: FourBitWriter,
    rounding: str,
    names: list[str],
    rounded: dict[str, Rounded],
    ratios: dict[str, float],
    program: Any,
) -> dict[str, Any]:
    results: dict[str, Any] = {"rounding": rounding, "matrices": len(writer.matrices), "tables": len(writer.tables)}
    if rounding == "gptq":
        results["rounded_without_data"] = [name for name in names if name not in rounded]
        results["output_error_to_nearest"] = float(np.mean(list(ratios.values()))) if ratios else None
    convolutions = sum(node.op_type == "Conv" for node in program.graph)
    if convolutions:
        results["note"] = f"{convolutions} convolutions stay float: 4-bit kernels are for matrix products."
    return results
