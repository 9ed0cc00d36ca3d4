"""Plots of a model's card, from the record: PNG files in a folder, and their captions."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfshrink.cards.model_tables import both_sides
from hfshrink.cards.rendering import is_number, one_line
from hfshrink.errors import CheckpointError, require
from hfshrink.measurement import Measurement, Score
from hfshrink.record import CompressionReport

FILE = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*\.(?:png|svg|jpe?g)", re.ASCII | re.IGNORECASE)
"""What a card embeds: a file below its own folder."""
MOST_BARS = 60
LAYERS: dict[str, str] = {"ranks": "rank", "kept_ratios": "kept share of the parameters", "kept": "kept units"}
"""results of a step, name -> value by module, and what the axis says."""


def write_plots(report: CompressionReport, folder: str | Path) -> list[dict[str, str]]:
    """Write the plots that a record has numbers for: size against score, sensitivity and rank or sparsity by layer.

    Args:
        report: The record.
        folder: Where the PNG files go; it is made where it is missing.

    Returns:
        For each its `file`, relative to the folder's parent, and its `caption`; ready for `details["plots"]` and for
        `model_card(plots=…)`.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointError: The folder can't be written.

    Example:
        >>> import tempfile
        >>> write_plots(CompressionReport(), Path(tempfile.mkdtemp()) / "plots")
        []
    """
    figure_class = require("matplotlib.figure", extra="plots").Figure
    target, written = Path(folder).expanduser().absolute(), []
    for name, caption, draw in _drawings(report):
        figure = figure_class(layout="constrained")
        draw(figure)
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=120, metadata={"Software": None})
        _write(target / f"{name}.png", image.getvalue())
        written.append({"file": f"{target.name}/{name}.png", "caption": caption})
    return written


def read_plots(plots: Any) -> list[dict[str, str]]:
    """Plots that a card may embed: relative names of images, no way out of the card's folder.

    Example:
        >>> read_plots([{"file": "plots/a.png", "caption": "A"}, {"file": "../b.png"}, {"file": "https://c/d.png"}])
        [{'file': 'plots/a.png', 'caption': 'A'}]
    """
    found = []
    for plot in plots if isinstance(plots, list | tuple) else ():
        file = plot.get("file") if isinstance(plot, Mapping) else None
        if isinstance(file, str) and FILE.fullmatch(file) and ".." not in file:
            found.append({"file": file, "caption": one_line(plot.get("caption") or Path(file).stem)})
    return found


def layer_values(report: CompressionReport) -> dict[str, dict[str, float]]:
    """What the last step that says so found for each module: axis label -> name -> value.

    Example:
        >>> from hfshrink.record import StepRecord
        >>> layer_values(CompressionReport(steps=(StepRecord("factorize", "none", results={"ranks": {"a": 8}}),)))
        {'rank': {'a': 8}}
    """
    found: dict[str, dict[str, float]] = {}
    for step in report.steps:
        for name, label in LAYERS.items():
            if values := _numbers(step.results.get(name)):
                found["kept share of the units" if _is_share(step.results[name]) else label] = values
    return found


def sensitivity_values(report: CompressionReport) -> tuple[str, dict[str, float]]:
    """Loss rise by module: of a recorded sensitivity its highest level, else of a plan that was made from one."""
    for step in reversed(report.steps):
        found = step.results.get("sensitivity")
        if isinstance(found, Mapping) and (values := _rises(found.get("rows"))):
            return str(found.get("title") or "sensitivity"), values
        plan = step.results.get("plan")
        modules = plan.get("modules") if isinstance(plan, Mapping) else None
        if isinstance(modules, Mapping):
            rises = {name: item.get("rise") for name, item in modules.items() if isinstance(item, Mapping)}
            if values := _numbers(rises):
                return "at the precision chosen", values
    return "", {}


def _drawings(report: CompressionReport) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    pairs = _scored_sizes(report)
    if pairs:
        score = pairs[0][2]
        found.append(("size-metric", f"Size of the weight files against {score.title}", _size_drawing(pairs)))
    title, rises = sensitivity_values(report)
    if rises:
        found.append(("sensitivity", f"Loss rise by module, {one_line(title, 80)}", _bar_drawing(rises, "loss rise")))
    for label, values in layer_values(report).items():
        name = "layers-" + label.replace(" ", "-")
        found.append((name, f"By layer: {label}", _bar_drawing(values, label)))
    return found


def _scored_sizes(report: CompressionReport) -> list[tuple[str, float, Score]]:
    """(which, MB, score) of both sides, where both have a size and a score of the same kind."""
    sides: list[tuple[str, Measurement]] = list(zip(("base", "compressed"), both_sides(report), strict=True))
    first = {(s.metric, s.dataset, s.split): s for s in sides[0][1].scores if s.value is not None}
    for score in sides[1][1].scores:
        other = first.get((score.metric, score.dataset, score.split))
        if other is not None and score.value is not None:
            sizes = [side.size_bytes for _, side in sides]
            if None not in sizes:
                return [
                    (name, (side.size_bytes or 0) / 1e6, one)
                    for (name, side), one in zip(sides, (other, score), strict=True)
                ]
    return []


def _size_drawing(pairs: Sequence[tuple[str, float, Score]]) -> Any:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for above, (name, size, score) in enumerate(pairs):  # one label above its point, one below: both may be near
            value = score.value or 0.0
            ends = None if score.low is None or score.high is None else [[value - score.low], [score.high - value]]
            axes.errorbar([size], [value], yerr=ends, marker="o", linestyle="none", capsize=3)
            axes.annotate(name, (size, value), (6, 6 if above else -14), textcoords="offset points")
        axes.set_xlim(0, 1.2 * max(size for _, size, _ in pairs))
        axes.set_xlabel("weight files (MB)")
        axes.set_ylabel(_as_text(pairs[0][2].metric))

    return draw


def _bar_drawing(values: Mapping[str, float], label: str) -> Any:
    """Bars in the model's order; of many modules those with the highest values."""
    kept = sorted(values, key=lambda name: -values[name])[:MOST_BARS]
    shown = [name for name in values if name in set(kept)]

    def draw(figure: Any) -> None:
        figure.set_size_inches(7, 1.2 + 0.2 * len(shown))
        axes = figure.subplots()
        axes.barh(range(len(shown)), [values[name] for name in shown])
        axes.set_yticks(range(len(shown)), [_as_text(name) for name in shown], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(label)

    return draw


def _as_text(name: str) -> str:
    """Not read as a formula."""
    return one_line(name, 80).replace("$", r"\$")


def _numbers(values: Any) -> dict[str, float]:
    """Numbers by name; of pairs (kept, all) the share."""
    if not isinstance(values, Mapping):
        return {}
    found = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and len(value) == 2 and all(is_number(part) for part in value) and value[1]:
            found[str(name)] = value[0] / value[1]
        elif is_number(value):
            found[str(name)] = value
    return found


def _is_share(values: Mapping[str, Any]) -> bool:
    return any(isinstance(value, list | tuple) for value in values.values())


def _rises(rows: Any) -> dict[str, float]:
    """Each place's rise at the level that hurts most of those recorded."""
    found: dict[str, float] = {}
    for row in rows if isinstance(rows, list | tuple) else ():
        if isinstance(row, Mapping) and is_number(row.get("rise")):
            place = str(row.get("place"))
            found[place] = max(row["rise"], found.get(place, row["rise"]))
    return found


def _write(path: Path, content: bytes) -> None:
    """Aside first, then moved into place."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(f"Can't write {path}: {error}. Choose another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
