"""`profile_nodes`: every node that ran is counted, shares add up, wrong input is told."""

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from transformers.exporters import ExportedComponent, ExportedModel

from hfshrink.errors import SettingError
from hfshrink.quantization.graphs.profiling import OpTime, _rows, node_table, profile_nodes

GRAPH = """
<ir_version: 9, opset_import: ["" : 20]>
graph (float[b, 64] x) => (float[b, 64] y)
{ a = MatMul(x, w) b0 = Softmax<axis=-1>(a) c = MatMul(b0, w) d = Softmax<axis=-1>(c) y = MatMul(d, w) }
"""
X = {"x": torch.ones(8, 64)}


@pytest.fixture
def proto():
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = onnx.parser.parse_model(GRAPH)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


@pytest.fixture
def path(proto, tmp_path):
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_every_node_is_counted_once(path):
    rows = profile_nodes(path, X, repeats=4)
    assert {row.op_type: row.calls for row in rows} == {"MatMul": 3, "Softmax": 2}


def test_shares_add_up_and_the_slowest_is_first(path):
    rows = profile_nodes(path, X, repeats=4)
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    assert [row.microseconds for row in rows] == sorted((row.microseconds for row in rows), reverse=True)


def test_profile_leaves_no_file(path):
    profile_nodes(path, X, repeats=1)
    assert [one.name for one in path.parent.iterdir()] == ["model.onnx"]


def test_exports_are_profiled_as_files_are(proto):
    exported = ExportedModel({"model": ExportedComponent(onnx_ir.from_proto(proto), {})}, "onnx")
    assert {row.op_type: row.calls for row in profile_nodes(exported, X, repeats=2)} == {"MatMul": 3, "Softmax": 2}


def test_an_interrupted_node_counts_with_its_fastest_call():
    calls = [[5, 7, 900], [6, 800, 1], [700, 8, 2]]
    events = [
        {"args": {"op_name": name}, "dur": dur}
        for call in calls
        for name, dur in zip(("Add", "MatMul", "Add"), call, strict=True)
    ]
    assert _rows(events, 3) == [OpTime("MatMul", 1, 7 / 13, 7.0), OpTime("Add", 2, 6 / 13, 6.0)]


def test_table_sums_the_rest():
    rows = [OpTime("a", 1, 0.5, 50.0), OpTime("b", 2, 0.3, 30.0), OpTime("c", 3, 0.2, 20.0)]
    lines = node_table(rows, 1).splitlines()
    assert lines[2].split("|")[1].strip() == "a"
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["2 others", "5", "50.0 %", "50"]


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (None, {}, "A file does not tell its inputs"),
        ({"z": torch.ones(1)}, {}, "takes x; inputs lacks x"),
        (X, {"repeats": 0}, "repeats and threads must be 1 or more, got 0 and 1"),
    ],
)
def test_bad_settings(path, inputs, settings, message):
    with pytest.raises(SettingError, match=message):
        profile_nodes(path, inputs, **settings)


def test_models_of_pytorch_have_no_nodes():
    with pytest.raises(SettingError, match="takes an ONNX export of one graph, got Linear"):
        profile_nodes(torch.nn.Linear(2, 2), X)
