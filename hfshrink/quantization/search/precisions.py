"""The precisions that a weight can have, as data: bits, codes, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.layers import QuantizedLinear
from hfshrink.layers.quantized import NORMAL_FLOAT, packed_bytes
from hfshrink.quantization.graphs.rounding import Rounded, round_clipped, round_to_nearest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the precisions in which numbers stay floats."""

GROUP_SIZE = 64
"""Neighbours that share a scale below 8 bits; 8-bit weights have one scale per row."""


@dataclass(frozen=True)
class Precision:
    """How the numbers of a weight are stored.

    Attributes:
        name: "int8", "int4", "int3", "int2", "nf4", "bf16", "fp16" or "fp32".
        bits: Per number, scales apart.
        scheme: "int" and "nf4" store codes; "float" casts.
    """

    name: str
    bits: int
    scheme: str

    @property
    def is_float(self) -> bool:
        """Whether numbers stay floats."""
        return self.scheme == "float"

    def group_size(self, given: int | None, width: int) -> int:
        """Neighbours in a row of `width` numbers that share a scale; None takes the whole row at 8 bits, else 64."""
        size = (width if self.bits == 8 else GROUP_SIZE) if given is None else given
        return min(size, width)


PRECISIONS = {
    "fp32": Precision("fp32", 32, "float"),
    "bf16": Precision("bf16", 16, "float"),
    "fp16": Precision("fp16", 16, "float"),
    "int8": Precision("int8", 8, "int"),
    "int4": Precision("int4", 4, "int"),
    "nf4": Precision("nf4", 4, "nf4"),
    "int3": Precision("int3", 3, "int"),
    "int2": Precision("int2", 2, "int"),
}


def check_precision(name: Any) -> Precision:
    """The precision of a name.

    Raises:
        SettingError: There is none of that name.

    Example:
        >>> check_precision("int3").bits
        3
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        raise SettingError(f"A precision must be one of {', '.join(PRECISIONS)}, got {name!r}.")
    return PRECISIONS[name]


def encode(weight: Tensor, precision: Precision, group_size: int | None = None) -> Rounded:
    """Codes and scales of a weight (out, in).

    Integers are rounded to the nearest code of their group, 0 in the middle; below 8 bits the group's range is clipped
    where that lowers the squared error (`round_clipped`). NF4: s = max |w| of the group, and the code is that of the
    nearest of the 16 values to w / s (Dettmers et al., arXiv:2305.14314).

    Args:
        weight: Shape (out, in), finite.
        precision: One that stores codes.
        group_size: Neighbours in a row that share a scale; None as in `Precision.group_size`.

    Raises:
        SettingError: NaN or infinite weights, or a group size below 1.

    Example:
        >>> codes, scale, _ = encode(torch.tensor([[2.0, -2.0, 0.9, 0.0]]), PRECISIONS["nf4"])
        >>> codes.tolist(), scale.tolist()
        ([[15, 0, 12, 7]], [[2.0]])
    """
    size = precision.group_size(group_size, weight.shape[-1])
    if precision.scheme == "nf4":
        return _encode_nf4(weight, size)
    rounding = round_to_nearest if precision.bits == 8 else round_clipped
    return rounding(weight, precision.bits, size)


def quantized_layer(linear: nn.Linear, precision: Precision, group_size: int | None = None) -> QuantizedLinear:
    """The compressed layer of a Linear at a precision that stores codes.

    Raises:
        SettingError: NaN or infinite weights, or a group size below 1.
    """
    codes, scale, _ = encode(linear.weight.detach(), precision, group_size)
    size = precision.group_size(group_size, linear.in_features)
    codebook = "nf4" if precision.scheme == "nf4" else "int"
    return QuantizedLinear.from_dense(linear, codes, scale, bits=precision.bits, group_size=size, codebook=codebook)


def rounded_weight(weight: Tensor, precision: Precision, group_size: int | None = None) -> Tensor:
    """A weight (out, in) as it is at a precision, in its own dtype.

    Raises:
        SettingError: NaN or infinite weights, or a group size below 1.

    Example:
        >>> rounded_weight(torch.tensor([[1.0, -8.0, 3.2]]), PRECISIONS["int8"]).tolist()
        [[1.0, -8.0, 3.1875]]
    """
    if precision.is_float:
        return weight.to(DTYPES[precision.name]).to(weight.dtype)
    out_features, width = weight.shape
    shell = nn.Linear(width, out_features, bias=False, device="meta")
    shell.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return quantized_layer(shell, precision, group_size).dequantized()


def weight_bytes(
    shape: tuple[int, int], precision: Precision, group_size: int | None = None, scale_bytes: int = 4
) -> int:
    """Bytes of a weight of shape (out, in): its numbers or codes, and scales of `scale_bytes` each.

    Example:
        >>> weight_bytes((8, 128), PRECISIONS["nf4"]), weight_bytes((8, 128), PRECISIONS["bf16"])
        (576, 2048)
    """
    rows, width = shape
    if precision.is_float:
        return rows * width * precision.bits // 8
    groups = rows * math.ceil(width / precision.group_size(group_size, width))
    return packed_bytes(rows * width, precision.bits) + groups * scale_bytes


def _encode_nf4(weight: Tensor, size: int) -> Rounded:
    weight = weight.detach()
    if size < 1:
        raise SettingError(f"group_size must be at least 1, or None for the usual one, got {size}.")
    if not bool(torch.isfinite(weight).all()):
        raise SettingError("The weight holds NaN or infinite values.")
    values = torch.tensor(NORMAL_FLOAT, device=weight.device)
    groups = nn.functional.pad(weight.float(), (0, -weight.shape[1] % size)).unflatten(1, (-1, size))
    scale = groups.abs().amax(-1).to(weight.dtype)
    share = groups / scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    limits = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(share.contiguous(), limits).flatten(1)[:, : weight.shape[1]]
    return Rounded(codes.to(torch.uint8), scale, None)
