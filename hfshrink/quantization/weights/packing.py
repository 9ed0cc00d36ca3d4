"""One weight at a time: the tensors that bitsandbytes' layers save, made in pieces so that little memory is needed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hfshrink.quantization.weights.choice import BLOCK, check_finite

PIECE = 2**21  # values quantized at once; a multiple of BLOCK
STATE_BYTES = 512  # upper bound of the JSON that describes a 4-bit weight
QUANT_MAP_BYTES = 4 * 16
NESTED_BLOCK, NESTED_MAP_BYTES = 256, 4 * 256  # double quantization: scales per second scale, the 8-bit code


def pack_four_bit(
    name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: str, double_quantization: bool
) -> dict[str, torch.Tensor]:
    """What a 4-bit layer of bitsandbytes saves of its weight, bit by bit.

    Args:
        name: Of the weight, such as `"model.layers.0.mlp.up_proj.weight"`.
        weight: Shape (outputs, inputs), inputs a multiple of 64.
        dtype: The weight is rounded to it first, as `from_pretrained` does.
        scheme: "nf4" or "fp4".
        double_quantization: Whether the blocks' scales are stored in 8 bits.

    Returns:
        Names in the checkpoint -> tensors: codes, two per byte, of shape (values / 2, 1); scales; the code's values.

    Raises:
        SettingError: NaN or infinite values.
    """
    from bitsandbytes import functional

    codes, scales = [], []
    for piece in _pieces(name, weight.reshape(-1), dtype, scheme):
        packed, state = functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=scheme)
        codes.append(packed)
        scales.append(state.absmax)
    absmax, offset, nested = torch.cat(scales), None, None
    if double_quantization:
        offset = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    state = functional.QuantState(
        absmax=absmax,
        shape=weight.shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=state.code,
        quant_type=scheme,
        offset=offset,
        state2=nested,
    )
    parts = {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return {name: _joined(codes), **parts}


def pack_int8(name: str, weight: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an int8 layer of bitsandbytes saves of its weight of shape (outputs, inputs), bit by bit.

    Args:
        name: Of the weight.
        weight: Shape (outputs, inputs).
        dtype: The weight is rounded to it first, as `from_pretrained` does.

    Raises:
        SettingError: NaN or infinite values, or values above float16's 65504.
    """
    from bitsandbytes import functional

    codes, scales = [], []
    for piece in _pieces(name, weight, dtype, "int8", through_float16=True):
        packed, scale, _ = functional.int8_vectorwise_quant(piece.to(torch.float16))
        codes.append(packed)
        scales.append(scale)
    layer = name.removesuffix(".weight")
    return {
        name: _joined(codes),
        f"{layer}.SCB": torch.cat(scales),
        f"{layer}.weight_format": torch.tensor(0, dtype=torch.uint8),  # rows: bitsandbytes knows no other today
    }


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype, scheme: str) -> torch.Tensor:
    """A float tensor in another dtype, read piece by piece.

    Raises:
        SettingError: NaN or infinite values, or values above float16's 65504 where `dtype` is that.
    """
    flat, new = tensor.reshape(-1), torch.empty(tensor.shape, dtype=dtype)
    pieces = _pieces(name, flat, dtype, scheme, through_float16=dtype == torch.float16)
    for place, piece in zip(new.view(-1).split(PIECE), pieces, strict=True):
        place.copy_(piece)
    return new


def packed_bytes(shape: torch.Size, scheme: str, double_quantization: bool) -> int:
    """Upper bound of the bytes that a quantized weight takes in a checkpoint."""
    if scheme == "int8":
        return shape.numel() + 4 * shape[0] + 1
    blocks = shape.numel() // BLOCK
    scales = blocks + 4 * (blocks // NESTED_BLOCK + 1) + NESTED_MAP_BYTES if double_quantization else 4 * blocks
    return shape.numel() // 2 + scales + QUANT_MAP_BYTES + STATE_BYTES


def pack(
    name: str, weight: torch.Tensor, dtype: torch.dtype, scheme: str, double_quantization: bool
) -> dict[str, torch.Tensor]:
    """What a layer of bitsandbytes saves of its weight: `pack_int8` or `pack_four_bit`."""
    if scheme == "int8":
        return pack_int8(name, weight, dtype)
    return pack_four_bit(name, weight, dtype, scheme, double_quantization)


def _pieces(
    name: str, values: torch.Tensor, dtype: torch.dtype, scheme: str, through_float16: bool = False
) -> Iterator[torch.Tensor]:
    """About `PIECE` values each along the first dimension, checked and rounded to `dtype`."""
    for piece in values.split(max(1, PIECE // values[0].numel()) if len(values) else 1):
        if piece.numel():
            check_finite(name, piece, scheme, through_float16)
        yield piece.contiguous().to(dtype)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts as one tensor; each is given up as soon as it is copied."""
    if len(parts) == 1:
        return parts[0]
    whole = torch.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    start = 0
    while parts:
        part = parts.pop(0)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole
