"""What the processor can do, and which scheme suits a model on it: the scheme `auto`."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

LARGEST_READ = 65536  # bytes of /proc/cpuinfo: one processor's block takes 2 to 4 KB
SYSCTL_SECONDS = 2

FLAGS = {
    "avx2": ("avx2", "avx2_0"),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx512vnni", "avx_vnni"),
    "amx": ("amx_int8", "amx_bf16"),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "feat_bf16"),
    "neon": ("asimd", "neon", "advsimd"),
    "dotprod": ("asimddp", "feat_dotprod"),
    "i8mm": ("i8mm", "feat_i8mm"),
}
"""Feature -> the flags that stand for it in /proc/cpuinfo and in sysctl."""

EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf"), "bnb": ("bitsandbytes",)}
"""Extra of hfshrink -> the modules that it needs."""


@dataclass(frozen=True)
class Rule:
    """One line of the table: where its conditions hold, `auto` takes its scheme. The first that fits wins.

    Attributes:
        kind: "encoder", "conv", "causal" or "seq2seq"; see `model_kind`.
        scheme: The scheme to take.
        reason: Why, in a plain sentence.
        features: What the processor must have.
        installed: The extra that must be installed, if any.
        calibrated: Whether it needs calibration data.
        parameters: Fewest parameters of the model.
    """

    kind: str
    scheme: str
    reason: str
    features: tuple[str, ...] = ()
    installed: str | None = None
    calibrated: bool = False
    parameters: int = 0


RULES = (
    Rule("causal", "nf4", "on a GPU 4-bit weights with double quantization leave the most memory", ("cuda",), "bnb"),
    Rule("causal", "bf16", "on a GPU bfloat16 halves the memory at full speed", ("cuda",)),
    Rule(
        "causal",
        "onnx-int4",
        "generation on a CPU waits for the weights to be read, and a model of this size bears 4 bits",
        installed="onnx",
        parameters=1_000_000_000,
    ),
    Rule(
        "causal",
        "onnx-int8",
        "generation on a CPU waits for the weights to be read, and a model this small loses too much at 4 bits",
        installed="onnx",
    ),
    Rule("encoder", "bf16", "on a GPU bfloat16 is the fastest and loses next to nothing", ("cuda",)),
    Rule(
        "encoder",
        "onnx-int8",
        "ONNX Runtime's dynamic int8 uses VNNI, needs no data, and is about as fast as OpenVINO's calibrated int8",
        ("vnni",),
        "onnx",
    ),
    Rule(
        "encoder",
        "onnx-int8",
        "dynamic int8 needs no data and makes a quarter of the file; without VNNI it is a little faster than float32",
        installed="onnx",
    ),
    Rule(
        "encoder",
        "openvino-int8",
        "OpenVINO's 8-bit weights need no data and make a quarter of the file",
        (),
        "openvino",
    ),
    Rule("conv", "bf16", "on a GPU bfloat16 is the fastest and loses next to nothing", ("cuda",)),
    Rule(
        "conv",
        "onnx-int8-static",
        "calibrated int8 convolutions are the fastest; ONNX Runtime's are about as fast as OpenVINO's",
        installed="onnx",
        calibrated=True,
    ),
    Rule(
        "conv",
        "openvino-int8",
        "OpenVINO's calibrated int8 convolutions are faster than float32",
        installed="openvino",
        calibrated=True,
    ),
    Rule(
        "conv", "bf16", "without calibration data int8 convolutions are slow; this processor has bfloat16", ("bf16",)
    ),
    Rule(
        "conv",
        "onnx-fp16",
        "without calibration data int8 convolutions are slow; float16 halves the file and gains no speed",
        installed="onnx",
    ),
    Rule("seq2seq", "int8", "on a GPU 8-bit weights halve the memory of bfloat16", ("cuda",), "bnb"),
)
"""What `auto` goes by: the table of docs/quantization.md, measured by benchmarks/quantization.py, one thread of an
AMD EPYC with AVX512-VNNI and BF16. The rows of GPUs, language models and sequence to sequence are judgement.
"""

LAST = "bfloat16 needs no extra package and halves the memory"
HINTS = (("conv", (), "onnx", "With calibration=, onnx-int8-static is smaller and faster."),)
"""(kind, features, extra, what to say) where calibration data is missing and would change the choice."""

SLOWER_THAN_BF16 = ("int8", "nf4", "fp4")
"""bitsandbytes' schemes, which on a CPU with bfloat16 take longer than plain bf16; the same table shows it."""


def processor_features() -> frozenset[str]:
    """What this machine's processor, and its GPU, can do for quantized models; empty where that can't be found out.

    Returns:
        Any of "avx2", "avx512", "vnni" (8-bit products summed in 32 bits), "amx", "bf16", "neon", "dotprod", "i8mm"
        and "cuda".

    Example:
        >>> processor_features() <= {*FLAGS, "cuda"}
        True
    """
    found = features_in(_flags_text()) or _features_of_torch()
    with contextlib.suppress(RuntimeError, AssertionError, OSError):
        if torch.cuda.is_available():
            found |= {"cuda"}
    return found


