"""The tables of a vocabulary inside a model: which they are, and the model with fewer rows in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.modules import stands_for

ID_ENTRIES = ("_token_id", "_token_ids", "suppress_tokens", "bad_words_ids", "force_words_ids")
"""Ends of the names of the config entries that hold token ids."""
BIASES = "sequence_bias"  # of a generation config: {(id, …): bias}, or [[[id, …], bias], …]
LOGIT_BIAS = "final_logits_bias"  # a buffer of shape (1, rows) in BART and its kin


def check_tables(model: Any) -> int:
    """The number of rows of a model's token embedding, once it is sure that all tables of the vocabulary are known.

    These are the embedding (rows, width), and in a language model the head's weight (rows, width) and bias (rows).

    Raises:
        UnsupportedModelError: No such embedding, a compressed, quantized or parametrized table, several configs, or a
            further table of as many rows.
        SettingError: NaN or infinite values in a table.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not isinstance(model, nn.Module) or getattr(model.config, "sub_configs", None):
        raise UnsupportedModelError(f"The vocabulary of {family!r} can't be trimmed, expected a plain text model.")
    tables = _tables(model)
    rows = int(tables[0].shape[0]) if tables else 0
    if not rows or any(len(table) != rows for table in tables):
        raise UnsupportedModelError(
            f"The family {family!r} ({type(model).__name__}) has no token embedding, or a head of another size, or "
            "one of them is compressed; expected an nn.Embedding and an nn.Linear with as many rows. Trim first, "
            "compress then."
        )
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(module, nn.Embedding | nn.Linear)
            and isinstance(weight, Tensor)
            and len(weight) == rows
            and not _is_any(weight, tables)
        ):
            raise UnsupportedModelError(
                f"{name} has {rows} rows, as many as the token embedding, but is neither it nor the head; the "
                f"vocabulary of the family {family!r} can't be trimmed."
            )
    if not all(bool(torch.isfinite(table).all()) for table in tables):
        raise SettingError(f"The token embedding or the head of {type(model).__name__} has NaN or infinite values.")
    return rows


def cut_rows(model: Any, kept: Tensor) -> list[str]:
    """Keep some rows of all tables of the vocabulary; tied tables stay tied.

    Args:
        model: A model that `check_tables` passed; changed in place.
        kept: Old ids that stay, in rising order, shape (new rows,), int64.

    Returns:
        Names of the modules that changed.
    """
    tables = _tables(model)
    rows = len(tables[0])
    fresh: dict[int, nn.Parameter] = {}
    changed = []
    for name, module in model.named_modules():
        for key, old in module._parameters.items():
            if old is None or not _is_any(old, tables):
                continue
            if id(old) not in fresh:
                new = old.detach()[kept.to(old.device)]
                fresh[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad)
            module._parameters[key] = fresh[id(old)]
            changed.append(name)
        if isinstance(module, nn.Embedding | nn.Linear) and name in changed:
            setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", len(kept))
        bias = module._buffers.get(LOGIT_BIAS)
        if bias is not None and bias.shape[-1] == rows:
            module._buffers[LOGIT_BIAS] = bias[..., kept.to(bias.device)]
            changed.append(name)
    return list(dict.fromkeys(changed))


def renumber(model: Any, rows: int, new_ids: Mapping[int, int]) -> None:
    """Write the new size and the new token ids into a model's configs, generation config and modules.

    Ids that are gone become None, and leave lists of ids; a sequence of ids with one that is gone goes as a whole.
    Ids that never had a row stay as they are.

    Args:
        model: A model whose rows are cut.
        rows: How many it had.
        new_ids: Old id -> new id of all tokens that stay.
    """
    new = partial(_new_ids, rows=rows, new_ids=new_ids)
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(new_ids)
        for name, value in _id_entries(config):
            setattr(config, name, new(value))
        biases = _biases(config)
        if biases:
            kept = [[new(ids), bias] for ids, bias in biases if _is_whole(new(ids), ids)]
            setattr(config, BIASES, dict(kept) if isinstance(config.sequence_bias, dict) else kept)
    tables = _tables(model)
    for module in model.modules():
        if vars(module).get("vocab_size") == rows:
            module.vocab_size = len(new_ids)
        is_other_table = stands_for(module, nn.Embedding) and not _is_any(module.weight, tables)  # of positions
        if isinstance(vars(module).get("padding_idx"), int) and not is_other_table:
            module.padding_idx = new(module.padding_idx)


def token_ids(model: Any) -> set[int]:
    """The token ids that a model's configs and its embedding name, such as those of padding, begin and end."""
    found = [value for config in _configs(model) for _, value in _id_entries(config)]
    found += [ids for config in _configs(model) for ids, _ in _biases(config)]
    found.append(model.get_input_embeddings().padding_idx)
    return set(_whole_numbers(found))


def _tables(model: Any) -> list[Tensor]:
    """The embedding's weight, and the head's weight and bias; empty where one of them is no plain parameter."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    kinds = ((embedding, nn.Embedding), (head, nn.Linear))
    found: list[Tensor] = []
    for module, kind in kinds:
        if module is None and kind is nn.Linear:
            continue
        weight = module._parameters.get("weight") if isinstance(module, kind) else None
        if weight is None or not weight.is_floating_point():
            return []
        found += [weight] + ([module.bias] if getattr(module, "bias", None) is not None else [])
    # an untied head of BERT leaves the bias of the module around it unused, but in the checkpoint
    around = [] if head is None else [m for m in model.modules() if any(child is head for child in m.children())]
    biases = [module._parameters.get("bias") for module in around]
    return found + [bias for bias in biases if bias is not None and bias.shape == found[0].shape[:1]]


def _is_any(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor is other for other in others)


def _configs(model: Any) -> list[Any]:
    """All different configs in a model, and its generation config."""
    found = [getattr(module, "config", None) for module in model.modules()]
    found.append(getattr(model, "generation_config", None))
    return list({id(config): config for config in found if config is not None}.values())


def _id_entries(config: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(config).items() if name.endswith(ID_ENTRIES) and value is not None]


def _new_ids(value: Any, rows: int, new_ids: Mapping[int, int]) -> Any:
    """An id, a list of ids or of such lists, under the new ids."""
    if isinstance(value, list | tuple):
        pairs = [(_new_ids(item, rows, new_ids), item) for item in value]
        return type(value)(new for new, old in pairs if new is not None and _is_whole(new, old))
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows:
        return value
    return new_ids.get(value)


def _is_whole(new: Any, old: Any) -> bool:
    """Whether a sequence of ids lost none; a single id is whole."""
    return not isinstance(old, list | tuple) or len(new) == len(old)


def _biases(config: Any) -> list[Any]:
    """(ids, bias) of the sequences whose scores a generation config moves."""
    found = vars(config).get(BIASES) or []
    return list(found.items() if isinstance(found, dict) else found)


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _whole_numbers(item)
    elif isinstance(value, int):
        yield value
