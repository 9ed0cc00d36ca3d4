"""A checkpoint without its weights: the model on meta, and where each of its tensors lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hfshrink.streaming.dtypes import float_dtypes, own_dtype
from hfshrink.streaming.sources import Place, empty_model, find_tensors, read_tensors, weight_files


@dataclass(frozen=True)
class Skeleton:
    """A checkpoint without its weights.

    Attributes:
        folder: Where it lies.
        model: On meta; its config says the dtype.
        places: Name of each tensor in the model -> where it lies.
        dtypes: Name of each float tensor -> the dtype that `from_pretrained` casts it to.
        unused: Keys of the files that the model does not know.
    """

    folder: Path
    model: Any
    places: dict[str, Place]
    dtypes: dict[str, torch.dtype]
    unused: list[str]

    def loaded_bytes(self, name: str) -> int:
        """Bytes of a tensor in the dtype that `from_pretrained` casts it to."""
        place, dtype = self.places[name], self.dtypes.get(name)
        return place.size_bytes if dtype is None else place.shape.numel() * dtype.itemsize

    def read(self, names: Iterable[str], title: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, mapped from their files, under a progress bar that counts bytes.

        Raises:
            CheckpointError: A file is corrupt.
        """
        from tqdm.auto import tqdm

        places = {name: self.places[name] for name in names}
        total = sum(place.size_bytes for place in places.values())
        with tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=None, delay=2) as bar:
            for name, tensor in read_tensors(places.items()):
                yield name, tensor
                bar.update(places[name].size_bytes)
                del tensor  # its mapping goes before the next one comes


def read_skeleton(
    folder: Path, task: str | None = None, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> Skeleton:
    """Names, shapes and places of a checkpoint; no weight is read.

    Args:
        folder: With a config and safetensors.
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        trust_remote_code: Whether to run code from the folder.
        dtype: To load in; None takes the checkpoint's own.

    Raises:
        UnsupportedModelError: No known architecture, or transformers would rebuild tensors of this family.
        CheckpointError: Files are missing, corrupt or foreign.
    """
    files, model = weight_files(folder), empty_model(folder, task, trust_remote_code)
    places, unused = find_tensors(files, model)
    dtype = dtype or own_dtype(model.config, places)
    model.config.dtype = dtype
    return Skeleton(folder, model, places, float_dtypes(model, places, dtype), unused)


def count_names(model: Any) -> int:
    """Parameters of a model, which may lie on meta, tied ones once."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)
