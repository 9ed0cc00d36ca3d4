"""Small changes of batches and outputs, so that student and teacher are compared where both mean something."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hfshrink.distillation.teachers.panel import SPANS
from hfshrink.labels import IGNORED

NOWHERE = -1e4  # logit of a position that is padding: no probability


def with_labels_that_count(inputs: dict[str, Any], head: str, mask: Tensor | None) -> dict[str, Any]:
    """The batch with −100 where a label stands that the other parts leave out.

    A causal model that is padded on the left would learn its first token from padding.

    Args:
        inputs: The batch.
        head: Kind of head.
        mask: Positions that count, (batch, sequence − 1) for causal models.
    """
    if head != "causal_tokens" or mask is None or not isinstance(inputs.get("labels"), Tensor):
        return inputs
    labels = inputs["labels"].clone()
    labels[:, 1:][~mask] = IGNORED
    return {**inputs, "labels": labels}


def with_spans_nowhere(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with spans of −100 at the sequence's end, which transformers leaves out; −100 it takes for 0."""
    spans = {n: inputs[n] for n in ("start_positions", "end_positions") if isinstance(inputs.get(n), Tensor)}
    if not spans or "input_ids" not in inputs:
        return inputs
    nowhere = inputs["input_ids"].shape[1]
    return {**inputs, **{name: at.masked_fill(at == IGNORED, nowhere) for name, at in spans.items()}}


def without_padding(outputs: Any, mask: Tensor | None) -> Any:
    """Start and end logits (batch, sequence) with no probability on padding; other outputs as they are.

    A cached teacher knows nothing of the padding that a batch adds, so it takes part on neither side.
    """
    if mask is None or outputs is None:
        return outputs
    spans = {name: getattr(outputs, name).masked_fill(~mask.bool(), NOWHERE) for name in SPANS}
    return SimpleNamespace(**spans, features=getattr(outputs, "features", None))


def on_device(outputs: Any, device: torch.device) -> Any:
    """Outputs whose logits lie on a device; a teacher may live on another one than its student."""
    for name in ("logits", *SPANS):
        value = getattr(outputs, name, None)
        if isinstance(value, Tensor) and value.device != device:
            setattr(outputs, name, value.to(device))
    return outputs


def nothing(outputs: Any) -> Tensor:
    """0, with a gradient of 0 for every weight that the outputs come from."""
    found = [getattr(outputs, name, None) for name in ("logits", *SPANS, "kept")]
    return sum((0.0 * value.sum() for value in found if isinstance(value, Tensor)), torch.zeros(()))
