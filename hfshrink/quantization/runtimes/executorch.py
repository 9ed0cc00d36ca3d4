"""ExecuTorch through transformers' exporter: int8 programs for phones and boards, run by XNNPACK's kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import batches
from hfshrink.errors import SettingError, require
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.modules import max_positions
from hfshrink.quantization.graphs.exporting import quiet
from hfshrink.terminal import progress

LONGEST = 512  # tokens per row, for models whose positions have no limit


def make_executorch_int8(
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    *,
    calibration: Any = None,
    samples: int = 128,
    max_batch: int = 8,
    max_length: int | None = None,
) -> tuple[Any, list[str], dict[str, Any]]:
    """The scheme `executorch-int8`: 8-bit weights per output channel; embeddings stay float.

    Linears quantize their inputs as they come (dynamic). Convolutions need ranges: they become int8 only where there
    is calibration data. The program takes any batch and length up to a bound, for which it plans its memory: with
    attention scores that grows by the square of the length.

    Args:
        model: A float32 model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Names of the modules that stay float.
        calibration: What `hfshrink.calibration.batches` reads; for convolutions.
        samples: Rows to calibrate on.
        max_batch: Most rows of one call.
        max_length: Most tokens of one row; None: as many as the model has positions, or 512.

    Returns:
        The export, the names of the quantized modules, and results for the record.

    Raises:
        SettingError: Nothing to quantize, convolutions alone and no calibration data, or more tokens than positions.
        MissingDependencyError: ExecuTorch is not installed.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> make_executorch_int8(BertModel(config), None, [])  # doctest: +SKIP
    """
    with quiet():  # importing torchao tells of kernels that it could not load
        require("torchao", extra="executorch")
        require("executorch.exir", extra="executorch")
    kinds = (nn.Linear,) if calibration is None else (nn.Linear, nn.Conv2d)
    wanted = [
        name for name, module in model.named_modules() if isinstance(module, kinds) and name not in set(kept_float)
    ]
    if not wanted:
        raise SettingError(
            f"There is nothing to quantize: no Linear outside {list(kept_float)}; convolutions need calibration=, "
            "some images of the kind that the model will see."
        )
    length = _length_of(model, max_length)
    model = copy.deepcopy(model)  # the exporter freezes the parameters and moves the model
    feed = () if calibration is None else batches(calibration, model, processor, batch_size=1, samples=samples)
    return _export(model, processor, wanted, list(feed), (max_batch, length))


def _length_of(model: Any, max_length: int | None) -> int:
    positions = max_positions(model)
    if max_length is None:
        return positions or LONGEST
    if max_length < 2 or (positions is not None and max_length > positions):
        most = "" if positions is None else f" and at most the model's {positions} positions"
        raise SettingError(f"max_length must be at least 2{most}, got {max_length}.")
    return max_length


def _export(
    model: Any, processor: Any, wanted: Sequence[str], rows: list[dict[str, Tensor]], most: tuple[int, int]
) -> tuple[Any, list[str], dict[str, Any]]:
    from transformers.exporters import ExecutorchConfig, ExecutorchExporter, PT2EQuantizer

    max_batch, length = most
    inputs = random_inputs(model, min(2, max_batch), min(8, length), processor, pairs=True)
    free = torch.export.Dim.AUTO
    axes: dict[str, Any] = {name: {0: free(max=max_batch), 1: free(max=length)} for name in inputs}
    if "pixel_values" in inputs:
        axes["pixel_values"] = {0: free(max=max_batch)}
        if rows:  # the size of the images is fixed in the program: that of the data
            inputs["pixel_values"] = rows[0]["pixel_values"][:1].repeat(min(2, max_batch), 1, 1, 1)
    flags: dict[str, Any] = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    changed: set[str] = set()
    feed = [{name: row[name] for name in inputs} for row in rows] or [inputs]
    with quiet(), eval_mode(model):
        quantizer = PT2EQuantizer(_xnnpack_quantizer(set(wanted), changed), progress(feed, "calibrating"))
        config = ExecutorchConfig(dynamic=True, dynamic_shapes=axes, quantizer=quantizer)
        exported = ExecutorchExporter().export(model, {**inputs, **flags}, config)
    if not changed:
        raise SettingError(f"XNNPACK's quantizer took none of {len(wanted)} modules: {', '.join(wanted[:5])}.")
    exported.config = copy.deepcopy(model.config)
    if hasattr(exported.config, "quantization_config"):  # a layer map describes PyTorch modules, not this program
        del exported.config.quantization_config
    return (
        exported,
        sorted(changed),
        {"samples": sum(len(next(iter(row.values()))) for row in rows), "max_batch": max_batch, "max_length": length},
    )


def _xnnpack_quantizer(wanted: set[str], changed: set[str]) -> Any:
    """A quantizer of the Linears and convolutions that belong to the `wanted` modules; it notes the `changed` ones."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    operators = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)

    class Quantizer(XNNPACKQuantizer):
        """XNNPACK's, which would turn whole numbers, and with them positions, into float tensors."""

        def transform_for_annotation(self, model: Any) -> Any:
            return model

        def validate(self, model: Any) -> None:
            marked = [node for node in model.graph.nodes if "quantization_annotation" in node.meta]
            changed.update(_module_of(node) for node in marked if node.target in operators)

    def belongs(node: Any) -> bool:  # asked of an operator together with its weights and a fused ReLU
        return node.target not in operators or _module_of(node) in wanted

    quantizer = Quantizer().set_filter_function(belongs)
    linear = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    convolution = get_symmetric_quantization_config(is_per_channel=True)
    for operator, config in zip(operators, (linear, convolution), strict=True):
        quantizer.set_operator_type(operator, config)
    return quantizer


def _module_of(node: Any) -> str:
    """The PyTorch module that a node of a traced graph came from."""
    scopes = list(node.meta.get("nn_module_stack", {}).values())
    return scopes[-1][0] if scopes else ""
