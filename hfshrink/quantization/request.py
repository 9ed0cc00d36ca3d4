"""What a call of `quantize` asks for, checked and loaded once for all schemes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hfshrink.data import data_title
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.loading import EXPORT_MANIFEST, load
from hfshrink.quantization.plain import plain
from hfshrink.quantization.weights.choice import check_unquantized, held_method, kept_names
from hfshrink.saving import check_target, read_config
from hfshrink.streaming.sources import check_outside, empty_model


@dataclass
class Request:
    """The keywords of `quantize`; `load` puts the loaded model in the place of its name.

    Attributes:
        source: The model as it was given.
        options: Of the scheme.
        settings: For the record.
        model: The loaded model, once `load` was called.
        reason: Why `auto` took this scheme.
        warning: Where the scheme brings no speed on this processor.
    """

    source: Any
    scheme: Any
    output_dir: Path | None
    calibration: Any
    metric: Any
    max_drop: float | None
    processor: Any
    task: str | None
    exclude: str | Sequence[str] | None
    overwrite: bool
    trust_remote_code: bool
    options: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    reason: str | None = None
    warning: str | None = None

    def __post_init__(self) -> None:
        """Refuse what can't work before anything is loaded."""
        if self.is_named and str(self.source).startswith("~"):
            self.source = Path(self.source).expanduser()
        _check_source(self.source)
        if self.output_dir is not None:
            if self.is_named:
                check_outside(self.source, self.output_dir)
            check_target(self.output_dir, self.overwrite)
        _check_bound(self.max_drop, self.metric, self.calibration)
        if isinstance(self.calibration, Iterator):  # it is read more than once: for ranges, and for the check
            self.calibration = list(self.calibration)
        given = {name: getattr(self, name) for name in ("metric", "max_drop", "task", "exclude")} | self.options
        self.settings = plain({name: value for name, value in given.items() if value is not None})
        if self.calibration is not None:
            self.settings["calibration"] = data_title(self.calibration)

    @property
    def is_named(self) -> bool:
        """Whether the model is a folder or a Hub id."""
        return isinstance(self.source, str | Path)

    @property
    def is_unread(self) -> bool:
        """Whether the checkpoint can be quantized as it is read: nothing asks for its float weights in memory."""
        return self.is_named and self.model is None and self.max_drop is None and self.calibration is None

    def load(self, dtype: Any = torch.float32) -> Any:
        """The float model: checkpoints are read in `dtype`, "auto" for their own; models come as they are.

        Raises:
            UnsupportedModelError: It is quantized already.
            CheckpointError: It can't be loaded.
        """
        if self.model is None:
            how = {"dtype": dtype} if self.is_named else {}
            self.model, found = load(self.source, self.task, trust_remote_code=self.trust_remote_code, **how)
            self.processor = self.processor or found
            _check_source(self.model)  # of a Hub id that is known only now
        return self.model

    def skeleton(self, **hub: Any) -> Any:
        """Names and shapes of the model: itself, or a named checkpoint's on meta, without its weights."""
        if self.model is not None or not self.is_named:
            return self.load()
        return empty_model(self.source, self.task, self.trust_remote_code, **hub)

    def kept_float(self) -> dict[str, str]:
        """Modules that stay float -> reason: what `exclude` names, or the task head.

        Raises:
            SettingError: A wildcard matches nothing.
        """
        return kept_names(self.load(), self.exclude)

    def check_keeps(self, keeps: bool) -> None:
        """Refuse `exclude` where a scheme has one dtype for all weights.

        Raises:
            SettingError: It names modules.
        """
        if self.exclude and not keeps:
            raise SettingError(f"{self.scheme} stores all weights alike, so exclude={self.exclude!r} can't hold.")

    def notes(self) -> dict[str, str]:
        """What the report shall say beside the numbers."""
        why = None if self.reason is None else f"auto took {self.scheme}: {self.reason}"
        said = [part for part in (why, self.warning) if part is not None]
        return {"note": " ".join(said)} if said else {}

    def source_bytes(self) -> int | None:
        """Bytes of the weight files that were read; None for a model in memory or on the Hub."""
        return weight_bytes(self.source) if self.is_named and Path(self.source).is_dir() else None


def _check_source(source: Any) -> None:
    """Refuse exports and models that another quantization holds; those with compressed layers may pass."""
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    if hasattr(source, "components") or (is_folder and (Path(source) / EXPORT_MANIFEST).is_file()):
        what = source if is_folder else type(source).__name__
        raise UnsupportedModelError(f"{what} is an export already; quantize the PyTorch model that it was made from.")
    config = read_config(source) if is_folder else getattr(source, "config", None)
    if config is not None and held_method(config) not in (None, "hfshrink"):
        check_unquantized(config, str(source) if is_folder else type(source).__name__)


def _check_bound(max_drop: Any, metric: Any, calibration: Any) -> None:
    if max_drop is None:
        if metric is not None:
            raise SettingError("metric= belongs to max_drop=, how far it may fall; to measure a model call evaluate.")
        return
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop < float("inf"):
        raise SettingError(f"max_drop must be a number of at least 0, such as 0.01, got {max_drop!r}.")
    if calibration is None:
        raise SettingError("max_drop needs labelled rows in calibration= to measure the fall on; not the test rows.")
