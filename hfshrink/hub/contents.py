"""What of a folder is uploaded: names on a list, and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hfshrink.cards.merging import MARKER
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.hub.leaks import without_machine_paths
from hfshrink.loading import EXPORT_MANIFEST
from hfshrink.saving import MAX_CONFIG_BYTES, read_config

WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json")
TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("additional_chat_templates/*.jinja", "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "normalizer.json"),
    *("tokenizer.model", "tekken.json", "*.tiktoken", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm"),
    *("target.spm", "bpe.codes", "dict.txt", "vocab-src.json", "vocab-tgt.json", "emoji.json", "entity_vocab.json"),
)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SENTENCES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "[0-9]_*/config.json")
RESULTS = ("all_results.json", "eval_results.json", "train_results.json", "test_results.json")
PLOTS = ("plots/*.png", "plots/*.svg")
RECORD_FILE, RESULTS_FILE, CARD_FILE = "hfshrink_record.json", "hfshrink_results.json", "README.md"
CONFIGS = ("config.json", "generation_config.json")
MODEL_FILES = (*CONFIGS, *WEIGHTS, *TOKENIZERS, *PROCESSORS, *SENTENCES, *RESULTS, *PLOTS)
"""Patterns of the files of a model that are uploaded; a pattern's `*` never reaches into a folder."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.npz")
STATES = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"),
    *("pruning_state.safetensors", "quantization_state.safetensors", "distillation.safetensors"),
)
"""Files of a run that goes on, uploaded only where `hub_strategy` asks for checkpoints. The Trainer's pickled
arguments are never among them: they hold its token."""
RUN_FILES = ("training_args.bin", *STATES)

logger = logging.getLogger(__name__)


