"""The schemes that `quantize` knows, as data: what each makes, where it runs, and which function makes it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hfshrink.errors import SettingError, require
from hfshrink.quantization.graphs.exporting import quiet

ONNX = (("onnx", "onnx"), ("onnxscript", "onnx"), ("onnxruntime", "onnx"))
BITSANDBYTES = (("bitsandbytes", "bnb"),)
OPENVINO = (("openvino", "openvino"), ("nncf", "openvino"))
EXECUTORCH = (("executorch", "executorch"), ("torchao", "executorch"))


@dataclass(frozen=True)
class Scheme:
    """One way to store numbers in fewer bits.

    Attributes:
        about: What comes out, in one line.
        maker: "room.module:function" below `hfshrink.quantization`. Its keyword-only arguments are the scheme's
            options.
        runtime: "torch" changes the model itself; the others export it.
        needs: (module, extra) pairs that must be installed.
        source: The paper or document that it comes from.
        keeps: Whether modules can stay float, as the task head does by default.
        keeps_vocabulary: Whether the output matrix of a causal language model stays float by default too; in small
            models that is a fifth of all weights.
        reads_calibration: Whether the maker takes `calibration`.
        bits: Of most of its weights.
    """

    about: str
    maker: str
    runtime: str = "onnx"
    needs: tuple[tuple[str, str], ...] = ONNX
    source: str = "ONNX Runtime"
    keeps: bool = True
    keeps_vocabulary: bool = True
    reads_calibration: bool = True
    bits: int = 8

    @property
    def ranked_at(self) -> int | None:
        """Bits at which `max_drop` ranks the modules; None where none can stay float."""
        return self.bits if self.keeps else None

    def load_maker(self) -> Callable[..., Any]:
        """The function that makes it.

        Raises:
            MissingDependencyError: An extra is not installed.
        """
        for module, extra in self.needs:
            with quiet():  # torchao prints what it can't load
                require(module, extra=extra)
        module, _, name = self.maker.partition(":")
        return getattr(import_module(f"hfshrink.quantization.{module}"), name)


TORCH: dict[str, Any] = {
    "runtime": "torch",
    "needs": (),
    "source": "PyTorch",
    "keeps": False,
    "reads_calibration": False,
}
BITS: dict[str, Any] = {"runtime": "torch", "needs": BITSANDBYTES, "reads_calibration": False}

SCHEMES: dict[str, Scheme] = {
    "bf16": Scheme("bfloat16: half the bytes, the range of float32", "weights.casting:cast_bf16", **TORCH),
    "fp16": Scheme("float16: half the bytes, values up to 65504", "weights.casting:cast_fp16", **TORCH),
    "int8": Scheme("8-bit weights of bitsandbytes", "weights.bits:quantize_int8", **BITS, source="arXiv:2208.07339"),
    "nf4": Scheme(
        "4-bit NormalFloat weights of bitsandbytes",
        "weights.bits:quantize_nf4",
        **BITS,
        source="arXiv:2305.14314",
        bits=4,
    ),
    "fp4": Scheme(
        "4-bit floating-point weights of bitsandbytes",
        "weights.bits:quantize_fp4",
        **BITS,
        source="arXiv:2305.14314",
        bits=4,
    ),
    "mixed": Scheme(
        "nf4, int8 or bf16 per module, by measured loss under a budget of bytes; loads with hfshrink",
        "search.mixed:make_mixed_weights",
        bits=4,
        runtime="torch",
        needs=(),
        source="hfshrink",
    ),
    "onnx-fp32": Scheme(
        "a float ONNX graph: the baseline for every other scheme in the same runtime",
        "graphs.floating:make_float",
        keeps=False,
    ),
    "onnx-int8": Scheme(
        "8-bit weights and embeddings, activations quantized as they come (dynamic); no data needed",
        "graphs.dynamic:make_dynamic",
        keeps_vocabulary=False,
        source="ONNX Runtime, dynamic quantization",
    ),
    "onnx-int8-static": Scheme(
        "8-bit weights and embeddings, activations in ranges from calibration data: for convolutional networks",
        "graphs.static:make_static",
        source="ONNX Runtime, static quantization",
    ),
    "onnx-int4": Scheme(
        "4-bit weights in groups, error-aware with calibration data (GPTQ), without it clipped",
        "graphs.four_bit:make_four_bit",
        bits=4,
        keeps_vocabulary=False,
        source="arXiv:2210.17323",
    ),
    "onnx-fp16": Scheme("16-bit weights and arithmetic: half the file", "graphs.half:make_half", keeps=False),
    "onnx-mixed": Scheme(
        "int8, int4 or float per module, by measured loss under a budget of bytes",
        "search.mixed_graphs:make_onnx_mixed",
        bits=4,
    ),
    "openvino-fp32": Scheme(
        "a float OpenVINO model: the baseline of its runtime",
        "runtimes.openvino:make_openvino_fp32",
        runtime="openvino",
        needs=OPENVINO,
        source="OpenVINO",
        keeps=False,
    ),
    "openvino-int8": Scheme(
        "8-bit weights, embeddings and activations, ranges from calibration data",
        "runtimes.openvino:make_openvino_int8",
        runtime="openvino",
        needs=OPENVINO,
        source="OpenVINO, NNCF",
    ),
    "openvino-int4": Scheme(
        "4-bit weights in groups",
        "runtimes.openvino:make_openvino_int4",
        bits=4,
        runtime="openvino",
        needs=OPENVINO,
        source="OpenVINO, NNCF",
    ),
    "executorch-int8": Scheme(
        "8-bit weights and activations for phones and boards (XNNPACK)",
        "runtimes.executorch:make_executorch_int8",
        runtime="executorch",
        needs=EXECUTORCH,
        source="ExecuTorch, XNNPACK",
    ),
}
"""scheme -> what it makes, and how."""


def check_scheme(scheme: Any) -> Scheme:
    """The row of a scheme.

    Raises:
        SettingError: There is no such scheme.

    Example:
        >>> check_scheme("onnx-int8").runtime
        'onnx'
    """
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise SettingError(f"scheme must be one of auto, {', '.join(SCHEMES)}, got {scheme!r}.{_nearest(scheme)}")
    return SCHEMES[scheme]


def options_of(maker: Callable[..., Any]) -> list[str]:
    """The options of a scheme: its maker's keyword-only arguments, save for what `quantize` itself hands it.

    Example:
        >>> options_of(SCHEMES["nf4"].load_maker())
        ['double_quantization']
    """
    parameters = inspect.signature(maker).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("calibration", "processor")]


def check_options(scheme: str, known: Sequence[str], options: Mapping[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Refuse keywords that a call does not have.

    Args:
        scheme: For the message.
        known: The options of this call.
        options: What was given.
        elsewhere: Options of other calls -> what they belong to.

    Raises:
        SettingError: An unknown option; the message names those that there are.
    """
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            hint = f" {name} belongs to {elsewhere[name]}." if name in elsewhere else hint
            raise SettingError(f"{scheme} has no option {name!r} here; it has {', '.join(known) or 'none'}.{hint}")


def _nearest(scheme: Any) -> str:
    close = difflib.get_close_matches(str(scheme), ["auto", *SCHEMES], 1)
    return f" Did you mean {close[0]}?" if close else ""
