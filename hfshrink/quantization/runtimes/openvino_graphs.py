"""OpenVINO graphs of PyTorch models, through transformers' exporter: their weights and the modules behind them."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import MissingDependencyError, require
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.quantization.graphs.exporting import quiet

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
"""Compile properties that keep OpenVINO from computing float operators in bfloat16."""

WEIGHT_PORTS = {"MatMul": 1, "Convolution": 1, "GroupConvolution": 1, "Gather": 0}
"""Operator -> the operand that holds its weights."""

UNPACKING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose")
"""Operators between stored codes and the operator that reads the weights."""


def export_openvino(model: Any, processor: Any = None) -> tuple[Any, dict[str, str]]:
    """Export a model as one float OpenVINO graph with free batch size and sequence length.

    Every input that the tokenizer makes and the model takes is traced. The graph owns its weights: the model can be
    trained on or dropped.

    Args:
        model: The model, a float32 one; it stays as it was.
        processor: Its tokenizer or image processor, or None.

    Returns:
        transformers' `ExportedModel` with one component, `model`, and name of a graph node -> name of the PyTorch
        module whose weights it reads.

    Raises:
        MissingDependencyError: OpenVINO or NNCF is not installed.
    """
    load_nncf()
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    inputs = random_inputs(model, 2, 8, processor, pairs=True)
    axes = {name: {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for name in inputs}
    if "pixel_values" in inputs:
        axes["pixel_values"] = {0: torch.export.Dim.AUTO}
    flags: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    with silent(), eval_mode(model):
        try:
            exporter = OpenVINOExporter()
        except ImportError as error:  # it names the package and the version that it needs
            raise MissingDependencyError(f"{error} Or install: pip install 'hfshrink[openvino]'") from error
        config = OpenVINOConfig(dynamic=True, dynamic_shapes=axes, stateful=False)
        exported = exporter.export(model, {**inputs, **flags}, config)
        modules = _modules_of_nodes(exported.program, model)
        _own_weights(exported.program)
    exported.config = copy.deepcopy(model.config)  # the exporter hands out the model's own object
    if hasattr(exported.config, "quantization_config"):  # a layer map describes PyTorch modules, not this graph
        del exported.config.quantization_config
    return exported, modules


def run_in_float32(exported: Any) -> Any:
    """The same export, compiled for the CPU with its float operators in float32; a reloaded one needs it again.

    `ExportedModel.from_pretrained(folder, device="cpu", config=FLOAT32)` does both at once.
    """
    return exported.to("cpu", config=dict(FLOAT32))


def weight_types(program: Any, modules: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """(node, module, type of the stored weights, such as "i8") of the nodes that read weights."""
    for node in program.get_ordered_ops():
        name = node.get_friendly_name()
        if name in modules:
            yield name, modules[name], _stored_weight(node).get_element_type().get_type_name()


def _stored_weight(node: Any) -> Any:
    """The node that the weights of an operator are stored in, a constant where they are weights indeed."""
    source = node.input_value(WEIGHT_PORTS[node.get_type_name()]).get_node()
    while source.get_type_name() in UNPACKING:
        source = source.input_value(0).get_node()
    return source


def _modules_of_nodes(program: Any, model: nn.Module) -> dict[str, str]:
    """Node -> module. A fresh graph's constants lie where the model's weights do.

    Tied weights lie at one place; a table and a matrix are told apart by the operator that reads them. Weights that
    the conversion transposed, or scaled by a folded batch normalization, are known by the directions of their rows.
    """
    weights = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim > 1
    }
    tables = {name for name in weights if isinstance(model.get_submodule(name), nn.Embedding)}
    places = {(weight.data_ptr(), name in tables): name for name, weight in reversed(weights.items())}
    found, moved = {}, {}
    for node in program.get_ordered_ops():
        kind = node.get_type_name()
        constant = _stored_weight(node) if kind in WEIGHT_PORTS else node
        if constant is node or constant.get_type_name() != "Constant":
            continue
        place = constant.data.__array_interface__["data"][0], kind == "Gather"
        if place in places:
            found[node.get_friendly_name()] = places[place]
        elif kind != "Gather" and constant.get_element_type().is_real():
            moved[node.get_friendly_name()] = torch.from_numpy(constant.data.copy())
    left = {name: weight for name, weight in weights.items() if name not in {*found.values(), *tables}}
    for node, values in moved.items():
        name = next((name for name, weight in left.items() if _same_directions(values, weight.detach())), None)
        if name is not None:
            found[node] = name
            del left[name]
    return found


def _same_directions(values: Tensor, weight: Tensor) -> bool:
    """Whether the rows (out, in) of two tensors are multiples of each other, the second one transposed or not."""
    if values.numel() != weight.numel():
        return False
    sides = [weight.flatten(1)] + [weight.T] * (weight.ndim == 2)  # GPT-2's Conv1D holds (in, out)
    for rows in sides:
        cosine = torch.cosine_similarity(values.reshape(len(rows), -1).double(), rows.cpu().double())
        if bool((cosine.abs() > 1 - 1e-6).all()):
            return True
    return False


def _own_weights(program: Any) -> None:
    """Copy the constants that lie in the model's memory, which may change or go."""
    import openvino
    from openvino.utils import replace_node

    for node in program.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.data.size > 1:
            copied = openvino.op.Constant(openvino.Tensor(node.data.copy(), shared_memory=False))
            copied.set_friendly_name(node.get_friendly_name())
            replace_node(node, copied)


def load_nncf() -> Any:
    """NNCF, imported without its messages."""
    require("openvino", extra="openvino")
    with silent():
        return require("nncf", extra="openvino")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No chatter and no progress bars of these libraries on the user's screen."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)