@dataclass
class Contents:
    """What one commit holds.

    Attributes:
        files: Path in the repository -> file on this disk, or bytes.
        replaced: Patterns of paths in the repository that go unless `files` has them: weights or rows which would be
            read in place of the new ones, or with them.
        places: Folders (`""`, `"onnx/onnx-int8/"`) where the files of an earlier push's export go too.
        kind: `"weights"`, `"export"` or `"dataset"`.
        export_format: Of an export: `"onnx"`, `"openvino"` or `"executorch"`.
        readme: The card that lies in the folder, where hfshrink wrote one: a new repository keeps what is added to it.
    """

    files: dict[str, Path | bytes] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    kind: str = "weights"
    export_format: str | None = None
    readme: str | None = None

    def add_json(self, name: str, data: Any) -> None:
        """Put a JSON file in; the same data give the same bytes."""
        self.files[name] = (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_folder(folder: Path, patterns: Iterable[str] = MODEL_FILES) -> Contents:
    """The files of a saved model or export that are published.

    Args:
        folder: As `save_pretrained` wrote it; what else lies there stays there.
        patterns: Names that are uploaded.

    Raises:
        CheckpointError: No model, weights that are not safetensors, weights and an export in one folder, missing
            shards, or a link that leads out of the folder.
    """
    read_config(folder)
    if (folder / EXPORT_MANIFEST).is_file():
        if (folder / WEIGHTS[0]).exists() or (folder / WEIGHTS[2]).exists():
            raise CheckpointError(
                f"{folder.name} holds weights (model.safetensors) and an export ({EXPORT_MANIFEST}): who loads it "
                "gets one of them. Publish the weights, with the export in a folder of its own: "
                "push_to_hub(weights, repo_id, exports={'onnx-int8': folder})."
            )
        names = (*export_files(folder), *(name for name in patterns if name not in WEIGHTS))
        return Contents(listed(folder, names), WEIGHTS, ("",), "export", export_format(folder), _own_card(folder))
    _check_weights(folder)
    return Contents(listed(folder, patterns), WEIGHTS, ("",), readme=_own_card(folder))


def _own_card(folder: Path) -> str | None:
    """The README that `hfshrink card` or a Trainer wrote, to which something may have been added; no other."""
    file = folder / CARD_FILE
    if file.is_symlink() or not file.is_file() or file.stat().st_size > MAX_CONFIG_BYTES:
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    return text if MARKER.search(text) else None


def export_files(folder: Path) -> list[str]:
    """Names of an export's own files, from its manifest.

    Raises:
        CheckpointError: The manifest can't be read, a file that it names is missing, or lies elsewhere.
    """
    path = folder / EXPORT_MANIFEST
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        names = manifest_files(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{EXPORT_MANIFEST} in {folder.name} can't be read ({type(error).__name__}): the export is half-written "
            "or foreign. Export the model again."
        ) from None
    wrong = next((name for name in names if Path(name).name != name or not (folder / name).is_file()), None)
    if wrong is not None:
        raise CheckpointError(f"{EXPORT_MANIFEST} names {wrong[:80]!r}, which is no file of {folder.name}.")
    return [EXPORT_MANIFEST, *names]


def manifest_files(manifest: Any) -> list[str]:
    """The files that an export's manifest names, as its exporter writes them.

    Raises:
        ValueError: No such format.
        KeyError: It is no manifest; so are `TypeError` and `AttributeError`.
    """
    from transformers.exporters.auto import get_exporter_class

    exporter = get_exporter_class(manifest["export_format"])
    return [name for entry in manifest["components"].values() for name in exporter.program_files(entry["file"])]


def add_exports(contents: Contents, exports: dict[str, Path]) -> None:
    """Put exports beside the weights, each in `<format>/<scheme>/`, such as `onnx/onnx-int8/`.

    Raises:
        SettingError: A name that is no folder's, or an export beside an export.
        CheckpointError: As of `export_files`.
    """
    if exports and contents.kind != "weights":
        raise SettingError("exports= go beside weights; this is an export itself. Push the model they were made from.")
    for scheme, folder in exports.items():
        place = f"{export_format(folder)}/{scheme}"
        for name, file in listed(folder, (*export_files(folder), *CONFIGS)).items():
            contents.files[f"{place}/{name}"] = file
        contents.places += (f"{place}/",)


def export_format(folder: Path) -> str:
    """`"onnx"`, `"openvino"` or `"executorch"`."""
    export_files(folder)
    return str(json.loads((folder / EXPORT_MANIFEST).read_text(encoding="utf-8"))["export_format"])


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a path in a repository fits a pattern, folder by folder.

    Example:
        >>> matches("plots/size.png", ["plots/*.png"]), matches("a/plots/size.png", ["*.png"])
        (True, False)
    """
    parts = name.split("/")
    return any(
        len(parts) == pattern.count("/") + 1
        and all(fnmatchcase(part, piece) for part, piece in zip(parts, pattern.split("/"), strict=True))
        for pattern in patterns
    )


def _check_weights(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    names = {file.name for file in folder.iterdir()}
    if not any(matches(name, WEIGHTS[:2]) for name in names):
        held = sorted(name for name in names if matches(name, PICKLES) and name not in RUN_FILES)
        what = f"only {', '.join(held[:3])}, which can run code when loaded" if held else "none"
        raise CheckpointError(
            f"{folder.name} must hold its weights as model.safetensors, it has {what}. Load it where you trust it and "
            "save it with save_pretrained."
        )
    if "model.safetensors.index.json" in names and "model.safetensors" not in names:
        missing = _shards(folder) - names
        if missing:
            raise CheckpointError(f"{folder.name} lacks {', '.join(sorted(missing)[:3])}: it is half-written.")
    for name in sorted(name for name in names if matches(name, WEIGHTS[:2])):
        try:
            with safe_open(folder / name, framework="numpy") as file:
                hidden = next((key for key in file.keys() if ".parametrizations." in key), None)  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} in {folder.name} can't be read; it is half-written or corrupt: {error}"
            ) from None
        if hidden is not None:
            raise CheckpointError(
                f"{name} holds parametrized weights ({hidden}), which from_pretrained fills at random. Fold them "
                "first: torch.nn.utils.parametrize.remove_parametrizations."
            )


def _shards(folder: Path) -> set[str]:
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"model.safetensors.index.json in {folder.name} can't be read.") from None


def listed(folder: Path, patterns: Iterable[str]) -> dict[str, Path | bytes]:
    """The files of a folder whose names fit; a link that leads out of it is an error."""
    patterns = tuple(patterns)
    found: dict[str, Path | bytes] = {}
    left: list[str] = []
    for file in sorted([*folder.iterdir(), *_one_deeper(folder, patterns)]):
        name = file.relative_to(folder).as_posix()
        if matches(name, patterns) and (file.is_file() or file.is_symlink()):
            _check_link(file, folder)
            found[name] = file
        elif file.is_file() and file.name != CARD_FILE and not file.name.startswith("."):
            left.append(name)
    if left:
        logger.info("Not uploaded: %s.", ", ".join(left[:20]))
    return found


def _one_deeper(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    firsts = {pattern.split("/")[0] for pattern in patterns if "/" in pattern}
    folders = [path for path in folder.iterdir() if path.is_dir() and any(fnmatchcase(path.name, f) for f in firsts)]
    for path in folders:
        _check_link(path, folder)
    return [file for path in folders for file in path.iterdir()]


def _check_link(file: Path, folder: Path) -> None:
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{file.relative_to(folder)} is a link that leads out of {folder.name}; links to other places are not "
            "followed. Copy the file itself into the folder."
        )
    if file.is_symlink() and not file.exists():
        raise CheckpointError(f"{file.relative_to(folder)} in {folder.name} is a link to nothing.")


Cleaner = Callable[[Any], Any]


def clean_configs(contents: Contents, cleaner: Cleaner) -> None:
    """Replace each JSON config by one without paths of this machine, where it holds any; its record too."""
    for name, file in list(contents.files.items()):
        short = name.rsplit("/", 1)[-1]
        if isinstance(file, Path) and (short.endswith("config.json") or short == "trainer_state.json"):
            data = _read_json(file, name)
            record = data.get("hfshrink") if isinstance(data, dict) else None
            cleaned = without_machine_paths(data)
            if record is not None:
                cleaned["hfshrink"] = cleaner(record)
            if cleaned != data:
                contents.add_json(name, cleaned)


def _read_json(file: Path, name: str) -> Any:
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is too large")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} can't be read as JSON ({error}): the folder is half-written.") from None
