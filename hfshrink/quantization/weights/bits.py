"""bitsandbytes: int8, nf4 and fp4 weights of a model in memory, or while a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfshrink.errors import SettingError, require
from hfshrink.loading import HUB_KEYWORDS, load
from hfshrink.modules import replace_module
from hfshrink.quantization.weights.choice import (
    BITS,
    Choice,
    check_finite,
    check_unquantized,
    choose_layers,
    kept_names,
)
from hfshrink.quantization.weights.exactness import be_quiet, keep_exact
from hfshrink.saving import read_config
from hfshrink.streaming.sources import empty_model


def quantize_int8(model: Any, kept_float: Sequence[str] = ()) -> tuple[Any, list[str], dict[str, Any]]:
    r"""int8 weights, one scale per output, and int8 activations, save for their outliers: LLM.int8.

    $$W_{ij} \approx s_i q_{ij} / 127, \quad s_i = \max_j |W_{ij}|$$; inputs with values above 6 are multiplied in
    float16. Dettmers et al. 2022, arXiv 2208.07339.

    Args:
        model: A float model, changed in place.
        kept_float: Names of modules to leave in float.

    Returns:
        The same model, the names of its quantized layers, and what there is to say: `skipped`, name -> reason.

    Raises:
        SettingError: Nothing to quantize, a weight not finite or beyond float16, or a layer map in the config.
        UnsupportedModelError: The model is quantized already.
        MissingDependencyError: The extra `bnb` is not installed.
    """
    return quantize_layers(model, "int8", kept_float)


def quantize_nf4(
    model: Any, kept_float: Sequence[str] = (), *, double_quantization: bool = True
) -> tuple[Any, list[str], dict[str, Any]]:
    """4-bit NormalFloat weights: in blocks of 64 the nearest of 16 quantiles of a normal distribution.

    Double quantization stores the blocks' scales in 8 bits, 0.37 bits per weight less. Dettmers et al. 2023 (QLoRA),
    arXiv 2305.14314. Inputs and outputs as in `quantize_int8`.
    """
    return quantize_layers(model, "nf4", kept_float, double_quantization)


def quantize_fp4(
    model: Any, kept_float: Sequence[str] = (), *, double_quantization: bool = True
) -> tuple[Any, list[str], dict[str, Any]]:
    """4-bit floats (1 sign, 2 exponent, 1 mantissa bit) as weights, in blocks of 64; otherwise as `quantize_nf4`."""
    return quantize_layers(model, "fp4", kept_float, double_quantization)


def quantize_layers(
    model: Any, scheme: str, kept_float: Sequence[str] | Mapping[str, str] = (), double_quantization: bool = True
) -> tuple[Any, list[str], dict[str, Any]]:
    """Replace the linear layers of a model in memory by bitsandbytes' ones; arguments as in `quantize_nf4`."""
    _check_call(scheme)
    check_unquantized(model.config, type(model).__name__)
    choice = choose_layers(model, scheme, kept_float)
    for name in choice.layers:
        check_finite(f"{name}.weight", model.get_submodule(name).weight, scheme, scheme == "int8")
    config = make_config(scheme, choice.patterns, double_quantization)
    for name in choice.layers:
        replace_module(model, name, _quantized(model.get_submodule(name), config))
    _set_quantizer(model, config)
    keep_exact(model)
    return model, choice.layers, _results(choice, model)


