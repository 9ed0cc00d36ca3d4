"""The accuracy guard: modules go back to float, the most harmful first, until the metric falls no more than told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.evaluation import evaluate
from hfshrink.measurement import is_lower_better
from hfshrink.quantization.perturbations import perturbation
from hfshrink.sensitivity import measure_sensitivity

RANKING_ROWS = 256

Made = tuple[Any, list[str], dict[str, Any]]

logger = logging.getLogger(__name__)


def guard(  # noqa: PLR0913, PLR0917
    make: Callable[[Any, Any, list[str]], Made],
    model: Any,
    processor: Any,
    kept_float: Sequence[str],
    task: str | None,
    rows: Any,
    metric: Any,
    max_drop: float,
    bits: int | None = 8,
) -> Made:
    """Quantize, measure, and restore as few modules to float as it takes for a fall of at most `max_drop`.

    Modules are ranked by the loss rise of each alone, at 8 bits inputs too. One is restored, then two, four, …; when
    the bound holds, the number is bisected. More modules in float need not be better on a finite sample, so what is
    found is small, and perhaps not the smallest. Everything is judged on `rows`: give validation rows. Rows that the
    model will be tested on would make the test too good.

    The float model is measured in PyTorch; its float export gives the same answers, as `check_parity` tells.

    Args:
        make: (model, processor, names of modules that stay float) -> result, quantized modules, facts for the record.
            It leaves the model as it was.
        model: The float model.
        processor: Its tokenizer or image processor, or None.
        kept_float: Modules that stay float in any case.
        task: One of `hfshrink.loading.TASKS`; None reads it from the model.
        rows: Validation rows with labels, as `evaluate` takes them.
        metric: As in `evaluate`; None takes the main one of the task. Those of which `is_lower_better` may rise
            by `max_drop`, all others may fall.
        max_drop: In the metric's own unit: 0.01 is one point of accuracy.
        bits: Of weights, at which modules are ranked; None where the scheme can't leave any in float.

    Returns:
        What `make` returned at last, its facts with `restored` (names, the most harmful first) and `guard` (metric,
        float value, and value and drop of each try).

    Raises:
        SettingError: A bound below 0, no rows, an unknown metric, no labels, a metric that is undefined for the float
            model, or a bound that one quantized module breaks already, or that the scheme can't help to keep.
    """
    if isinstance(max_drop, bool) or not isinstance(max_drop, int | float) or not 0 <= max_drop < math.inf:
        raise SettingError(f"max_drop must be a number of at least 0, such as 0.01, got {max_drop!r}.")
    if rows is None:
        raise SettingError("max_drop needs validation rows with labels to measure the fall on, got None.")
    judge = _Judge(rows, metric, processor, task, max_drop)
    judge.measure_float(model)
    made = make(model, processor, list(kept_float))
    if judge.accepts(made[0], restored=0):
        return _told(made, [], judge)
    if bits is None:
        raise SettingError(
            f"{judge.name} goes from {judge.float_value:.4f} to {judge.tries[0]['value']}, further than max_drop="
            f"{max_drop:g}, and this scheme stores all weights alike. Allow a larger max_drop, or take another scheme."
        )
    ranked = _most_harmful_first(model, rows, processor, made[1], bits)
    del made  # an export is as large as the model

    def attempt(number: int) -> Made | None:
        found = make(model, processor, [*kept_float, *ranked[:number]])
        return found if judge.accepts(found[0], restored=number) else None

    number, made = _fewest(attempt, len(ranked), judge)
    restored = ranked[:number]
    names = ", ".join(restored)
    logger.warning("max_drop=%g: %d of %d modules stay float: %s", max_drop, number, len(ranked), names)
    return _told(made, restored, judge)


@dataclass
class _Judge:
    """Measures a model and says whether its metric stays within the bound of the float one's."""

    rows: Any
    metric: Any
    processor: Any
    task: str | None
    max_drop: float
    name: str = ""
    float_value: float = math.nan
    is_lower_better: bool = False
    tries: list[dict[str, Any]] = field(default_factory=list)

    def measure_float(self, model: Any) -> None:
        score = evaluate(model, self.rows, self.metric, processor=self.processor, task=self.task).main
        if score.value is None:
            raise SettingError(f"The metric {score.metric} is undefined for the float model on these rows.")
        self.name, self.float_value = score.metric, score.value
        self.is_lower_better = is_lower_better(score.metric)

    def accepts(self, quantized: Any, restored: int) -> bool:
        value = evaluate(quantized, self.rows, self.metric, processor=self.processor, task=self.task).main.value
        drop = None
        if value is not None:
            drop = value - self.float_value if self.is_lower_better else self.float_value - value
        self.tries.append({"restored": restored, "value": value, "drop": drop})
        return drop is not None and drop <= self.max_drop

    def facts(self) -> dict[str, Any]:
        return {
            "metric": self.name,
            "float": self.float_value,
            "max_drop": self.max_drop,
            "tries": self.tries,
            "direction": "lower is better" if self.is_lower_better else "higher is better",
        }


def _told(made: Made, restored: list[str], judge: _Judge) -> Made:
    exported, modules, results = made
    return exported, modules, {**results, "restored": restored, "guard": judge.facts()}


def _fewest(attempt: Callable[[int], Made | None], modules: int, judge: _Judge) -> tuple[int, Made]:
    """The number of restored modules at which the bound holds, by doubling and bisecting, and its result."""
    too_few, number, found = 0, 1, None
    while number < modules:
        found = attempt(number)
        if found is not None or number == modules - 1:
            break
        too_few, number = number, min(2 * number, modules - 1)
    if found is None:
        drops = ", ".join(_show(row) for row in judge.tries)
        raise SettingError(
            f"{judge.name} falls by more than max_drop={judge.max_drop:g} from {judge.float_value:.4f} while any of "
            f"{modules} modules is quantized; drops by modules in float: {drops}. Allow a larger max_drop, or take a "
            "scheme with more bits."
        )
    while number - too_few > 1:
        middle = (too_few + number) // 2
        better = attempt(middle)
        if better is None:
            too_few = middle
        else:
            number, found = middle, better
    return number, found


def _show(row: dict[str, Any]) -> str:
    drop = "undefined" if row["drop"] is None else f"{row['drop']:.4f}"
    return f"{row['restored']}: {drop}"


def _most_harmful_first(model: Any, rows: Any, processor: Any, modules: Sequence[str], bits: int) -> list[str]:
    """The quantized modules by falling loss rise; those without a weight of their own in PyTorch last."""
    trial = perturbation("int", levels=(bits,), quantize_inputs=bits == 8)
    places = set(trial.places(model))
    measurable = [name for name in dict.fromkeys(modules) if name in places]
    if not measurable:
        raise SettingError(f"None of {len(modules)} quantized modules has a weight to rank: {', '.join(modules[:5])}.")
    found = measure_sensitivity(model, rows, trial, include=measurable, samples=RANKING_ROWS, processor=processor)
    return [*reversed(found.best_first()), *(name for name in dict.fromkeys(modules) if name not in places)]
