"""Compressed layers in a saved model: the layer map in `config.json`, its loader for `from_pretrained`.

The map stands where transformers looks for a quantization: `config.quantization_config = {"quant_method": "hfshrink",
"format_version": 1, "layers": {module name: spec}}`. With hfshrink imported, `from_pretrained` puts the layers in
place before it reads the weights. Without, it fails with a size mismatch, because every layer keeps one tensor of
another shape under `weight`. With `ignore_mismatched_sizes=True` and without hfshrink nothing can stop transformers
from filling those layers at random.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfshrink.errors import CheckpointError, SettingError, UnsupportedModelError
from hfshrink.layers import LAYER_KINDS, CompressedLayer, check_parts, check_place, empty_layer, fit_heads
from hfshrink.modules import measure_parameters, replace_module
from hfshrink.record import StepRecord, append_step, config_of

METHOD = "hfshrink"
FORMAT_VERSION = 1
MAX_LAYERS = 100_000  # a layer map from elsewhere that claims more is refused

logger = logging.getLogger(__name__)

for _table in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    _table.pop(METHOD, None)  # registering twice raises, and a reload of this module would


@register_quantization_config(METHOD)
class HfshrinkConfig(QuantizationConfigMixin):
    """The layer map of a model: module name -> spec of the compressed layer in its place.

    Example:
        >>> spec = {"kind": "low_rank", "in_features": 16, "out_features": 24, "rank": 4, "bias": True}
        >>> HfshrinkConfig({"encoder.dense": spec}).to_dict()["layers"] == {"encoder.dense": spec}
        True
    """

    def __init__(self, layers: Any = None, format_version: Any = FORMAT_VERSION, **_: Any) -> None:
        """Check a layer map, which may come from somebody else's `config.json`.

        Raises:
            CheckpointError: A newer format, too many layers, or a spec that describes no known layer.
        """
        if type(format_version) is not int or not 1 <= format_version <= FORMAT_VERSION:
            raise CheckpointError(
                f"This layer map has format {format_version!r}, this hfshrink reads 1..{FORMAT_VERSION}. "
                "Upgrade with: pip install -U hfshrink"
            )
        layers = {} if layers is None else layers
        if not isinstance(layers, dict):
            raise CheckpointError(
                f"Expected the layer map as a JSON object, got {type(layers).__name__}: {str(layers)[:80]}"
            )
        if len(layers) > MAX_LAYERS:
            raise CheckpointError(f"This layer map claims {len(layers):,} layers; at most {MAX_LAYERS:,} are read.")
        for name, spec in layers.items():
            _empty(name, spec)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers


@register_quantizer(METHOD)
class HfshrinkQuantizer(HfQuantizer):
    """Puts the layers of a map into a model that `from_pretrained` is about to fill."""

    quantization_config: HfshrinkConfig

    def validate_environment(self, *_: Any, **__: Any) -> None:
        if not self.pre_quantized:
            raise CheckpointError(
                "quantization_config=HfshrinkConfig(…) can't compress while loading. Load the model without it, "
                "then compress it."
            )

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        found = _resolve_names(self.quantization_config.layers, model)
        modules = dict(model.named_modules())
        for name, spec in found.items():
            dense, layer = modules[name], _empty(name, spec)
            check_place(name, dense, layer, model, CheckpointError)
            replace_module(model, name, layer.to(dense.weight.dtype))
        fit_heads(model)
        self.quantization_config.layers = found
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if hasattr(module, "config"):  # this and every model inside it: floats that train and cast as any others
                module.is_quantized = False
                vars(module.config).pop("_is_quantized", None)
        layers = compressed_layers(model)
        if not layers:
            self.remove_quantization_config(model)
        for name, layer in layers.items():
            _check_loaded(name, layer, model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        for name, layer in compressed_layers(model).items():
            replace_module(model, name, layer.to_dense().to(dtype))
        fit_heads(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def compressed_layers(model: nn.Module) -> dict[str, CompressedLayer]:
    """The compressed layers of a model by module name."""
    kinds = tuple(LAYER_KINDS.values())
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def layer_map(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Module name -> spec of each compressed layer in a model; empty for a dense one."""
    return {name: layer.spec() for name, layer in compressed_layers(model).items()}


def set_layers(model: Any, layers: Mapping[str, CompressedLayer]) -> None:
    """Put compressed layers in the places of a model's dense ones, and write the layer map into its config.

    Layers that are already compressed may be replaced; all others stay and stay in the map. Nothing is changed when it
    raises.

    Args:
        model: A transformers model.
        layers: Module name -> the compressed layer to put there.

    Raises:
        SettingError: The model is quantized by other means, or a layer does not fit its place: no such module, one of
            another class or size, or a weight that is tied to an embedding.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hfshrink.layers import ResizedLinear
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        >>> model = BertModel(config)
        >>> name, rows = "encoder.layer.0.attention.self.query", torch.arange(6)
        >>> set_layers(model, {name: ResizedLinear.from_dense(model.get_submodule(name), rows=rows)})
        >>> layer_map(model)[name]["out_features"]
        6
    """
    check_free_slot(model)
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        if name not in modules:
            raise SettingError(f"{type(model).__name__} has no module called {name!r}.")
        check_place(name, modules[name], layer, model, SettingError)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    fit_heads(model)
    write_map(model)


