"""A Linear whose weight is stored in codes of 8, 4, 3 or 2 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import copied, dense_linear, empty_parameter, read_spec

PLANES = {8: (8,), 4: (4,), 3: (2, 1), 2: (2,)}
"""bits of a code -> the widths in which it is packed, the low bits first; each divides a byte."""

NORMAL_FLOAT = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NF4: quantiles of the normal distribution, scaled to -1..1 (Dettmers et al., arXiv:2305.14314)."""

CODEBOOKS = ("int", "nf4")


class QuantizedLinear(nn.Module):
    """y = W · x + bias with w = s · (code − z), or w = s · NF4[code]; s and z are shared by neighbours in a row.

    Codes lie packed and 1-D under the dense layer's name `weight`: they can't fit there, so a load without hfshrink
    fails instead of filling the layer at random. They are unpacked in each call: this saves memory, not time. Codes,
    scales and zero points don't train, the bias does.

    Attributes:
        weight: Packed codes, shape (bytes,), uint8.
        scale: s, shape (out, groups).
        zero_point: z, shape (out, groups), uint8; None where it is 2^(bits − 1) everywhere, and with NF4.
        bias: Shape (out,), or None.

    Example:
        >>> codes, scale = torch.tensor([[0, 9, 8, 7]]), torch.tensor([[1.0, 0.5]])
        >>> layer = QuantizedLinear.from_dense(nn.Linear(4, 1), codes, scale, bits=4, group_size=2)
        >>> layer
        QuantizedLinear(in_features=4, out_features=1, bits=4, group_size=2, codebook=int, bias=True)
        >>> layer.to_dense().weight.tolist(), layer.weight.numel()
        ([[-8.0, 1.0, 0.0, -0.5]], 2)
    """

    kind = "quantized"
    replaces: type[nn.Module] = nn.Linear
    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        codebook: str = "int",
        has_zero_points: bool = False,
        bias: bool = True,
    ) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        super().__init__()
        if codebook not in CODEBOOKS or bits not in PLANES or (codebook == "nf4" and (bits != 4 or has_zero_points)):
            raise SettingError(
                f"Expected the codebook int with {', '.join(map(str, PLANES))} bits, or nf4 with 4 bits and no zero "
                f"points, got {codebook!r} with {bits} bits, zero points {has_zero_points}."
            )
        if not 1 <= group_size <= in_features:
            raise SettingError(
                f"group_size must be in 1..{in_features} for a weight of shape ({out_features}, {in_features}), "
                f"got {group_size}."
            )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.codebook = bits, group_size, codebook
        groups = -(-in_features // group_size)
        size = packed_bytes(in_features * out_features, bits)
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device="meta"))
        self.register_buffer("scale", torch.empty(out_features, groups, device="meta"))
        zeros = torch.empty(out_features, groups, dtype=torch.uint8, device="meta") if has_zero_points else None
        self.register_buffer("zero_point", zeros)
        self.register_parameter("bias", empty_parameter(out_features) if bias else None)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        *,
        bits: int,
        group_size: int | None = None,
        codebook: str = "int",
    ) -> QuantizedLinear:
        """Put codes in the place of a Linear's weight, scales in its dtype and on its device; the bias is copied.

        Args:
            linear: The dense layer, weight of shape (out, in).
            codes: Shape (out, in), integers in 0..2^bits − 1.
            scale: Shape (out, groups).
            zero_point: Shape (out, groups), integers in 0..2^bits − 1; None means 2^(bits − 1).
            bits: 8, 4, 3 or 2.
            group_size: Neighbours in a row that share a scale, the last ones fewer; None takes the whole row.
            codebook: "int", or "nf4" for codes of `NORMAL_FLOAT`.

        Raises:
            SettingError: Shapes that don't fit, codes out of range, scales that are no numbers.
        """
        out_features, in_features = linear.weight.shape
        size = in_features if group_size is None else group_size
        has_zeros, has_bias = zero_point is not None, linear.bias is not None
        layer = cls(in_features, out_features, bits, size, codebook=codebook, has_zero_points=has_zeros, bias=has_bias)
        _check_codes("codes", codes, (out_features, in_features), bits)
        if tuple(scale.shape) != tuple(layer.scale.shape) or not bool(torch.isfinite(scale).all()):
            raise SettingError(
                f"scale must be finite and of shape {tuple(layer.scale.shape)}, got {tuple(scale.shape)}."
            )
        device = linear.weight.device
        layer.weight = pack_codes(codes.to(device), bits)
        layer.scale = scale.detach().to(device, linear.weight.dtype, copy=True).contiguous()
        if zero_point is not None:
            _check_codes("zero_point", zero_point, tuple(scale.shape), bits)
            layer.zero_point = zero_point.to(device, torch.uint8, copy=True).contiguous()
        layer.bias = copied(linear.bias)
        return layer.train(linear.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> QuantizedLinear:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        named = {name: spec.get(name) for name in ("codebook", "zero_points")}
        if None in named.values():
            raise CheckpointError(
                f"A layer of kind {cls.kind!r} needs the entries codebook and zero_points, "
                f"got {', '.join(sorted(map(str, spec)))[:200]}."
            )
        rest = {name: value for name, value in spec.items() if name not in named}
        sizes = read_spec(rest, cls.kind, ("in_features", "out_features", "bits", "group_size"))
        codebook, zeros = named["codebook"], named["zero_points"]
        if not isinstance(codebook, str) or not isinstance(zeros, bool):
            raise CheckpointError(
                f"Expected a codebook by name and zero_points that is true or false, got {str(codebook)[:40]!r} and "
                f"{str(zeros)[:40]!r} in a layer of kind {cls.kind!r}."
            )
        try:
            return cls(*sizes, codebook=codebook[:40], has_zero_points=zeros, bias=spec["bias"])
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "codebook": self.codebook,
            "zero_points": self.zero_point is not None,
            "bias": self.bias is not None,
        }

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight that this layer stands for."""
        return self.out_features, self.in_features

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, shape (out, in), in the dtype of the scales."""
        codes = unpack_codes(self.weight, self.bits, self.out_features * self.in_features).view(self.dense_shape)
        if self.codebook == "nf4":
            values = torch.tensor(NORMAL_FLOAT, dtype=self.scale.dtype, device=codes.device)[codes.int()]
        elif self.zero_point is None:
            values = codes.to(self.scale.dtype) - 2 ** (self.bits - 1)  # exact: at most 8 bits
        else:
            values = codes.to(self.scale.dtype) - self._spread(self.zero_point).to(self.scale.dtype)
        return values * self._spread(self.scale)

    def _spread(self, shared: Tensor) -> Tensor:
        """(out, groups) -> (out, in), or (out, 1) where a row is one group."""
        if shared.shape[1] == 1:
            return shared
        return shared.repeat_interleave(self.group_size, dim=1)[:, : self.in_features]

    def to_dense(self) -> nn.Linear:
        """The Linear with the weight that the codes stand for; it trains, as the codes could not."""
        linear = dense_linear(self.dequantized(), self.bias, like=self)
        linear.weight.requires_grad_(True)
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)."""
        return F.linear(x, self.dequantized(), self.bias)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
        zeros = ", zero_points=True" if self.zero_point is not None else ""
        codebook = f"codebook={self.codebook}"
        return f"{sizes}, group_size={self.group_size}, {codebook}{zeros}, bias={self.bias is not None}"


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in 0..2^bits − 1 in as few bytes as they need, the first code in the lowest bits.

    Codes of 3 bits lie in two parts: first the two low bits of all, then the high ones.

    Args:
        codes: Any shape, integers.
        bits: A key of `PLANES`.

    Returns:
        Shape (`packed_bytes`,), uint8.

    Example:
        >>> pack_codes(torch.tensor([1, 2, 3]), bits=4).tolist()
        [33, 3]
    """
    flat, parts, start = codes.flatten().to(torch.uint8), [], 0
    for width in PLANES[bits]:
        plane = (flat >> start) & (2**width - 1)
        each = 8 // width
        plane = F.pad(plane, (0, -len(plane) % each)).view(-1, each)
        packed = plane[:, 0].clone()
        for place in range(1, each):
            packed |= plane[:, place] << (width * place)
        parts.append(packed)
        start += width
    return torch.cat(parts)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes that `pack_codes` packed, shape (count,), uint8.

    Example:
        >>> unpack_codes(torch.tensor([33, 3], dtype=torch.uint8), bits=4, count=3).tolist()
        [1, 2, 3]
    """
    codes, shift = None, 0
    for width in PLANES[bits]:
        size = packed_bytes(count, width)
        part, packed = packed[:size], packed[size:]
        if width < 8:
            part = torch.stack([(part >> place) & (2**width - 1) for place in range(0, 8, width)], dim=1).flatten()
        plane = part[:count] << shift if shift else part[:count]
        codes = plane if codes is None else codes | plane
        shift += width
    return torch.empty(0, dtype=torch.uint8) if codes is None else codes


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `pack_codes` needs for so many codes.

    Example:
        >>> packed_bytes(5, bits=3)
        3
    """
    if bits in (1, 2, 4, 8):
        return -(-count * bits // 8)
    return sum(packed_bytes(count, width) for width in PLANES[bits])


def _check_codes(name: str, codes: Tensor, shape: tuple[int, ...], bits: int) -> None:
    if tuple(codes.shape) != tuple(shape) or codes.is_floating_point():
        raise SettingError(
            f"{name} must be integers of shape {tuple(shape)}, got {codes.dtype} of shape {tuple(codes.shape)}."
        )
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= 2**bits:
        raise SettingError(f"{name} of {bits} bits must lie in 0..{2**bits - 1}, got {low}..{high}.")
