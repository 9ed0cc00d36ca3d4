"""Which modules of a model can be factored, the matrix that stands in each, and the layer that takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.checkpoint import compressed_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.factorization.allocation import Size
from hfshrink.factorization.convolutions import channel_kernels, separable_kernels
from hfshrink.layers import (
    CompressedLayer,
    LowRankConv1D,
    LowRankConv2d,
    LowRankEmbedding,
    LowRankLinear,
    SeparableConv2d,
)
from hfshrink.layers.common import check_forward
from hfshrink.modules import head_names, select_modules

FORMS = ("channel", "separable", "tucker")
TYPES: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D, nn.Conv2d, nn.Embedding)
SHOWN = 6


def factorable(
    model: Any, include: str | Sequence[str] = "*", exclude: str | Sequence[str] | None = None, form: str = "channel"
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules whose weights can be factored, and those that can't or shall not be, each with the reason.

    Args:
        model: A transformers model.
        include: Wildcards of module names. Embeddings are taken where a wildcard names nothing but embeddings.
        exclude: Wildcards of names to leave out, which are not listed; None means the task head, which is listed, and
            `()` nothing. Tied weights are never taken.
        form: Of convolutions: "channel", "separable" or "tucker".

    Returns:
        Name -> Linear, Conv1D, Conv2d without groups, or Embedding; and name -> reason for what was left out.

    Raises:
        SettingError: A wildcard without match or one that names factored layers only, NaN or infinite weights, nothing
            that can be factored, or an unknown form.
        UnsupportedModelError: Quantized weights.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> modules, skipped = factorable(BertForSequenceClassification(BertConfig(**sizes)))
        >>> len(modules), skipped["classifier"]
        (7, 'the task head')
    """
    if form not in FORMS:
        raise SettingError(f"form must be one of {', '.join(FORMS)}, got {form!r}.")
    compressed = compressed_layers(model)
    types = (*TYPES, *{type(layer) for layer in compressed.values()})
    found = select_modules(model, types, include, exclude or ())
    patterns = [include] if isinstance(include, str) else list(include)
    reasons = _reasons(model, exclude is None)
    reasons |= {name: f"is compressed already ({layer.kind})" for name, layer in compressed.items()}
    embeddings = _named_embeddings(model, patterns)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in found.items():
        if isinstance(module, nn.Embedding) and name not in embeddings:
            reasons.setdefault(name, "an embedding, factored only where a wildcard in include names embeddings alone")
        reason = reasons.get(name) or _unfit(module, form)
        if reason is None:
            chosen[name] = module
        else:
            skipped[name] = reason
    skipped |= {name: f"a stack of {len(stack)} matrices, as of experts" for name, stack in _stacks(model, patterns)}
    _check_any(model, chosen, skipped)
    _check_explicit(patterns, compressed)
    check_weights(chosen)
    return chosen, skipped


def matrix(module: nn.Module, values: Tensor | None = None, form: str = "channel") -> Tensor:
    """The matrix (m, n) that is factored: the weight of a module, or values of its shape.

    (out, in) of a Linear or Conv1D; (words, dim) of an Embedding; (out, in·height·width) of a Conv2d in the form
    "channel", and (in·height, out·width) in the form "separable", whose two sides are the two thinner kernels.

    Example:
        >>> matrix(nn.Conv2d(2, 4, (3, 5))).shape, matrix(nn.Conv2d(2, 4, (3, 5)), form="separable").shape
        (torch.Size([4, 30]), torch.Size([6, 20]))
    """
    weight: Any = module.weight
    values = weight.detach() if values is None else values
    if isinstance(module, Conv1D):
        return values.T
    if isinstance(module, nn.Conv2d) and form == "separable":
        return values.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return values.flatten(1)


def size_of(module: nn.Module, form: str = "channel") -> Size:
    """What a module's weight costs dense and per rank."""
    return Size.of_matrix(*matrix(module, form=form).shape)


def takes_inputs(module: nn.Module, form: str = "channel") -> bool:
    """Whether the columns of its matrix are multiplied with inputs, so that a Gram matrix of them can weigh."""
    return not isinstance(module, nn.Embedding) and (form == "channel" or not isinstance(module, nn.Conv2d))


def takes_rows(module: nn.Module, form: str = "channel") -> bool:
    """Whether the rows of its matrix are outputs (of an Embedding: words), so that a weight of each makes sense."""
    return form == "channel" or not isinstance(module, nn.Conv2d)