def load_bits(
    source: str | Path,
    scheme: str,
    *,
    task: str | None = None,
    exclude: str | Sequence[str] | None = None,
    double_quantization: bool = True,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[Any, list[str], dict[str, Any]]:
    """Load a checkpoint and quantize each weight as it is read, so that the float model never is in memory.

    Args:
        source: A folder or Hub id.
        scheme: "int8", "nf4" or "fp4".
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        exclude: `fnmatch` wildcards of modules to leave in float; None means the task head.
        double_quantization: Whether 4-bit schemes quantize their scales too.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        **kwargs: Go to `from_pretrained`: `device_map`, `dtype`, `revision`, …

    Returns:
        The model, the names of its quantized layers, and results as of `quantize_int8`.

    Raises:
        SettingError: Unknown scheme, nothing to quantize, values that are not finite, or a layer map in the config.
        UnsupportedModelError: The checkpoint is quantized already, or its task is unknown.
        MissingDependencyError: The extra `bnb` is not installed.
        CheckpointError: It can't be loaded.
    """
    _check_call(scheme)
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    check_unquantized(read_config(source, **hub), str(source))
    skeleton = empty_model(source, task, trust_remote_code, **hub)
    choice = choose_layers(skeleton, scheme, kept_names(skeleton, exclude))
    config = make_config(scheme, choice.patterns, double_quantization)
    model, _ = load(source, task, trust_remote_code=trust_remote_code, quantization_config=config, **kwargs)
    layers = [name for name in choice.layers if _is_quantized(model.get_submodule(name))]
    _check_scales(model, layers, scheme)
    keep_exact(model)
    results = _results(choice, model)
    results["skipped"] |= dict.fromkeys(set(choice.layers) - set(layers), "left in float by device_map")
    return model, layers, results


def make_config(scheme: str, patterns: Sequence[str], double_quantization: bool = True) -> Any:
    """The `BitsAndBytesConfig` of a scheme.

    Args:
        scheme: "int8", "nf4" or "fp4".
        patterns: Names of modules to skip.
        double_quantization: Whether 4-bit schemes quantize their scales too.
    """
    from transformers import BitsAndBytesConfig

    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(patterns))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme,
        bnb_4bit_use_double_quant=double_quantization,
        llm_int8_skip_modules=list(patterns),
    )


def _check_call(scheme: str) -> None:
    if scheme not in BITS:
        raise SettingError(f"scheme must be one of {', '.join(BITS)}, got {scheme!r}.")
    require("bitsandbytes", extra="bnb")
    be_quiet()


def _is_quantized(layer: Any) -> bool:
    import bitsandbytes as bnb

    return isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


def _quantized(layer: Any, config: Any) -> nn.Module:
    """A layer of bitsandbytes with the weight of a Linear or Conv1D."""
    weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T.contiguous()
    make = _int8_layer if config.load_in_8bit else _four_bit_layer
    new = make(weight, layer.bias is not None, config)
    new.bias = layer.bias
    new.source_cls = type(layer)  # transformers' own mark of a transposed weight
    new.requires_grad_(False)
    return new.train(layer.training)


def _int8_layer(weight: torch.Tensor, bias: bool, config: Any) -> Any:
    import bitsandbytes as bnb

    rows, columns = weight.shape
    with torch.device("meta"):
        new: Any = bnb.nn.Linear8bitLt(columns, rows, bias, False, threshold=config.llm_int8_threshold)
    whole: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    new.weight = whole.to(weight.device)
    return new


def _four_bit_layer(weight: torch.Tensor, bias: bool, config: Any) -> Any:
    import bitsandbytes as bnb

    rows, columns = weight.shape
    double, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    with torch.device("meta"):
        new: Any = bnb.nn.Linear4bit(columns, rows, bias, config.bnb_4bit_compute_dtype, double, kind)
    whole: Any = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=new
    )
    new.weight = whole.to(weight.device)
    return new


def _set_quantizer(model: Any, config: Any) -> None:
    """Leave the model as `from_pretrained(quantization_config=config)` does, so that it saves itself."""
    from transformers.quantizers.auto import AutoHfQuantizer

    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.hf_quantizer.postprocess_model(model)


def _check_scales(model: Any, names: Sequence[str], scheme: str) -> None:
    """Raise `SettingError` where a weight that was read had NaN, infinite or, for int8, too large values."""
    for name in names:
        layer: Any = model.get_submodule(name)
        if scheme == "int8":
            scales = layer.weight.SCB
        else:
            state = layer.weight.quant_state
            scales = state.state2.absmax + state.offset if state.nested else state.absmax
        if not torch.isfinite(scales).all():
            raise SettingError(
                f"{name}.weight has NaN or infinite values, or, for int8, values above 65504; {scheme} can't "
                f"store them. Is the checkpoint corrupt? Otherwise leave it out: exclude={name!r}."
            )


def _results(choice: Choice, model: nn.Module) -> dict[str, Any]:
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}.values()
    return {"skipped": choice.skipped, "weight_bytes": sum(tensor.nbytes for tensor in tensors)}
