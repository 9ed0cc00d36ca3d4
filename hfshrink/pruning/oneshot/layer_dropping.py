"""Whole layers: which ones matter least, and taking them out of a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.blocks import block_influence, set_depth, spread_layers
from hfshrink.checkpoint import check_free_slot, write_map
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode
from hfshrink.modules import layer_stack
from hfshrink.record import config_of

LAYER_METHODS = ("influence", "top", "spread", "random")


def choose_layers(
    depth: int, number_dropped: int, method: str = "influence", influence: Sequence[float] = (), *, seed: int = 0
) -> list[int]:
    """The numbers of the layers to drop, in rising order.

    `"influence"` drops those with the lowest block influence (ShortGPT, arXiv:2403.03853), `"top"` the last ones, the
    best of the simple rules in arXiv:2004.03844, `"spread"` keeps layers at even distances, the first and the last
    among them, and `"random"` is the baseline.

    Args:
        depth: Layers of the model.
        number_dropped: How many go; at least one stays.
        method: One of `LAYER_METHODS`.
        influence: One number per layer, from `layer_influence`; for `"influence"`. Of equal ones the later layer goes.
        seed: Of `"random"`; no other random state is touched.

    Raises:
        SettingError: An unknown method, a number out of range, or no influence for each layer.

    Example:
        >>> choose_layers(6, 2, "top"), choose_layers(6, 3, "spread"), choose_layers(3, 1, influence=[0.9, 0.1, 0.3])
        ([4, 5], [1, 3, 4], [1])
    """
    if method not in LAYER_METHODS:
        raise SettingError(f"method must be one of {', '.join(LAYER_METHODS)} for layers, got {method!r}.")
    if type(number_dropped) is not int or not 0 <= number_dropped < depth:
        raise SettingError(f"0..{depth - 1} of {depth} layers can be dropped, got {number_dropped}.")
    if method == "influence":
        if len(influence) != depth:
            raise SettingError(f"influence must have one number for each of {depth} layers, got {len(influence)}.")
        ranked = sorted(range(depth), key=lambda layer: (influence[layer], -layer))
        return sorted(ranked[:number_dropped])
    if method == "random":
        order = torch.randperm(depth, generator=torch.Generator().manual_seed(seed))
        return sorted(order[:number_dropped].tolist())
    left = depth - number_dropped
    kept = range(left) if method == "top" else spread_layers(depth, left)
    return [layer for layer in range(depth) if layer not in kept]


def layer_influence(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> list[float]:
    """1 − mean cos(x, y) over tokens, of a layer's input x and output y: block influence (arXiv:2403.03853).

    Padding (where a batch has an `attention_mask` of zeros) does not count.

    Args:
        model: The model; it runs in eval mode, without gradients.
        batches: Model inputs, as `hfshrink.calibration.batches` gives them.

    Returns:
        One number in 0..2 per layer; a layer that changes nothing has 0.

    Raises:
        SettingError: No batches, a layer that never ran, or NaN and infinite values.
        UnsupportedModelError: A family whose layers are not found.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> found = layer_influence(BertModel(BertConfig(**sizes)), [{"input_ids": torch.ones(1, 3).long()}])
        >>> len(found), all(0 <= influence <= 2 for influence in found)
        (2, True)
    """
    _, layers = layer_stack(model)
    sums, counts = [0.0] * len(layers), [0] * len(layers)
    mask: list[Tensor | None] = [None]

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, number: int) -> None:
        before, after = (args or tuple(kwargs.values()))[0], output[0] if isinstance(output, tuple) else output
        x, y = _tokens(before, mask[0]), _tokens(after, mask[0])
        sums[number] += float(block_influence(x, y).sum())
        counts[number] += len(x)

    with ExitStack() as hooks, eval_mode(model), torch.no_grad():
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_hook(partial(see, number=number), with_kwargs=True).remove)
        for batch in batches:
            mask[0] = batch.get("attention_mask")
            model(**{name: value for name, value in batch.items() if name != "labels"})
    if not all(counts):
        raise SettingError(f"The calibration data has no tokens, or never ran layer {counts.index(0)}.")
    found = [total / count for total, count in zip(sums, counts, strict=True)]
    if not all(torch.isfinite(torch.tensor(found))):
        raise SettingError("The calibration data gives NaN or infinite hidden states. Check it, or load in float32.")
    return found


def drop_layers(model: Any, dropped: Sequence[int]) -> list[str]:
    """Take layers out of a model; the others move up, and their weights stay as they are.

    The config says the new depth in the family's spelling, lists with one entry per layer are trimmed, and whatever
    counts layers (`layer_idx` of the KV cache) is numbered anew; plain transformers loads the saved model. A layer map
    follows.

    Args:
        model: Changed in place. Nothing is changed when it raises.
        dropped: Layer numbers, from 0.

    Returns:
        Names of the layers that went.

    Raises:
        SettingError: Numbers out of range or twice, or all layers.
        UnsupportedModelError: An encoder-decoder, a family whose layers are not found, or layers that differ so that
            one can't take the place of another.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=6, vocab_size=9)
        >>> model = BertModel(BertConfig(**sizes))
        >>> drop_layers(model, [1]), model.config.num_hidden_layers
        (['encoder.layer.1'], 2)
    """
    config = config_of(model)
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"The encoder-decoder {config.model_type!r} has two stacks of layers, of which none can be dropped here. "
            "Its single weights can be pruned (structure='unstructured')."
        )
    check_free_slot(model)
    stack, layers = layer_stack(model)
    kept = _kept(len(layers), dropped)
    if len(kept) == len(layers):
        return []
    numbers = _new_numbers(model, stack, kept)
    for place, attribute, number in numbers:
        setattr(model.get_submodule(place), attribute, number)
    for layer in sorted(set(range(len(layers))) - set(kept), reverse=True):
        del layers[layer]
    shared = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for own in shared.values():
        if getattr(own, "num_hidden_layers", None) == len(layers) + len(set(dropped)):
            set_depth(own, kept)
    if getattr(config, "quantization_config", None) is not None:
        write_map(model)
    return [f"{stack}.{layer}" for layer in sorted(set(dropped))]


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """States (batch, sequence, size) or (batch · sequence, size) as (tokens, size) in float64, without padding."""
    x = x.flatten(end_dim=-2).double()
    return x[mask.flatten().to(x.device) != 0] if mask is not None and mask.numel() == len(x) else x


def _kept(depth: int, dropped: Sequence[int]) -> list[int]:
    wrong = [n for n in dropped if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < depth]
    if wrong or len(set(dropped)) != len(dropped):
        raise SettingError(f"dropped must be different numbers in 0..{depth - 1}, got {list(dropped)}.")
    if len(dropped) == depth:
        raise SettingError(f"All {depth} layers would be dropped; at least one must stay.")
    return [layer for layer in range(depth) if layer not in set(dropped)]


def _new_numbers(model: Any, stack: str, kept: Sequence[int]) -> list[tuple[str, str, Any]]:
    """(module, attribute, new value) of all that counts layers, after checking that each layer fits its new place.

    What a layer is in its old place and in its new one is read from models of the old and the new config, built
    without weights: same weights, and no setting that goes by the place other than the number itself.
    """
    before, after = _sketches(model, kept)
    prefix = f"{stack}."
    found = []
    for name, module in before.named_modules():  # such as the number of layers that DistilBERT's encoder keeps
        if not name.startswith(prefix):
            twin = _settings(after.get_submodule(name))
            found += [(name, key, value) for key, value in twin.items() if value != getattr(module, key, value)]
    for new, old in enumerate(kept):
        one, other = before.get_submodule(f"{prefix}{old}"), after.get_submodule(f"{prefix}{new}")
        problem = _difference(one, other, old, new)
        if problem:
            raise UnsupportedModelError(
                f"In the family {model.config.model_type!r} layers differ: layer {old} can't take place {new}, "
                f"{problem}. Drop layers so that the others keep a place of their kind, such as the last ones "
                "(method='top')."
            )
        for name, module in one.named_modules():
            twin = vars(other.get_submodule(name))
            changed = [key for key, value in _settings(module).items() if value != twin[key]]
            found += [(f"{prefix}{old}.{name}".rstrip("."), key, new) for key in changed]
    return found


def _sketches(model: Any, kept: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Models without weights of the config as it is, and of the config with the kept layers only."""
    from huggingface_hub.errors import StrictDataclassError

    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    smaller = copy.deepcopy(config)
    set_depth(smaller, kept)
    try:
        type(smaller).from_dict(smaller.to_dict())
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            before, after = type(model)(config), type(model)(smaller)
    except (ValueError, TypeError, RuntimeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{type(model).__name__} of the family {config.model_type!r} can't be built from its config with "
            f"{len(kept)} layers: {reason}"
        ) from error
    stack, _ = layer_stack(model)
    old, new = (
        {name: tensor.shape for name, tensor in made.state_dict().items() if not name.startswith(f"{stack}.")}
        for made in (before, after)
    )
    odd = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if odd:
        raise UnsupportedModelError(
            f"In the family {config.model_type!r} the shape of {odd[0]} goes by the number of layers; none can be "
            "dropped. Its single weights can be pruned (structure='unstructured')."
        )
    return before, after


