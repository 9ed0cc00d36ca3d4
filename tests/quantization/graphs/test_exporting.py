"""Fresh exports: what they hold of the process that made them."""

import re
from types import SimpleNamespace

import pytest
import torch

import exports
from hfshrink.quantization.graphs.exporting import drop_traces

onnx_ir = pytest.importorskip("onnx_ir", reason="needs the extra onnx")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_saved_graph_names_source_files(tmp_path, family):
    exports.of(family)[1].save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        assert b"stack_trace" not in content
        assert b"site-packages" not in content
        assert torch.__file__.removesuffix("__init__.py").encode() not in content
        assert not re.search(rb'File "/', content)


def test_traces_of_inner_graphs_and_functions_go_and_module_names_stay():
    def graph(*nodes):
        for node in nodes:
            node.metadata_props.update({"pkg.torch.onnx.stack_trace": "File /a.py", "namespace": "kept"})
        return onnx_ir.Graph([], [], nodes=nodes, opset_imports={"": 20})

    inner, own = onnx_ir.node("Identity", [None]), onnx_ir.node("Identity", [None])
    branch = onnx_ir.node("If", [None], {"then_branch": graph(inner)})
    function = onnx_ir.Function("mine", "f", "", graph=graph(own), attributes=[])
    model = onnx_ir.Model(graph(branch), ir_version=10, functions=[function])

    drop_traces(SimpleNamespace(components={"model": SimpleNamespace(program=model)}))
    assert all(node.metadata_props == {"namespace": "kept"} for node in (inner, own, branch))
