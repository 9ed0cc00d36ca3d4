"""Fresh students of another family, with the teacher's task, labels and inputs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from hfshrink.distillation.students.depth import fresh_model
from hfshrink.errors import SettingError
from hfshrink.inputs import image_shape
from hfshrink.loading import TASKS, find_processor, infer_task
from hfshrink.modules import PADDED_POSITIONS, max_positions

TOKEN_IDS = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep", "unk", "mask", "decoder_start"))
FROM_TEACHER = ("num_labels", "id2label", "label2id", "problem_type", "vocab_size", "num_channels")
"""Config entries that the student must share with its teacher."""

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
        SettingError: Unknown architecture or entry, other inputs than the teacher's, or no head for its task.
    """
    _check_architecture(architecture)
    task = infer_task(teacher)
    _check_inputs(teacher, architecture)
    _check_task(architecture, task)
    default = _make_config(architecture, {})
    entries = _entries(default)
    _check_entries(architecture, config, entries)
    wanted = dict(config)
    if num_layers is not None:
        wanted[_layers_entry(architecture, entries)] = num_layers
    taken = _from_teacher(teacher, default, entries)
    student_config = _make_config(architecture, {**taken, **wanted})
    student_config._name_or_path = getattr(teacher.config, "_name_or_path", "")  # where the tokenizer lies
    import transformers

    auto = getattr(transformers, TASKS[task][0])
    model_class = auto._model_mapping[type(student_config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    try:
        return fresh_model(model_class, student_config, teacher), sorted(taken)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise SettingError(f"A {architecture!r} with {dict(wanted)} can't be built: {error}") from error


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


def _check_entries(architecture: str, config: Mapping[str, Any], entries: set[str]) -> None:
    for name, value in config.items():
        if name in FROM_TEACHER:
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
    positions = max_positions(teacher) or getattr(text, "max_position_embeddings", None)
    if "max_position_embeddings" in entries and positions is not None:
        padded = default.model_type in PADDED_POSITIONS
        pad = taken.get("pad_token_id", getattr(default, "pad_token_id", None)) or 0
        taken["max_position_embeddings"] = positions + (pad + 1 if padded else 0)
    return taken
