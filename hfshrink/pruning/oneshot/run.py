"""`prune`: weights, units or layers of a model in one call, with little data or none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hfshrink.data import data_title
from hfshrink.errors import SettingError
from hfshrink.layerwise import TOKENS, CalibrationData
from hfshrink.loading import load
from hfshrink.modules import layer_stack, measure_parameters
from hfshrink.pruning.criteria.ranking import kept_units
from hfshrink.pruning.criteria.unit_scores import ON_DATA, ON_WEIGHTS, unit_scores
from hfshrink.pruning.oneshot.layer_dropping import LAYER_METHODS, choose_layers, drop_layers, layer_influence
from hfshrink.pruning.oneshot.rows import example_of, has_loss, is_plain, mean_length
from hfshrink.pruning.oneshot.weights import (
    GRADIENT_METHODS,
    LAYERWISE_METHODS,
    SCOPES,
    check_request,
    prune_weights,
)
from hfshrink.pruning.search.tuning import search_and_tune
from hfshrink.pruning.training.history import OWN_SOURCES, SOURCES, ZEROS_ONLY
from hfshrink.pruning.training.settings import check_sparsity, check_structure, read_pattern
from hfshrink.pruning.units.cutting import cut_units
from hfshrink.pruning.units.groups import STRUCTURES, UnitGroup, find_units, mask_units
from hfshrink.pruning.units.weights import check_is_model, check_weights, prunable
from hfshrink.record import StepRecord, append_step

METHODS = {
    "weights": tuple(SCOPES),
    "heads and neurons": (*ON_WEIGHTS, *ON_DATA, "search"),
    "channels": ON_WEIGHTS,
    "layers": LAYER_METHODS,
}
"""Kind of structure -> its methods."""
LABELLED = (*GRADIENT_METHODS, "search")
NEED_DATA = (*ON_DATA, *GRADIENT_METHODS, *LAYERWISE_METHODS, "search", "influence")

logger = logging.getLogger(__name__)


@dataclass
class _Done:
    """What was changed, and what the record says about it."""

    modules: list[str]
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Asked:
    """The keywords of `prune`, with the method that was chosen."""

    sparsity: float
    structure: str
    method: str
    scope: str | None
    cost: str
    include: str | Sequence[str]
    exclude: str | Sequence[str]
    cut: bool
    seed: int


def prune(
    model: Any,
    sparsity: float | None = None,
    structure: str = "unstructured",
    method: str | None = None,
    *,
    calibration: Any = None,
    scope: str | None = None,
    cost: str = "macs",
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] = (),
    cut: bool = True,
    seed: int = 0,
) -> Any:
    """Prune a model without training it.

    Units (heads, neurons, channels) and layers are cut out for real: the model gets smaller and faster, and computes
    what it did with zeros in their place. Where all layers stay equal and the config can say so, any transformers
    loads the saved model; elsewhere `import hfshrink` must stand before `from_pretrained`. Single weights become
    zeros, which makes neither the file nor the latency smaller.

    Args:
        model: A model, folder or Hub id; a model is changed in place. Channels are cut in any `nn.Module`.
        sparsity: Share that goes, in [0, 1): of the weights, of the units of each kind, of the layers. With "search"
            the share of the cost of all heads and neurons. N:M says it itself.
        structure: "unstructured", N:M such as "2:4" (2 of 4 neighbours stay), "heads", "neurons", "heads+neurons",
            "channels" or "layers".
        method: None takes "wanda", "search" ("activation" where the model computes no loss) or "influence" with
            `calibration`, and "magnitude" or "spread" without; of channels always "magnitude".

            * weights: "magnitude", "random"; with data "wanda", "sparsegpt"; with labels "taylor", "fisher"
            * heads and neurons: "magnitude", "random"; with data "activation"; with labels "taylor", "fisher", or
              "search" (mask search, rearrangement and rescaling of Kwon et al. 2022, arXiv:2204.09656)
            * channels: "magnitude" (L1 of the filters), "random"
            * layers: "spread", "top", "random"; with data "influence"
        calibration: Rows like those that the model will see: a `datasets.Dataset`, a Hub id, a folder or an iterable
            of batches. At most 2,048 rows are read. Language models need no labels.
        scope: What is ranked together: "global", "module", or for weights "row". None takes "row" for Wanda, "module"
            for channels and "activation", whose scores do not compare between layers, else "global".
        cost: What "search" saves: "macs", or "latency" as measured on this machine.
        include: Wildcards of names of modules, or of groups of units.
        exclude: Wildcards of names to leave out.
        cut: Whether units are cut out; False leaves zeros.
        seed: Of "random".

    Returns:
        The model, with the step in its record.

    Raises:
        SettingError: A keyword out of range, no data or labels where the method needs them, NaN weights, a module that
            would be left empty, tied weights that would be cut. The model is as it was, unless hidden states turn NaN
            behind layers that "wanda" or "sparsegpt" have pruned.
        UnsupportedModelError: A family without that structure; the message names it and what works.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = prune(BertForSequenceClassification(BertConfig(**sizes)), 0.5, "neurons", scope="module")
        >>> model.config.intermediate_size
        3
        >>> prune(model, 0.5, "layers").config.num_hidden_layers
        1
    """
    start = time.perf_counter()
    model, processor = (model, None) if is_plain(model) else load(model)
    check_is_model(model)
    asked = _read(sparsity, structure, method, calibration, scope, cost, include, exclude, cut, seed)
    data = CalibrationData(model, calibration, processor)
    is_open = method is None and asked.method == "search" and cost == "macs"
    if is_open and not has_loss(model, data.batches(with_labels=True)[0]):
        asked = replace(asked, method="activation")
        logger.info("The calibration data has no labels: units are scored by their activations.")
    kind, before = _kind(structure), measure_parameters(model)
    done = _TECHNIQUES[kind](model, asked, data)
    after = measure_parameters(model)
    if after.parameters == before.parameters and done.modules:
        done.results["note"] = ZEROS_ONLY
        logger.warning(ZEROS_ONLY)
    if is_plain(model):
        return model
    defaults = {"scope": None, "cost": "macs", "include": "*", "exclude": (), "cut": True, "seed": 0}
    given = {n: v for n, v in vars(asked).items() if n not in defaults or v != defaults[n]}
    step = StepRecord(
        technique="prune",
        method=asked.method,
        settings={**given, **({} if calibration is None else {"calibration": data_title(calibration)})},
        before=before,
        after=after,
        modules=done.modules,
        results=done.results,
        seconds=time.perf_counter() - start,
        source=OWN_SOURCES.get((kind, asked.method)) or (SOURCES.get(asked.method, "") if kind == "weights" else ""),
    )
    append_step(model, step)
    return model


def _prune_weights(model: Any, asked: _Asked, data: CalibrationData) -> _Done:
    modules = prunable(model, asked.include, asked.exclude)
    share = read_pattern(asked.structure) or asked.sparsity
    check_request(modules, share, asked.method, asked.scope)
    if share == 0:
        return _Done([], {"sparsity": 0.0})
    batches = None
    if asked.method in NEED_DATA:
        limit = TOKENS if asked.method in LAYERWISE_METHODS else None
        batches = data.batches(with_labels=asked.method in LABELLED, tokens=limit)
    masks = prune_weights(model, modules, share, asked.method, batches, scope=asked.scope, seed=asked.seed)
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    return _Done(list(masks), {"sparsity": round(1 - kept / total, 6)})


def _prune_units(model: Any, asked: _Asked, data: CalibrationData) -> _Done:
    example = example_of(model, data.calibration) if asked.structure == "channels" else {}
    groups = find_units(model, asked.structure, asked.include, asked.exclude, **example)
    names = {axis.module for group in groups for axis in (*group.writes, *group.reads)}
    check_weights({name: model.get_submodule(name) for name in sorted(names)})
    if asked.sparsity == 0:
        return _Done([], {"sparsity": 0.0})
    if asked.method != "search":
        return _take_out(model, asked, groups, _kept_by_score(model, asked, groups, data), {})
    batches = data.batches(with_labels=True)
    length = mean_length(model, batches)
    with _undone_on_error(model, groups):
        kept, results = search_and_tune(
            model, groups, asked.sparsity, batches, cost=asked.cost, sequence_length=length
        )
        return _take_out(model, asked, groups, kept, results)


def _kept_by_score(model: Any, asked: _Asked, groups: Sequence[UnitGroup], data: CalibrationData) -> dict[str, Tensor]:
    batches = data.batches(with_labels=asked.method in LABELLED) if asked.method in NEED_DATA else []
    scores = unit_scores(model, groups, asked.method, batches, seed=asked.seed)
    is_local = asked.structure == "channels" or asked.method == "activation"
    scope = asked.scope or ("module" if is_local else "global")
    kept: dict[str, Tensor] = {}
    for kind in dict.fromkeys(group.structure for group in groups):
        rivals = {group.name: scores[group.name] for group in groups if group.structure == kind}
        kept |= kept_units(rivals, asked.sparsity, scope=scope)
    return kept


def _take_out(
    model: Any,
    asked: _Asked,
    groups: Sequence[UnitGroup],
    kept: Mapping[str, Tensor],
    results: dict[str, Any],
) -> _Done:
    """Cut or mask what is not kept."""
    results["kept"] = {name: [int(mask.sum()), len(mask)] for name, mask in kept.items()}
    fewer = [group for group in groups if not bool(kept[group.name].all())]
    if not fewer:
        sizes = " or ".join(str(size) for size in sorted({group.units for group in groups}))
        raise SettingError(
            f"A sparsity of {asked.sparsity} of {len(groups)} groups with {sizes} units is none of them. Give more."
        )
    if asked.cut:
        return _Done(cut_units(model, groups, kept), results)
    for group in fewer:
        mask_units(model, group, kept[group.name])
    return _Done([axis.module for group in fewer for axis in group.reads], results)


@contextmanager
def _undone_on_error(model: Any, groups: Sequence[UnitGroup]) -> Iterator[None]:
    """Put the weights that read units back where the search, or the cut after it, raises."""
    weights = [model.get_submodule(axis.module).weight for group in groups for axis in group.reads]
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, values in zip(weights, before, strict=True):
                weight.copy_(values)
        raise


def _prune_layers(model: Any, asked: _Asked, data: CalibrationData) -> _Done:
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    floats = [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.is_floating_point()]
    check_weights({name: model.get_submodule(name) for name in floats})
    depth = len(layer_stack(model)[1])
    number = round(asked.sparsity * depth)
    if number == 0 and asked.sparsity:
        raise SettingError(f"A sparsity of {asked.sparsity} of {depth} layers is none. Give {1 / depth:.3f} or more.")
    if number == depth:
        raise SettingError(f"A sparsity of {asked.sparsity} of {depth} layers is all of them; one at least must stay.")
    influence = layer_influence(model, data.batches()) if asked.method == "influence" else []
    dropped = choose_layers(depth, number, asked.method, influence, seed=asked.seed)
    names = drop_layers(model, dropped) if dropped else []
    results: dict[str, Any] = {"dropped_layers": dropped}
    if influence:
        results["influence"] = [round(value, 6) for value in influence]
    return _Done(names, results)


_TECHNIQUES: dict[str, Callable[[Any, _Asked, CalibrationData], _Done]] = {
    "weights": _prune_weights,
    "heads and neurons": _prune_units,
    "channels": _prune_units,
    "layers": _prune_layers,
}


def _kind(structure: str) -> str:
    if structure in ("channels", "layers"):
        return structure
    return "heads and neurons" if structure in STRUCTURES else "weights"


def _read(
    sparsity: Any,
    structure: Any,
    method: str | None,
    calibration: Any,
    scope: str | None,
    cost: str,
    include: Any,
    exclude: Any,
    cut: bool,
    seed: int,
) -> _Asked:
    """Check all keywords before any work."""
    if structure == "vocabulary":
        raise SettingError("The vocabulary is trimmed with its tokenizer: trim_vocabulary(model, corpus).")
    check_structure(structure, ("unstructured", *STRUCTURES, "layers"))
    share = check_sparsity(sparsity, structure)
    kind = _kind(structure)
    method = _best(kind, calibration) if method is None else method
    if method not in METHODS[kind]:
        raise SettingError(f"method must be one of {', '.join(METHODS[kind])} for {kind}, got {method!r}.")
    if method in NEED_DATA and calibration is None:
        without = ", ".join(name for name in METHODS[kind] if name not in NEED_DATA)
        raise SettingError(
            f"The method {method!r} needs data: give calibration=, some rows like those that the model will see. "
            f"Without data there are {without}."
        )
    if cost not in ("macs", "latency") or (cost == "latency" and method != "search"):
        raise SettingError(f"cost must be macs, or latency with the method 'search', got {cost!r} with {method!r}.")
    _check_scope(scope, kind, structure, method)
    if not cut and kind in ("weights", "layers"):
        raise SettingError(f"cut=False leaves units as zeros; {structure!r} has no units.")
    if kind == "layers" and (list(include) != ["*"] or exclude):
        raise SettingError("include and exclude name modules or groups of units; which layers go is up to the method.")
    return _Asked(share, structure, method, scope, cost, include, exclude, cut, seed)


def _check_scope(scope: str | None, kind: str, structure: str, method: str) -> None:
    scopes: tuple[str, ...] = SCOPES[method] if kind == "weights" else ("global", "module")
    if kind == "layers" or method == "search" or ":" in structure:
        scopes = ()
    if scope is not None and scope not in scopes:
        known = f"one of {', '.join(scopes)}" if scopes else "left out"
        raise SettingError(f"scope must be {known} for {structure!r} with the method {method!r}, got {scope!r}.")


def _best(kind: str, calibration: Any) -> str:
    """The method where none is asked for."""
    if calibration is None:
        return "spread" if kind == "layers" else "magnitude"
    if kind == "heads and neurons":
        return "search"
    return {"weights": "wanda", "layers": "influence"}.get(kind, "magnitude")
