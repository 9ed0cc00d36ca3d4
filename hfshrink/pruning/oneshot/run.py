"""`prune`: weights, units or layers of a model in one call, with little data or none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hfshrink.calibration import batches as read_batches
from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import SettingError
from hfshrink.inputs import eval_mode
from hfshrink.labels import IGNORED
from hfshrink.loading import infer_task, load
from hfshrink.modules import layer_stack
from hfshrink.pruning.criteria.ranking import kept_units
from hfshrink.pruning.criteria.unit_scores import ON_DATA, ON_WEIGHTS, unit_scores
from hfshrink.pruning.oneshot.layer_dropping import LAYER_METHODS, choose_layers, drop_layers, layer_influence
from hfshrink.pruning.oneshot.weights import GRADIENT_METHODS, LAYERWISE_METHODS, SCOPES, prune_weights
from hfshrink.pruning.search.tuning import search_and_tune
from hfshrink.pruning.training.history import SOURCES, ZEROS_ONLY, measure_parameters
from hfshrink.pruning.training.settings import check_sparsity, check_structure
from hfshrink.pruning.units.cutting import cut_units
from hfshrink.pruning.units.groups import STRUCTURES, find_units, mask_units
from hfshrink.pruning.units.weights import check_weights, prunable
from hfshrink.record import StepRecord, append_step

ROWS = 2048
"""Rows of the calibration data that are read at most, as many as Kwon et al. take."""
BATCH_SIZE = 16

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
        method: None takes the best that `calibration` allows.

            * weights: "magnitude", "random"; with data "wanda", "sparsegpt"; with labels "taylor", "fisher"
            * heads and neurons: "magnitude", "random"; with data "activation"; with labels "taylor", "fisher", or
              "search" (mask search, rearrangement and rescaling of Kwon et al. 2022, arXiv:2204.09656)
            * channels: "magnitude" (L1 of the filters), "random"
            * layers: "spread", "top", "random"; with data "influence"
        calibration: Rows like those that the model will see: a `datasets.Dataset`, a Hub id, a folder or an iterable
            of batches. At most 2,048 rows are read. Language models need no labels.
        scope: What is ranked together: "global", "module", or for weights "row"; None takes what suits the method.
        cost: What "search" saves: "macs", or "latency" as measured on this machine.
        include: Wildcards of names of modules, or of groups of units.
        exclude: Wildcards of names to leave out.
        cut: Whether units are cut out; False leaves zeros.
        seed: Of "random".

    Returns:
        The model, with the step in its record.

    Raises:
        SettingError: A keyword out of range, no data or labels where the method needs them, NaN weights, a module that
            would be left empty, tied weights that would be cut.
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
    model, processor = (model, None) if _is_plain(model) else load(model)
    asked = _read(model, sparsity, structure, method, calibration, scope, cost, include, exclude, cut, seed)
    data = _Data(model, calibration, processor, asked.method)
    before = measure_parameters(model)
    done = _TECHNIQUES[_kind(structure)](model, asked, data)
    if measure_parameters(model).parameters == before.parameters and done.modules:
        done.results["note"] = ZEROS_ONLY
        logger.warning(ZEROS_ONLY)
    if _is_plain(model):
        return model
    defaults = {"scope": None, "cost": "macs", "include": "*", "exclude": (), "cut": True, "seed": 0}
    given = {n: v for n, v in vars(asked).items() if n not in defaults or v != defaults[n]}
    step = StepRecord(
        technique="prune",
        method=asked.method,
        settings={**given, **({} if calibration is None else {"calibration": _title(calibration)})},
        before=before,
        after=measure_parameters(model),
        modules=done.modules,
        results=done.results,
        seconds=time.perf_counter() - start,
        source=SOURCES.get(asked.method, ""),
    )
    append_step(model, step)
    return model


class _Data:
    """The calibration data, read when a method asks for it."""

    def __init__(self, model: Any, calibration: Any, processor: Any, method: str) -> None:
        self.model, self.calibration, self.processor, self.method = model, calibration, processor, method

    def batches(self) -> list[dict[str, Tensor]]:
        """All batches, with labels for a language model where a gradient is needed."""
        if self.calibration is None:
            return []
        how = {"batch_size": BATCH_SIZE, "samples": ROWS}
        found = list(read_batches(self.calibration, self.model, self.processor, **how))
        if self.method in LABELLED and "labels" not in found[0] and infer_task(self.model) in LANGUAGE_TASKS:
            return [_with_labels(batch) for batch in found]
        return found


def _with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return {**batch, "labels": ids if mask is None else ids.masked_fill(mask == 0, IGNORED)}


def _prune_weights(model: Any, asked: _Asked, data: _Data) -> _Done:
    modules = prunable(model, asked.include, asked.exclude)
    pattern = tuple(int(number) for number in asked.structure.split(":")) if ":" in asked.structure else None
    needs = asked.method in NEED_DATA
    masks = prune_weights(
        model,
        modules,
        asked.sparsity if pattern is None else (pattern[0], pattern[1]),
        asked.method,
        data.batches() if needs else None,
        scope=asked.scope,
        seed=asked.seed,
    )
    kept, total = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    return _Done(list(masks), {"sparsity": round(1 - kept / total, 6)})


def _prune_units(model: Any, asked: _Asked, data: _Data) -> _Done:
    groups = find_units(model, asked.structure, asked.include, asked.exclude, **_example(model, data.calibration))
    names = {axis.module for group in groups for axis in (*group.writes, *group.reads)}
    check_weights({name: model.get_submodule(name) for name in sorted(names)})
    if asked.sparsity == 0:
        return _Done([], {"sparsity": 0.0})
    results: dict[str, Any] = {}
    batches = data.batches() if asked.method in NEED_DATA else []
    if asked.method == "search":
        length = _mean_length(model, batches)
        kept, results = search_and_tune(
            model, groups, asked.sparsity, batches, cost=asked.cost, sequence_length=length
        )
    else:
        scores = unit_scores(model, groups, asked.method, batches, seed=asked.seed)
        scope = asked.scope or ("module" if asked.structure == "channels" else "global")
        kept = {}
        for kind in dict.fromkeys(group.structure for group in groups):
            rivals = {group.name: scores[group.name] for group in groups if group.structure == kind}
            kept |= kept_units(rivals, asked.sparsity, scope=scope)
    results["kept"] = {name: [int(mask.sum()), len(mask)] for name, mask in kept.items()}
    if asked.cut:
        return _Done(cut_units(model, groups, kept), results)
    for group in groups:
        mask_units(model, group, kept[group.name])
    return _Done([axis.module for group in groups for axis in group.reads], results)


def _prune_layers(model: Any, asked: _Asked, data: _Data) -> _Done:
    depth = len(layer_stack(model)[1])
    number = round(asked.sparsity * depth)
    if number == 0 and asked.sparsity:
        raise SettingError(f"A sparsity of {asked.sparsity} of {depth} layers is none. Give {1 / depth:.3f} or more.")
    influence = layer_influence(model, data.batches()) if asked.method == "influence" else []
    dropped = choose_layers(depth, number, asked.method, influence, seed=asked.seed)
    names = drop_layers(model, dropped) if dropped else []
    results: dict[str, Any] = {"dropped_layers": dropped}
    if influence:
        results["influence"] = [round(value, 6) for value in influence]
    return _Done(names, results)


def _mean_length(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> int:
    """Tokens of a row without padding, on average; of images what the first layer reads."""
    masks = [batch["attention_mask"] for batch in batches if "attention_mask" in batch]
    if masks:
        return max(1, round(sum(int(mask.sum()) for mask in masks) / sum(len(mask) for mask in masks)))
    lengths: list[int] = []
    first = layer_stack(model)[1][0]
    handle = first.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((*args, *kwargs.values())[0].shape[1]), with_kwargs=True
    )
    try:
        with torch.no_grad(), eval_mode(model):
            model(**{name: value[:1] for name, value in batches[0].items() if value.ndim})
    finally:
        handle.remove()
    return lengths[0]


_TECHNIQUES: dict[str, Callable[[Any, _Asked, _Data], _Done]] = {
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
    model: Any,
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
    method = _best(kind, calibration, model) if method is None else method
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
    scopes = SCOPES[method] if kind == "weights" else ("global", "module")
    if scope is not None and (scope not in scopes or method == "search" or kind == "layers"):
        raise SettingError(f"scope must be one of {', '.join(scopes)} for the method {method!r}, got {scope!r}.")
    if not cut and kind in ("weights", "layers"):
        raise SettingError(f"cut=False leaves units as zeros; {structure!r} has no units.")
    return _Asked(share, structure, method, scope, cost, include, exclude, cut, seed)


def _best(kind: str, calibration: Any, model: Any) -> str:
    """The method where none is asked for."""
    if calibration is None:
        return "spread" if kind == "layers" else "magnitude"
    if kind == "heads and neurons":
        return "search"
    return {"weights": "wanda", "layers": "influence"}.get(kind, "magnitude")


def _is_plain(model: Any) -> bool:
    """Whether it is a module that is no model of transformers."""
    return isinstance(model, nn.Module) and not isinstance(getattr(model, "config", None), PreTrainedConfig)


def _example(model: Any, calibration: Any) -> dict[str, Any]:
    """One batch for a plain module, which does not say how its inputs look."""
    if not _is_plain(model):
        return {}
    if calibration is None:
        raise SettingError(
            f"{type(model).__name__} is no model of transformers and does not say what it reads: give calibration=, "
            "one batch such as torch.randn(1, 3, 224, 224)."
        )
    if isinstance(calibration, Tensor | Mapping):
        return {"inputs": calibration}
    return {"inputs": next(iter(calibration))}


def _title(calibration: Any) -> str:
    """A data set's name for the record, without the machine's folders."""
    if isinstance(calibration, str | Path):
        path = Path(calibration)
        return path.name if path.is_absolute() or path.exists() else str(path)
    return type(calibration).__name__
