"""Pairs of quantize and dequantize: codes by hand, shared where equal, and graphs that still compute."""

import numpy as np
import pytest

from hfshrink.quantization.graphs.calibrating import open_session
from hfshrink.quantization.graphs.pairs import PairInserter, to_codes

pytest.importorskip("onnxruntime")
import onnx_ir as ir


@pytest.fixture
def program():
    """y = x @ w, z = x @ w + table[ids] on x (rows, 2)."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", type=kind, shape=ir.Shape([None, 2]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None]))
    constants = {"w": np.array([[1.0, -2.0], [0.5, 0.25]]), "table": np.array([[1.0, 0.0], [-2.0, 3.0]])}
    values = {
        name: ir.Value(name=name, type=kind, const_value=ir.Tensor(array.astype(np.float32), name=name))
        for name, array in constants.items()
    }
    nodes = [
        ir.node("MatMul", [x, values["w"]], name="first"),
        ir.node("MatMul", [x, values["w"]], name="second"),
        ir.node("Gather", [values["table"], ids], name="look"),
    ]
    nodes.append(ir.node("Add", [nodes[1].outputs[0], nodes[2].outputs[0]], name="sum"))
    for number, node in enumerate(nodes):
        node.outputs[0].name, node.outputs[0].type = f"value_{number}", kind
    outputs = [nodes[0].outputs[0], nodes[3].outputs[0]]
    graph = ir.Graph([x, ids], outputs, nodes=nodes, initializers=list(values.values()), opset_imports={"": 18})
    return ir.Model(graph, ir_version=9)


def run(program):
    x = np.array([[1.0, 2.0], [-0.6, 0.3]], np.float32)
    return open_session(program).run(None, {"x": x, "ids": np.array([1, 0])}), x


def test_codes_by_hand():
    values, scale = np.array([[1.0, 2.5], [-300.0, 0.1]]), np.array([0.5, 1.0])
    assert to_codes(values, scale, 0, np.int8).tolist() == [[2, 5], [-127, 0]]
    assert to_codes(values, scale, 1, np.int8).tolist() == [[2, 2], [-127, 0]]
    assert to_codes(values, np.array(10.0), 1, np.int8).tolist() == [[0, 0], [-30, 0]]


@pytest.mark.parametrize("same", [True, False])
def test_readers_share_a_pair_where_their_grids_are_equal(program, same):
    pairs = PairInserter(program)
    first, second = list(program.graph)[:2]
    pairs.quantize_input(first, 0, 0.1, 100)
    pairs.quantize_input(second, 0, 0.1, 100 if same else 90)
    assert (first.inputs[0] is second.inputs[0]) == same
    assert sum(node.op_type == "QuantizeLinear" for node in program.graph) == (1 if same else 2)


def test_the_graph_computes_with_what_the_codes_mean(program):
    pairs = PairInserter(program)
    first, second, look = list(program.graph)[:3]
    weight, table = (value.const_value.numpy() for value in (first.inputs[1], look.inputs[0]))
    scale, steps = np.array([0.01, 0.02], np.float32), np.array([0.03, 0.05], np.float32)
    for node in (first, second):
        pairs.quantize_input(node, 0, 0.25, 7)
        pairs.quantize_weight(node, 1, weight, scale, 1)
    pairs.quantize_table(look, table, steps)
    pairs.drop_unused()
    (y, z), x = run(program)
    codes = np.clip(np.round(x / 0.25) + 7, 0, 255) - 7
    expected = (codes * 0.25) @ (to_codes(weight, scale, 1, np.int8) * scale)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(z, expected + (to_codes(table, steps, 1, np.int8) * steps)[[1, 0]], atol=1e-5)
    assert not {"w", "table"} & set(program.graph.initializers)


def test_outputs_reach_every_reader_as_codes(program):
    pairs = PairInserter(program)
    second = list(program.graph)[1]
    pairs.quantize_output(second.outputs[0], 0.5, 10)
    (_, z), x = run(program)
    product = np.round(x @ np.array([[1.0, -2.0], [0.5, 0.25]]) / 0.5) * 0.5
    np.testing.assert_allclose(z, product + np.array([[-2.0, 3.0], [1.0, 0.0]]), atol=1e-6)


def test_a_table_whose_rows_are_an_output(program):
    """The output stays float, and keeps its name."""
    pairs, look = PairInserter(program), list(program.graph)[2]
    table = look.inputs[0].const_value.numpy()
    program.graph.outputs.append(look.outputs[0])
    pairs.quantize_table(look, table, np.array([0.5, 0.25], np.float32))
    assert [value.name for value in program.graph.outputs] == ["value_0", "value_3", "value_2"]
    (_, _, rows), _ = run(program)
    assert rows.dtype == np.float32
    assert rows.tolist() == table[[1, 0]].tolist()


def test_names_stay_unique(program):
    pairs = PairInserter(program)
    assert [pairs.free("w"), pairs.free("w"), pairs.free("new")] == ["w_1", "w_2", "new"]


def test_taking_the_place_of_an_output_keeps_its_name(program):
    pairs = PairInserter(program)
    first = next(iter(program.graph))
    new = pairs.node("Neg", [first.inputs[0]], "negative", first, first.outputs[0])
    pairs.take_place(first.outputs[0], new)
    (y, _), x = run(program)
    assert program.graph.outputs[0].name == "value_0"
    assert np.array_equal(y, -x)
