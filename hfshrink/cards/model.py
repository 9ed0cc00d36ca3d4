"""The model card, rendered from the record alone: a number that the record lacks can't appear."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

from hfshrink.errors import SettingError
from hfshrink.record import CompressionReport, comparison_table
from hfshrink.record import report as read_report
from hfshrink.terminal import table

TAGS = {"make_student": "distillation", "distill": "distillation", "quantize": "quantized"}
"""technique -> the Hub's tag for it."""
SNIPPETS = {
    "text": ("AutoTokenizer", 'processor("An example.", return_tensors="pt")', "logits"),
    "question-answering": (
        "AutoTokenizer",
        'processor("A question?", "A text.", return_tensors="pt")',
        "start_logits",
    ),
    "feature-extraction": ("AutoTokenizer", 'processor("An example.", return_tensors="pt")', "last_hidden_state"),
    "image-classification": ("AutoImageProcessor", 'processor(image, return_tensors="pt")', "logits"),
}
"""task -> (Auto class of the processor, a call of it, the output to read)."""


def model_card(report: Any, *, model_name: str | None = None, **metadata: Any) -> Any:
    """Render a model card with the base-against-compressed table and the model index.

    Args:
        report: A `CompressionReport`, or a model, export, folder or Hub id that holds one.
        model_name: Title of the card and of the model index; None takes the base model's name.
        **metadata: Further fields of `huggingface_hub.ModelCardData`: `license`, `language`, `datasets`, …

    Returns:
        A `huggingface_hub.ModelCard`; `.save(path)` writes it, `.content` is its text.

    Raises:
        SettingError: The report has no steps: there is nothing to tell.

    Example:
        >>> from hfshrink.record import StepRecord
        >>> step = StepRecord("quantize", "onnx-int8")
        >>> card = model_card(CompressionReport("some/model", (step,)))
        >>> card.data.base_model, card.data.base_model_relation
        ('some/model', 'quantized')
    """
    from huggingface_hub import ModelCard

    if not isinstance(report, CompressionReport):
        report = read_report(report)
    if not report.steps:
        raise SettingError(
            "This record has no steps: hfshrink did nothing to the model, so there is no card to write."
        )
    title = model_name or f"{(report.base_model or 'model').rpartition('/')[2]}-{report.steps[-1].method}"
    text = _template().render(
        card_data=_card_data(report, title, metadata).to_yaml(),
        title=title,
        report=report,
        comparison=comparison_table(report),
        steps=_steps_table(report),
        checks=_checks(report),
        versions=report.steps[-1].versions,
        is_export=_is_export(report),
        auto_class=_auto_class(report),
        snippet=SNIPPETS.get(report.details.get("task", ""), SNIPPETS["text"]),
    )
    return ModelCard(text)


def _template() -> Any:
    import jinja2

    text = resources.files("hfshrink.cards").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["plain"] = _plain
    environment.filters["no_html"] = _no_html
    return environment.from_string(text)


def _plain(value: Any) -> str:
    """One line without markup: text from a record can't become a heading, a link or a tag."""
    return _no_html(re.sub(r"([`*_\[\]|#])", r"\\\1", " ".join(str(value).split())))


def _no_html(text: str) -> str:
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _card_data(report: CompressionReport, title: str, metadata: dict[str, Any]) -> Any:
    from huggingface_hub import ModelCardData

    tags = sorted(
        {"hfshrink", *(TAGS[s.technique] for s in report.steps if s.technique in TAGS), *metadata.pop("tags", ())}
    )
    results = _eval_results(report)
    base = metadata.pop("base_model", None) or report.base_model or ""
    on_hub = base.count("/") == 1  # a folder's name is no link
    known = {
        "base_model": base if on_hub else None,
        "base_model_relation": ("quantized" if _is_quantized(report) else "finetune") if on_hub else None,
        "library_name": "onnx" if _is_export(report) else "transformers",
        "pipeline_tag": report.details.get("task"),
        "metrics": sorted({score.metric for score in report.compressed.scores}) or None,
        "eval_results": results or None,
        "model_name": title if results else None,
    }
    return ModelCardData(
        tags=tags, **{name: value for name, value in {**known, **metadata}.items() if value is not None}
    )


def _eval_results(report: CompressionReport) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=report.details.get("task", "other"),
            dataset_type=score.dataset or "unknown",
            dataset_name=score.dataset or "unknown",
            dataset_split=score.split,
            metric_type=score.metric,
            metric_value=round(score.value, 4),
        )
        for score in report.compressed.scores
        if score.value is not None
    ]


def _steps_table(report: CompressionReport) -> str:
    rows = [
        (str(number), step.technique, step.method, _short(step.settings), step.source)
        for number, step in enumerate(report.steps, start=1)
    ]
    return table(("", "step", "method", "settings", "source"), rows)


def _checks(report: CompressionReport) -> list[str]:
    """One sentence per check that a step made on its own work."""
    sentences = []
    for step in report.steps:
        parity = step.results.get("parity")
        if not isinstance(parity, dict) or not isinstance(parity.get("max_difference"), float):
            continue
        agreement = parity.get("agreement")
        same = f", same answer in {100 * agreement:.1f} % of cases" if isinstance(agreement, float) else ""
        sentences.append(
            f"`{_plain(step.method)}` against the float model on {_plain(parity.get('rows'))} "
            f"{_plain(parity.get('inputs'))}: largest difference of an output {parity['max_difference']:.3g}{same}."
        )
    return sentences


def _is_export(report: CompressionReport) -> bool:
    return report.steps[-1].method.startswith("onnx-")


def _is_quantized(report: CompressionReport) -> bool:
    return any(step.technique == "quantize" for step in report.steps)


def _auto_class(report: CompressionReport) -> str:
    from hfshrink.loading import TASKS

    return TASKS.get(report.details.get("task", ""), ("AutoModel", ""))[0]


def _short(settings: dict[str, Any]) -> str:
    shown = {name: value for name, value in settings.items() if value is not None}
    return ", ".join(
        f"{name}={json.dumps(value) if not isinstance(value, str) else value}" for name, value in shown.items()
    )
