"""Single weights in one shot: unstructured and N:M sparsity, by scores or layer by layer (Wanda, SparseGPT)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import walk, without_cache
from hfshrink.pruning.criteria import scores as criteria
from hfshrink.pruning.criteria.thresholds import (
    check_pattern,
    count_dropped,
    global_masks,
    keep_largest,
    keep_largest_per_row,
    n_of_m_mask,
)
from hfshrink.pruning.oneshot.obs import sparsegpt
from hfshrink.pruning.units.weights import check_weights, matrix

SCOPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("magnitude", "random", "taylor", "fisher"), ("global", "module", "row")),
    "wanda": ("row", "module"),
    "sparsegpt": ("block",),
}
"""method -> the scopes in which weights can be ranked, the first without being asked."""

GRADIENT_METHODS = ("taylor", "fisher")
LAYERWISE_METHODS = ("wanda", "sparsegpt")

Sparsity = float | tuple[int, int]


def prune_weights(
    model: Any,
    modules: Mapping[str, nn.Module],
    sparsity: Sparsity,
    method: str = "magnitude",
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    scope: str | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Set weights to zero in place, in one shot.

    "wanda" (arXiv:2306.11695) and "sparsegpt" (arXiv:2301.00774) go through the model layer by layer, each layer with
    the inputs that the pruned layers before it make; "sparsegpt" also moves the weights that stay. Memory: one layer's
    statistics, and a hidden state per calibration token. See `walk` for modules outside the layers.

    Args:
        model: Runs in eval mode.
        modules: Name -> Linear, Conv1D or Conv2d of the model, see `prunable`.
        sparsity: Fraction of their weights that goes, in [0, 1); or (n, m): n of each m consecutive inputs stay.
        method: A key of `SCOPES`.
        batches: Model inputs on the model's device, needed by all methods but "magnitude" and "random"; with labels
            for "taylor" and "fisher".
        scope: What is ranked together: "global", all modules, none of which loses more than 98 %; "module"; "row", the
            inputs of one output; "block", SparseGPT's 128 columns. None takes the paper's; N:M has none.
        seed: Of "random".

    Returns:
        Module name -> mask (out, in), True where a weight stays.

    Raises:
        SettingError: A setting out of range, a module left empty, NaN weights or inputs, no batches or no labels where
            they are needed. Where a setting is to blame, nothing has been changed.
        UnsupportedModelError: Quantized weights, or for Wanda and SparseGPT grouped convolutions or layers that can't
            be run one by one.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
        >>> masks = prune_weights(model, {"0": model[0], "1": model[1]}, 0.5)
        >>> int((model[0].weight == 0).sum() + (model[1].weight == 0).sum())
        5
    """
    check_request(modules, sparsity, method, scope)
    if batches is None and method in (*GRADIENT_METHODS, *LAYERWISE_METHODS):
        raise SettingError(
            f'The method "{method}" needs calibration data, got none. "magnitude" and "random" work without.'
        )
    if sparsity == 0:
        return {name: torch.ones_like(matrix(m, _weight(m)), dtype=torch.bool) for name, m in modules.items()}
    scope = scope or SCOPES[method][0]
    if method in LAYERWISE_METHODS:
        return _prune_layerwise(model, modules, sparsity, (method, scope), list(batches or ()))
    masks = choose_masks(weight_scores(model, modules, method, batches, seed=seed), sparsity, scope)
    apply_masks(modules, masks)
    return masks


