"""Factor a checkpoint file to file, weight by weight: the model itself never is in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.calibration import ModuleStatistics
from hfshrink.checkpoint import set_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.factorization.allocation import Allocation, energy_ranks, fixed_ranks, uniform_ranks
from hfshrink.factorization.deciding import Factors, factor
from hfshrink.factorization.sites import factorable, factored, matrix, size_of
from hfshrink.layers import CompressedLayer
from hfshrink.record import versions
from hfshrink.saving import check_target, read_config, write_text
from hfshrink.streaming.shards import Plan, partial_folder, to_bytes, write_checkpoint, write_config
from hfshrink.streaming.skeleton import Skeleton, count_names, read_skeleton
from hfshrink.streaming.sources import check_outside, find_folder, fingerprint, weight_files

PIECE = 2**21  # values looked at at once, when weights are checked


def stream_factors(  # noqa: PLR0913
    source: str | Path,
    output_dir: str | Path,
    *,
    rank_ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
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

    In memory are one output shard and one decomposition in float64: 4 to 5 times the bytes of a float32 weight whose
    sides are 3 : 1, 8 times those of a square one (twice as much for 16 bits). Where an embedding is the largest
    tensor, as in language models, that is less than 4 times the largest tensor.

    Args:
        source: A folder or Hub id with safetensors of a dense float model.
        output_dir: Where the result shall lie; missing or empty.
        rank_ratio: Kept parameters / dense parameters of each factored weight, in (0, 1). Exactly one of this and the
            next two is given.
        rank: The same rank for all.
        energy: Share of each weight's squared norm to keep, in (0, 1]. Reads and decomposes all weights twice: the
            files can be planned only when all ranks are known.
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
    _check_sizes(rank_ratio, rank, energy)
    folder, shard_bytes = find_folder(source, trust_remote_code), to_bytes(max_shard_size)
    check_outside(folder, output_dir)
    check_target(output_dir, overwrite)
    _check_dense(folder)
    skeleton = read_skeleton(folder, task, trust_remote_code)
    sites = Sites(skeleton, *factorable(skeleton.model, include, exclude))
    sites.check_dtypes()
    ranks = _choose_ranks(sites, rank_ratio, rank, energy, rank_multiple)
    sites.check_finite()
    notes = partial_folder(output_dir).with_suffix(".ranks.json")
    if energy is not None:
        ranks = _energy_ranks(sites, energy, rank_multiple, notes)
    factoring = _plan_layers(sites, ranks, energy is not None)
    settings = [rank_ratio, rank, energy, factoring.ranks, str(skeleton.model.config.dtype)]
    plan = Plan("factorize", skeleton, factoring.sizes(), shard_bytes, settings, has_code=trust_remote_code)
    results: dict[str, Any] = {
        "modules": list(factoring.ranks),
        "ranks": factoring.ranks,
        **factoring.parameters(),
        "skipped": sites.skipped | ranks.reasons,
        "unused": skeleton.unused,
    }

    def finish(aside: Path, counts: dict[str, Any]) -> None:
        results.update(counts)
        write_config(skeleton.model, aside)
        if record is not None:
            record(aside, results)

    write_checkpoint(plan, output_dir, factoring.convert, finish, overwrite)
    notes.unlink(missing_ok=True)
    return results


@dataclass(frozen=True)
class Sites:
    """The modules of a checkpoint that can be factored.

    Attributes:
        skeleton: Of the checkpoint.
        modules: Name -> the dense module, on meta.
        skipped: Name -> why a module can't be, or shall not be.
    """

    skeleton: Skeleton
    modules: dict[str, Any]
    skipped: dict[str, str]

    def read(self, title: str, without: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """Name of a module and its weight, mapped from its file."""
        names = [f"{name}.weight" for name in self.modules if name not in without]
        for name, weight in self.skeleton.read(names, title):
            yield name.removesuffix(".weight"), weight
            del weight  # its mapping goes before the next one comes

    def factor(self, name: str, weight: Tensor, rank: int) -> tuple[nn.Module, Factors]:
        """The module with the weight, in the dtype that a load would give it, and its factors up to a rank."""
        module = copy.copy(self.modules[name])
        values = nn.Parameter(weight.to(self.skeleton.dtypes[f"{name}.weight"]), requires_grad=False)
        module._parameters = {**module._parameters, "weight": values}
        return module, factor(name, module, rank, ModuleStatistics())

    def check_dtypes(self) -> None:
        """Refuse weights that are stored as integers or in 8 bits."""
        for name in self.modules:
            if f"{name}.weight" not in self.skeleton.dtypes:
                stored = self.skeleton.places[f"{name}.weight"].dtype
                raise UnsupportedModelError(f"{name}.weight is stored as {stored}; floats of 16 to 64 bits factor.")

    def check_finite(self) -> None:
        """Look through all weights: a day of decompositions shall not end in a NaN."""
        for name, weight in self.read("check"):
            dtype = self.skeleton.dtypes[f"{name}.weight"]
            if not all(bool(piece.to(dtype).isfinite().all()) for piece in weight.reshape(-1).split(PIECE)):
                raise SettingError(
                    f"{name}.weight has NaN or infinite values as {dtype}. Is the checkpoint corrupt? Otherwise leave "
                    f"it out: exclude={name!r}."
                )


@dataclass(frozen=True)
class Factoring:
    """What becomes of each tensor.

    Attributes:
        sites: The modules of the source.
        layers: Name -> the layer on meta that takes a module's place.
        ranks: Name -> its rank.
        by_energy: Whether the ranks come from the tails of all factors that save parameters; those kept must be cut
            from the same ones, as other products round otherwise.
    """

    sites: Sites
    layers: dict[str, CompressedLayer]
    ranks: dict[str, int]
    by_energy: bool

    def sizes(self) -> dict[str, int]:
        """Bytes that are written for each tensor."""
        found = {}
        for name, place in self.sites.skeleton.places.items():
            site, dtype = self._site(name), self.sites.skeleton.dtypes.get(name)
            count = (
                place.shape.numel() if site is None else sum(f.numel() for f in _factors(self.layers[site]).values())
            )
            found[name] = place.size_bytes if dtype is None else count * dtype.itemsize
        return found

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
        most = size_of(self.sites.modules[site]).largest_rank if self.by_energy else rank
        module, found = self.sites.factor(site, tensor, most)
        layer = found.layer(module, rank, "channel")
        return {f"{root}{part}": values for part, values in _factors(layer).items()}

    def _site(self, name: str) -> str | None:
        """The factored module whose weight a tensor is."""
        site, _, last = name.rpartition(".")
        return site if last == "weight" and site in self.layers else None


def _factors(layer: CompressedLayer) -> dict[str, Tensor]:
    return {name: factor.detach() for name, factor in layer.named_parameters() if name != "bias"}


def _check_sizes(rank_ratio: Any, rank: Any, energy: Any) -> None:
    given = {"rank_ratio": rank_ratio, "rank": rank, "energy": energy}
    found = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(found) != 1:
        raise SettingError(f"Give exactly one of {', '.join(given)}, got {', '.join(found) or 'none'}.")


def _check_dense(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not those of the plain model."""
    held = read_config(folder).get("quantization_config")
    if not held:
        return
    method = held.get("quant_method") if isinstance(held, dict) else held
    if method == "hfshrink":
        raise SettingError(
            f"{folder} holds compressed layers already, which are not factored file to file. Load it and factorize "
            "the model, or factor what hfshrink.to_dense makes of it."
        )
    raise UnsupportedModelError(
        f"{folder} is quantized by {method}: quantized weights can't be factored. Factor the float model that it was "
        "made from, then quantize it."
    )


