"""`load`: a Hub id, a folder or a model -> the model in its right Auto class, and its tokenizer or processor."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from hfshrink.errors import CheckpointError, HfshrinkError, SettingError, UnsupportedModelError, require
from hfshrink.record import config_of
from hfshrink.saving import read_config

logger = logging.getLogger(__name__)

TASKS = {
    "text-classification": ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "question-answering": ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    "fill-mask": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "text-generation": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "text2text-generation": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    "feature-extraction": ("AutoModel", "MODEL_MAPPING_NAMES"),
}
"""task -> (Auto class, the table of transformers that lists its architectures)."""

HUB_KEYWORDS = ("revision", "token", "cache_dir", "local_files_only")  # of `from_pretrained`, for every file alike
EXPORT_MANIFEST = "export.json"  # written by transformers' ExportedModel.save_pretrained


def load(model: Any, task: str | None = None, *, trust_remote_code: bool = False, **kwargs: Any) -> tuple[Any, Any]:
    """Load a model in the right Auto class, and its tokenizer or processor.

    The task comes from `config.architectures` and is never guessed. Weights are read from safetensors only.

    Args:
        model: A Hub id or folder (of a model, or of an export that `quantize` wrote), or a loaded model or export,
            which is returned as it is.
        task: One of `hfshrink.loading.TASKS`; None reads it from the config.
        trust_remote_code: Whether to run code that lies in the checkpoint's repository.
        **kwargs: Go to `from_pretrained`: `dtype`, `device_map`, `revision`, …

    Returns:
        The model in eval mode, and its tokenizer, image processor or processor; None where the checkpoint has none.

    Raises:
        SettingError: Unknown task, or `ignore_mismatched_sizes=True`, which would fill a compressed layer at random.
        UnsupportedModelError: The config names no architecture, or one that fits no task; give `task=`.
        CheckpointError: No such folder or model, no network, half-written or foreign files, no safetensors.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model, tokenizer = load(BertModel(config))
        >>> infer_task(model), tokenizer
        ('feature-extraction', None)
    """
    if kwargs.get("ignore_mismatched_sizes"):
        raise SettingError(
            "ignore_mismatched_sizes=True re-initializes every layer whose shape differs, compressed ones included, "
            "and says nothing. Leave it out; to change a head, load the model first and replace its classifier."
        )
    if task is not None:
        _check_task(task)
    if not isinstance(model, str | Path):
        config_of(model)  # raises for what is no model
        return model, find_processor(model)
    _check_folder(model)
    hub = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    manifest = _find_manifest(model, kwargs.get("subfolder", ""), hub)
    if manifest is not None:
        loaded = _load_export(model, manifest, trust_remote_code, kwargs)
    else:
        loaded = _load_weights(str(model), task, trust_remote_code, kwargs, hub)
    return loaded, load_processor(model, trust_remote_code, **hub)


def infer_task(model: Any, task: str | None = None) -> str:
    """The task of a model, export or config; `task` itself where it is given.

    A loaded model is known by its class, a config by its `architectures`; optimum's `TasksManager` is asked for
    classes that are in no table of transformers.

    Raises:
        UnsupportedModelError: No architecture, or one that fits no task or several.
    """
    if task is not None:
        return _check_task(task)
    config = config_of(model)
    names = getattr(config, "architectures", None) or []
    names = [names] if isinstance(names, str) else list(names)
    is_torch_model = hasattr(model, "named_modules")
    if is_torch_model:
        names = [type(model).__name__]
    elif not names and hasattr(model, "components"):  # an export that was not saved yet: its graphs know their source
        names = [n for n in (part.metadata.architecture for part in model.components.values()) if n is not None]
    if not names:
        raise UnsupportedModelError(
            f"The config of {getattr(config, '_name_or_path', '') or type(config).__name__} names no architecture, "
            f"so its task is unknown. Give task=, one of: {', '.join(TASKS)}."
        )
    tasks = _tasks_of(names[0])
    if not tasks and is_torch_model:
        tasks = _ask_optimum(model)
    if not tasks and is_torch_model:  # a subclass: the user's, or what sharding makes of a class
        tasks = next((found for base in type(model).__mro__[1:] if (found := _tasks_of(base.__name__))), [])
    if len(tasks) != 1:
        what = "fits no task that hfshrink knows" if not tasks else f"fits several tasks ({', '.join(tasks)})"
        raise UnsupportedModelError(f"The architecture {names[0]} {what}. Give task=, one of: {', '.join(TASKS)}.")
    return tasks[0]


def find_processor(model: Any) -> Any:
    """The tokenizer or processor beside a loaded model's files, as far as no network is needed; else None."""
    name = getattr(config_of(model), "_name_or_path", "")
    return load_processor(name, trust_remote_code=False, local_files_only=True) if name else None


