"""Quantization configs of transformers (TorchAoConfig, HqqConfig, GPTQConfig, …) in place of a scheme."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import MissingDependencyError, SettingError
from hfshrink.loading import HUB_KEYWORDS, load
from hfshrink.quantization.plain import plain
from hfshrink.quantization.weights.choice import check_unquantized, choose_layers, kept_names, linear_layers
from hfshrink.quantization.weights.exactness import be_quiet, keep_exact
from hfshrink.saving import read_config
from hfshrink.streaming.sources import empty_model

PACKAGES = {
    "aqlm": ("aqlm", "aqlm[gpu]"),
    "auto-round": ("auto_round", "auto-round"),
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "hfshrink[bnb]"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "fp_quant": ("fp_quant", "fp_quant"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "quark": ("quark", "amd-quark"),
    "sinq": ("sinq", "sinq"),
    "spqr": ("spqr_quant", "spqr_quant[gpu]"),
    "torchao": ("torchao", "torchao"),
    "vptq": ("vptq", "vptq"),
}
"""quant_method -> (module that it needs, what pip installs for it); the others come with transformers."""


def is_foreign_config(scheme: Any) -> bool:
    """Whether what was given as a scheme is one of transformers' quantization configs.

    Example:
        >>> is_foreign_config("int8")
        False
    """
    if isinstance(scheme, str):
        return False
    from transformers.utils.quantization_config import QuantizationConfigMixin

    return isinstance(scheme, QuantizationConfigMixin)


def quantize_with_config(
    source: Any, config: Any, task: str | None = None, *, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[Any, list[str], dict[str, Any]]:
    """Load a checkpoint through `from_pretrained(quantization_config=config)`: transformers does the work.

    Args:
        source: A folder or Hub id.
        config: One of transformers' quantization config objects.
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        **kwargs: Go to `from_pretrained`.

    Returns:
        The model, the names of its quantized layers, and results: `config`, JSON-safe, and `skipped`, name -> reason,
        as far as hfshrink chose: a `BitsAndBytesConfig` that names no modules to skip gets the head, tied weights and
        shapes that bitsandbytes can't run (transformers' own default quantizes a classifier with a bias).

    Raises:
        SettingError: `source` is a model in memory, the config needs a device that this machine has not, or nothing
            was quantized.
        MissingDependencyError: The config's package is not installed; the message has its pip line.
        UnsupportedModelError: The checkpoint is quantized already.
        CheckpointError: It can't be loaded.
    """
    if not isinstance(source, str | Path):
        raise SettingError(
            f"A {type(config).__name__} quantizes while a checkpoint is loaded; give its folder or Hub id, got a "
            f"{type(source).__name__}. For a model in memory there are int8, nf4 and fp4."
        )
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    check_unquantized(read_config(source, **hub), str(source))
    check_runnable(config)
    config, skipped = _with_heads_skipped(source, config, task, trust_remote_code, hub)
    try:
        model, _ = load(source, task, trust_remote_code=trust_remote_code, quantization_config=config, **kwargs)
    except ImportError as error:
        raise MissingDependencyError(f"{type(config).__name__} lacks a package: {error}{_pip_line(config)}") from error
    modules = changed_layers(model)
    if not modules:
        raise SettingError(f"{type(config).__name__} quantized none of the layers of {type(model).__name__}.")
    if method_of(config) == "bitsandbytes":
        be_quiet()
        keep_exact(model)
    return model, modules, {"config": plain_config(config), "skipped": skipped}


def _with_heads_skipped(
    source: Any, config: Any, task: str | None, trust: bool, hub: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """The config; one of bitsandbytes that leaves the modules to skip open gets those of our own schemes."""
    if method_of(config) != "bitsandbytes" or config.llm_int8_skip_modules is not None:
        return config, {}
    model = empty_model(source, task, trust, **hub)
    scheme = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
    choice = choose_layers(model, scheme, kept_names(model, None))
    config = copy.deepcopy(config)
    config.llm_int8_skip_modules = choice.patterns
    return config, choice.skipped


def check_runnable(config: Any) -> None:
    """Raise where a config's package or processor is not there, before anything is read.

    Raises:
        MissingDependencyError: Its package is not installed.
        SettingError: It needs a GPU, or transformers refuses it on this machine for another reason.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    name = type(config).__name__
    module = PACKAGES.get(method_of(config), ("", ""))[0]
    if module and not _is_installed(module):
        raise MissingDependencyError(
            f"{name} needs the package {module!r}, which is not installed.{_pip_line(config)}"
        )
    try:
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment(device_map=None)
    except ImportError as error:
        if "GPU" in str(error) and not torch.cuda.is_available():  # some say it with an ImportError
            raise SettingError(f"{name} can't run on this machine: {error}") from error
        raise MissingDependencyError(f"{name} lacks a package: {error}{_pip_line(config)}") from error
    except (RuntimeError, ValueError, TypeError) as error:
        here = (
            "" if torch.cuda.is_available() else " This machine has no GPU: int8, nf4 and bf16 run on its processor."
        )
        raise SettingError(f"{name} can't run on this machine: {error}{here}") from error


def method_of(config: Any) -> str:
    """The `quant_method` of a config, as `config.json` has it."""
    method = getattr(config, "quant_method", "")
    return str(getattr(method, "value", method))


def plain_config(config: Any) -> dict[str, Any]:
    """A config as JSON holds it: no secrets, and objects by the names of their types.

    Example:
        >>> from transformers import BitsAndBytesConfig
        >>> plain_config(BitsAndBytesConfig(load_in_8bit=True))["load_in_8bit"]
        True
    """
    return {"class": type(config).__name__, **plain(config.to_dict())}


def changed_layers(model: Any) -> list[str]:
    """Names of the linear layers that are no plain float Linear or Conv1D any more."""
    from torch import nn

    plain = {id(module) for module in linear_layers(model).values() if type(module).__module__.startswith("torch.nn")}
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_layer = isinstance(module, nn.Linear) or "linear" in type(module).__name__.lower()
        if not is_layer or any(True for _ in module.children()):
            continue
        is_plain_tensor = type(weight) is nn.Parameter and weight.is_floating_point()
        if not (id(module) in plain and is_plain_tensor):
            found.append(name)
    return found


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _pip_line(config: Any) -> str:
    package = PACKAGES.get(method_of(config), ("", ""))[1]
    return f" Install it with: pip install '{package}'" if package else ""
