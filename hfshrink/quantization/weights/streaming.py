"""Quantize a checkpoint file to file, tensor by tensor: the model itself never is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfshrink.errors import SettingError, require
from hfshrink.quantization.weights.bits import make_config
from hfshrink.quantization.weights.choice import BITS, check_unquantized, choose_layers, kept_names
from hfshrink.quantization.weights.packing import cast, pack, packed_bytes
from hfshrink.saving import read_config
from hfshrink.streaming.dtypes import FLOATS
from hfshrink.streaming.shards import Plan, to_bytes, write_checkpoint, write_config
from hfshrink.streaming.skeleton import Skeleton, read_skeleton
from hfshrink.streaming.sources import check_outside, find_folder

CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Converter:
    """What becomes of each tensor.

    Attributes:
        scheme: One of `BITS` or `CASTS`.
        double_quantization: Whether 4-bit scales are stored in 8 bits.
        source: The checkpoint; tensors are rounded to its dtypes, before they are quantized or as they are stored.
        quantized: Names that bitsandbytes quantizes -> whether they are stored transposed (GPT-2's Conv1D).
    """

    scheme: str
    double_quantization: bool
    source: Skeleton
    quantized: dict[str, bool]

    def changed(self) -> list[str]:
        """Names of the tensors that are quantized or get another dtype."""
        return [
            name
            for name, dtype in self.source.dtypes.items()
            if name in self.quantized or FLOATS[self.source.places[name].dtype] != dtype
        ]

    def size(self, name: str) -> int:
        """Upper bound of the bytes that are written for a tensor."""
        place = self.source.places[name]
        if name in self.quantized:
            shape = torch.Size(reversed(place.shape)) if self.quantized[name] else place.shape
            return packed_bytes(shape, self.scheme, self.double_quantization)
        return (
            place.shape.numel() * self.source.dtypes[name].itemsize if name in self.source.dtypes else place.size_bytes
        )

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is written for one tensor, under the source's own key, which transformers knows how to rename."""
        key = self.source.places[name].key
        if name not in self.source.dtypes:
            return {key: tensor.clone()}
        dtype = self.source.dtypes[name]
        if name not in self.quantized:
            return {key: cast(key, tensor, dtype, self.scheme)}
        tensor = tensor.T.contiguous() if self.quantized[name] else tensor
        return pack(key, tensor, dtype, self.scheme, self.double_quantization)


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
    from transformers.pytorch_utils import Conv1D

    folder = _check_call(source, output_dir, scheme, exclude, trust_remote_code)
    shard_bytes = to_bytes(max_shard_size)
    skeleton = read_skeleton(folder, task, trust_remote_code, CASTS.get(scheme))
    model = skeleton.model
    names, skipped, config = _choose(model, scheme, exclude, double_quantization)
    is_transposed = {f"{name}.weight": isinstance(model.get_submodule(name), Conv1D) for name in names}
    converter = Converter(scheme, double_quantization, skeleton, is_transposed)
    if not converter.changed():
        raise SettingError(f"{source} has no weights to cast: all are in {scheme} already.")
    sizes = {name: converter.size(name) for name in skeleton.places}
    settings = [double_quantization, sorted(names), str(model.config.dtype)]
    plan = Plan(scheme, skeleton, sizes, shard_bytes, settings, has_code=trust_remote_code)
    results: dict[str, Any] = {
        "modules": names or list(dict.fromkeys(name.rpartition(".")[0] for name in converter.changed())),
        "skipped": skipped,
        "unused": skeleton.unused,
    }

    def finish(aside: Path, counts: dict[str, Any]) -> None:
        results.update(counts)
        if config is not None:
            model.config.quantization_config = config
        write_config(model, aside)
        if record is not None:
            record(aside, results)

    write_checkpoint(plan, output_dir, converter.convert, finish, overwrite)
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
    check_outside(folder, output_dir)
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