def _choose_ranks(sites: Sites, rank_ratio: Any, rank: Any, energy: Any, multiple: int) -> Allocation:
    """The ranks that shapes decide; for an energy, those of spectra that fall evenly, which checks the setting.

    Raises:
        SettingError: A value out of range, or no rank saves parameters anywhere.
    """
    sizes = {name: size_of(module) for name, module in sites.modules.items()}
    if energy is not None:
        even = {name: torch.arange(size.full_rank, -1, -1).double() for name, size in sizes.items()}
        return energy_ranks(even, sizes, energy, multiple)
    found = uniform_ranks(sizes, rank_ratio, multiple) if rank is None else fixed_ranks(sizes, rank)
    _check_any(found)
    return found


def _energy_ranks(sites: Sites, energy: float, multiple: int, notes: Path) -> Allocation:
    """The ranks that keep a share of each weight's energy; each is noted in a file, for a call after a kill."""
    source = fingerprint(weight_files(sites.skeleton.folder))
    key = {"source": source, "settings": [energy, multiple], "versions": versions()}
    found = _read_notes(notes, key)
    sizes = {name: size_of(module) for name, module in sites.modules.items()}
    for name, weight in sites.read("ranks", without=found):
        size = sizes[name]
        tails = sites.factor(name, weight, max(1, size.largest_rank))[1].tails
        one = energy_ranks({name: tails}, {name: size}, energy, multiple)
        found[name] = [one[name], one.reasons.get(name)]
        write_text(notes, json.dumps({"key": key, "ranks": found}))
        del weight
    reasons = {name: found[name][1] for name in sizes if found[name][1] is not None}
    ranks = Allocation({name: found[name][0] for name in sizes}, sizes, reasons)
    _check_any(ranks)
    return ranks


def _read_notes(notes: Path, key: dict[str, Any]) -> dict[str, Any]:
    try:
        noted = json.loads(notes.read_text(encoding="utf-8"))
        return dict(noted["ranks"]) if noted["key"] == key else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or not ours


def _check_any(ranks: Allocation) -> None:
    if all(rank is None for rank in ranks.values()):
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(ranks.reasons.items())[:3])
        raise SettingError(f"No module would become smaller, all {len(ranks)} stay dense ({shown}).")


def _plan_layers(sites: Sites, ranks: Mapping[str, int | None], by_energy: bool) -> Factoring:
    """Put the layers in their places in the skeleton, whose config then holds their map."""
    kept = {name: rank for name, rank in ranks.items() if rank is not None}
    layers: dict[str, CompressedLayer] = {}
    for name, rank in kept.items():
        rows, columns = matrix(sites.modules[name]).shape
        up, down = torch.empty(rows, rank, device="meta"), torch.empty(rank, columns, device="meta")
        layers[name] = factored(sites.modules[name], up, down)
    set_layers(sites.skeleton.model, layers)
    return Factoring(sites, layers, kept, by_energy)
