"""Run the export of a causal language model: scores, and everything that transformers' `generate` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.exporters import ExportedModel

from hfshrink.errors import UnsupportedModelError

CACHE_INPUT = "past_key_values"


class ExportedCausalLM(ExportedModel, GenerationMixin):  # type: ignore[misc] # both name generation_config
    """An export whose one graph takes tokens and a key-value cache, and returns scores and the longer cache.

    Called like the model it came from: without a cache it scores whole rows, padding on either side. `generate` is
    transformers' own: greedy search, sampling, beam search, stopping criteria, streamers.

    Attributes:
        scoring_inputs: What a call must get; the rest is made up from it.

    Example:
        >>> exported, tokenizer = hfshrink.load("small")  # doctest: +SKIP
        >>> exported.generate(**tokenizer("The sun", return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    scoring_inputs = ("input_ids", "attention_mask")

    def __init__(self, components: Any, export_format: Any, config: Any = None, generation_config: Any = None) -> None:
        """See `ExportedModel`.

        Raises:
            UnsupportedModelError: The graph has no cache, or there are several graphs.
        """
        super().__init__(components, export_format, config, generation_config or _generation_config(config))
        if len(self.components) != 1 or not has_cache(self):
            raise UnsupportedModelError(
                f"Expected an export of one graph with {CACHE_INPUT}, got the graphs {', '.join(self.components)}. "
                "Export a causal language model with generation=True."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Score; see `forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Any:
        """Scores of the next token after each of `input_ids`, and the cache with them.

        Args:
            input_ids: New tokens, shape (batch, new).
            attention_mask: 1 for real tokens, shape (batch, past + new); None means all.
            position_ids: Shape (batch, new); None counts all tokens, padding too, as PyTorch models do. `generate`
                counts the real ones.
            past_key_values: The cache of earlier tokens; None or an empty one for a prompt.

        Returns:
            What the PyTorch model returns: `logits` (batch, new, vocabulary) and `past_key_values`.
        """
        if past_key_values is None or past_key_values.get_seq_length() == 0:
            past_key_values = self._empty_cache(len(input_ids))
        total, new = past_key_values.get_seq_length() + input_ids.shape[1], input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), total)
        if position_ids is None:
            position_ids = torch.arange(total - new, total).expand(len(input_ids), -1)
        name = self._single_component()
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask.long(),
            "position_ids": position_ids,
            CACHE_INPUT: past_key_values,
        }
        taken = self.components[name].metadata.kwargs
        return self.runners[name](**{key: value for key, value in given.items() if key in taken})

    def can_generate(self) -> bool:
        """Yes; transformers asks."""
        return True

    def is_remote_code(self) -> bool:
        """No; transformers asks."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None; transformers asks which kernels mixtures of experts use in PyTorch."""
        return {}

    def eval(self) -> ExportedCausalLM:
        """Itself: a graph has no training mode."""
        return self

    def _empty_cache(self, batch_size: int) -> DynamicCache:
        """A cache of no tokens: per layer keys and values of shape (batch, heads, 0, width)."""
        graph = self.components[self._single_component()].program.graph
        cache, shapes = DynamicCache(), {}
        for value in graph.inputs:
            path = value.name.removeprefix("input.")
            if path.startswith(f"{CACHE_INPUT}.layers."):
                shapes[path] = int(str(value.shape[1])), int(str(value.shape[3]))
        for layer in range(len(shapes) // 2):
            keys, values = (
                torch.empty(batch_size, shapes[path][0], 0, shapes[path][1])
                for path in (f"{CACHE_INPUT}.layers.{layer}.{part}" for part in ("keys", "values"))
            )
            cache.update(keys, values, layer)
        return cache


def has_cache(exported: Any) -> bool:
    """Whether an export's graph takes a key-value cache, so that it can generate."""
    return any(CACHE_INPUT in component.metadata.kwargs for component in exported.components.values())


def _generation_config(config: Any) -> GenerationConfig:
    return GenerationConfig() if config is None else GenerationConfig.from_model_config(config)