def load_processor(source: str | Path, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """The tokenizer or processor of a folder or Hub id; None where it has none."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    for auto in (AutoProcessor, AutoTokenizer, AutoImageProcessor):
        try:
            found = auto.from_pretrained(str(source), trust_remote_code=trust_remote_code, **kwargs)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
            continue
        if not _is_empty_tokenizer(found):
            return found
    return None


def _is_empty_tokenizer(processor: Any) -> bool:
    """Without tokenizer files transformers makes a tokenizer that knows its special tokens only."""
    known = getattr(processor, "get_vocab", None)
    return known is not None and len(known()) <= len(set(processor.all_special_tokens))


def _check_task(task: str) -> str:
    if task not in TASKS:
        raise SettingError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    return task


def _tasks_of(architecture: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    found = []
    for task, (_, mapping) in TASKS.items():
        names = getattr(modeling_auto, mapping).values()
        if any(architecture in ((name,) if isinstance(name, str) else name) for name in names):
            found.append(task)
    if len(found) > 1 and "feature-extraction" in found:  # some heads are listed as their family's base model too
        found.remove("feature-extraction")
    if "text2text-generation" in found and architecture.endswith("ForConditionalGeneration"):
        return ["text2text-generation"]  # BART and its kin are listed for fill-mask besides
    return found


def _ask_optimum(model: Any) -> list[str]:
    try:
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return []
    try:
        task = TasksManager.infer_task_from_model(model)
    except ValueError:
        return []
    return [task] if task in TASKS else []


def _check_folder(source: str | Path) -> None:
    """Say what is wrong with a folder before anything heavy is loaded; Hub ids pass."""
    path = Path(source)
    if path.is_file():
        raise CheckpointError(f"{source} is a file. Give the folder that save_pretrained wrote.")
    if not path.is_dir():
        if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
            raise CheckpointError(f"There is no folder {source}.")
        return
    read_config(path)
    if (path / EXPORT_MANIFEST).is_file():
        return
    files = {file.name for file in path.iterdir()}
    if not any(name.endswith(".safetensors") for name in files):
        if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in files):
            raise CheckpointError(
                f"{source} holds pickled weights only, which can run code when loaded. "
                "Convert them once where you trust them: "
                "AutoModel.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)."
            )
        raise CheckpointError(
            f"{source} has a config.json but no weights (*.safetensors): it is half-written or a config only."
        )


def _find_manifest(source: str | Path, subfolder: str, hub: dict[str, Any]) -> Path | None:
    """The manifest of an export in a folder or a repository of the Hub; None where weights lie there, or nothing."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        file = Path(source) / subfolder / EXPORT_MANIFEST
        return file if file.is_file() else None
    kinds = ("missing_entries", "gated_repo", "connection_errors")
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in kinds}  # the weights' own errors say more
    try:
        found = cached_file(str(source), EXPORT_MANIFEST, subfolder=subfolder, **quiet, **hub)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _load_export(source: str | Path, manifest: Path, trust_remote_code: bool, kwargs: dict[str, Any]) -> Any:
    from transformers.exporters import ExportedModel

    from hfshrink.generation import ExportedCausalLM, has_cache

    if _export_format(manifest) == "openvino":  # left alone it computes in bfloat16 where the processor has it
        require("openvino", extra="openvino")
        kwargs = {"device": "cpu", "config": {"INFERENCE_PRECISION_HINT": "f32"}, **kwargs}
    try:
        exported = ExportedModel.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
        if not has_cache(exported) or len(exported.components) != 1:
            return exported
        parts = (exported.components, exported.export_format, exported.config, exported.generation_config)
        decoder = ExportedCausalLM(*parts)
        decoder._runners = exported._runners  # loaded with the caller's options
        return decoder
    except TypeError as error:
        if "Unknown kwargs" not in str(error):
            raise CheckpointError(f"The export in {source} can't be read: {error}") from error
        raise SettingError(f"The export in {source} can't be loaded with these keywords: {error}") from None
    except Exception as error:  # of the runtimes: protobuf's and ONNX Runtime's have no common parent
        raise CheckpointError(
            f"The export in {source} can't be read; it is half-written or corrupt: {error}"
        ) from error


def _export_format(manifest: Path) -> Any:
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))).get("export_format")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{manifest} can't be read; it is half-written or corrupt: {error}") from error


def _load_weights(
    source: str, task: str | None, trust_remote_code: bool, kwargs: dict[str, Any], hub: dict[str, Any]
) -> Any:
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
        auto = getattr(transformers, TASKS[infer_task(config, task)][0])
        kwargs = {"use_safetensors": True, **kwargs, "output_loading_info": True}
        model, info = auto.from_pretrained(source, trust_remote_code=trust_remote_code, **kwargs)
        _check_complete(source, model, config, info)
        return model.eval()
    except HfshrinkError:
        raise
    except SafetensorError as error:
        raise CheckpointError(
            f"The weights of {source} can't be read; they are half-written or corrupt: {error}"
        ) from error
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        where = "" if Path(source).is_dir() else " Check the name and the network, or give a local folder."
        raise CheckpointError(f"Can't load {source!r}: {error}{where}") from error


def _check_complete(source: str, model: Any, config: Any, info: dict[str, Any]) -> None:
    """Refuse weights that the checkpoint lacks and that were filled at random, save for a head that was asked for.

    BERT's pooler is a part of such a head: a masked language model is saved without one. A checkpoint written with
    parametrized weights lacks them under their plain names.
    """
    missing = sorted(info["missing_keys"])
    if not missing:
        return
    own_class = type(model).__name__ in (getattr(config, "architectures", None) or ())
    base = f"{model.base_model_prefix}."
    head = [name for name in missing if not name.startswith(base) or name.startswith(f"{base}pooler.")]
    if own_class or len(head) != len(missing):
        raise CheckpointError(
            f"{source} lacks {len(missing)} of its weights ({', '.join(missing[:3])}, …), which would be random: it "
            "is half-written, or was saved with parametrized weights."
        )
    logger.warning("%s has no head for this task; %s are random until they are trained.", source, ", ".join(head))
