"""`QAT`: which weights and activations a training run quantizes, from when on, and who sets their ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hfshrink.errors import SettingError

ACTIVATION_RANGES = ("ema", "lsq")
WEIGHT_RANGES = ("max", "lsq")
LOWEST_BITS, HIGHEST_BITS = 2, 8


@dataclass(frozen=True)
class QAT:
    """Settings of quantization-aware training, for `QATTrainer` and `CompressionTrainer`.

    Attributes:
        weight_bits: 2 to 8, symmetric per output channel: codes from −127 to 127, or from −2^(bits−1) to
            2^(bits−1) − 1 with fewer bits.
        activation_bits: 8 quantizes the input of every module to unsigned 8 bits with one range per module; None
            leaves activations in float (weight-only formats).
        group_size: Neighbouring inputs that share a scale; it must divide the inputs of each module. None: one scale
            per output channel.
        activation_ranges: "ema", a moving average of each optimizer step's smallest and largest input; "lsq", a scale
            that is trained (arXiv:1902.08153), from that range on, with its zero point.
        weight_ranges: "max", the largest weight of the channel at each step; "lsq", a scale that is trained.
        start: Share of all steps after which fake quantization begins; ranges are watched from the first step on.
        freeze: Share of all steps at the end in which ranges and learned scales stand still; a learned weight scale
            may still shrink with the largest weight.
        decay: Of the moving average, per optimizer step.
        scale_learning_rate: Of learned scales; it follows the Trainer's schedule. None takes the Trainer's rate.
        embeddings: Whether embedding tables are quantized as well: one scale per column, as ONNX exports have
            it, or per group of a row with `group_size`.
        include: Wildcards of the modules to quantize (Linear, Conv2d, Conv1D and, if asked for, Embedding).
        exclude: Wildcards of names to leave in float; None means the task head and a transformer's patch convolution,
            `()` nothing.

    Raises:
        SettingError: A value out of range, or settings that do not go together.

    Example:
        >>> QAT(weight_bits=4).method
        'qat-w4a8'
        >>> QAT(weight_bits=4, activation_bits=None).method
        'qat-w4'
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    group_size: int | None = None
    activation_ranges: str = "ema"
    weight_ranges: str = "max"
    start: float = 0.0
    freeze: float = 0.2
    decay: float = 0.9
    scale_learning_rate: float | None = None
    embeddings: bool = False
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._check_bits()
        _check_known("activation_ranges", self.activation_ranges, ACTIVATION_RANGES)
        _check_known("weight_ranges", self.weight_ranges, WEIGHT_RANGES)
        for name in ("start", "freeze", "decay"):
            _check_share(name, getattr(self, name))
        if self.start + self.freeze >= 1:
            raise SettingError(
                f"start and freeze are shares of all steps: {self.start} + {self.freeze} leaves no step in between."
            )
        rate = self.scale_learning_rate
        if rate is not None and (not _is_number(rate) or not 0 <= rate < float("inf")):
            raise SettingError(f"scale_learning_rate must be a number of at least 0 or None, got {rate!r}.")
        if not isinstance(self.embeddings, bool):
            raise SettingError(f"embeddings must be True or False, got {self.embeddings!r}.")

    def _check_bits(self) -> None:
        bits = self.weight_bits
        if not _is_whole(bits) or not LOWEST_BITS <= bits <= HIGHEST_BITS:
            raise SettingError(
                f"weight_bits must be a whole number in {LOWEST_BITS}..{HIGHEST_BITS}, got {bits!r}. "
                "For 16 bits there is nothing to train: quantize(model, 'bf16')."
            )
        if self.activation_bits is not None and (not _is_whole(self.activation_bits) or self.activation_bits != 8):
            raise SettingError(
                f"activation_bits must be 8, or None for activations in float, got {self.activation_bits!r}."
            )
        if self.group_size is not None and (not _is_whole(self.group_size) or self.group_size < 2):
            raise SettingError(f"group_size must be a whole number of at least 2, or None, got {self.group_size!r}.")
        if self.activation_bits is None and self.activation_ranges == "lsq":
            raise SettingError("activation_ranges='lsq' learns ranges of activations; activation_bits=None has none.")

    @property
    def method(self) -> str:
        """What the record calls it."""
        return f"qat-w{self.weight_bits}" + ("" if self.activation_bits is None else f"a{self.activation_bits}")

    @property
    def is_learned(self) -> bool:
        """Whether there are scales to train."""
        return "lsq" in (self.activation_ranges, self.weight_ranges)

    def given(self) -> dict[str, Any]:
        """For the record: what differs from the defaults, and what names the run."""
        defaults = asdict(QAT())
        always = ("weight_bits", "activation_bits", "group_size")
        return {name: value for name, value in asdict(self).items() if name in always or value != defaults[name]}


def _check_known(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise SettingError(f"{name} must be one of {', '.join(known)}, got {value!r}.")


def _check_share(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        meaning = "" if name == "decay" else "the share of all steps, "
        hint = f" For {value:g} percent give {value / 100:g}." if _is_number(value) and 1 < value < 100 else ""
        raise SettingError(f"{name} must be {meaning}a number in [0, 1), got {value!r}.{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