def write_map(model: Any) -> None:
    """Write the map of the compressed layers that a model has now into its config; without any, none stays there."""
    layers = layer_map(model)
    if layers:
        config_of(model).quantization_config = HfshrinkConfig(layers)
    else:
        _drop_quantizer(model)


def check_free_slot(model: Any) -> None:
    """Raise `SettingError` where another quantization holds the config's one slot; for techniques to call first."""
    held = getattr(config_of(model), "quantization_config", None)
    method = held.get("quant_method") if isinstance(held, dict) else getattr(held, "quant_method", None)
    if held is not None and method != METHOD:
        raise SettingError(
            f"This model is quantized by {getattr(method, 'value', method)}, and a config has one place for a "
            "quantization: compressed layers could not be saved beside it. Compress the float model, save it, and "
            "quantize after loading; or go to ONNX from the compressed one."
        )


def to_dense(model: Any) -> Any:
    """Turn all compressed layers into plain ones, so that any program with transformers can load the saved model.

    The model has its dense size again; what was removed is zero. Values change by the rounding of one product at most.

    Args:
        model: A model, a folder, or a Hub id.

    Returns:
        The same model, changed in place, with one more step in its record. A model without compressed layers stays as
        it is.

    Raises:
        CheckpointError: A layer's stored indices are corrupt, or the folder or Hub id can't be loaded.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> from hfshrink.layers import ResizedLinear
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
        >>> model = BertModel(config)
        >>> dense = model.pooler.dense
        >>> set_layers(model, {"pooler.dense": ResizedLinear.from_dense(dense, columns=torch.arange(7))})
        >>> to_dense(model).pooler.dense
        Linear(in_features=8, out_features=8, bias=True)
    """
    if isinstance(model, str | Path):
        from hfshrink.loading import load

        model, _ = load(model)
    config_of(model)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError("An export has no layers to turn back. Give the model that it was made from.")
    start, layers = time.perf_counter(), compressed_layers(model)
    if not layers:
        logger.warning("to_dense: %s has no compressed layers; it stays as it is.", type(model).__name__)
        return model
    before = measure_parameters(model)
    dense = {name: layer.to_dense() for name, layer in layers.items()}
    for name, plain in dense.items():
        replace_module(model, name, plain)
    fit_heads(model)
    _drop_quantizer(model)
    step = StepRecord(
        technique="to_dense",
        method=" + ".join(sorted({layer.kind for layer in layers.values()})),
        before=before,
        after=measure_parameters(model),
        modules=list(layers),
        seconds=time.perf_counter() - start,
    )
    append_step(model, step)
    return model


def _empty(name: Any, spec: Any) -> CompressedLayer:
    """The layer of a spec on meta, with the module's name in the error."""
    try:
        return empty_layer(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (layer {str(name)[:120]})") from None


def _resolve_names(layers: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The part of a layer map that concerns `model`, under its own module names.

    As transformers does with weights, a map of a model with a head serves its bare base model, and the other way
    round; what belongs to the head of another architecture is left out.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    is_other = type(model).__name__ not in (getattr(model.config, "architectures", None) or [type(model).__name__])
    found: dict[str, Any] = {}
    for name, spec in layers.items():
        names = (name, name.removeprefix(prefix), prefix + name)
        own = next((candidate for candidate in names if candidate in modules), None)
        if own is None and is_other and not name.startswith(prefix):
            continue
        if own is None or own in found:
            what = f"which {type(model).__name__} has not" if own is None else "twice"
            raise CheckpointError(
                f"The layer map names {name[:120]!r}, {what}. Is it the right config.json for these weights?"
            )
        found[own] = spec
    return found


def _check_loaded(name: str, layer: CompressedLayer, model: Any) -> None:
    """Raise `CheckpointError` where a tensor of a layer was not in the checkpoint, or its indices are corrupt."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    if any(tensor.is_meta for _, tensor in tensors):
        return  # offloaded to disk: transformers found it there
    missing = [key for key, tensor in tensors if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise CheckpointError(
            f"The checkpoint has no fitting {', '.join(missing)} for {name}: it is half-written or foreign."
        )
    kept = getattr(layer, "kept", None)
    if kept is not None:
        try:
            kept()
        except CheckpointError as error:
            raise CheckpointError(f"{error} ({name})") from None
        check_parts(name, layer, model, CheckpointError)


def _drop_quantizer(model: Any) -> None:
    for module in model.modules():
        for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
            vars(module).pop(attribute, None)
    vars(config_of(model)).pop("quantization_config", None)