def factored(module: Any, up: Tensor, down: Tensor, form: str = "channel") -> CompressedLayer:
    """The layer in the place of a module.

    Args:
        module: As in `factorable`.
        up: Shape (m, rank), of `matrix(module, form=form)`.
        down: Shape (rank, n).
        form: "channel" or "separable".
    """
    if isinstance(module, nn.Embedding):
        return LowRankEmbedding.from_dense(module, up, down)
    if isinstance(module, Conv1D):
        return LowRankConv1D.from_dense(module, up, down)
    if not isinstance(module, nn.Conv2d):
        return LowRankLinear.from_dense(module, up, down)
    if form == "channel":
        return LowRankConv2d.from_dense(module, *channel_kernels(up, down, module.weight.shape))
    return SeparableConv2d.from_dense(module, *separable_kernels(up, down, module.weight.shape))


def check_is_model(model: Any) -> None:
    """Raise `UnsupportedModelError` for an export, whose weights can't be reached."""
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"A {type(model).__name__} can't be factored: its weights lie in a graph. Factor the model that it was "
            "made from, then export that."
        )


def check_weights(modules: Mapping[str, nn.Module]) -> None:
    """Raise `SettingError` for NaN, infinite or parametrized weights, `UnsupportedModelError` for quantized ones."""
    for name, module in modules.items():
        weight: Any = module.weight
        if not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name}.weight is of type {weight.dtype}: quantized weights can't be factored. Factor the float "
                "model, then quantize it."
            )
        if not isinstance(weight, nn.Parameter):
            raise SettingError(f"{name}.weight is parametrized. Fold the parametrization first, or exclude it.")
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise SettingError(f"{name}.weight has NaN or infinite values. Load another checkpoint, or in float32.")


def _reasons(model: Any, skips_heads: bool) -> dict[str, str]:
    """Modules that are left alone wherever they are found: tied ones, and the task head."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    reasons = dict.fromkeys(head_names(model), "the task head") if skips_heads else {}
    return reasons | {
        key.removesuffix(".weight"): f"its weight is tied to {other}"
        for pair in tied.items()
        for key, other in (pair, pair[::-1])
    }


def _stacks(model: nn.Module, patterns: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Parameters that hold several matrices in one tensor (experts of transformers' MoE models); they stay dense."""
    return [
        (f"{name}.{key}".lstrip("."), tensor)
        for name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd) and any(fnmatchcase(name, one) for one in patterns)
        for key, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 3 and min(tensor.shape) > 1
    ]


def _named_embeddings(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The embeddings that a wildcard names which matches no other weights."""
    kinds = {name: isinstance(m, nn.Embedding) for name, m in model.named_modules() if isinstance(m, TYPES)}
    named: set[str] = set()
    for pattern in patterns:
        hits = {name for name in kinds if fnmatchcase(name, pattern)}
        if all(kinds[name] for name in hits):
            named |= hits
    return named


def _unfit(module: nn.Module, form: str) -> str | None:
    """Why a module can't be factored; None where it can."""
    weight: Any = module.weight
    if not weight.is_floating_point():
        return None  # refused by name, not passed over
    kind: Any = next(kind for kind in TYPES if isinstance(module, kind))
    try:
        check_forward(module, kind)
    except SettingError as error:
        return str(error).partition(";")[0]
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"a convolution in {module.groups} groups, whose filters read different channels"
        if form != "channel" and 1 in module.kernel_size:
            height, width = module.kernel_size
            return f"a kernel of {height}×{width} gains nothing in the form {form!r}; the form 'channel' factors it"
    return None


def _check_any(model: Any, chosen: Mapping[str, Any], skipped: Mapping[str, str]) -> None:
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:SHOWN])
        raise SettingError(
            f"{type(model).__name__} has no module left to factor: {len(skipped)} modules match"
            + (f" and are left out ({why})." if why else ", exclude takes all.")
        )


def _check_explicit(patterns: Sequence[str], compressed: Mapping[str, Any]) -> None:
    """Refuse a wildcard that names compressed layers only: nothing would come of it."""
    if not compressed:
        return
    for name, layer in compressed.items():
        if name in patterns:
            raise SettingError(
                f"{name} is compressed already, by a {type(layer).__name__}. Leave it out, or call to_dense first."
            )
