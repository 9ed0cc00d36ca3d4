"""Factor a checkpoint file to file, weight by weight: the model itself never is in memory."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfshrink.calibration import ModuleStatistics
from hfshrink.checkpoint import METHOD, set_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.factorization.allocation import Allocation
from hfshrink.factorization.deciding import factor
from hfshrink.factorization.making import SOURCES, Made, warn
from hfshrink.factorization.request import Request
from hfshrink.factorization.sites import factorable, factored, matrix, size_of
from hfshrink.factorization.streamed_ranks import KEYWORDS, Notes, Sites, Sizing, known_ranks, ranks_by_tails
from hfshrink.layers import CompressedLayer
from hfshrink.loading import EXPORT_MANIFEST
from hfshrink.measurement import Measurement
from hfshrink.record import StepRecord, report
from hfshrink.saving import check_target, read_config
from hfshrink.streaming.shards import Plan, partial_folder, to_bytes, write_checkpoint, write_config
from hfshrink.streaming.skeleton import count_names, read_skeleton
from hfshrink.streaming.sources import check_outside, find_folder

logger = logging.getLogger(__name__)


def streams(request: Request) -> bool:
    """Whether a request goes file to file: named, to a folder, without data, and with plain weights in the source.

    A checkpoint of compressed layers is loaded, and so are exports, which have their own error, and the forms of
    convolutions that have no plain matrix.
    """
    if not request.is_named or request.output_dir is None or request.calibration is not None:
        return False
    source = Path(request.source).expanduser()
    if request.form != "channel" or (source / EXPORT_MANIFEST).exists():
        return False
    return _method(read_config(source if source.is_dir() else request.source)) != METHOD


def stream_request(request: Request, max_shard_size: int | str, start: float) -> Path:
    """Meet a request file to file; the record is written before the folder is moved into place.

    Args:
        request: One that `streams`.
        max_shard_size: Largest output file.
        start: Of the call, by `time.perf_counter`.

    Returns:
        The folder.

    Raises:
        SettingError: See `stream_factors`; so with the others.
        BudgetError: The budget can't be met.
        UnsupportedModelError: transformers rebuilds tensors of this family while loading.
        CheckpointError: The source can't be read, or the folder can't be written.
    """
    source, target = find_folder(request.source), Path(request.output_dir or "")
    report(source)  # a step is appended at the end: what can't be read is told before work
    base = source.name if Path(request.source).expanduser().is_dir() else str(request.source)

    def record(aside: Path, results: dict[str, Any]) -> None:
        found = dict(results)
        step = StepRecord(
            technique="factorize",
            method=request.weighting,
            settings=request.settings,
            before=Measurement(parameters=found.pop("parameters_before"), size_bytes=weight_bytes(source)),
            after=Measurement(parameters=found.pop("parameters_after"), size_bytes=weight_bytes(aside)),
            modules=found.pop("modules"),
            skipped=found.pop("skipped"),
            results=found,
            seconds=time.perf_counter() - start,
            source=SOURCES[request.weighting],
        )
        old = report(aside)
        new = dataclasses.replace(old, steps=(*old.steps, step), compressed=Measurement())
        dataclasses.replace(new, base_model=old.base_model or base or None).save(aside)

    names = (*KEYWORDS, "rank_multiple", "include", "exclude", "overwrite")
    how: dict[str, Any] = {name: getattr(request, name) for name in names}
    stream_factors(source, target, **how, max_shard_size=max_shard_size, record=record)
    return target


def stream_factors(  # noqa: PLR0913
    source: str | Path,
    output_dir: str | Path,
    *,
    rank_ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_parameters: int | None = None,
    max_size_bytes: int | None = None,
    include: str | Sequence[str] = "*",
    exclude: str | Sequence[str] | None = None,
    rank_multiple: int = 8,
    task: str | None = None,
    max_shard_size: int | str = "5GB",
    trust_remote_code: bool = False,
    overwrite: bool = False,
    record: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Factor the weights of a checkpoint of any size, by truncated SVD, into a folder that `from_pretrained` loads.

    Eckart and Young 1936: of all products of rank r, the r largest singular triplets are nearest to a weight. The
    tensors equal those that loading, `factorize` with weighting "none", and saving give, bit by bit, under the
    source's keys. A call that was killed goes on where it stood when it is made again: finished shards wait in a
    hidden folder beside `output_dir`.

    In memory are one output shard, the weight, and the eigen-decomposition of its shorter side k in float64: k²
    numbers and 2 k² that LAPACK takes beside them. Of a float32 weight whose sides are 2 : 1 that makes 4 times its
    bytes (as much for longer ones, where the factors count more), of a square one 7 times; twice as much for 16 bits.
    So 4 times the largest tensor are enough where that is an embedding, or a feed-forward weight of twice the width.

    Args:
        source: A folder or Hub id with safetensors of a dense float model.
        output_dir: Where the result shall lie; missing or empty.
        rank_ratio: Kept parameters / dense parameters of each factored weight, in (0, 1). Exactly one of this and the
            next four is given.
        rank: The same rank for all.
        energy: Share of each weight's squared norm to keep, in (0, 1]. This and the budgets read and decompose all
            weights twice: the files can be planned only when all ranks are known.
        max_parameters: Of the whole model, as `factorize` spreads them.
        max_size_bytes: Of all tensors that are written.
        include: `fnmatch` wildcards of modules to factor.
        exclude: Wildcards of modules to leave dense; None means the task head.
        rank_multiple: Ranks by ratio and energy are multiples of it.
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        max_shard_size: Largest output file, such as `"2GB"`, or bytes.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        overwrite: Whether a folder with files in it may be replaced.
        record: Called with the finished folder and the results just before the folder is moved into place.

    Returns:
        `modules` (factored), `ranks` (of each), `parameters_before` and `parameters_after` (of the whole model, tied
        ones once), `skipped` (name -> reason), `unused` (keys of the source that the model does not know),
        `source_bytes` and `size_bytes` (tensors read and written), `shards`, `resumed_shards`.

    Raises:
        SettingError: Not exactly one size, a value out of range, nothing to factor, NaN or infinite weights,
            compressed layers in the source, or `output_dir` holds the source. All before the first decomposition.
        UnsupportedModelError: The checkpoint is quantized, or transformers rebuilds its tensors while loading.
        CheckpointError: Files are missing, corrupt or foreign, or there is no space.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
        >>> folder = Path(tempfile.mkdtemp())
        >>> BertModel(config).save_pretrained(folder / "dense")
        >>> stream_factors(folder / "dense", folder / "thin", rank=4, include="pooler*")["modules"]
        ['pooler.dense']
        >>> AutoModel.from_pretrained(folder / "thin").pooler.dense
        LowRankLinear(in_features=16, out_features=16, rank=4, bias=True)
    """
    sizing = Sizing.of(
        rank_multiple, rank_ratio=rank_ratio, rank=rank, energy=energy, max_parameters=max_parameters,
        max_size_bytes=max_size_bytes,
    )  # fmt: skip
    folder, shard_bytes = find_folder(source, trust_remote_code), to_bytes(max_shard_size)
    check_outside(folder, output_dir)
    check_target(output_dir, overwrite)
    _check_dense(folder)
    skeleton = read_skeleton(folder, task, trust_remote_code)
    sites = Sites(skeleton, *factorable(skeleton.model, include, exclude))
    sites.check_dtypes()
    ranks = known_ranks(sites, sizing)
    sites.check_finite()
    notes = Notes.of(partial_folder(output_dir).with_suffix(".notes.jsonl"), skeleton)
    if ranks is None:
        ranks = ranks_by_tails(sites, sizing, notes)
    factoring = _plan_layers(sites, ranks, sizing.by_tails, notes)
    settings = [sizing.keyword, sizing.value, factoring.ranks, str(skeleton.model.config.dtype)]
    plan = Plan("factorize", skeleton, factoring.sizes(), shard_bytes, settings, has_code=trust_remote_code)
    results: dict[str, Any] = {
        "modules": list(factoring.ranks),
        **factoring.parameters(),
        "skipped": sites.skipped | ranks.reasons,
        "unused": skeleton.unused,
    }

    def finish(aside: Path, counts: dict[str, Any]) -> None:
        results.update(counts | factoring.made().results(sites.modules))
        write_config(skeleton.model, aside)
        if record is not None:
            record(aside, results)

    write_checkpoint(plan, output_dir, factoring.convert, finish, overwrite)
    notes.path.unlink(missing_ok=True)
    warn(factoring.made(), len(sites.modules))
    return results


