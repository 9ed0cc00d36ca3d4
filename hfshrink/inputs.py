"""What a model or export is fed: its inputs' names, and seeded random ones for tracing, timing and checking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import accepted_inputs, max_positions
from hfshrink.record import config_of

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
DEFAULT_IMAGE_SIZE = 224  # for convolutional models whose config names none


def input_names(model: Any) -> tuple[list[str], list[str]]:
    """Names of the inputs that a model or export can take, and of those that it must get.

    Raises:
        UnsupportedModelError: An export of several graphs, as for generation: it is not called as a whole.
    """
    if isinstance(model, nn.Module):
        return sorted(accepted_inputs(model) - {"labels"}), []
    if hasattr(model, "scoring_inputs"):  # a decoder with a cache, which makes up the rest
        return list(model.scoring_inputs), ["input_ids"]
    if len(model.components) != 1:
        raise UnsupportedModelError(
            f"This export has the graphs {', '.join(model.components)} and is no single call. "
            "Measure the model before its export, or export it with OnnxExporter().export."
        )
    metadata = next(iter(model.components.values())).metadata
    return list(metadata.kwargs), [name for name in metadata.kwargs if name not in metadata.in_constants]


def model_inputs(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a batch that a model or export takes, on its device.

    Raises:
        SettingError: An input that an export was traced with is not there.
    """
    taken, needed = input_names(model)
    missing = [name for name in needed if name not in batch]
    if missing:
        raise SettingError(
            f"The export was traced with {', '.join(needed)}; the data set lacks {', '.join(missing)}. "
            "Encode the rows with the tokenizer that the export was made with (model_input_names)."
        )
    return {name: _as_read(tensor, model) for name, tensor in batch.items() if name in taken}


def random_inputs(
    model: Any,
    batch_size: int,
    sequence_length: int,
    processor: Any = None,
    seed: int = 0,
    pairs: bool = False,
) -> dict[str, Tensor]:
    """Seeded random inputs on the model's device.

    Args:
        model: A model or export.
        batch_size: Rows.
        sequence_length: Tokens per row; images have the size that their config tells.
        processor: Its tokenizer or image processor: only the inputs that it makes; None makes all that the model
            takes.
        seed: Of the ids and pixels; the caller's random state stays as it was.
        pairs: Whether the second half of each row is a second sentence, and that of the last of several rows padding.

    Returns:
        For text `input_ids` of shape (batch, tokens) without padding or other special tokens, a mask of ones, token
        types of zeros and the decoder's inputs, as far as the model takes them; for images `pixel_values` (batch,
        channels, height, width).

    Raises:
        SettingError: `sequence_length` is below 1, or more than the model has positions.
        UnsupportedModelError: The model reads neither text nor images.
    """
    generator = torch.Generator().manual_seed(seed)
    taken, needed = input_names(model)
    if isinstance(model, nn.Module) and processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        taken = [name for name in taken if name in tokenizer.model_input_names or name.startswith("decoder")]
    if "input_ids" in taken:
        inputs = _token_inputs(model, taken, (batch_size, sequence_length), generator)
        if pairs:
            inputs = _as_pairs(inputs, getattr(config_of(model), "type_vocab_size", 1))
    elif "pixel_values" in taken:
        channels, height, width = image_shape(model, processor)
        inputs = {"pixel_values": torch.randn(batch_size, channels, height, width, generator=generator)}
    else:
        raise UnsupportedModelError(
            f"Expected a model that takes input_ids or pixel_values, this one takes {', '.join(taken)}."
        )
    missing = [name for name in needed if name not in inputs]
    if missing:
        raise UnsupportedModelError(
            f"The export needs {', '.join(missing)}, which can't be made up. Export it with {', '.join(inputs)} only."
        )
    return {name: _as_read(tensor, model) for name, tensor in inputs.items()}


def _as_read(tensor: Tensor, model: Any) -> Tensor:
    """On the model's device; pixels in its dtype, which half precision needs."""
    is_half = isinstance(model, nn.Module) and getattr(model, "dtype", None) in (torch.bfloat16, torch.float16)
    return tensor.to(model.device, model.dtype if is_half and tensor.is_floating_point() else None)


def image_shape(model: Any, processor: Any = None) -> tuple[int, int, int]:
    """(channels, height, width) of one image: from the config, else the image processor, else 224 pixels."""
    config = config_of(model)
    size: Any = getattr(config, "image_size", None) or _processor_size(processor) or DEFAULT_IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(config, "num_channels", None) or 3), int(height), int(width)


def _processor_size(processor: Any) -> tuple[int, int] | None:
    size = getattr(processor, "crop_size", None) or getattr(processor, "size", None)
    if size is None:
        return None
    values = dict(size)
    edge = values.get("shortest_edge")
    height, width = values.get("height", edge), values.get("width", edge)
    return None if height is None or width is None else (int(height), int(width))


def _token_inputs(
    model: Any, taken: list[str], shape: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    limit, tokens = max_positions(model), shape[1]
    if tokens < 1 or (limit is not None and tokens > limit):
        raise SettingError(f"sequence_length must lie in 1..{limit or 'any'} for this model, got {tokens}.")
    outer = config_of(model)
    config = outer.get_text_config()
    marks = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask")]
    special = {number for mark in marks for number in (mark if isinstance(mark, list) else [mark])}
    known = torch.tensor([number for number in range(config.vocab_size) if number not in special] or [0])
    ids = known[torch.randint(len(known), shape, generator=generator)]
    end = getattr(outer, "eos_token_id", None)
    if outer.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # BART reads its class there
    ones, zeros = torch.ones(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    values = (ids, ones, zeros, ids.clone(), ones.clone())
    return {name: value for name, value in zip(TOKEN_INPUTS, values, strict=True) if name in taken}


def _as_pairs(inputs: dict[str, Tensor], types: int) -> dict[str, Tensor]:
    rows, length = inputs["input_ids"].shape
    if "token_type_ids" in inputs:
        inputs["token_type_ids"][:, length // 2 :] = min(1, types - 1)
    if "attention_mask" in inputs and rows > 1:
        inputs["attention_mask"][-1, (length + 1) // 2 :] = 0
    return inputs


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """The model in eval mode; every module's own training flag is put back afterwards. Exports have none."""
    flags = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
