"""Rewrites of a float ONNX graph that ONNX Runtime runs faster on a CPU; every one computes what it replaces."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

ATTENTION_OPSET, FIRST_RUNTIME = 23, (1, 23)
"""The first operator set with `Attention`, and the first ONNX Runtime that runs it on a CPU."""

OLDEST_OPSET = 20
"""What the exporter writes. Up to 23 operators took more types, and GroupNormalization's scale became one per channel.
"""


@dataclass
class _Match:
    """The parts of one attention: values of shape (batch, length, heads × size), the rest as found."""

    query: Any
    key: Any
    value: Any
    mask: Any
    empty: Any
    zero: Any
    heads: int
    scale: float
    output: Any


def fuse_graph(program: Any) -> dict[str, int]:
    """Rewrite a float graph in place into forms that ONNX Runtime's CPU kernels run faster.

    - Attention: reshape, transposes, softmax(q kᵀ · scale + mask) v, transpose, reshape become one `Attention` of the
      ONNX standard (operator set 23), whose kernel reads heads in strides: 1.3 times faster than the parts. An
      ONNX Runtime that has no such kernel (before 1.23) keeps the parts.
    - Normed sums: the Add before a LayerNormalization becomes a `Sum`. ONNX Runtime would fuse the Add into
      `SkipLayerNormalization`, whose CPU kernel takes 7 to 9 times as long (benchmarks/quantization_nodes.py).

    Where a shape is unknown, or anything differs from the known form, the graph stays as it is.

    Args:
        program: The `onnx_ir.Model` of a float export.

    Returns:
        How many were rewritten: `attention`, `norms`.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    found = {"attention": _fuse_attention(program), "norms": _keep_norms_apart(program.graph)}
    if any(found.values()):
        RemoveUnusedNodesPass()(program)
    return found


def _keep_norms_apart(graph: Any) -> int:
    done = 0
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        add = _producer(norm.inputs[0], "Add")
        if add is not None and all(value.const_value is None for value in add.inputs):  # a bias is no second branch
            add.op_type = "Sum"
            done += 1
    return done


def _fuse_attention(program: Any) -> int:
    graph = program.graph
    if not _can_raise(program) or not _has_kernel():
        return 0
    masks: dict[Hashable, Any] = {}
    done = 0
    for softmax in [node for node in graph if node.op_type == "Softmax" and node.domain == ""]:
        match = _match_attention(softmax)
        if match is not None:
            _replace(graph, match, masks)
            done += 1
    if done:
        graph.sort()  # a mask may have been spread after the first attention that reads it
        program.opset_imports[""] = max(program.opset_imports[""], ATTENTION_OPSET)
    return done


def _can_raise(program: Any) -> bool:
    """Whether all operators mean in operator set 23 what they mean in the graph's."""
    opset = program.opset_imports.get("", 0)
    if opset >= ATTENTION_OPSET:
        return True
    kinds = {node.op_type for node in program.graph.all_nodes() if node.domain == ""}
    return opset >= OLDEST_OPSET and "GroupNormalization" not in kinds and not program.functions


def _has_kernel() -> bool:
    """Whether the ONNX Runtime that is installed runs `Attention`; a graph for another machine has it."""
    try:
        return tuple(int(part) for part in version("onnxruntime").split(".")[:2]) >= FIRST_RUNTIME
    except (PackageNotFoundError, ValueError):
        return True


