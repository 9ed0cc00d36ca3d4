"""The errors that hfshrink raises itself.

```
HfshrinkError
├── SettingError (ValueError)             a keyword, a value or a data set does not fit; raised before work starts
├── UnsupportedModelError (TypeError)     the model is of a family or has a head that the call does not know
├── MissingDependencyError (ImportError)  an optional package is not installed
├── CheckpointError (RuntimeError)        a folder or file is missing, half-written, foreign, corrupt or unwritable
└── BudgetError (RuntimeError)            a size, a drop or a time was asked for that can't be reached
```

Every message says what was expected, what came, where, and what to do.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class HfshrinkError(Exception):
    """Base class of every error that hfshrink raises on purpose."""


class SettingError(HfshrinkError, ValueError):
    """A keyword, a value or a data set does not fit. Raised before work starts where it can be known."""


class UnsupportedModelError(HfshrinkError, TypeError):
    """The model is of a family, or has a head, that the call does not know."""


class MissingDependencyError(HfshrinkError, ImportError):
    """An optional package is not installed; the message holds the `pip install` line."""


class CheckpointError(HfshrinkError, RuntimeError):
    """A folder or file is missing, half-written, foreign, corrupt or can't be written."""


class BudgetError(HfshrinkError, RuntimeError):
    """A size, a drop or a time that can't be reached; the message tells the nearest that can."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    OpenVINO and NNCF report their use over the network from their import on; here they are imported without.

    Args:
        module: Dotted module name, such as `"onnxruntime"`.
        extra: The extra of hfshrink that installs it, such as `"onnx"`.

    Raises:
        MissingDependencyError: The module, or something that it needs, is not installed.

    Example:
        >>> require("json", extra="onnx").dumps([1])
        '[1]'
    """
    package = module.partition(".")[0]
    if package in ("openvino", "nncf"):
        _stop_telemetry()
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"This call needs the package {package!r}, which can't be imported ({error}). "
            f"Install it with: pip install 'hfshrink[{extra}]'"
        ) from error


def _stop_telemetry() -> None:
    """Hide OpenVINO's telemetry package, as if it were not installed; where it runs already, it sends nothing more.

    There is no variable that turns it off, and the file that does lies in the user's home.
    """
    if sys.modules.setdefault("openvino_telemetry", None) is not None:  # type: ignore[arg-type] # None: no such module
        from openvino_telemetry.utils.sender import TelemetrySender

        TelemetrySender.send = lambda *_, **__: None
