"""What a teacher's answers depend on, as hashes and names that two runs can compare."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from hfshrink.digests import digest_of, weights_digest
from hfshrink.record import model_name, versions

if TYPE_CHECKING:
    from hfshrink.distillation.teachers.answers import TeacherRun

NO_LOGIT = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "hfshrink", "dtype", "torch_dtype"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "gradient_checkpointing"),
    *("use_cache", "output_hidden_states", "output_attentions", "return_dict", "use_return_dict"),
    *("*dropout*", "*pdrop*", "*layerdrop*", "*drop_path*"),
    *("max_length", "min_length", "max_new_tokens", "min_new_tokens", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "num_return_sequences", "top_p", "typical_p", "repetition_penalty"),
    *("diversity_penalty", "length_penalty", "*no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_*_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
)
"""Entries of a config that change no logit in eval mode, as wildcards: names, training, generation, what is returned.
transformers sets `problem_type` itself at the first forward pass with labels."""

SAME_ANSWERS = ("hfshrink.", "teacher.name.", "teacher.revision.", "collator.class.", "collator.settings.")
"""Told, but they do not change an answer: whatever a collator is called, it must leave the inputs alone."""

MOST_TOLD = 6  # differences in a message

Scalar = str | int | float | bool | None


def cache_settings(run: TeacherRun) -> dict[str, Any]:
    """Everything that the answers of a run depend on, JSON-safe, for the store's `cache.json`.

    Args:
        run: The teacher and what is kept of it.
    """
    config: Any = run.model.config
    tokenizer = getattr(run.processor, "tokenizer", run.processor)
    return {
        "hfshrink": versions().get("hfshrink"),
        "teacher": {
            "name": model_name(run.model),
            "revision": getattr(config, "_commit_hash", None),
            "class": type(run.model).__name__,
            "config": json.loads(json.dumps(_that_count(config.to_dict()), sort_keys=True, default=str)),
            "weights": weights_digest(run.model),
        },
        "tokenizer": None if tokenizer is None else _tokenizer_settings(tokenizer),
        "collator": _collator_settings(run.collator, config, tokenizer),
        "answers": {
            "signal": run.signal,
            "entries": None if run.signal == "full" else run.entries,
            "seed": run.seed if run.signal == "sampled" else None,
            "classes": run.classes,
            "parts": dict(run.parts),
        },
    }


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What differs in two runs' settings, for people.

    A tokenizer that one side does not know is no difference: the rows were encoded before.

    Args:
        stored: Of the run that made the cache.
        given: Of this run.

    Example:
        >>> differences({"answers": {"seed": 0}}, {"answers": {"seed": 1}})
        ['answers.seed is 0 there, 1 here']
    """
    there, here = _flat(stored), _flat(given)
    names = sorted((there.keys() | here.keys()) - {"format_version", "identity"})
    unknown = stored.get("tokenizer") is None or given.get("tokenizer") is None
    left_out = (*SAME_ANSWERS, *(("tokenizer.", "collator.pad_id.") if unknown else ()))
    names = [name for name in names if not f"{name}.".startswith(left_out)]
    found = [
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if len(found) > MOST_TOLD:
        found[MOST_TOLD:] = [f"and {len(found) - MOST_TOLD} more"]
    if found and there.get("teacher.name") != here.get("teacher.name"):
        found.append(f"the teacher is {there.get('teacher.name')!r} there, {here.get('teacher.name')!r} here")
    return found


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    if not hasattr(tokenizer, "get_vocab"):
        settings = tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else {}
        return {"class": type(tokenizer).__name__, "settings": digest_of(settings)}
    return {
        "class": type(tokenizer).__name__,
        "vocabulary": digest_of(tokenizer.get_vocab()),
        "special_ids": [int(number) for number in tokenizer.all_special_ids],
        "truncation_side": tokenizer.truncation_side,
        "max_length": min(int(tokenizer.model_max_length), 2**31 - 1),
    }


def _collator_settings(collator: Any, config: Any, tokenizer: Any) -> dict[str, Any]:
    pad = getattr(config, "pad_token_id", None)
    padding = {
        "padding_side": getattr(tokenizer, "padding_side", "right"),
        "pad_id": getattr(tokenizer, "pad_token_id", None) if pad is None else pad,
    }
    if collator is None:
        return {"class": "default", **padding}
    known = getattr(collator, "__dict__", {})
    simple = {name: value for name, value in known.items() if isinstance(value, Scalar)}
    name = getattr(collator, "__qualname__", type(collator).__qualname__)
    return {"class": name, **padding, "settings": simple}


def _that_count(config: Mapping[Any, Any]) -> dict[str, Any]:
    """The entries of a config that can change a logit, those of inner configs too."""
    kept = {str(k): v for k, v in config.items() if not any(fnmatchcase(str(k), name) for name in NO_LOGIT)}
    return {name: _that_count(value) if isinstance(value, Mapping) else value for name, value in kept.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat
