"""Which nodes of a graph hold weights, and which PyTorch modules they came from."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any


def weight_nodes(program: Any, ops: Sequence[str]) -> list[Any]:
    """Nodes whose weight operand is a constant float table or matrix, as ONNX Runtime's quantizer takes them."""
    import onnx_ir

    found = []
    for node in program.graph:
        if node.op_type not in ops:
            continue
        weight = node.inputs[0 if node.op_type == "Gather" else 1]
        constant = None if weight is None else weight.const_value
        if constant is not None and constant.dtype == onnx_ir.DataType.FLOAT and len(constant.shape) == 2:
            found.append(node)
    return found


def module_of(node: Any) -> str:
    """The PyTorch module that a node came from: the last scope before the operator's own.

    A Conv is named after its weight: a batch norm that is merged into it gives the node its own scopes.
    """
    if node.op_type == "Conv":
        maker = node.inputs[1].producer()  # of int8 codes
        module, dot, _ = (node.inputs[1] if maker is None else maker.inputs[0]).name.rpartition(".weight")
        if dot:
            return module
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    return scopes[-2] if len(scopes) > 1 else node.name


def fold_transposes(program: Any) -> None:
    """Transpose constant weights for good, in place.

    The exporter's optimizer leaves large ones, such as a vocabulary's, to run time, where no quantizer sees them.
    """
    import numpy as np
    import onnx_ir

    for node in list(program.graph):
        constant = node.inputs[0].const_value if node.op_type == "Transpose" and node.inputs[0] is not None else None
        if constant is None:
            continue
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
        array, old = np.ascontiguousarray(np.transpose(constant.numpy(), order)), node.outputs[0]
        tensor = onnx_ir.tensor(array, name=old.name)
        new = onnx_ir.Value(name=old.name, shape=onnx_ir.Shape(array.shape), type=old.type, const_value=tensor)
        onnx_ir.convenience.replace_all_uses_with(old, new)
        program.graph.remove(node, safe=True)
        program.graph.register_initializer(new)