def weight_scores(
    model: Any,
    modules: Mapping[str, nn.Module],
    method: str,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Scores of single weights, comparable between modules.

    Args:
        model: As in `prune_weights`; gradients that it holds stay as they are.
        modules: Name -> Linear, Conv1D or Conv2d.
        method: "magnitude", "random", "taylor" or "fisher".
        batches: With labels; "fisher" squares the gradient of each batch, so batches of one row give the empirical
            Fisher information, and larger ones an estimate of it that is faster.
        seed: Of "random".

    Returns:
        Module name -> scores (out, in), float32 or float64.

    Raises:
        SettingError: No batches or no loss where gradients are needed, frozen weights, NaN gradients.
    """
    views = {name: matrix(module, _weight(module)) for name, module in modules.items()}
    if method == "magnitude":
        return {name: criteria.magnitude(view) for name, view in views.items()}
    if method == "random":
        return {
            name: criteria.random_scores(view.shape, seed + zlib.crc32(name.encode())).to(view.device)
            for name, view in views.items()
        }
    means = _mean_gradients(model, modules, batches or (), squared=method == "fisher")
    score = criteria.fisher if method == "fisher" else criteria.taylor
    return {name: score(view, matrix(modules[name], means[name])) for name, view in views.items()}


def choose_masks(
    scores: Mapping[str, Tensor], sparsity: Sparsity, scope: str = "global", max_sparsity: float = 0.98
) -> dict[str, Tensor]:
    """Masks of scores (out, in): what `prune_weights` keeps.

    Args:
        scores: Module name -> scores (out, in).
        sparsity: Fraction that goes, or (n, m), for which `scope` means nothing.
        scope: "global", "module" or "row".
        max_sparsity: Largest fraction that goes in one module, with the scope "global".

    Raises:
        SettingError: NaN scores, settings out of range, N:M that does not divide.

    Example:
        >>> choose_masks({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}, 0.5, "module")["b"]
        tensor([[False,  True]])
    """
    if scope == "global" and not isinstance(sparsity, tuple):
        return global_masks(scores, sparsity, max_sparsity)
    masks = {}
    for name, found in scores.items():
        with _naming(name):
            masks[name] = _module_mask(found, sparsity, scope)
    return masks


def apply_masks(modules: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> None:
    """Zero the weights whose mask (out, in) is False, in place."""
    for name, mask in masks.items():
        weight = _weight(modules[name])
        _write(modules[name], matrix(modules[name], weight).masked_fill(~mask.to(weight.device), 0))


def check_request(modules: Mapping[str, nn.Module], sparsity: Sparsity, method: str, scope: str | None = None) -> None:
    """Check all that can be known before work starts.

    Raises:
        SettingError: See `prune_weights`.
        UnsupportedModelError: Quantized weights, or convolutions that a layer-wise method can't see through.
    """
    if method not in SCOPES:
        raise SettingError(f"method must be one of {', '.join(SCOPES)}, got {method!r}.")
    if scope is not None and (scope not in SCOPES[method] or isinstance(sparsity, tuple)):
        known = "None for N:M" if isinstance(sparsity, tuple) else " or ".join(map(repr, SCOPES[method]))
        raise SettingError(f'scope must be {known} with the method "{method}", got {scope!r}.')
    if not modules:
        raise SettingError("No module was selected: there are no weights to prune.")
    check_weights(modules)
    for name, module in modules.items():
        if not isinstance(module.weight, nn.Parameter):
            raise SettingError(
                f"{name}.weight is parametrized. Fold the parametrization first, or exclude the module."
            )
        with _naming(name):
            _check_sizes(matrix(module, _weight(module)), sparsity, scope or SCOPES[method][0])
        if method in LAYERWISE_METHODS and isinstance(module, nn.Conv2d) and not _has_patches(module):
            raise UnsupportedModelError(
                f'{name} is a convolution with groups or a padding of its own, which the method "{method}" does not '
                'know. Exclude it, or use "magnitude", "taylor" or "fisher".'
            )


def _check_sizes(view: Tensor, sparsity: Sparsity, scope: str) -> None:
    if isinstance(sparsity, tuple):
        check_pattern(*sparsity, view.shape[1])
        return
    size = view.shape[1] if scope == "row" else view.numel()
    if count_dropped(sparsity, size) == size and scope != "global":  # there the cap prevents it
        raise SettingError(f"sparsity {sparsity} leaves nothing of {size} weights. Lower it, or exclude the module.")


def _has_patches(conv: nn.Conv2d) -> bool:
    """Whether `F.unfold` sees what the convolution sees."""
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return conv.groups == 1 and zeros and type(conv).forward is nn.Conv2d.forward


def _prune_layerwise(
    model: Any,
    modules: Mapping[str, nn.Module],
    sparsity: Sparsity,
    how: tuple[str, str],
    batches: list[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    method, scope = how
    masks: dict[str, Tensor] = {}
    with eval_mode(model), torch.no_grad():
        for stats in walk(model, modules, "input_square" if method == "wanda" else "input_gram", batches):
            for name, found in stats.items():
                with _naming(name):
                    masks[name] = _prune_module(modules[name], found, sparsity, method, scope)
    return {name: masks[name] for name in modules}


def _prune_module(module: nn.Module, stats: ModuleStatistics, sparsity: Sparsity, method: str, scope: str) -> Tensor:
    view = matrix(module, _weight(module))
    if method == "sparsegpt" and stats.input_gram is not None:
        values, mask = sparsegpt(view, stats.input_gram, sparsity)
    elif stats.input_square is not None:
        mask = _module_mask(criteria.wanda(view, stats.input_square.sqrt()), sparsity, scope)
        values = view.masked_fill(~mask, 0)
    _write(module, values)
    return mask


def _module_mask(scores: Tensor, sparsity: Sparsity, scope: str) -> Tensor:
    if isinstance(sparsity, tuple):
        return n_of_m_mask(scores, *sparsity)
    return keep_largest_per_row(scores, sparsity) if scope == "row" else keep_largest(scores, sparsity)


def _mean_gradients(
    model: Any, modules: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]], *, squared: bool
) -> dict[str, Tensor]:
    """The mean over batches of each weight's gradient, or of its square; in the weight's shape, float32."""
    frozen = [name for name, module in modules.items() if not _parameter(module).requires_grad]
    if frozen:
        raise SettingError(f"{len(frozen)} weights get no gradient, they are frozen: {', '.join(frozen[:6])}.")
    weights = [_parameter(module) for module in modules.values()]
    means = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    number = 0
    with eval_mode(model), torch.enable_grad():
        for number, batch in enumerate(batches, start=1):
            loss = getattr(model(**batch, **without_cache(model)), "loss", None)
            if loss is None:
                raise SettingError(f"Batch {number - 1} gives no loss: gradients need labels in the calibration data.")
            found = torch.autograd.grad(loss, weights, allow_unused=True)
            for name, mean, gradient in zip(modules, means, found, strict=True):
                values = torch.zeros_like(mean) if gradient is None else gradient.float()
                if not bool(values.isfinite().all()):
                    raise SettingError(f"The gradient of {name}.weight has NaN or infinite values. Check the data.")
                mean.lerp_(values.square() if squared else values, 1 / number)
    if not number:
        raise SettingError("The calibration data is empty: it has no batch.")
    return dict(zip(modules, means, strict=True))


def _parameter(module: Any) -> nn.Parameter:
    return module.weight


def _weight(module: nn.Module) -> Tensor:
    return _parameter(module).detach()


def _write(module: nn.Module, values: Tensor) -> None:
    """Put a weight given as (out, in) back, in the parameter's shape, dtype and memory layout."""
    weight = _parameter(module)
    with torch.no_grad():
        weight.copy_(values.T if isinstance(module, Conv1D) else values.reshape(weight.shape))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in an error which module it is about."""
    try:
        yield
    except SettingError as error:
        raise SettingError(f"{error} ({name})") from None
