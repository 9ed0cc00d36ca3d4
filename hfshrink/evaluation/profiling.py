"""`profile`: size, operations, speed, memory and energy of a model; `measure_latencies`: several, interleaved."""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import hfshrink
from hfshrink.errors import CheckpointError, SettingError
from hfshrink.evaluation.machine import processor_name, read_energy
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.loading import EXPORT_MANIFEST, load
from hfshrink.measurement import Latency, Measurement
from hfshrink.modules import count_parameters, memory_bytes

logger = logging.getLogger(__name__)

WARM_UP = 5
EXPORT_SUFFIXES = (".onnx", ".onnx.data", ".xml", ".bin", ".pte", ".pt2")
FOOTPRINT_SECONDS = 600


def profile(
    model: Any,
    *,
    sequence_length: int = 128,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int = 1,
    repeats: int = 30,
    processor: Any = None,
    memory: bool = True,
) -> Measurement:
    """Count and measure what a model costs.

    Computed are `parameters`, `nonzero_parameters` and `memory_bytes` from the tensors, and `macs` by torch's FLOP
    counter on one example (matrix products and convolutions, attention included; a multiplication and an addition are
    one MAC). Exports hide their tensors: these four are None. Models quantized by another library have no `macs`:
    their kernels are not counted.

    Measured are `size_bytes` from the files (a model in memory is saved to a temporary folder), the latency as in
    `measure_latencies`, `loaded_bytes` and `peak_memory_bytes` of a fresh process that loads the model and runs one
    example, and `energy_joules` of one forward pass of one example, as the whole processor's counter has it (Linux
    with readable RAPL counters).

    Args:
        model: A Hub id, a folder, a loaded model or an export.
        sequence_length: Tokens per example; images take their size from the config.
        batch_sizes: Examples per forward pass, one latency each.
        threads: Threads of the computation.
        repeats: Timed calls per batch size.
        processor: Image processor that knows the size of an image, where the config does not.
        memory: Whether to start the process that measures memory; it takes seconds.

    Returns:
        The measurement; fields that could not be measured are None.

    Raises:
        SettingError: A keyword out of range, or more tokens than the model has positions.
        CheckpointError: The model can't be read.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> profile(model, sequence_length=4, batch_sizes=(1,), repeats=2, memory=False).macs
        1856
    """
    _check_settings(batch_sizes, threads, repeats)
    loaded, found = load(model)
    processor = processor or found
    inputs = random_inputs(loaded, 1, sequence_length, processor)
    with tempfile.TemporaryDirectory() as temporary:
        # before any forward pass: bitsandbytes' 4-bit weights are not saved faithfully after one
        folder = _folder_of(model, loaded, Path(temporary))
        size = None if folder is None else weight_bytes(folder)
        loaded_bytes, peak = _footprint(folder, sequence_length) if memory and folder is not None else (None, None)
    counts: dict[str, int | None] = {}
    if isinstance(loaded, nn.Module):
        parameters, nonzero = count_parameters(loaded)
        counts = {
            "parameters": parameters,
            "nonzero_parameters": nonzero,
            "memory_bytes": memory_bytes(loaded),
            "macs": count_macs(loaded, inputs),
        }
    latency = measure_latencies(
        {"model": loaded},
        sequence_length=sequence_length,
        batch_sizes=batch_sizes,
        threads=threads,
        repeats=repeats,
        processor=processor,
    )["model"]
    return Measurement(
        **counts,  # type: ignore[arg-type]
        size_bytes=size,
        loaded_bytes=loaded_bytes,
        peak_memory_bytes=peak,
        energy_joules=_energy(loaded, inputs, threads, repeats),
        sequence_length=_tokens(inputs),
        latency=latency,
        device=_device_name(loaded),
    )


def measure_latencies(
    models: dict[str, Any],
    *,
    sequence_length: int = 128,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int = 1,
    repeats: int = 30,
    processor: Any = None,
    seed: int = 0,
) -> dict[str, tuple[Latency, ...]]:
    """Time several models in one run, so that their ratios hold on a machine that others use too.

    Each round calls every model once, in an order drawn anew; five rounds of warm-up are not counted. The threads are
    fixed, and those of ONNX Runtime do not spin. The CPU time is that of the whole process, and the value to trust on
    a shared machine.

    Args:
        models: name -> loaded model or export.
        sequence_length: Tokens per example; images take their size from the config.
        batch_sizes: Examples per forward pass.
        threads: Threads of the computation.
        repeats: Timed calls per model and batch size.
        processor: Image processor that knows the size of an image, where the config does not.
        seed: Seed of the orders and of the random inputs.

    Returns:
        name -> one `Latency` per batch size: the median and the 95th percentile of the wall-clock times, and the
        median CPU time.

    Raises:
        SettingError: A keyword out of range, or more tokens than a model has positions.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> found = measure_latencies({"tiny": model}, sequence_length=4, batch_sizes=(1,), repeats=2)
        >>> found["tiny"][0].runtime, found["tiny"][0].repeats
        ('torch', 2)
    """
    _check_settings(batch_sizes, threads, repeats)
    order = random.Random(seed)
    found: dict[str, list[Latency]] = {name: [] for name in models}
    calls = {name: _pinned(model, threads) for name, model in models.items()}
    with _quiet(list(models.values()), threads):
        for batch_size in batch_sizes:
            inputs = {
                name: random_inputs(m, batch_size, sequence_length, processor, seed) for name, m in models.items()
            }
            samples: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for turn in range(WARM_UP + repeats):
                for name in order.sample(sorted(models), len(models)):
                    sample = _time(calls[name], inputs[name])
                    if turn >= WARM_UP:
                        samples[name].append(sample)
            for name, model in models.items():
                found[name].append(_latency(model, samples[name], threads, batch_size, _tokens(inputs[name])))
    return {name: tuple(latencies) for name, latencies in found.items()}


