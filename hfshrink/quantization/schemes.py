"""The schemes that `quantize` knows, as data: what each makes, where it runs, and which function makes it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hfshrink.errors import SettingError, require

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
    """

    about: str
    maker: str
    runtime: str = "onnx"
    needs: tuple[tuple[str, str], ...] = ONNX
    source: str = "ONNX Runtime"

    def load_maker(self) -> Callable[..., Any]:
        """The function that makes it.

        Raises:
            MissingDependencyError: An extra is not installed.
        """
        for module, extra in self.needs:
            require(module, extra=extra)
        module, _, name = self.maker.partition(":")
        return getattr(import_module(f"hfshrink.quantization.{module}"), name)


SCHEMES: dict[str, Scheme] = {
    "onnx-fp32": Scheme(
        "a float ONNX graph: the baseline for every other scheme in the same runtime", "graphs.exporting:make_float"
    ),
    "onnx-int8": Scheme(
        "8-bit weights and embeddings, activations quantized as they come (dynamic); no data needed",
        "graphs.dynamic:make_dynamic",
        source="ONNX Runtime, dynamic quantization",
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


def check_options(scheme: str, maker: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse keywords that the scheme does not have.

    Raises:
        SettingError: An unknown option; the message names those that there are.
    """
    parameters = inspect.signature(maker).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "calibration"]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise SettingError(f"{scheme} has no option {name!r}; it has {', '.join(known) or 'none'}.{hint}")


def _nearest(scheme: Any) -> str:
    close = difflib.get_close_matches(str(scheme), ["auto", *SCHEMES], 1)
    return f" Did you mean {close[0]}?" if close else ""
