"""Fresh students of another family, with the teacher's task, labels and inputs."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from hfshrink.distillation.students.depth import fresh_model
from hfshrink.errors import SettingError
from hfshrink.inputs import image_shape, random_inputs
from hfshrink.loading import TASKS, find_processor, infer_task
from hfshrink.modules import max_positions

TOKEN_IDS = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "unk", "mask", "decoder_start"))
FROM_TEACHER = ("num_labels", "id2label", "label2id", "problem_type", "vocab_size", "num_channels")
"""Config entries that the student must share with its teacher, besides the ids of special tokens."""

POSITIONS = "max_position_embeddings"

TOKENS = 8
"""Of the example that a fresh student is tried on, where its teacher has no longest input."""

READS = {"input_ids": "text", "pixel_values": "images", "input_values": "audio", "input_features": "audio"}


def fresh_student(
    teacher: Any, architecture: str, config: Mapping[str, Any], num_layers: int | None = None
) -> tuple[Any, list[str]]:
    """A model of another family with fresh weights that does the teacher's task on the teacher's inputs.

    Args:
        teacher: The model.
        architecture: A `model_type` of transformers, such as `"mobilenet_v2"`.
        config: Entries of the new family's config.
        num_layers: Its layers, where its config has such an entry.

    Returns:
        The student, in the teacher's dtype and on its device, and the names of the config entries that came from the
        teacher.

    Raises:
        SettingError: Unknown architecture or entry, no head for the teacher's task, or a student that can't read the
            teacher's inputs.
    """
    _check_architecture(architecture)
    task = infer_task(teacher)
    _check_inputs(teacher, architecture)
    _check_task(architecture, task)
    default = _make_config(architecture, {})
    wanted = _wanted(default, config, num_layers)
    taken = _from_teacher(teacher, default, _entries(default))
    taken = {name: value for name, value in _canonical(default, taken).items() if name not in wanted}
    student_config = _make_config(architecture, {**taken, **wanted})
    student_config._name_or_path = getattr(teacher.config, "_name_or_path", "")  # where the tokenizer lies
    import transformers

    auto = getattr(transformers, TASKS[task][0])
    model_class = auto._model_mapping[type(student_config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    own_length = _canonical_name(default, POSITIONS) in wanted
    try:
        if not own_length:
            _lengthen(student_config, model_class, teacher)
        student = fresh_model(model_class, student_config, teacher)
    except (ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise SettingError(f"A {architecture!r} with {dict(wanted)} can't be built: {error}") from error
    _check_reading(student, teacher, (_reads(student if own_length else teacher)) or TOKENS)
    return student, sorted(taken)


def _check_architecture(architecture: str) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if architecture not in CONFIG_MAPPING_NAMES:
        name = str(architecture).lower().replace("-", "_")
        near = difflib.get_close_matches(name, list(CONFIG_MAPPING_NAMES), n=3, cutoff=0.5)
        hint = f"Near it are {', '.join(near)}." if near else "Try mobilenet_v2, resnet, squeezebert or bert."
        raise SettingError(f"architecture={architecture!r} is no model_type that transformers knows. {hint}")


def _check_inputs(teacher: Any, architecture: str) -> None:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = MODEL_MAPPING_NAMES.get(architecture, ())
    base = getattr(transformers, names if isinstance(names, str) else (*names, "")[0], None)
    own, other = teacher.main_input_name, getattr(base, "main_input_name", None)
    if other is not None and own != other:
        raise SettingError(
            f"The teacher {type(teacher).__name__} reads {own} ({READS.get(own, 'another kind')}), a student of the "
            f"architecture {architecture!r} reads {other} ({READS.get(other, 'another kind')}). Choose one that "
            f"reads {own}."
        )


def _check_task(architecture: str, task: str) -> None:
    from transformers.models.auto import modeling_auto

    known = getattr(modeling_auto, TASKS[task][1])
    if architecture not in known:
        examples = ", ".join(name for name in ("bert", "distilbert", "gpt2", "t5", "resnet", "vit") if name in known)
        raise SettingError(
            f"The architecture {architecture!r} has no head for the teacher's task, {task}. These have one: "
            f"{examples}, and {len(known)} in all ({TASKS[task][0]})."
        )


def _make_config(architecture: str, entries: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(architecture, **entries)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise SettingError(f"The config of {architecture!r} refuses {dict(entries)}: {error}") from error


def _entries(config: Any) -> set[str]:
    """Names that a config takes, in either spelling."""
    return {name for name in config.to_dict() if not name.startswith("_")} | set(config.attribute_map) | {"num_labels"}


def _canonical_name(config: Any, name: str) -> str:
    """The name under which a config keeps an entry, such as `n_layers` for DistilBERT's `num_hidden_layers`."""
    return config.attribute_map.get(name, name)


