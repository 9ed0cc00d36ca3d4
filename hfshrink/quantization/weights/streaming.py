"""Quantize a checkpoint file to file, tensor by tensor: the model itself never is in memory."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import CheckpointError, SettingError, require
from hfshrink.quantization.weights.bits import empty_model, make_config
from hfshrink.quantization.weights.casting import is_kept_float32
from hfshrink.quantization.weights.choice import BITS, check_unquantized, choose_layers, kept_names
from hfshrink.quantization.weights.packing import cast, pack, packed_bytes, to_bytes
from hfshrink.quantization.weights.sources import (
    SIDE_FILES,
    Place,
    find_folder,
    find_tensors,
    fingerprint,
    read_tensors,
    weight_files,
)
from hfshrink.record import versions
from hfshrink.saving import read_config, save_aside, write_text

logger = logging.getLogger(__name__)

CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MANIFEST = "streaming.json"
NOT_COPIED = ("config.json", "trainer_state.json")
SPARE_BYTES = 2**20  # of headers and config files, when the space on disk is checked


@dataclass(frozen=True)
class Plan:
    """What becomes of each tensor, decided before the first one is read.

    Attributes:
        scheme: One of `BITS` or `CASTS`.
        double_quantization: Whether 4-bit scales are stored in 8 bits.
        places: Name -> where it lies in the source.
        dtypes: Name -> the dtype that it is rounded to, before it is quantized or as it is stored.
        quantized: Names that bitsandbytes quantizes -> whether they are stored transposed (GPT-2's Conv1D).
        shards: The names in each output file.
        size_bytes: Upper bound of the output.
    """

    scheme: str
    double_quantization: bool
    places: dict[str, Place]
    dtypes: dict[str, torch.dtype]
    quantized: dict[str, bool]
    shards: list[list[str]]
    size_bytes: int

    def changed(self) -> list[str]:
        """Names of the tensors that are quantized or get another dtype."""
        return [
            name
            for name, dtype in self.dtypes.items()
            if name in self.quantized or FLOATS[self.places[name].dtype] != dtype
        ]

    def file_name(self, shard: int) -> str:
        """Name of an output file, as transformers names them."""
        if len(self.shards) == 1:
            return "model.safetensors"
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"


def stream_weights(
    source: str | Path,
    output_dir: str | Path,
    scheme: str,
    *,
    task: str | None = None,
    exclude: str | Sequence[str] | None = None,
    max_shard_size: int | str = "5GB",
    double_quantization: bool = True,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    record: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Quantize a checkpoint of any size into a folder that plain transformers loads.

    The tensors equal those that loading, quantizing and saving would give, bit by bit, under the source's keys. At
    most one output shard and twice the largest tensor are in memory. A call that was killed goes on where it stood
    when it is made again: finished shards wait in a hidden folder beside `output_dir`.

    Args:
        source: A folder or Hub id with safetensors.
        output_dir: Where the result shall lie; missing or empty.
        scheme: "int8", "nf4", "fp4", "bf16" or "fp16".
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        exclude: `fnmatch` wildcards of modules to leave in float; None means the task head.
        max_shard_size: Largest output file, such as `"2GB"`, or bytes.
        double_quantization: Whether 4-bit schemes quantize their scales too.
        trust_remote_code: Whether to run code from the checkpoint's repository.
        overwrite: Whether a folder with files in it may be replaced.
        record: Called with the finished folder and the results just before the folder is moved into place.

    Returns:
        `modules` (quantized or cast), `skipped` (name -> reason), `unused` (keys of the source that the model does not
        know), `source_bytes` and `size_bytes` (tensors read and written), `shards`, `resumed_shards`.

    Raises:
        SettingError: Unknown scheme, nothing to quantize, NaN or infinite weights, or `output_dir` holds the source.
        UnsupportedModelError: The checkpoint is quantized already, or transformers rebuilds its tensors while loading.
        MissingDependencyError: The extra `bnb` is not installed.
        CheckpointError: Files are missing, corrupt or foreign, or there is no space.
    """
    folder = _check_call(source, output_dir, scheme, exclude, trust_remote_code)
    shard_bytes = to_bytes(max_shard_size)
    files, model = weight_files(folder), empty_model(folder, task, trust_remote_code)
    names, skipped, config = _choose(model, scheme, exclude, double_quantization)
    places, unused = find_tensors(files, model)
    plan = _plan(model, scheme, double_quantization, places, names, shard_bytes)
    if not plan.changed():
        raise SettingError(f"{source} has no weights to cast: all are in {scheme} already.")
    key = {
        "source": fingerprint(files),
        "settings": [scheme, double_quantization, shard_bytes, sorted(names), str(model.config.dtype)],
        "versions": versions(),
    }
    with save_aside(output_dir, overwrite=overwrite) as aside:
        target = Path(output_dir).expanduser().absolute()
        partial = target.with_name(f".{target.name}.streaming")
        done = _open_partial(partial, key, [plan.file_name(number) for number in range(len(plan.shards))])
        _check_space(partial.parent, plan, done)
        resumed = len(done)
        _write_shards(plan, partial, key, done)
        _write_config(model, config, scheme, aside)
        _copy_side_files(folder, aside, trust_remote_code)
        for name in done:
            (partial / name).rename(aside / name)
        _write_index(plan, done, aside)
        results = {
            "modules": names or list(dict.fromkeys(name.rpartition(".")[0] for name in plan.changed())),
            "skipped": skipped,
            "unused": unused,
            "source_bytes": sum(place.size_bytes for place in places.values()),
            "size_bytes": sum(shard["tensor_bytes"] for shard in done.values()),
            "shards": len(done),
            "resumed_shards": resumed,
        }
        if record is not None:
            record(aside, results)
    shutil.rmtree(partial, ignore_errors=True)
    return results


def _check_call(source: Any, output_dir: Any, scheme: str, exclude: Any, trust_remote_code: bool) -> Path:
    """The folder of the source, after what can be known without reading weights was checked."""
    if scheme not in (*BITS, *CASTS):
        raise SettingError(f"Streaming makes {', '.join((*BITS, *CASTS))}, got {scheme!r}.")
    if scheme in CASTS and exclude:
        raise SettingError(f"{scheme} casts all weights, as a plain reload would; it takes no exclude={exclude!r}.")
    if scheme in BITS:
        require("bitsandbytes", extra="bnb")
    folder = find_folder(source, trust_remote_code)
    if folder.resolve().is_relative_to(Path(output_dir).expanduser().resolve()):
        raise SettingError(f"output_dir {output_dir} holds the model that is read. Choose another folder.")
    check_unquantized(read_config(folder), str(source))
    return folder


def _choose(
    model: Any, scheme: str, exclude: str | Sequence[str] | None, double_quantization: bool
) -> tuple[list[str], dict[str, str], Any]:
    """The layers to quantize, those to skip with reasons, and the quantization config; none of these for a cast."""
    if scheme in CASTS:
        return [], {}, None
    choice = choose_layers(model, scheme, kept_names(model, exclude))
    return choice.layers, choice.skipped, make_config(scheme, choice.patterns, double_quantization)


def _plan(
    model: Any, scheme: str, double: bool, places: dict[str, Place], layers: list[str], shard_bytes: int
) -> Plan:
    from transformers.pytorch_utils import Conv1D

    dtype = CASTS.get(scheme) or _own_dtype(model.config, places)
    model.config.dtype = dtype
    dtypes = {
        name: torch.float32 if is_kept_float32(model, name, dtype) else dtype
        for name, place in places.items()
        if place.dtype in FLOATS
    }
    quantized = {f"{name}.weight": isinstance(model.get_submodule(name), Conv1D) for name in layers}
    sizes = {}
    for name, place in places.items():
        if name in quantized:
            shape = torch.Size(reversed(place.shape)) if quantized[name] else place.shape
            sizes[name] = packed_bytes(shape, scheme, double)
        else:
            width = dtypes[name].itemsize if name in dtypes else None
            sizes[name] = place.size_bytes if width is None else place.shape.numel() * width
    return Plan(scheme, double, places, dtypes, quantized, _split(sizes, shard_bytes), sum(sizes.values()))


def _own_dtype(config: Any, places: dict[str, Place]) -> torch.dtype:
    """The dtype that `from_pretrained` loads in: the config's, or that of the first float tensor."""
    named = config.dtype
    if named is None:
        named = next((FLOATS[place.dtype] for place in places.values() if place.dtype in FLOATS), torch.float32)
    return getattr(torch, named) if isinstance(named, str) else named


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, in groups of at most `most` bytes; a larger tensor has a group of its own."""
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _open_partial(partial: Path, key: dict[str, Any], files: list[str]) -> dict[str, Any]:
    """What an earlier call with the same source and settings finished: file name -> its entry in the manifest."""
    try:
        manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
        if manifest["key"] == key:
            done = {name: shard for name, shard in manifest["shards"].items() if (partial / name).is_file()}
            return {
                name: done[name]
                for name in files
                if name in done and (partial / name).stat().st_size == done[name]["file_bytes"]
            }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # none, or not ours: start anew
    shutil.rmtree(partial, ignore_errors=True)
    return {}


def _check_space(parent: Path, plan: Plan, done: dict[str, Any]) -> None:
    needed = plan.size_bytes + SPARE_BYTES - sum(shard["file_bytes"] for shard in done.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError(
            f"{plan.scheme} writes {needed:,} bytes to {parent}, where {free:,} are free. Make space or "
            "choose another disk."
        )


def _write_shards(plan: Plan, partial: Path, key: dict[str, Any], done: dict[str, Any]) -> None:
    """Write the shards that are not there yet, and note each in the manifest."""
    from tqdm.auto import tqdm

    partial.mkdir(exist_ok=True)
    total = sum(place.size_bytes for place in plan.places.values())
    with tqdm(total=total, desc=plan.scheme, unit="B", unit_scale=True, disable=None, delay=2) as bar:
        for number, names in enumerate(plan.shards):
            file = plan.file_name(number)
            if file not in done:
                done[file] = _write_shard(partial / file, _convert_all(plan, names, bar, partial))
                write_text(partial / MANIFEST, json.dumps({"key": key, "shards": done}))
            else:
                bar.update(sum(plan.places[name].size_bytes for name in names))


def _convert_all(plan: Plan, names: list[str], bar: Any, partial: Path) -> dict[str, torch.Tensor]:
    """The tensors of one shard."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        for name, tensor in read_tensors((name, plan.places[name]) for name in names):
            tensors |= _convert(plan, name, tensor)
            bar.update(plan.places[name].size_bytes)
            del tensor  # its mapping goes before the next one comes
    except SettingError:  # a value that does not fit: there is nothing to go on with
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return tensors


def _convert(plan: Plan, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is written for one tensor, under the source's own key, which transformers knows how to rename."""
    key = plan.places[name].key
    if name not in plan.dtypes:
        return {key: tensor.clone()}
    dtype = plan.dtypes[name]
    if name not in plan.quantized:
        return {key: cast(key, tensor, dtype, plan.scheme)}
    tensor = tensor.T.contiguous() if plan.quantized[name] else tensor
    return pack(key, tensor, dtype, plan.scheme, plan.double_quantization)


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write a file aside and move it into place; its entry in the manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"Can't write {path}: {error}. What is finished stays beside it; the same call goes on from there."
        ) from error
    return {
        "file_bytes": path.stat().st_size,
        "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "keys": list(tensors),
    }


def _write_config(model: Any, quantization_config: Any, scheme: str, folder: Path) -> None:
    config = model.config
    config.architectures = [type(model).__name__]
    if quantization_config is not None:
        config.quantization_config = quantization_config
    config.save_pretrained(folder)


def _copy_side_files(source: Path, folder: Path, trust_remote_code: bool) -> None:
    for pattern in (*SIDE_FILES, *(["*.py"] if trust_remote_code else [])):
        for file in source.glob(pattern):
            if file.name not in NOT_COPIED and not file.name.endswith(".index.json") and file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write_index(plan: Plan, done: dict[str, Any], folder: Path) -> None:
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(shard["tensor_bytes"] for shard in done.values())},
        "weight_map": {key: name for name, shard in sorted(done.items()) for key in shard["keys"]},
    }
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
