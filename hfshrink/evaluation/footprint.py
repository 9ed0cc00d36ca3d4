"""Memory of one model in a process of its own: `python -m hfshrink.evaluation.footprint FOLDER [TOKENS]` prints JSON.

The libraries that it needs and the model's class are imported first; what resident memory grows by then is the
model's.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import sys
from pathlib import Path

LIBRARIES = {
    "bitsandbytes": ("bitsandbytes", "accelerate", "transformers.integrations.bitsandbytes"),
    "torchao": ("torchao.quantization", "transformers.integrations.torchao"),
}
"""quant_method of a config -> the modules that transformers imports when it loads such a checkpoint."""


def measure_footprint(folder: str, sequence_length: int = 128) -> dict[str, int | None]:
    """Load a model, run one example, and read the process's resident memory.

    Args:
        folder: A folder with a model or an export.
        sequence_length: Tokens of the example.

    Returns:
        `loaded_bytes` and `peak_memory_bytes`: growth by loading, and highest growth up to the end of the forward
        pass; None where the system has no `/proc`.
    """
    import torch

    from hfshrink.inputs import random_inputs
    from hfshrink.loading import load, load_processor
    from hfshrink.modules import plain_parts

    _import_model_code(folder)
    load_processor(folder)
    gc.collect()
    _reset_peak()
    before = _resident("VmRSS")
    model, processor = load(folder)
    if isinstance(model, torch.nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            for part in plain_parts(tensor):
                part.count_nonzero()  # safetensors are mapped: a page counts once it was read
    loaded = _resident("VmRSS")
    with torch.inference_mode():
        model(**random_inputs(model, 1, sequence_length, processor))
    peak = _resident("VmHWM")
    if before is None or loaded is None or peak is None:
        return {"loaded_bytes": None, "peak_memory_bytes": None}
    return {"loaded_bytes": max(0, loaded - before), "peak_memory_bytes": max(0, peak - before)}


def _import_model_code(folder: str) -> None:
    import transformers

    from hfshrink.loading import EXPORT_MANIFEST
    from hfshrink.saving import read_config

    config = read_config(folder)
    if (Path(folder) / EXPORT_MANIFEST).is_file():
        from transformers.exporters.auto import get_exporter_class, get_runner_class

        manifest = json.loads((Path(folder) / EXPORT_MANIFEST).read_text(encoding="utf-8"))
        get_exporter_class(manifest["export_format"])  # both import what they need and what is there of it
        get_runner_class(manifest["export_format"])
    quantization = config.get("quantization_config") or {}
    for name in LIBRARIES.get(str(quantization.get("quant_method")), ()):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    for name in config.get("architectures") or []:
        getattr(transformers, name, None)


def _resident(field: str) -> int | None:
    """A field of `/proc/self/status` in bytes: VmRSS is resident now, VmHWM its highest value."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


def _reset_peak() -> None:
    try:
        # 5 sets VmHWM to VmRSS, see proc_pid_clear_refs(5)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return


if __name__ == "__main__":
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 128
    sys.stdout.write(json.dumps(measure_footprint(sys.argv[1], tokens)) + "\n")