def _match_attention(softmax: Any) -> _Match | None:
    """The attention around a softmax, or None where anything differs from the known form."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    scores, mask = _split_mask(softmax.inputs[0])
    scores, factor = _unscaled(scores)
    product, weighted = _producer(scores, "MatMul"), _only_user(softmax.outputs[0], "MatMul")
    if product is None or weighted is None or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    (query, by_query), (key, by_key) = (_unscaled(value) for value in product.inputs)
    found = _heads(query), _heads(key, transposed=True), _heads(weighted.inputs[1])
    ending = _ending(weighted.outputs[0])
    scale = factor * by_query * by_key
    if None in found or ending is None or not (math.isfinite(scale) and scale > 0):  # 0 would mean the default
        return None
    (query, heads), (key, key_heads), (value, value_heads) = found
    output, empty, zero = ending
    match = _Match(query, key, value, mask, empty, zero, heads, scale, output)
    return match if heads == key_heads == value_heads and _fits(match) else None


def _fits(match: _Match) -> bool:
    """Whether no part is broadcast in a way that `Attention` does not know, and the output merges the heads."""
    query, key, value, output = (_sizes_of(part) for part in (match.query, match.key, match.value, match.output))
    if not query[0] or not query[0] == key[0] == value[0]:
        return False
    if len(output) != 3 or output[2] != value[2] or not _share_rows(output, query):
        return False
    if match.empty is not None and _sizes_of(match.empty)[0] not in (1, query[0]):
        return False
    if match.mask is None:
        return True
    mask = _sizes_of(match.mask)
    return len(mask) == 4 and mask[0] in (1, query[0]) and mask[1] in (1, match.heads)


def _sizes_of(value: Any) -> list[Any]:
    """The sizes of a value: numbers, names of free sizes, None where unknown; none at all without a known rank."""
    return [] if value.shape is None else [size if isinstance(size, int) else size.value for size in value.shape]


def _share_rows(one: list[Any], other: list[Any]) -> bool:
    """Whether the first two sizes of two equally large values are the same: where one of them is, the other has to."""
    return any(left is not None and left == right for left, right in zip(one[:2], other[:2], strict=True))


def _replace(graph: Any, match: _Match, masks: dict[Hashable, Any]) -> None:
    """Put one `Attention` before the node that made the output.

    Args:
        graph: The graph.
        match: What it replaces.
        masks: Name of a mask and numbers of queries and keys -> its expanded form, filled here: the layers of a model
            share one.
    """
    import onnx_ir as ir

    last = match.output.producer()
    new = []
    inputs = [match.query, match.key, match.value]
    if match.mask is not None:
        lengths = [_sizes_of(value)[1] for value in inputs[:2]]
        names = [value.name if size is None else size for value, size in zip(inputs, lengths, strict=False)]
        place = (match.mask.name, *names)
        if place not in masks:
            new += _expand_mask(graph, match)
            masks[place] = new[-1].outputs[0]
        inputs.append(masks[place])
    settings = {"q_num_heads": match.heads, "kv_num_heads": match.heads, "scale": match.scale}
    new.append(ir.node("Attention", inputs, settings))
    if match.empty is not None:  # rows without any token to look at give zeros
        axis = _constant(graph, "attention_head_axis", [1])
        new.append(ir.node("Squeeze", [match.empty, axis]))
        new.append(ir.node("Where", [new[-1].outputs[0], match.zero, new[-2].outputs[0]]))
    result = new[-1].outputs[0]
    result.shape, result.dtype = match.output.shape, match.output.dtype
    for node in new:
        node.metadata_props.update(last.metadata_props)
    graph.insert_before(last, new)
    is_output, name = match.output.is_graph_output(), match.output.name
    match.output.replace_all_uses_with(result, replace_graph_outputs=True)
    if is_output:
        match.output.name, result.name = f"{name}_parts", name


def _expand_mask(graph: Any, match: _Match) -> list[Any]:
    """Nodes that spread a mask over queries and keys: `Attention` broadcasts over batch and heads only."""
    import onnx_ir as ir

    lengths = [ir.node("Shape", [value], {"start": 1, "end": 2}) for value in (match.query, match.key)]
    ones = _constant(graph, "attention_ones", [1, 1])
    shape = ir.node("Concat", [ones, *(node.outputs[0] for node in lengths)], {"axis": 0})
    return [*lengths, shape, ir.node("Expand", [match.mask, shape.outputs[0]])]


def _split_mask(value: Any) -> tuple[Any, Any]:
    """Scores and the mask added to them, or None."""
    add = _producer(value, "Add")
    if add is None:
        return value, None
    left, right = add.inputs
    is_left = _producer(_unscaled(left)[0], "MatMul") is not None
    return (left, right) if is_left else (right, left)


def _unscaled(value: Any) -> tuple[Any, float]:
    """A value without the constant that multiplies it, and that constant."""
    product = _producer(value, "Mul")
    if product is not None:
        for one, other in (product.inputs, tuple(reversed(product.inputs))):
            constant = None if other.const_value is None else other.const_value.numpy()
            if constant is not None and constant.size == 1 and constant.ndim <= 4:
                return one, float(constant.reshape(()))
    return value, 1.0


def _heads(value: Any, transposed: bool = False) -> Any:
    """The (batch, length, heads × size) value behind heads of shape (batch, heads, length, size), and their number.

    Args:
        value: The heads.
        transposed: They have the shape (batch, heads, size, length).
    """
    swap = _producer(value, "Transpose")
    if transposed and (swap is None or _permutation(swap) != [0, 2, 3, 1]):
        value = _untransposed(value)
        swap = None if value is None else _producer(value, "Transpose")
    elif transposed:
        return _merged(swap.inputs[0])
    if swap is None or _permutation(swap) != [0, 2, 1, 3]:
        return None
    return _merged(swap.inputs[0])


def _merged(value: Any) -> Any:
    """What was reshaped to (batch, length, heads, size), and the number of heads."""
    reshape = _producer(value, "Reshape")
    if reshape is None:
        return None
    source, split = _sizes_of(reshape.inputs[0]), _sizes_of(value)
    if len(source) != 3 or len(split) != 4 or not all(isinstance(size, int) for size in (source[2], *split[2:])):
        return None
    fits = source[2] == split[2] * split[3] and _share_rows(source, split)
    return (reshape.inputs[0], split[2]) if fits else None


def _untransposed(value: Any) -> Any:
    """The (…, length, size) behind (…, size, length): by one Transpose, or by one between two Reshapes."""
    swap = _producer(value, "Transpose")
    if swap is not None:
        return swap.inputs[0] if _permutation(swap) == [0, 1, 3, 2] else None
    outer = _producer(value, "Reshape")
    swap = None if outer is None else _producer(outer.inputs[0], "Transpose")
    inner = None if swap is None or _permutation(swap) != [0, 2, 1] else _producer(swap.inputs[0], "Reshape")
    if inner is None or inner.inputs[0].shape is None or len(inner.inputs[0].shape) != 4:
        return None
    source = inner.inputs[0]
    flat, back = _sizes(inner.inputs[1], source), _sizes(outer.inputs[1], source)
    # (batch · heads, length, size), and back with the two swapped
    return source if flat == [-1, (2, 3), (3, 4)] and back == [(0, 2), (3, 4), (2, 3)] else None


def _sizes(shape: Any, source: Any) -> list[Any]:
    """A computed shape, part by part: a number, the (start, end) of `source`'s own sizes, or None for the rest."""
    concat = _producer(shape, "Concat")
    return [] if concat is None else [_size(part, source, len(source.shape)) for part in concat.inputs]


