"""From a trained model to its 8-bit graph: learned ranges need no calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.quantization.training.folding import learned_ranges, trained_step
from hfshrink.quantization.training.sites import is_transposed

logger = logging.getLogger(__name__)


def make_learned(
    model: Any, processor: Any, kept_float: Sequence[str], *, calibration: Any = None
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `onnx-int8-static` of a model that `QAT` trained: its own ranges, and no calibration data.

    Embeddings stay float unless they were trained in few bits too, so that the graph computes what was trained.
    """
    from hfshrink.quantization.graphs.dynamic import supports_vnni
    from hfshrink.quantization.graphs.exporting import export_float
    from hfshrink.quantization.graphs.fusing import fuse_graph

    step = trained_step(model)
    if step is not None and step.settings["weight_bits"] == 8 and not supports_vnni():
        logger.warning("Without VNNI sums of 8-bit products can overflow here: train with QAT(weight_bits=7).")
    trained = set((learned_ranges(model) or ({}, {}))[1])
    tables = [n for n, m in model.named_modules() if isinstance(m, nn.Embedding) and n not in trained]
    floats = export_float(model, processor)
    fused = fuse_graph(floats.components["model"].program)
    exported, changed = apply_learned(floats, model, [*kept_float, *tables])
    return exported, changed, {"ranges_from": "training", "fused": fused}


def apply_learned(exported: Any, model: Any, kept_float: Sequence[str] = ()) -> tuple[Any, list[str]]:
    """Put what `QAT` learned into an exported float graph, which then computes what was trained.

    Args:
        exported: A float export of `model`.
        model: The trained model, in eval mode.
        kept_float: Names of modules that stay float; embeddings among them.

    Returns:
        The quantized export and the names of the modules that are int8 in it.

    Raises:
        SettingError: The model has no learned ranges, weights in groups, which int8 nodes have not, or no node of the
            graph has a learned range.
    """
    from hfshrink.quantization.graphs.static import apply_ranges

    found = learned_ranges(model)
    if found is None or not found[0]:
        raise SettingError(
            "The model has no learned ranges of activations: train it with QAT(activation_bits=8), or calibrate it."
        )
    ranges, scales = found
    if any(scale.shape[1] > 1 for scale in scales.values()):
        raise SettingError("Weights in groups have no int8 nodes: train with QAT(group_size=None).")
    scales = {name: _scale_in_graph(exported, model, name, scale.flatten()) for name, scale in scales.items()}
    left = _left_in_float(exported)
    there = {name: limits for name, limits in ranges.items() if name not in left}
    if len(there) < len(ranges):
        kept = ", ".join(sorted(set(ranges) - set(there)))
        logger.warning("The graph keeps %s in float, though trained in 8 bits.", kept)
    scales = {name: scale for name, scale in scales.items() if name in there or name not in ranges}
    return apply_ranges(exported, there, scales, kept_float)


def _convolutions(exported: Any) -> dict[str, Any]:
    """PyTorch module -> its Conv node, by the weight's name: a batch norm that was merged renames the node."""
    nodes = [node for node in exported.components["model"].program.graph if node.op_type == "Conv"]
    return {node.inputs[1].name.removesuffix(".weight"): node for node in nodes if node.inputs[1].name is not None}


def _left_in_float(exported: Any) -> set[str]:
    """Convolutions that the 8-bit graph leaves in float, such as a lone one of image patches."""
    from hfshrink.quantization.graphs.targets import find_targets

    return set(_convolutions(exported)) - {t.module for t in find_targets(exported.components["model"].program)}


def _scale_in_graph(exported: Any, model: Any, name: str, scale: Tensor) -> Tensor:
    """The scale of each output channel, where a batch norm was merged into the weight times what that made of it."""
    node, module = _convolutions(exported).get(name), model.get_submodule(name)
    constant = None if node is None else node.inputs[1].const_value
    if constant is None or is_transposed(module):
        return scale
    after = torch.as_tensor(constant.numpy().copy()).flatten(1).abs().amax(1)
    before = module.weight.detach().float().cpu().flatten(1).abs().amax(1)
    return scale.cpu() * torch.where((before > 0) & (after > 0), after / before, torch.ones_like(before))
