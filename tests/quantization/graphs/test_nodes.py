"""Where the weights of a graph lie."""

import numpy as np
import onnx_ir as ir
import torch

from hfshrink.quantization.graphs.nodes import fold_transposes, weight_nodes


def test_weights_that_are_transposed_at_run_time_are_quantized_too():
    """The exporter leaves the transpose of a large vocabulary in the graph."""
    values = [ir.val("x", ir.DataType.FLOAT, ["rows", 64])]
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).numpy()
    table = ir.Value(name="w", shape=ir.Shape([32, 64]), const_value=ir.tensor(weight, name="w"))
    turned = ir.node("Transpose", [table], attributes={"perm": [1, 0]})
    product = ir.node("MatMul", [values[0], turned.outputs[0]])
    graph = ir.Graph(values, product.outputs, nodes=[turned, product], initializers=[table], opset_imports={"": 21})
    program = ir.Model(graph, ir_version=10)
    assert weight_nodes(program, ("MatMul",)) == []
    fold_transposes(program)
    [found] = weight_nodes(program, ("MatMul",))
    assert np.array_equal(found.inputs[1].const_value.numpy(), weight.T)
    assert [node.op_type for node in program.graph] == ["MatMul"]