def _size(part: Any, source: Any, rank: int) -> Any:
    if part.const_value is not None:
        return int(part.const_value.numpy().reshape(-1)[0]) if part.const_value.size == 1 else None
    piece = _producer(part, "Slice")
    sizes = None if piece is None else _producer(piece.inputs[0], "Shape")
    if sizes is None or sizes.inputs[0] is not source or any(v.const_value is None for v in piece.inputs[1:3]):
        return None
    start, end = (int(value.const_value.numpy().reshape(-1)[0]) for value in piece.inputs[1:3])
    return slice(start, end).indices(rank)[:2]


def _ending(value: Any) -> tuple[Any, Any, Any] | None:
    """The (batch, length, heads × size) output after an attention; the condition and value of its empty rows."""
    empty = zero = None
    where = _only_user(value, "Where")
    if where is not None:
        empty, zero = where.inputs[0], where.inputs[1]
        fits = empty.shape is not None and len(empty.shape) == 4 and empty.shape[1] == 1 and empty.shape[3] == 1
        constant = zero.const_value
        is_scalar = constant is not None and constant.size == 1 and len(constant.shape) <= 3
        if not fits or where.inputs[2] is not value or not is_scalar:
            return None
        value = where.outputs[0]
    swap = _only_user(value, "Transpose")
    reshape = None if swap is None or _permutation(swap) != [0, 2, 1, 3] else _only_user(swap.outputs[0], "Reshape")
    return None if reshape is None else (reshape.outputs[0], empty, zero)


def _producer(value: Any, op: str) -> Any:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op and node.domain == "" else None


def _only_user(value: Any, op: str) -> Any:
    """The node that alone reads a value, where it is such an operator; else None."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0].node if users[0].node.op_type == op and users[0].node.domain == "" else None


def _permutation(node: Any) -> list[int]:
    return list(node.attributes.get_ints("perm", []))


def _constant(graph: Any, name: str, numbers: list[int]) -> Any:
    """An integer constant of the graph, made once."""
    import numpy as np
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)])
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    return graph.initializers[name]
