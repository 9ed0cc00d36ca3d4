"""Finding and replacing modules: wildcards on names, the stack of layers, the heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.measurement import Measurement

PADDED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "xlm-roberta-xl")
"""Families whose position ids start behind the padding id."""


def select_modules(
    model: nn.Module,
    types: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
) -> dict[str, nn.Module]:
    """The modules of some types whose dotted names match the wildcards.

    Args:
        model: The model to look into.
        types: Module classes to select.
        include: `fnmatch` wildcards (not regular expressions); a name must match at least one.
        exclude: Wildcards; a name that matches one is left out.

    Returns:
        name -> module, in the model's order. A module that is registered twice appears once.

    Raises:
        SettingError: A wildcard in `include` or `exclude` matches nothing: most likely a typing mistake.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> list(select_modules(model, exclude="2"))
        ['0']
    """
    include = [include] if isinstance(include, str) else list(include)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    candidates = {name: module for name, module in model.named_modules() if name and isinstance(module, types)}
    for pattern in (*include, *exclude):
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in candidates):
            raise SettingError(
                f"The wildcard {pattern!r} matches none of {len(candidates)} modules: {_some(candidates)}."
            )
    return {
        name: module
        for name, module in candidates.items()
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put `new` in the place of the module called `name`, and return the old one.

    Raises:
        SettingError: The model has no module of that name.
    """
    parent_name, _, child = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        old = parent.get_submodule(child)
    except AttributeError:
        raise SettingError(f"{type(model).__name__} has no module called {name!r}.") from None
    parent._modules[child] = new  # set_submodule would refuse names inside a ModuleList on older torch
    return old


def stands_for(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of class `kind`, or a compressed layer in the place of one.

    Example:
        >>> stands_for(nn.Linear(2, 3), nn.Linear), stands_for(nn.Linear(2, 3), nn.Embedding)
        (True, False)
    """
    return issubclass(getattr(module, "replaces", type(module)), kind)


def layer_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's repeated layers.

    Found by structure, not by family: the one `ModuleList` that has `config.num_hidden_layers` modules of one class.

    Raises:
        UnsupportedModelError: There is none, or more than one (an encoder-decoder).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=1, intermediate_size=8)
        >>> name, layers = layer_stack(BertModel(config))
        >>> name, len(layers)
        ('encoder.layer', 3)
    """
    config: Any = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(layer) for layer in module}) == 1
    ]
    if len(found) != 1:
        family = getattr(config, "model_type", type(model).__name__)
        raise UnsupportedModelError(
            f"The family {family!r} ({type(model).__name__}) has {len(found)} stacks of "
            f"config.num_hidden_layers={depth} equal layers, "
            "expected exactly one, as in BERT, RoBERTa, DistilBERT, ELECTRA, Llama, GPT-2 and ViT."
        )
    return found[0]


def head_names(model: Any) -> list[str]:
    """Names of the Linears that make up a model's task head: all that do not belong to its base model.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> head_names(BertForSequenceClassification(config))
        ['classifier']
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        return []
    return [
        name
        for name, module in model.named_modules()
        if stands_for(module, nn.Linear) and not name.startswith(f"{prefix}.")
    ]


def accepted_inputs(model: nn.Module) -> set[str]:
    """Names of the arguments that a model's forward takes by name."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def max_positions(model: Any) -> int | None:
    """Longest input in tokens that a model's learned position embeddings can read; None without such a limit.

    RoBERTa-like models count positions from the padding id on, and lose those rows. Rotary models have no hard limit.
    """
    if not isinstance(model, nn.Module):  # an export: the config has the table's size, less two rows to be safe
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        family = getattr(getattr(model, "config", None), "model_type", "")
        return None if limit is None else limit - 2 * (family in PADDED_POSITIONS)
    for name, module in model.named_modules():
        if stands_for(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe", "embed_positions")):
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - max(before, getattr(module, "offset", 0))
    return None


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(parameters, parameters that are not exactly zero), tied ones once; a layer's integer codes are none.

    torchao's packed tensors count as the float weights that they stand for.
    """
    import torch

    with torch.no_grad():
        parameters = list(model.parameters())
        return sum(p.numel() for p in parameters), sum(_count_nonzero(p) for p in parameters)


def memory_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, tied ones once; of tensors made of others, those of the parts.

    torchao's tensors have the shape and dtype of the float weights that they stand for: by these they weigh as much.

    Example:
        >>> memory_bytes(nn.Linear(2, 3))
        36
    """
    tensors = (*model.parameters(), *model.buffers())
    return sum(part.numel() * part.element_size() for tensor in tensors for part in plain_parts(tensor))


def plain_parts(tensor: Any) -> Iterator[Any]:
    """The tensors that hold a tensor's numbers: itself, or what torch's wrapper tensors, such as torchao's, pack.

    Example:
        >>> import torch
        >>> [part.shape for part in plain_parts(torch.zeros(2, 3))]
        [torch.Size([2, 3])]
    """
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from plain_parts(getattr(tensor, name))


def measure_parameters(model: nn.Module) -> Measurement:
    """The counts of `count_parameters`, as a record keeps them before and after a step."""
    parameters, nonzero = count_parameters(model)
    return Measurement(parameters=parameters, nonzero_parameters=nonzero)


def _count_nonzero(tensor: Any) -> int:
    try:
        return int(tensor.count_nonzero())
    except NotImplementedError:  # of packed tensors, whose kinds lack most operators
        return int(tensor.dequantize().count_nonzero())


def _some(names: dict[str, Any], most: int = 6) -> str:
    shown = list(names)[:most]
    return ", ".join(shown) + (f", … (+{len(names) - most} more)" if len(names) > most else "")
