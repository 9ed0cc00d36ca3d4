"""What the Hub is known to check in the YAML of a README: the shape of fields, closed lists, evaluation results."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"^(?:\ufeff|\s)*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
RELATIONS = ("finetune", "adapter", "merge", "quantized")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


LICENSES = _words("""
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community unknown
other
""")
TASKS = _words("""
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation fill-mask sentence-similarity text-ranking text-to-speech
text-to-audio automatic-speech-recognition audio-to-audio audio-classification audio-text-to-text
voice-activity-detection depth-estimation image-classification object-detection image-segmentation text-to-image
image-to-text image-to-image image-to-video unconditional-image-generation video-classification reinforcement-learning
robotics tabular-classification tabular-regression time-series-forecasting text-to-video image-text-to-text
visual-question-answering document-question-answering zero-shot-image-classification graph-ml mask-generation
zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction video-text-to-text keypoint-detection
visual-document-retrieval any-to-any video-to-video multiple-choice tabular-to-text table-to-text text-retrieval
time-series other
""")
REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
Check = Callable[[str, Any, "Findings"], None]


@dataclass
class Findings:
    """What is wrong with a README's metadata, and what is only worth saying."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        double = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if double is not None:
            raise yaml.MarkedYAMLError(problem=f"duplicated mapping key {double!r}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def front_matter(text: str) -> dict[str, Any] | None:
    """The metadata on top of a README; none without any.

    Raises:
        ValueError: It is no YAML, or no mapping.
    """
    found = FRONT_MATTER.match(text)
    if found is None or not found[1].strip():
        return None
    try:
        data = yaml.load(found[1], Loader=_Loader)
    except yaml.YAMLError as fault:
        raise ValueError(f"YAML Metadata Error: {fault}") from None
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"YAML Metadata Error: expected a mapping, got {type(data).__name__}")
    return data


def _each(name: str, value: Any, findings: Findings) -> list[tuple[str, str]]:
    """The texts of a field that takes one or a list."""
    items = value if isinstance(value, list) else [value]
    names = [f"{name}[{number}]" for number in range(len(items))] if isinstance(value, list) else [name]
    findings.errors += [f'"{at}" must be a string' for at, item in zip(names, items, strict=True) if not _text(item)]
    return [(at, item) for at, item in zip(names, items, strict=True) if _text(item)]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(name: str, value: Any, findings: Findings) -> None:
    _each(name, value, findings)


def _list(name: str, value: Any, findings: Findings) -> None:
    if isinstance(value, list):
        _each(name, value, findings)
    else:
        findings.errors.append(f'"{name}" must be an array')


def _string(name: str, value: Any, findings: Findings) -> None:
    if not _text(value):
        findings.errors.append(f'"{name}" must be a string')


def _licenses(name: str, value: Any, findings: Findings) -> None:
    for at, item in _each(name, value, findings):
        if item not in LICENSES:
            findings.errors.append(f'"{at}" must be one of [{", ".join(sorted(LICENSES))}]')


def _languages(name: str, value: Any, findings: Findings) -> None:
    for at, item in _each(name, value, findings):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", item):
            findings.errors.append(
                f'"{at}" with value "{item}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code '
                '(two/three letters), or a special value like "code", "multilingual".'
            )


def _repositories(name: str, value: Any, findings: Findings) -> None:
    for at, item in _each(name, value, findings):
        if not REPO_ID.fullmatch(item) or "--" in item or ".." in item or len(item) > 96:
            kind = "dataset" if name.startswith("datasets") else "model"
            findings.errors.append(
                f'"{at}" with value "{item}" is not valid. Use a {kind} id from https://hf.co/{kind}s.'
            )


def _relation(name: str, value: Any, findings: Findings) -> None:
    if value not in RELATIONS:
        findings.errors.append(f'"{name}" must be one of [{", ".join(RELATIONS)}]')


def _tasks(name: str, value: Any, findings: Findings) -> None:
    for _, item in _each(name, value, findings):
        if item not in TASKS:
            findings.warnings.append(f'The {name} "{item}" is not in the official list')


def _pipeline(name: str, value: Any, findings: Findings) -> None:
    if _text(value):
        _tasks(name, value, findings)
    else:
        findings.errors.append(f'"{name}" must be a string')


def _model_index(name: str, value: Any, findings: Findings) -> None:
    """Each model has a name and results; each result a task, a data set and metrics with their values."""
    if not isinstance(value, list):
        findings.errors.append(f'"{name}" must be an array')
        return
    for number, model in enumerate(value):
        at = f"{name}[{number}]"
        results = _need(at, model, ("name",), findings).get("results")
        if not isinstance(results, list):
            findings.errors.append(f'"{at}.results" is required')
            continue
        for place, result in enumerate(results):
            _result(f"{at}.results[{place}]", result, findings)


def _result(at: str, result: Any, findings: Findings) -> None:
    result = _need(at, result, ("task", "dataset", "metrics"), findings)
    if "task" in result:
        _need(f"{at}.task", result["task"], ("type",), findings)
    if "dataset" in result:
        _need(f"{at}.dataset", result["dataset"], ("name", "type"), findings)
    metrics = result.get("metrics", [])
    if not isinstance(metrics, list):
        findings.errors.append(f'"{at}.metrics" must be an array')
        return
    for number, metric in enumerate(metrics):
        _need(f"{at}.metrics[{number}]", metric, ("type", "value"), findings)


def _need(at: str, value: Any, keys: tuple[str, ...], findings: Findings) -> dict[str, Any]:
    if not isinstance(value, dict):
        findings.errors.append(f'"{at}" must be of type object')
        return {}
    findings.errors += [f'"{at}.{key}" is required' for key in keys if value.get(key) in (None, "")]
    return {key: item for key, item in value.items() if item not in (None, "")}


CHECKS: dict[str, Check] = {
    "license": _licenses,
    "license_name": _string,
    "license_link": _string,
    "language": _languages,
    "tags": _list,
    "datasets": _repositories,
    "base_model": _repositories,
    "base_model_relation": _relation,
    "metrics": _texts,
    "library_name": _string,
    "pipeline_tag": _pipeline,
    "pretty_name": _string,
    "task_categories": _tasks,
    "task_ids": _texts,
    "size_categories": _texts,
    "thumbnail": _string,
    "model-index": _model_index,
}


def card_problems(content: bytes | str | None) -> Findings:
    """What the Hub would say to a README (none: no README, nothing to say)."""
    findings = Findings()
    if content is None:
        return findings
    try:
        data = front_matter(content.decode() if isinstance(content, bytes) else content)
    except UnicodeDecodeError:
        findings.errors.append("README.md must be UTF-8")
        return findings
    except ValueError as fault:
        findings.errors.append(str(fault))
        return findings
    if not data:
        findings.warnings.append("empty or missing yaml metadata in repo card")
        return findings
    findings.errors += [f"keys must be strings, got {key!r}" for key in data if not isinstance(key, str)]
    for name, check in CHECKS.items():
        if data.get(name) is not None:
            check(name, data[name], findings)
    return findings