@dataclass(frozen=True)
class Factoring:
    """What becomes of each tensor.

    Attributes:
        sites: The modules of the source.
        layers: Name -> the layer on meta that takes a module's place.
        ranks: Name -> its rank.
        reasons: Name of a module that stays dense -> why.
        by_tails: Whether the ranks come from the tails of all factors that save parameters; those kept must be cut
            from the same ones, as other products round otherwise.
        notes: Where each module's error is noted.
    """

    sites: Sites
    layers: dict[str, CompressedLayer]
    ranks: dict[str, int]
    reasons: dict[str, str]
    by_tails: bool
    notes: Notes

    def sizes(self) -> dict[str, int]:
        """Bytes that are written for each tensor."""
        found, skeleton = {}, self.sites.skeleton
        for name in skeleton.places:
            site = self._site(name)
            if site is None:
                found[name] = skeleton.loaded_bytes(name)
            else:
                count = sum(part.numel() for part in _factors(self.layers[site]).values())
                found[name] = count * skeleton.dtypes[name].itemsize
        return found

    def made(self) -> Made:
        """What is told of the layers, as of those that were made in memory; errors once all are converted."""
        errors = {name: self.notes.error(name, rank) for name, rank in self.ranks.items()}
        return Made(self.layers, self.reasons, errors)

    def parameters(self) -> dict[str, int]:
        """The parameters of the whole model before and after, tied ones once."""
        dense = sum(self.sites.modules[name].weight.numel() for name in self.layers)
        kept = sum(values.numel() for layer in self.layers.values() for values in _factors(layer).values())
        after = count_names(self.sites.skeleton.model)
        return {"parameters_before": after + dense - kept, "parameters_after": after}

    def convert(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What is written for one tensor: itself, or its factors, one under the source's own key and one beside it."""
        skeleton, site = self.sites.skeleton, self._site(name)
        key, dtype = skeleton.places[name].key, skeleton.dtypes.get(name)
        if site is None:
            return {key: tensor.clone() if dtype is None else tensor.to(dtype, copy=True)}
        rank, root = self.ranks[site], key.removesuffix("weight")
        module = self.sites.loaded(site, tensor)
        most = size_of(module).largest_rank if self.by_tails else rank
        found = factor(site, module, most, ModuleStatistics())
        self.notes.add("error", site, [rank, found.relative_error(rank)])
        layer = found.layer(module, rank, "channel")
        return {f"{root}{part}": values for part, values in _factors(layer).items()}

    def _site(self, name: str) -> str | None:
        """The factored module whose weight a tensor is."""
        site, _, last = name.rpartition(".")
        return site if last == "weight" and site in self.layers else None


def _factors(layer: CompressedLayer) -> dict[str, Tensor]:
    return {name: factor.detach() for name, factor in layer.named_parameters() if name != "bias"}


def _check_dense(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not those of the plain model."""
    method = _method(read_config(folder))
    if method is None:
        return
    if method == METHOD:
        raise SettingError(
            f"{folder} holds compressed layers already, which are not factored file to file. Load it and factorize "
            "the model, or factor what hfshrink.to_dense makes of it."
        )
    raise UnsupportedModelError(
        f"{folder} is quantized by {method}: quantized weights can't be factored. Factor the float model that it was "
        "made from, then quantize it."
    )


def _method(config: Mapping[str, Any]) -> Any:
    """What compressed the weights that a config describes; None for plain ones."""
    held = config.get("quantization_config")
    return (held.get("quant_method", "") if isinstance(held, dict) else held) if held else None


def _plan_layers(sites: Sites, ranks: Allocation, by_tails: bool, notes: Notes) -> Factoring:
    """Put the layers in their places in the skeleton, whose config then holds their map."""
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    layers: dict[str, CompressedLayer] = {}
    for name, rank in kept.items():
        rows, columns = matrix(sites.modules[name]).shape
        up, down = torch.empty(rows, rank, device="meta"), torch.empty(rank, columns, device="meta")
        layers[name] = factored(sites.modules[name], up, down)
    set_layers(sites.skeleton.model, layers)
    return Factoring(sites, layers, kept, ranks.reasons, by_tails, notes)