def count_macs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int | None:
    """Multiply-accumulate operations of one forward pass; None for kernels of another library, which can't be counted.

    For a matrix product of (m, k) and (k, n) these are m · k · n.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and str(getattr(quantizer.quantization_config, "quant_method", "")) != "hfshrink":
        return None
    counter = FlopCounterMode(display=False)
    # the fused attention kernel of the CPU has no formula there; the plain one is two matrix products
    with eval_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops() // 2


def weight_bytes(folder: str | Path) -> int | None:
    """Bytes of the weight files in a folder: those of an export, else the safetensors; None without any."""
    folder = Path(folder)
    suffixes = EXPORT_SUFFIXES if (folder / EXPORT_MANIFEST).is_file() else (".safetensors",)
    files = [file for file in folder.iterdir() if file.is_file() and file.name.endswith(suffixes)]
    return sum(file.stat().st_size for file in files) if files else None


def _check_settings(batch_sizes: Sequence[int], threads: int, repeats: int) -> None:
    for name, value in (("threads", threads), ("repeats", repeats), *(("batch_sizes", size) for size in batch_sizes)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingError(f"{name} must be at least 1 and whole, got {value!r}.")


def _folder_of(model: Any, loaded: Any, temporary: Path) -> Path | None:
    if isinstance(model, str | Path) and Path(model).is_dir():
        return Path(model)
    try:
        loaded.save_pretrained(temporary)
    except (OSError, ValueError, RuntimeError, NotImplementedError, CheckpointError) as error:
        logger.warning("The model can't be saved, so its size is not measured: %s", error)
        return None
    return temporary


def _footprint(folder: Path, sequence_length: int) -> tuple[int | None, int | None]:
    """(loaded_bytes, peak_memory_bytes) of a fresh process; (None, None) where it fails."""
    root = str(Path(hfshrink.__file__).parents[1])
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
    command = [sys.executable, "-m", "hfshrink.evaluation.footprint", str(folder), str(sequence_length)]
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FOOTPRINT_SECONDS, env=environment, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return found["loaded_bytes"], found["peak_memory_bytes"]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning("Memory is not measured, as the model does not load in a process of its own: %s", reason[-300:])
        return None, None


def _pinned(model: Any, threads: int) -> Callable[..., Any]:
    """Something to call: the model itself, or an export on a fresh runner with fixed threads."""
    if isinstance(model, nn.Module):
        return model
    fresh = type(model)(model.components, model.export_format, config=model.config)
    if str(model.export_format) == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return fresh.to(session_options=options)
    if str(model.export_format) == "openvino":
        return fresh.to("cpu", config={"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"})
    return fresh.to()


@contextmanager
def _quiet(models: Sequence[Any], threads: int) -> Iterator[None]:
    """Eval mode, no gradients and a fixed number of torch threads; all put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with eval_mode(nn.ModuleList([m for m in models if isinstance(m, nn.Module)])), torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _time(call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> tuple[float, float]:
    """(wall clock, CPU) milliseconds of one call."""
    is_cuda = next(iter(inputs.values())).is_cuda
    wall, processor = time.perf_counter(), time.process_time()
    call(**inputs)
    if is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)


def _latency(
    model: Any, samples: list[tuple[float, float]], threads: int, batch_size: int, tokens: int | None
) -> Latency:
    walls = sorted(wall for wall, _ in samples)
    return Latency(
        latency_ms_p50=statistics.median(walls),
        latency_ms_p95=float(np.quantile(walls, 0.95)),
        cpu_ms=statistics.median(cpu for _, cpu in samples),
        runtime="torch"
        if isinstance(model, nn.Module)
        else {"onnx": "onnxruntime"}.get(str(model.export_format), str(model.export_format)),
        device=_device_name(model),
        threads=threads,
        batch_size=batch_size,
        sequence_length=tokens,
        repeats=len(samples),
    )


def _tokens(inputs: dict[str, torch.Tensor]) -> int | None:
    return inputs["input_ids"].shape[1] if "input_ids" in inputs else None


def _device_name(model: Any) -> str:
    device = torch.device(model.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def _energy(model: Any, inputs: dict[str, torch.Tensor], threads: int, repeats: int) -> float | None:
    """Joules of one forward pass: the growth of the processor packages' counters over `repeats` calls."""
    before = read_energy()
    if before is None:
        return None
    call = _pinned(model, threads)
    with _quiet([model], threads):
        call(**inputs)
        before = read_energy()
        for _ in range(repeats):
            call(**inputs)
        after = read_energy()
    if before is None or after is None:
        return None
    # a counter that ran over starts again at 0
    joules = [
        (after[z][0] - before[z][0] + (before[z][1] if after[z][0] < before[z][0] else 0)) / 1e6
        for z in before
        if z in after
    ]
    return sum(joules) / repeats
