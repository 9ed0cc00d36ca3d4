"""What a matrix product costs on this processor, precision by precision: for plans under a budget of milliseconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from hfshrink.errors import SettingError, require
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.modules import max_positions
from hfshrink.quantization.perturbations import rows_of
from hfshrink.terminal import progress

TOKENS = 128
"""Tokens of the one example whose time counts, as `profile` measures; fewer where a model has fewer positions."""

WARM_UP, REPEATS = 3, 15

Product = tuple[int, int, int]
"""Rows of the input, width, outputs."""


def find_products(model: Any, processor: Any, modules: Sequence[str]) -> dict[str, Product]:
    """The matrix products that modules compute for one example: 128 tokens, or an image.

    Raises:
        SettingError: A module is not called by the model.
    """
    found: dict[str, Product] = {}

    def note(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            width = args[0].shape[-1]
            found[name] = (args[0].numel() // width, width, rows_of(module).shape[0])

        return hook

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(eval_mode(model))
        for name in modules:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(note(name)).remove)
        model(**random_inputs(model, 1, tokens_of(model), processor))
    if idle := [name for name in modules if name not in found]:
        raise SettingError(f"{', '.join(idle[:5])} did not run, so there is no time of it. Leave it out: exclude=….")
    return {name: found[name] for name in modules}


def tokens_of(model: Any) -> int:
    """128, or the positions of a model that has fewer."""
    return min(TOKENS, max_positions(model) or TOKENS)


def measure_costs(
    products: Mapping[str, Product], precisions: Sequence[str], write: Callable[[Any, str], Any]
) -> dict[str, dict[str, int]]:
    """Time each product alone at each precision: a graph of one MatMul, one thread, median processor time.

    Products of one shape are timed once. In the whole graph neighbours share the quantization of their input, so the
    sum over modules of int8 is a little more than they take together.

    Args:
        products: Module -> its product.
        precisions: Names.
        write: (export of the MatMul, a node named `matrix`; a precision) -> export at that precision.

    Returns:
        Module -> precision -> microseconds, whole numbers of at least 1.
    """
    pairs = [(product, name) for product in dict.fromkeys(products.values()) for name in precisions]
    known = {
        (product, name): _microseconds(write(_export_of(product), name).components["model"].program, product)
        for product, name in progress(pairs, "latency")
    }
    return {module: {name: known[product, name] for name in precisions} for module, product in products.items()}


def _export_of(product: Product) -> Any:
    """An export of one MatMul with a constant weight."""
    import onnx_ir
    from transformers.exporters import ExportedComponent, ExportedModel

    rows, width, outputs = product
    weight = np.random.default_rng(0).normal(size=(width, outputs)).astype(np.float32) / width**0.5
    kind = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    x = onnx_ir.Value(name="x", type=kind, shape=onnx_ir.Shape([rows, width]))
    constant = onnx_ir.Value(
        name="weight", type=kind, shape=onnx_ir.Shape(weight.shape), const_value=onnx_ir.tensor(weight, name="weight")
    )
    node = onnx_ir.node("MatMul", [x, constant], name="matrix")
    node.outputs[0].name, node.outputs[0].type = "y", kind
    node.outputs[0].shape = onnx_ir.Shape([rows, outputs])
    graph = onnx_ir.Graph(
        [x], [node.outputs[0]], nodes=[node], initializers=[constant], opset_imports={"": 21}, name="product"
    )
    program = onnx_ir.Model(graph, ir_version=10)
    return ExportedModel({"model": ExportedComponent(program, None)}, "onnx")  # type: ignore[arg-type]


def _microseconds(program: Any, product: Product) -> int:
    """Median processor time of a graph that takes x (rows, width)."""
    runtime = require("onnxruntime", extra="onnx")
    import onnx_ir

    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 3
    model = onnx_ir.to_proto(program).SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": np.random.default_rng(1).normal(size=product[:2]).astype(np.float32)}
    times = []
    for _ in range(WARM_UP + REPEATS):
        start = time.process_time()
        session.run(None, feed)
        times.append(time.process_time() - start)
    return max(1, round(1e6 * statistics.median(times[WARM_UP:])))
