"""What a weighting needs of each module: the Gram matrix of its inputs, the squared gradients of its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.errors import SettingError
from hfshrink.factorization.sites import factorable, matrix, takes_inputs
from hfshrink.factorization.tails import WEIGHTINGS
from hfshrink.inputs import eval_mode
from hfshrink.layerwise import TOKENS, CalibrationData, walk, without_cache
from hfshrink.loading import load
from hfshrink.terminal import progress

GRADIENT_TOKENS = 4096
"""Tokens whose gradients say which modules matter."""

Batch = Mapping[str, Tensor]


def collect_statistics(
    model: Any,
    calibration: Any,
    weighting: str = "activation",
    *,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] | None = None,
    processor: Any = None,
) -> dict[str, ModuleStatistics]:
    """The statistics of all modules of a model at once, for `perturbation` and `factor_errors`.

    `factorize` collects its own, one layer at a time. Of inputs with more than 32 tokens per feature an even sample of
    about as many is multiplied, and its Gram matrix scaled up to all tokens.

    Args:
        model: A model, a folder or a Hub id.
        calibration: Rows like those that the model will see, in any form that calibration data may have.
        weighting: "activation", "fisher" (needs labels; language models make their own) or "fisher+activation".
        include: Wildcards of module names.
        exclude: Wildcards of names to leave out; None means the task head.
        processor: The model's tokenizer or image processor; None looks beside the model's files.

    Raises:
        SettingError: No statistics belong to the weighting, fewer tokens than a module has input features, no labels,
            NaN inputs or gradients, or a wildcard without match.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertForSequenceClassification(BertConfig(**sizes))
        >>> found = collect_statistics(model, [{"input_ids": torch.ones(2, 5, dtype=torch.long)}], include="*query")
        >>> [(name, stats.tokens) for name, stats in found.items()]
        [('bert.encoder.layer.0.attention.self.query', 10)]
    """
    if weighting not in WEIGHTINGS[1:]:
        raise SettingError(f"weighting must be one of {', '.join(WEIGHTINGS[1:])}, got {weighting!r}.")
    model, found = load(model)
    modules, _ = factorable(model, include, exclude)
    data = CalibrationData(model, calibration, processor or found)
    gathered = layer_statistics(model, modules, weighting, read_rows(data, weighting))
    return {name: stats for some in gathered for name, stats in some.items()}


def read_rows(data: CalibrationData, weighting: str) -> list[dict[str, Tensor]]:
    """The batches that a weighting reads: with labels where it needs them, and up to `TOKENS` tokens."""
    return [] if weighting == "none" else data.batches(with_labels="fisher" in weighting, tokens=TOKENS)


def layer_statistics(
    model: Any,
    modules: Mapping[str, nn.Module],
    weighting: str,
    batches: Sequence[Batch],
    *,
    form: str = "channel",
    update_inputs: bool = False,
) -> Iterator[dict[str, ModuleStatistics]]:
    """What the weighting needs of each module, layer by layer where it is about inputs.

    Args:
        model: Runs in eval mode.
        modules: Name -> module, as `factorable` gives them.
        weighting: "none", "fisher", "activation" or "fisher+activation".
        batches: From `read_rows`.
        form: Of convolutions. Those that are not in the form "channel", and embeddings, have no inputs to weigh by.
        update_inputs: Whether later layers are fed what earlier ones make after the caller changed them.

    Yields:
        Module name -> statistics; every module once. For "none" they are empty. A module that is by its nature fed
        with few of the tokens (the pooler of BERT sees one of each row) has no Gram matrix where it saw fewer than it
        has input features.

    Raises:
        SettingError: As in `collect_statistics`.
        UnsupportedModelError: Layers that can't be run one by one.
    """
    fed = {n: m for n, m in modules.items() if "activation" in weighting and takes_inputs(m, form)}
    given = check_tokens(fed, batches)
    squares = squared_gradients(model, modules, batches) if "fisher" in weighting else {}
    for name in modules:
        if name not in fed:
            yield {name: squares.get(name, ModuleStatistics())}
    if not fed:
        return
    with eval_mode(model), torch.no_grad():
        for stats in walk(model, fed, "input_gram", batches, rerun=update_inputs, sampled=True):
            for name, found in stats.items():
                if given is not None and found.tokens < given and found.tokens < _features(fed[name]):
                    found.input_gram = None
                else:
                    _check_enough(name, fed[name], found.tokens)
                found.squared_gradient = squares.pop(name, ModuleStatistics()).squared_gradient
            yield stats


def check_tokens(modules: Mapping[str, nn.Module], batches: Sequence[Batch]) -> int | None:
    """Refuse calibration data with fewer tokens than a Linear has inputs, as far as the batches tell.

    Returns:
        How many tokens there are, padding left out; None for images.

    Raises:
        SettingError: As said; it names the module with most inputs.
    """
    linears = {name: module for name, module in modules.items() if not isinstance(module, nn.Conv2d)}
    if not linears or any("input_ids" not in batch for batch in batches):
        return None
    tokens = 0
    for batch in batches:
        mask, ids = batch.get("attention_mask"), batch["input_ids"]
        tokens += int((mask != 0).sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()
    widest = max(linears, key=lambda name: _features(linears[name]))
    _check_enough(widest, linears[widest], tokens)
    return tokens


def squared_gradients(
    model: Any, modules: Mapping[str, nn.Module], batches: Sequence[Batch]
) -> dict[str, ModuleStatistics]:
    """Σ over rows of g² with g the gradient of a row's own loss: the diagonal of the empirical Fisher information.

    Each row runs by itself (FWSVD, arXiv:2207.00112): squares of the gradient of a whole batch would be another sum.

    Args:
        model: Runs in eval mode; its gradients and what of it is frozen stay as they are.
        modules: Name -> module.
        batches: With labels.

    Returns:
        Module name -> statistics with `squared_gradient` in the weight's shape, float32, and `backwards` = rows.

    Raises:
        SettingError: No batch, no loss, or NaN gradients.
    """
    weights: list[Any] = [module.weight for module in modules.values()]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    rows = [row for batch in batches for row in _single_rows(batch)]
    if not rows:
        raise SettingError("The calibration data is empty: it has no batch.")
    with eval_mode(model), _asking_only(model, weights), torch.enable_grad():
        for row in progress(rows, "Fisher information"):
            loss = getattr(model(**row, **without_cache(model)), "loss", None)
            if loss is None:
                raise SettingError(
                    f"{type(model).__name__} computes no loss from {', '.join(row)}: the Fisher information needs "
                    'labels in the calibration data. weighting="activation" needs none.'
                )
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for name, total, found in zip(modules, sums, gradients, strict=True):
                _add_square(name, total, found)
    return {
        name: ModuleStatistics(backwards=len(rows), squared_gradient=total)
        for name, total in zip(modules, sums, strict=True)
    }


def row_energies(
    model: Any, modules: Mapping[str, nn.Module], data: CalibrationData, form: str = "channel"
) -> dict[str, float] | None:
    """Module -> Σ_ij F_ij / rows of its matrix, for `comparable_tails`; None where the data has no labels.

    One number a module needs fewer rows than weights of all rows: `GRADIENT_TOKENS` tokens, and 256 rows at most.
    """
    few = data.batches(with_labels=True, tokens=GRADIENT_TOKENS)[:16]
    first = next(_single_rows(few[0]))
    with eval_mode(model), torch.no_grad():
        if getattr(model(**first, **without_cache(model)), "loss", None) is None:
            return None
    squares = squared_gradients(model, modules, few)
    return {
        name: float(torch.as_tensor(squares[name].squared_gradient).double().sum())
        / matrix(module, form=form).shape[0]
        for name, module in modules.items()
    }


def row_weights(module: nn.Module, stats: ModuleStatistics) -> Tensor | None:
    """√Σ_j F_ij, shape (out,), of the matrix that is factored; None without squared gradients."""
    squares = stats.squared_gradient
    return None if squares is None else matrix(module, squares).double().sum(dim=1).sqrt()


def _add_square(name: str, total: Tensor, gradient: Tensor | None) -> None:
    if gradient is None:
        return
    if not bool(gradient.isfinite().all()):
        raise SettingError(f"The gradient of {name}.weight has NaN or infinite values. Check the data and the loss.")
    total.addcmul_(gradient.float(), gradient.float())


def _single_rows(batch: Batch) -> Iterator[dict[str, Tensor]]:
    count = max((len(value) for value in batch.values() if value.ndim), default=1)
    for row in range(count):
        yield {n: v[row : row + 1] if v.ndim and len(v) == count else v for n, v in batch.items()}


@contextmanager
def _asking_only(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """These weights ask for a gradient while the block runs, and no others."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(weight) for weight in weights}
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _features(module: nn.Module) -> int:
    return matrix(module).shape[1]


def _check_enough(name: str, module: nn.Module, tokens: int) -> None:
    features = _features(module)
    if tokens < features:
        what = "places" if isinstance(module, nn.Conv2d) else "tokens"
        raise SettingError(
            f"The calibration data has {tokens:,} {what} without padding, and the Gram matrix of {name} with its "
            f"{features:,} input features needs {features:,} at least, better ten times as many. Give more rows, or "
            'take weighting="none".'
        )
