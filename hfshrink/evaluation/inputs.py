"""Random inputs of the shape that a model or export takes, for timing and counting."""

from __future__ import annotations

from typing import Any

import torch

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.evaluation.prediction import input_names
from hfshrink.modules import max_positions
from hfshrink.record import config_of

TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask")
DEFAULT_IMAGE_SIZE = 224  # for convolutional models whose config names none


def random_inputs(
    model: Any, batch_size: int, sequence_length: int, processor: Any = None, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Seeded random inputs on the model's device.

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
    if "input_ids" in taken:
        inputs = _token_inputs(model, taken, (batch_size, sequence_length), generator)
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
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


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
) -> dict[str, torch.Tensor]:
    limit, tokens = max_positions(model), shape[1]
    if tokens < 1 or (limit is not None and tokens > limit):
        raise SettingError(f"sequence_length must lie in 1..{limit or 'any'} for this model, got {tokens}.")
    outer = config_of(model)
    config = outer.get_text_config()
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls", "mask")}
    known = torch.tensor([number for number in range(config.vocab_size) if number not in special] or [0])
    ids = known[torch.randint(len(known), shape, generator=generator)]
    end = getattr(outer, "eos_token_id", None)
    if outer.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # BART reads its class there
    ones, zeros = torch.ones(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    values = (ids, ones, zeros, ids.clone(), ones.clone())
    return {name: value for name, value in zip(TOKEN_INPUTS, values, strict=True) if name in taken}