def _canonical(config: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    return {_canonical_name(config, name): value for name, value in named.items()}


def _wanted(default: Any, config: Mapping[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The entries that the caller gave, under their canonical names."""
    architecture, entries = default.model_type, _entries(default)
    _check_entries(architecture, config, default)
    named = list(config.items())
    if num_layers is not None:
        if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers < 1:
            raise SettingError(f"num_layers must be a whole number of at least 1, got {num_layers!r}.")
        named.append((_layers_entry(architecture, entries), num_layers))
    counts = Counter(_canonical_name(default, name) for name, _ in named)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise SettingError(
            f"{twice} of a {architecture!r} is given twice, under two names"
            + (", of which num_layers is one" if num_layers is not None else "")
            + f": {', '.join(f'{n}={v!r}' for n, v in named if _canonical_name(default, n) == twice)}. Give it once."
        )
    return _canonical(default, dict(named))


def _check_entries(architecture: str, config: Mapping[str, Any], default: Any) -> None:
    entries = _entries(default)
    shared = {_canonical_name(default, name) for name in (*FROM_TEACHER, *TOKEN_IDS)}
    for name, value in config.items():
        if _canonical_name(default, name) in shared:
            raise SettingError(
                f"{name}={value!r}: the student takes {name} from its teacher, so that their labels and inputs are "
                "the same. Leave it out."
            )
        if name not in entries:
            near = difflib.get_close_matches(name, sorted(entries), n=3, cutoff=0.5)
            hint = f"Near it are {', '.join(near)}." if near else f"It has {', '.join(sorted(entries))}."
            raise SettingError(f"The config of {architecture!r} has no entry {name!r} (got {value!r}). {hint}")


def _layers_entry(architecture: str, entries: set[str]) -> str:
    found = next((name for name in ("num_hidden_layers", "num_layers") if name in entries), None)
    if found is None:
        near = ", ".join(sorted(name for name in entries if "depth" in name or "layer" in name))
        raise SettingError(f"The config of {architecture!r} has no number of layers; give its own entries: {near}.")
    return found


def _from_teacher(teacher: Any, default: Any, entries: set[str]) -> dict[str, Any]:
    """Config entries that the student takes over: labels, and what its inputs look like."""
    old = teacher.config
    taken: dict[str, Any] = {"id2label": dict(old.id2label), "label2id": dict(old.label2id)}
    taken["problem_type"] = old.problem_type
    if teacher.main_input_name == "pixel_values":
        channels, height, width = image_shape(teacher, find_processor(teacher))
        size = {"num_channels": channels, "image_size": height if height == width else [height, width]}
        return taken | {name: value for name, value in size.items() if name in entries}
    text = old.get_text_config()
    for name in ("vocab_size", "type_vocab_size"):
        if name in entries and getattr(text, name, None):
            taken[name] = getattr(text, name)
    for name in TOKEN_IDS:
        own, other = getattr(text, name, None), getattr(default, name, None)
        if own is not None or (isinstance(other, int) and other >= text.vocab_size):
            taken[name] = own
    positions = _reads(teacher) or getattr(text, POSITIONS, None)
    if POSITIONS in entries and positions is not None:
        taken[POSITIONS] = positions
    return taken


def _reads(model: Any) -> int | None:
    """Longest input in tokens; I-BERT's table of positions is no `Embedding`."""
    known = max_positions(model)
    for name, module in model.named_modules():
        if known is None and name.endswith("position_embeddings") and hasattr(module, "padding_idx"):
            known = len(module.weight) - (0 if module.padding_idx is None else module.padding_idx + 1)
    return known


def _lengthen(config: Any, model_class: Any, teacher: Any) -> None:
    """Add the rows of positions that the family does not read, such as those up to RoBERTa's padding id."""
    with torch.device("meta"):
        reads = _reads(fresh_model(model_class, config, teacher))
    needed = _reads(teacher) or getattr(config, POSITIONS, None)
    if reads is not None and needed is not None and reads < needed and hasattr(config, POSITIONS):
        setattr(config, POSITIONS, getattr(config, POSITIONS) + needed - reads)


def _check_reading(student: Any, teacher: Any, tokens: int) -> None:
    """Raise `SettingError` for a student that can't read a random example of so many tokens, or of one image."""
    is_image, no_end = teacher.main_input_name == "pixel_values", getattr(teacher.config, "eos_token_id", None) is None
    hint = ""
    try:
        inputs = random_inputs(student, 1, tokens, find_processor(teacher) if is_image else None)
        if "input_ids" in inputs and no_end:  # then the teacher's texts need not end as the student expects
            inputs["input_ids"][:, -1] = inputs["input_ids"][:, 0]
            hint = " Maybe it reads the end-of-sequence token, and the teacher's config has no eos_token_id."
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            copy.deepcopy(student).eval()(**inputs)  # a copy: BigBird changes its attention by the length
    except (SettingError, ValueError, RuntimeError, IndexError, TypeError) as error:
        what = "an image of the teacher's size" if is_image else f"{tokens} tokens, as many as its teacher reads"
        raise SettingError(
            f"A {student.config.model_type!r} of these sizes can't read {what}: {' '.join(str(error).split())[:300]}."
            f"{hint if student.config.is_encoder_decoder else ''} Give sizes of its config that fit, or another "
            "architecture=."
        ) from error
