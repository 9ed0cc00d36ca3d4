"""Export a causal language model as one graph that scores, reads a prompt and continues it."""

from __future__ import annotations

import copy
from typing import Any

import torch

from hfshrink.errors import MissingDependencyError, UnsupportedModelError
from hfshrink.generation import ExportedCausalLM
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.loading import infer_task
from hfshrink.modules import accepted_inputs
from hfshrink.quantization.graphs.exporting import drop_traces, export_float, fewer_rewrites, own_weights, quiet

TRACED_PAST, TRACED_TOKENS = 6, 2  # both of them free at run time; 0 and 1 would be taken for constants


def generates(model: Any, generation: bool | None) -> bool:
    """Whether to export for generation: as asked, else wherever the model is a causal language model.

    Raises:
        UnsupportedModelError: It is asked for, and the model is none.
    """
    is_causal = infer_task_or_none(model) == "text-generation"
    if generation and not is_causal:
        raise UnsupportedModelError(
            f"generation=True is for causal language models, {type(model).__name__} is none. Leave it out."
        )
    return is_causal if generation is None else generation


def export_graph(model: Any, processor: Any, generation: bool | None) -> Any:
    """The float graph of a model: with a cache where it shall generate, else `export_float`."""
    return export_decoder(model) if generates(model, generation) else export_float(model, processor)


def infer_task_or_none(model: Any) -> str | None:
    """The task of a model, or None for one that fits none."""
    try:
        return infer_task(model)
    except UnsupportedModelError:
        return None


def export_decoder(model: Any) -> ExportedCausalLM:
    """Export a causal language model as one float graph with its key-value cache as input and output.

    transformers' own export for generation makes two graphs, for the prompt and for what follows, and each holds all
    weights. The second one, traced with several new tokens at once, reads a prompt too where its cache is empty; so it
    is the only one that is made here. Batch size, length of the cache and number of new tokens are free.

    Args:
        model: A causal language model with a growing cache (`DynamicCache`); it is left as it was.

    Returns:
        The export; `exported(**inputs)` scores, `exported.generate(...)` continues.

    Raises:
        UnsupportedModelError: The model has no such cache.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    inputs = _traced_inputs(model)
    with quiet(), eval_mode(model):
        try:
            exporter = OnnxExporter()
        except ImportError as error:
            raise MissingDependencyError(f"{error} Or install: pip install 'hfshrink[onnx]'") from error
        with fewer_rewrites():
            exported = exporter.export(model, inputs, OnnxConfig(dynamic=True))
    config = copy.deepcopy(model.config)  # the exporter hands out the model's own object
    if hasattr(config, "quantization_config"):  # a layer map describes PyTorch modules, not this graph
        del config.quantization_config
    own_weights(exported)
    drop_traces(exported)
    generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    return ExportedCausalLM(exported.components, exported.export_format, config, generation_config)


def _traced_inputs(model: Any) -> dict[str, Any]:
    """A cache of some tokens, and some more tokens that follow it."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    ids = random_inputs(model, 2, TRACED_PAST + TRACED_TOKENS)["input_ids"]
    with torch.no_grad(), eval_mode(model):
        past = getattr(model(ids[:, :TRACED_PAST], use_cache=True), "past_key_values", None)
        kinds = {type(layer) for layer in getattr(past, "layers", [None])}
        if type(past) is not DynamicCache or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            raise UnsupportedModelError(
                f"{type(model).__name__} keeps a {type(past).__name__}; only a DynamicCache of keys and values can be "
                "exported for generation. Export for scoring only: generation=False."
            )
        # one that keeps all tokens: the mask of a sliding window hides the old ones, where its own cache drops them
        past = DynamicCache()
        model(ids[:, :TRACED_PAST], past_key_values=past, use_cache=True)
    inputs: dict[str, Any] = {
        "input_ids": ids[:, TRACED_PAST:],
        "attention_mask": torch.ones_like(ids),
        "past_key_values": past,
    }
    if "position_ids" in accepted_inputs(model):
        inputs["position_ids"] = torch.arange(TRACED_PAST, ids.shape[1]).expand(2, -1)
    return {**inputs, "use_cache": True}
