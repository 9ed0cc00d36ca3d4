"""What a call of `factorize` asks for, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfshrink.checkpoint import check_free_slot
from hfshrink.data import data_title
from hfshrink.errors import SettingError
from hfshrink.evaluation.profiling import weight_bytes
from hfshrink.factorization.sites import FORMS, check_is_model
from hfshrink.factorization.tails import WEIGHTINGS
from hfshrink.layerwise import CalibrationData
from hfshrink.loading import load
from hfshrink.record import report
from hfshrink.saving import check_target

SIZES = ("rank_ratio", "rank", "energy", "max_parameters", "max_size_bytes", "max_drop")
"""The keywords that say how small the model gets; one of them is given."""
DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(SIZES),
    "metric": None,
    "weighting": "",
    "form": "channel",
    "update_inputs": False,
    "rank_multiple": 8,
    "include": "*",
    "exclude": None,
}


@dataclass
class Request:
    """The keywords of `factorize`; `load` puts the loaded model in the place of its name.

    Attributes:
        source: The model as it was given.
        settings: Those that were given, for the record.
        model: The loaded model, once `load` was called.
        processor: Beside its files; None where there is none.
    """

    source: Any
    rank_ratio: float | None
    rank: int | None
    energy: float | None
    max_parameters: int | None
    max_size_bytes: int | None
    max_drop: float | None
    metric: Any
    weighting: str  # "" for what fits the calibration data
    calibration: Any
    form: str
    update_inputs: bool
    rank_multiple: int
    include: str | Sequence[str]
    exclude: str | Sequence[str] | None
    output_dir: Path | None
    overwrite: bool
    settings: dict[str, Any] = field(default_factory=dict)
    model: Any = None
    processor: Any = None

    def __post_init__(self) -> None:
        """Refuse what can't work before anything is loaded."""
        self.settings = self._given()
        self._check_size()
        self._check_weighting()
        _check_whole("rank_multiple", self.rank_multiple)
        if self.form not in FORMS:
            raise SettingError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if self.form == "tucker" and self.size != "rank_ratio":
            raise SettingError(f"The form 'tucker' has two ranks a layer: give rank_ratio, got {self.size}.")
        if isinstance(self.calibration, Iterator):  # it is read more than once: for statistics, and for the metric
            self.calibration = list(self.calibration)
        if self.output_dir is not None:
            self.output_dir = Path(self.output_dir).expanduser()
            _check_not_inside(self.source, self.output_dir)
            check_target(self.output_dir, self.overwrite)

    @property
    def size(self) -> str:
        """The keyword that says how small the model gets."""
        return next(name for name in SIZES if getattr(self, name) is not None)

    @property
    def is_named(self) -> bool:
        """Whether the model is a folder or a Hub id."""
        return isinstance(self.source, str | Path)

    def load(self) -> Any:
        """The model; a named one is read in the dtype of its files.

        Raises:
            SettingError: It is quantized by other means, or no model of transformers.
            UnsupportedModelError: It is an export.
            CheckpointError: It can't be loaded, or its record can't be read.
        """
        if self.model is None:
            source = Path(self.source).expanduser() if str(self.source).startswith("~") else self.source
            model, self.processor = load(source)
            check_is_model(model)
            check_free_slot(model)
            report(model)  # a step is appended at the end: what can't be read is told before work
            self.model = model
        return self.model

    def data(self) -> CalibrationData:
        """The calibration data, which is read when it is asked for."""
        return CalibrationData(self.model, self.calibration, self.processor)

    def source_bytes(self) -> int | None:
        """Bytes of the weight files that were read; None for a model in memory or on the Hub."""
        return weight_bytes(self.source) if self.is_named and Path(self.source).is_dir() else None

    def _given(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name, default in DEFAULTS.items() if getattr(self, name) != default}
        if "metric" in given:
            given["metric"] = _metric_title(self.metric)
        for name in ("include", "exclude"):
            if name in given and not isinstance(given[name], str):
                given[name] = list(given[name])
        return given | ({} if self.calibration is None else {"calibration": data_title(self.calibration)})

    def _check_size(self) -> None:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "got none of them"
            raise SettingError(f"Give exactly one of {', '.join(SIZES)}, {what}.")
        value = getattr(self, self.size)
        if self.size in ("rank", "max_parameters", "max_size_bytes"):
            _check_whole(self.size, value)
        elif self.size == "max_drop":
            if not _is_number(value) or value < 0:
                raise SettingError(f"max_drop must be a number of at least 0, such as 0.01, got {value!r}.")
        elif not _is_number(value) or not 0 < value < 1:
            what = "kept / dense parameters" if self.size == "rank_ratio" else "the share of the squared norm to keep"
            raise SettingError(f"{self.size} must lie between 0 and 1 ({what}), got {value!r}.")
        if self.max_drop is None and self.metric is not None:
            raise SettingError("metric= belongs to max_drop=, how far it may fall; to measure a model call evaluate.")
        if self.max_drop is not None and self.calibration is None:
            raise SettingError("max_drop needs labelled rows in calibration= to measure the fall on; no test rows.")
        if self.max_drop is not None and self.update_inputs:
            raise SettingError("max_drop measures factors that it keeps: they can't change with update_inputs=True.")

    def _check_weighting(self) -> None:
        if not self.weighting:
            self.weighting = "none" if self.calibration is None else "activation"
        if self.weighting not in WEIGHTINGS:
            raise SettingError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {self.weighting!r}.")
        if self.weighting != "none" and self.calibration is None:
            raise SettingError(
                f"weighting={self.weighting!r} needs data: give calibration=, rows like those that the model will see."
            )
        if self.update_inputs and "activation" not in self.weighting:
            raise SettingError(
                f"update_inputs=True is about the inputs of later layers, which weighting={self.weighting!r} does not "
                'read. Take weighting="activation" with calibration data.'
            )


def _metric_title(metric: Any) -> Any:
    """A metric's name, or the names of some, for the record."""
    if isinstance(metric, list | tuple):
        return [_metric_title(one) for one in metric]
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def _check_whole(name: str, number: Any) -> None:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise SettingError(f"{name} must be a whole number of at least 1, got {number!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_not_inside(source: Any, output_dir: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read: replacing it would delete the source."""
    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    if is_folder and Path(source).resolve().is_relative_to(output_dir.resolve()):
        raise SettingError(f"output_dir {output_dir} holds the model that is read. Choose another folder.")
