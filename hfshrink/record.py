"""The record: what was done to a model and what was measured, the one source for tables, plots, cards and the CLI.

It lives in `model.config.hfshrink`, an ordinary config key, so that `save_pretrained`, `from_pretrained` and
`push_to_hub` of plain transformers carry it along.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.measurement import Latency, Measurement, Score, megabytes
from hfshrink.saving import read_config, write_text
from hfshrink.terminal import table

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FORMAT_VERSION = 1
MAX_STEPS = 1000  # a record from elsewhere that claims more is refused
TEXTS = ("technique", "method", "source", "metric", "dataset", "split", "runtime", "device")
MAPS = ("settings", "before", "after", "skipped", "results", "versions")
FIELD_TYPES: dict[str, Any] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(MAPS, dict),
    **dict.fromkeys(("modules", "latency", "scores"), list),
}
"""field of a record from elsewhere -> what it must be; all others are numbers."""
PACKAGES = ("hfshrink", "transformers", "torch", "datasets", "onnx", "onnxruntime", "bitsandbytes")


@dataclass(frozen=True)
class StepRecord:
    """One technique applied once.

    Attributes:
        technique: Name of the public call, such as `"quantize"`.
        method: Variant of it, such as `"onnx-int8"`.
        settings: The keywords that were given, JSON-safe.
        before: The model before the step.
        after: The model after it.
        modules: Names of the modules that the step changed.
        skipped: Names of the modules that it left alone, each with the reason.
        results: What the step found out about its own work, such as a parity check.
        seconds: Wall-clock time.
        source: The paper or document that the method comes from.
        versions: Packages and their versions.
    """

    technique: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    before: Measurement = field(default_factory=Measurement)
    after: Measurement = field(default_factory=Measurement)
    modules: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    source: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())


@dataclass(frozen=True)
class CompressionReport:
    """All steps that led to a model, and the measurements of its base and of itself.

    Example:
        >>> step = StepRecord("quantize", "onnx-int8", after=Measurement(parameters=8))
        >>> CompressionReport("some/model", steps=(step,)).steps[0].method
        'onnx-int8'
    """

    base_model: str | None = None
    steps: tuple[StepRecord, ...] = ()
    base: Measurement = field(default_factory=Measurement)
    compressed: Measurement = field(default_factory=Measurement)
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, as it stands in `config.json`; what was not measured is left out."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "history": [_plain(step) for step in self.steps],
            "base": _plain(self.base),
            "compressed": _plain(self.compressed),
            "details": self.details,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompressionReport:
        """Read the JSON form.

        Raises:
            CheckpointError: It is not a record, or one of a newer format.
        """
        if not isinstance(data, dict) or not isinstance(data.get("history"), list):
            raise CheckpointError(
                f"Expected a record with a list 'history', got {type(data).__name__}: {str(data)[:80]}"
            )
        if data.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"This record has format {data.get('format_version')!r}, this hfshrink reads {FORMAT_VERSION}. "
                "Upgrade with: pip install -U hfshrink"
            )
        if len(data["history"]) > MAX_STEPS:
            raise CheckpointError(f"This record claims {len(data['history'])} steps; at most {MAX_STEPS} are read.")
        return cls(
            base_model=None if data.get("base_model") is None else str(data["base_model"]),
            steps=tuple(_read_step(step) for step in data["history"]),
            base=_read_measurement(data.get("base", {})),
            compressed=_read_measurement(data.get("compressed", {})),
            details=data["details"] if isinstance(data.get("details"), dict) else {},
        )

    def attach(self, model: Any) -> None:
        """Write this report into `model.config.hfshrink`, so that the next `save_pretrained` carries it."""
        config_of(model).hfshrink = self.to_dict()

    def save(self, folder: str | Path) -> None:
        """Write this report into the `config.json` of a saved model, aside first and then moved into place.

        Raises:
            CheckpointError: The folder has no `config.json`, or can't be written.
        """
        config = read_config(folder)
        config["hfshrink"] = self.to_dict()
        try:
            write_text(Path(folder) / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        except OSError as error:
            raise CheckpointError(f"Can't write {Path(folder) / 'config.json'}: {error}") from error

    def __str__(self) -> str:
        head = f"base model: {self.base_model or 'unknown'}"
        steps = table(
            ("step", "method", "parameters", "file MB", "seconds"),
            [
                (
                    step.technique,
                    step.method,
                    _change(step.before.parameters, step.after.parameters, lambda n: f"{n:,}"),
                    _change(step.before.size_bytes, step.after.size_bytes, megabytes),
                    "" if step.seconds is None else f"{step.seconds:.1f}",
                )
                for step in self.steps
            ],
        )
        notes = [f"{step.technique}: {step.results['note']}" for step in self.steps if step.results.get("note")]
        return "\n\n".join(part for part in (head, steps, "\n".join(notes), comparison_table(self)) if part)


def comparison_table(report: CompressionReport) -> str:
    """The base-against-compressed table of a report; empty when nothing was measured."""
    base, compressed = ({row[0]: row for row in side.rows()} for side in (report.base, report.compressed))
    names = list(base) + [name for name in compressed if name not in base]
    missing = ("", "not measured", "")
    rows = [
        (name, base.get(name, missing)[1], compressed.get(name, missing)[1], (compressed.get(name) or base[name])[2])
        for name in names
    ]
    return table(("what", "base", "compressed", "how"), rows) if rows else ""


def report(model: Any) -> CompressionReport:
    """Read the record of a model, an export, a folder or a Hub id.

    Args:
        model: A loaded model or export, a folder with a `config.json`, or a Hub id.

    Returns:
        The report; without steps for a model that hfshrink never touched.

    Raises:
        CheckpointError: The folder is no model, or its record can't be read.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> report(BertModel(config)).steps
        ()
    """
    if isinstance(model, str | Path):
        data = read_config(model).get("hfshrink")
    else:
        data = getattr(config_of(model), "hfshrink", None)
    return CompressionReport() if data is None else CompressionReport.from_dict(data)


def append_step(model: Any, step: StepRecord, *, base_model: str | None = None, task: str | None = None) -> None:
    """Add a step to the record of a model or export; the first one also names the base model and the task.

    Measurements of an earlier state are dropped: they are not of this model any more.
    """
    old = report(model)
    base = old.base_model or base_model or model_name(model)
    details = {"task": task, **old.details} if task else old.details
    new = dataclasses.replace(
        old, base_model=base, steps=(*old.steps, step), compressed=Measurement(), details=details
    )
    new.attach(model)


def config_of(model: Any) -> PreTrainedConfig:
    """The config of a model or export (a config is its own).

    Raises:
        SettingError: The object has none.
    """
    from transformers import PreTrainedConfig

    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise SettingError(
            f"Expected a transformers model, an export, a folder or a Hub id, got {type(model).__name__}."
        )
    return config


def model_name(model: Any) -> str | None:
    """The Hub id of a model, or the last part of its folder's name: paths of a machine stay out of records."""
    name = getattr(config_of(model), "_name_or_path", "") or ""
    return (Path(name).name if Path(name).is_absolute() or Path(name).exists() else name) or None


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _change(before: Any, after: Any, show: Any) -> str:
    if after is None:
        return ""
    return show(after) if before is None or before == after else f"{show(before)} → {show(after)}"