def _difference(one: nn.Module, other: nn.Module, old: int, new: int) -> str:
    """What keeps layer `old` from standing in place `new`; empty where nothing does."""
    shapes, needed = ({name: t.shape for name, t in layer.state_dict().items()} for layer in (one, other))
    odd = sorted(name for name in {*shapes, *needed} if shapes.get(name) != needed.get(name))
    if odd:
        return f"{'which has no' if odd[0] not in needed else 'which needs another'} {odd[0]}"
    modules, twins = dict(one.named_modules()), dict(other.named_modules())
    for name in {**modules, **twins}:
        module, twin = modules.get(name), twins.get(name)
        if module is None or type(module) is not type(twin):
            return f"where {name or 'it'} is a {type(twin).__name__} instead of a {type(module).__name__}"
        for key, value in _settings(module).items():
            there = vars(twin).get(key)
            is_number = type(value) is int and (value, there) == (old, new)
            if value != there and not is_number:
                return f"where {name or 'it'} has {key}={there} instead of {value}"
    return ""


def _settings(module: Any) -> dict[str, Any]:
    """A module's plain attributes: numbers, words and switches; not what transformers keeps under an underscore."""
    plain = (bool, int, float, str)
    return {key: value for key, value in vars(module).items() if isinstance(value, plain) and not key.startswith("_")}
