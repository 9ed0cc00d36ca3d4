"""A plan: the precision of each module, from measured loss rises and a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hfshrink.errors import SettingError, require
from hfshrink.loading import infer_task
from hfshrink.quantization.perturbations import perturbation
from hfshrink.quantization.search.knapsack import choose_options
from hfshrink.quantization.search.precisions import Precision
from hfshrink.sensitivity import PLOT_SUFFIXES, Perturbation, measure_sensitivity

CLASSIFICATION = ("text-classification", "token-classification", "image-classification")

Rises = dict[str, dict[str, float]]
"""module -> name of a precision -> loss rise of that module alone; infinite where the loss was no number."""


@dataclass(frozen=True)
class Plan:
    """The precision of each module, and what it should cost.

    Attributes:
        precisions: Module -> name of its precision, in the model's order.
        rises: Module -> loss rise that was measured for it alone.
        sizes: Module -> bytes of its weight.
        predicted_rise: Sum of the rises, negative ones as 0.
        measured_rise: Loss rise of all together on the same rows; None before it is measured.
        rounding: How much of the budget counting in steps may have lost, in its unit; see `Choice.rounding`.
    """

    precisions: dict[str, str]
    rises: dict[str, float]
    sizes: dict[str, int]
    predicted_rise: float
    measured_rise: float | None = None
    rounding: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        modules = {
            name: {"precision": precision, "rise": self.rises[name], "bytes": self.sizes[name]}
            for name, precision in self.precisions.items()
        }
        return {
            "modules": modules,
            "predicted_rise": self.predicted_rise,
            "measured_rise": self.measured_rise,
            "weight_bytes": sum(self.sizes.values()),
            "rounding": self.rounding,
        }

    def plot(self, path: str | Path) -> None:
        """Write a heat-map of the precisions, modules down; the suffix says whether PNG or SVG.

        Raises:
            SettingError: Another suffix.
            MissingDependencyError: matplotlib is not installed.
        """
        check_plot_path(path)
        names = list(dict.fromkeys(self.precisions.values()))
        figure = require("matplotlib.figure", extra="plots").Figure(
            figsize=(4 + 0.7 * len(names), 1.5 + 0.25 * len(self.precisions)), layout="constrained"
        )
        axes = figure.subplots()
        cells = [
            [self.rises[module] if name == chosen else math.nan for name in names]
            for module, chosen in self.precisions.items()
        ]
        image = axes.imshow(cells, aspect="auto", cmap="viridis")
        axes.set_yticks(range(len(cells)), list(self.precisions), fontsize=7)
        axes.set_xticks(range(len(names)), names)
        axes.set_title("precision of each module", fontsize=9)
        figure.colorbar(image, ax=axes, label="damage of the module alone")
        figure.savefig(path)


def check_plot_path(path: str | Path) -> None:
    """Raise `SettingError` where a plot could not be written under that name."""
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise SettingError(f"The plot's name must end in {' or '.join(PLOT_SUFFIXES)}, got {str(path)!r}.")


def measure_of(model: Any) -> str:
    """What `measure_sensitivity` measures for a plan: divergence from the float model, where that tells classes.

    Few hundred losses are too noisy for one module at a time. Language models and all others go by their loss: the
    answers of a vocabulary are too large to keep, and their many tokens make it sure.
    """
    config: Any = model.config
    one_class = getattr(config, "problem_type", None) in (None, "single_label_classification")
    has_classes = getattr(config, "num_labels", 0) > 1 and infer_task(model) in CLASSIFICATION
    return "divergence" if has_classes and one_class else "loss"


def measure_rises(
    model: Any,
    rows: Any,
    modules: Sequence[str],
    trials: Mapping[str, tuple[Perturbation, float] | None],
    *,
    samples: int = 256,
    processor: Any = None,
) -> Rises:
    """The damage of each module at each precision, the others as they are; see `measure_of` for its measure.

    Args:
        model: The float model.
        rows: Calibration rows.
        modules: Names.
        trials: Name of a precision -> its perturbation and the level there; None where nothing changes.
        samples: Rows to measure on.
        processor: Of raw rows.

    Raises:
        SettingError: What `measure_sensitivity` raises.
    """
    rises: Rises = {module: {} for module in modules}
    measure = measure_of(model)
    for name, trial in trials.items():
        if trial is None:
            found = dict.fromkeys(modules, 0.0)
        else:
            what, level = trial
            how = {"levels": (level,), "include": list(modules), "samples": samples, "processor": processor}
            table = measure_sensitivity(model, rows, what, measure=measure, **how)
            measured = {module: table.rise(module, level) for module in modules}
            found = {module: math.inf if rise is None else rise for module, rise in measured.items()}
        for module, rise in found.items():
            rises[module][name] = rise
    return rises


def make_plan(
    rises: Rises,
    sizes: Mapping[str, Mapping[str, int]],
    budget: int,
    costs: Mapping[str, Mapping[str, int]] | None = None,
) -> Plan:
    """The precisions with the least sum of loss rises within a budget.

    Args:
        rises: Of `measure_rises`.
        sizes: Module -> precision -> bytes.
        budget: Largest sum of the costs.
        costs: Module -> precision -> whole number; None counts the bytes.

    Raises:
        SettingError: The budget is smaller than the least that is possible.

    Example:
        >>> rises = {"a": {"int4": 0.3, "int8": 0.0}, "b": {"int4": 0.1, "int8": 0.0}}
        >>> plan = make_plan(rises, {name: {"int4": 4, "int8": 8} for name in rises}, budget=12)
        >>> plan.precisions, plan.predicted_rise
        ({'a': 'int8', 'b': 'int4'}, 0.1)
    """
    choice = choose_options(rises, sizes if costs is None else costs, budget)
    return Plan(
        choice.options,
        {name: rises[name][option] for name, option in choice.options.items()},
        {name: sizes[name][option] for name, option in choice.options.items()},
        choice.loss,
        rounding=choice.rounding,
    )


class Together:
    """A perturbation of many modules at once: the one place is the whole plan, its one level is 1."""

    title = "quantize as planned"
    levels: Sequence[float] = (1.0,)

    def __init__(self, trials: Mapping[str, tuple[Perturbation, float] | None]) -> None:
        """Module -> its perturbation and level; None where it stays as it is."""
        self.trials = {name: trial for name, trial in trials.items() if trial is not None}

    def places(self, model: nn.Module) -> list[str]:
        """The plan as a whole."""
        return ["plan"]

    @contextmanager
    def apply(self, model: nn.Module, place: str, level: float) -> Iterator[None]:
        """All modules at once."""
        with ExitStack() as stack:
            for name, (trial, bits) in self.trials.items():
                stack.enter_context(trial.apply(model, name, bits))
            yield


def measure_plan(
    model: Any,
    rows: Any,
    trials: Mapping[str, tuple[Perturbation, float] | None],
    *,
    samples: int = 256,
    processor: Any = None,
) -> tuple[float, float | None]:
    """The loss of the float model, and how far it rises when all modules are rounded at once.

    Args:
        model: The float model.
        rows: Rows with labels.
        trials: Module -> perturbation and level; None where it stays as it is.
        samples: Rows to measure on.
        processor: Of raw rows.
    """
    how = {"measure": measure_of(model), "samples": samples, "processor": processor}
    found = measure_sensitivity(model, rows, Together(trials), **how)
    return found.dense_loss, found.rise("plan", 1.0)


def trial_of(
    precision: Precision, group_size: int | None = None, quantize_inputs: bool = False
) -> tuple[Perturbation, float]:
    """The perturbation that rounds to a precision, and its level.

    Raises:
        SettingError: fp32, which changes nothing, or a group size below 1.
    """
    scheme = "int" if precision.scheme == "int" else precision.name
    trial = perturbation(scheme, (precision.bits,), group_size=group_size, quantize_inputs=quantize_inputs)
    return trial, precision.bits