def _plain(value: Any) -> Any:
    """Dataclasses as dicts without what is unknown or empty; numbers JSON can't hold become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in named.items() if item not in (None, [], {}, "")}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _known(cls: type, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise CheckpointError(
            f"Expected a {cls.__name__} as a JSON object, got {type(data).__name__}: {str(data)[:80]}"
        )
    known = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
    for name, value in known.items():
        expected = FIELD_TYPES.get(name, (int, float))
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            raise CheckpointError(
                f"A {cls.__name__} of this record has {name}={str(value)[:60]!r}, which is no {name}."
            )
    return known


def _read_measurement(data: Any) -> Measurement:
    known = _known(Measurement, data)
    try:
        known["latency"] = tuple(Latency(**_known(Latency, item)) for item in known.get("latency", ()))
        known["scores"] = tuple(Score(**_known(Score, item)) for item in known.get("scores", ()))
    except TypeError as error:
        raise CheckpointError(f"This record's measurement is incomplete: {error}") from None
    return Measurement(**known)


def _read_step(data: Any) -> StepRecord:
    known = _known(StepRecord, data)
    if not isinstance(known.get("technique"), str) or not isinstance(known.get("method"), str):
        raise CheckpointError(f"A step of this record names no technique and method: {str(data)[:80]}")
    for side in ("before", "after"):
        known[side] = _read_measurement(known.get(side, {}))
    return StepRecord(**{"versions": {}, **known})