def features_in(text: str) -> frozenset[str]:
    """The features that the text of /proc/cpuinfo or of sysctl names.

    Example:
        >>> sorted(features_in("flags : fpu avx2 avx512f avx512_vnni"))
        ['avx2', 'avx512', 'vnni']
    """
    flags: set[str] = set()
    for line in text.splitlines():
        name, _, values = line.partition(":")
        name = name.strip().lower()
        if name.startswith("hw.optional."):
            flags |= {name.rpartition(".")[2]} if values.strip() == "1" else set()
        elif name in ("flags", "features"):
            flags |= set(values.lower().split())
    return frozenset(feature for feature, names in FLAGS.items() if flags.intersection(names))


def choose_scheme(
    model: Any,
    has_calibration: bool = False,
    features: Collection[str] | None = None,
    installed: Collection[str] | None = None,
) -> tuple[str, str]:
    """The scheme that `auto` takes for a model on this machine, and why, in a plain sentence.

    Args:
        model: The PyTorch model.
        has_calibration: Whether there are rows to calibrate on.
        features: What the processor has; None asks `processor_features`.
        installed: Extras that are there, of `EXTRAS`; None looks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        >>> choose_scheme(model, features={"vnni"}, installed={"onnx"})[0]
        'onnx-int8'
    """
    features = processor_features() if features is None else features
    installed = installed_extras() if installed is None else installed
    kind, parameters = model_kind(model), sum(p.numel() for p in model.parameters())
    for rule in RULES:
        fits = rule.kind == kind and set(rule.features) <= set(features) and parameters >= rule.parameters
        if fits and (rule.installed is None or rule.installed in installed) and has_calibration >= rule.calibrated:
            return rule.scheme, f"{rule.reason}.{_hint(kind, rule.scheme, has_calibration, features, installed)}"
    return "bf16", f"{LAST}.{_hint(kind, 'bf16', has_calibration, features, installed)}"


def model_kind(model: Any) -> str:
    """What `auto` tells apart: "causal" and "seq2seq" generate text, "conv" is mostly convolutions, else "encoder".

    Example:
        >>> model_kind(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2)))
        'conv'
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is not None and can_generate():
        return "seq2seq" if model.config.is_encoder_decoder else "causal"
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    return "conv" if convolutions > linears else "encoder"


def installed_extras() -> frozenset[str]:
    """Extras of hfshrink, of those that `auto` knows, whose packages are installed; nothing is imported."""
    return frozenset(
        extra for extra, modules in EXTRAS.items() if all(importlib.util.find_spec(name) for name in modules)
    )


def warn_if_slower(scheme: str, features: Collection[str] | None = None) -> str | None:
    """What to warn of where a scheme saves memory but not time on this processor; None where it does not.

    Args:
        scheme: One of `hfshrink.quantization.SCHEMES`.
        features: What the processor has; None asks `processor_features`.

    Example:
        >>> warn_if_slower("nf4", {"bf16"})
        'nf4 saves memory, not time: on a CPU with bfloat16 the scheme "bf16" is faster.'
    """
    features = processor_features() if features is None else features
    if "cuda" in features:
        return None
    if scheme in SLOWER_THAN_BF16 and "bf16" in features:
        return f'{scheme} saves memory, not time: on a CPU with bfloat16 the scheme "bf16" is faster.'
    if scheme == "bf16" and "bf16" not in features:
        return (
            "bf16 saves memory, not time: this processor has no bfloat16 instructions and runs it slower than float32."
        )
    if scheme in ("fp16", "onnx-fp16"):
        return f"{scheme} halves the file, not the time: CPUs compute float16 no faster than float32."
    return None


def _hint(kind: str, scheme: str, has_calibration: bool, features: Collection[str], installed: Collection[str]) -> str:
    """What more calibration data would bring."""
    if has_calibration or "cuda" in features:
        return ""
    fits = (
        text for k, needed, extra, text in HINTS if k == kind and set(needed) <= set(features) and extra in installed
    )
    return "".join(f" {text}" for text in fits)


def _flags_text() -> str:
    """What the system says about its processor; "" where it does not."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
        return file.read(LARGEST_READ)
    if platform.system() == "Darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["/usr/sbin/sysctl", "hw.optional"]
            found = subprocess.run(command, capture_output=True, text=True, timeout=SYSCTL_SECONDS, check=False)
            return found.stdout
    return ""


def _features_of_torch() -> frozenset[str]:
    """What PyTorch found out about the processor, where the system tells nothing."""
    capability = torch.backends.cpu.get_cpu_capability().upper()
    if "AVX512" in capability:
        return frozenset({"avx2", "avx512"})
    return frozenset({"avx2"}) if "AVX2" in capability else frozenset()
