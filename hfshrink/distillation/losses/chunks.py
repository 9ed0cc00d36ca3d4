"""Language-model losses without the logits of a whole batch.

Logits of (batch, sequence, vocabulary) are the largest tensor of a small language model's training: 2,048 positions
of 49,152 tokens are 400 MB in float32, and a divergence holds several of that size. Here the body runs once, the head
only on a chunk of positions at a time; backward computes each chunk again (activation checkpointing), so no more than
one chunk's logits exist at any moment. The loss and its gradients are those of the plain form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hfshrink.distillation.losses.divergences import SparseTargets
from hfshrink.distillation.losses.logits import LogitLoss
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.labels import IGNORED
from hfshrink.loading import infer_task
from hfshrink.modules import accepted_inputs


@dataclass(frozen=True)
class LazyLogits:
    """A language model's answer before its head: what the logits can be computed from, some rows at a time.

    Attributes:
        hidden: The body's output, (batch, sequence, width).
        head: The output layer, width -> vocabulary.
        kept: The logits of the last position, (batch, 1, vocabulary), as the whole model returned them.
        autocast: Device type, dtype, and whether automatic mixed precision was on where the model ran its head.
    """

    hidden: Tensor
    head: nn.Module
    kept: Tensor
    autocast: tuple[str, torch.dtype, bool]

    def logits(self, rows: Tensor) -> Tensor:
        """The logits of rows of the hidden states, (…, width) -> (…, vocabulary)."""
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            return self.head(rows)


def supports_chunks(model: Any) -> bool:
    """Whether a model's logits may be computed in chunks: a causal language model with a head and the usual loss.

    What its forward does to the logits after the head is known only when it runs, see `run_without_logits`.

    Args:
        model: The bare model, not wrapped.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> supports_chunks(BertForSequenceClassification(config))
        False
    """
    if "logits_to_keep" not in accepted_inputs(model) or infer_task(model) != "text-generation":
        return False
    usual_loss = getattr(model, "_loss_function", None) is None  # transformers: set by the user
    routed = getattr(model.config, "output_router_logits", False)  # then the model's loss has a part for the experts
    return usual_loss and not routed and model.base_model is not model and model.get_output_embeddings() is not None


def run_without_logits(called: Callable[..., Any], model: Any, inputs: Mapping[str, Any]) -> LazyLogits:
    """Run a language model on a batch, with the head on the last position only.

    The kept position ties the head into the outputs' graph, where DistributedDataParallel looks for it.

    Args:
        called: What to call: the model, or its wrapper (DistributedDataParallel, not FSDP: there the head's weight
            exists only inside the forward).
        model: The bare model that `supports_chunks`.
        inputs: Of the forward; labels are left out.

    Raises:
        UnsupportedModelError: The model's logits are not its head's answer to its body's output: a family that scales
            or caps them, or transforms the output first.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1)
        >>> model = LlamaForCausalLM(config)
        >>> lazy = run_without_logits(model, model, {"input_ids": torch.tensor([[1, 2, 3]])})
        >>> lazy.kept.shape, lazy.logits(lazy.hidden).shape
        (torch.Size([1, 1, 9]), torch.Size([1, 3, 9]))
    """
    head = model.get_output_embeddings()
    seen: dict[str, Any] = {}

    def watch_body(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen["hidden"] = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)

    def watch_head(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        device = output.device.type
        seen["autocast"] = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        seen["rows"], seen["answer"] = inputs[0], output

    bodies = {model.base_model, model.get_decoder()}  # some families call the decoder inside the base model directly
    hooks = [body.register_forward_hook(watch_body) for body in bodies] + [head.register_forward_hook(watch_head)]
    try:
        outputs = called(**{name: value for name, value in inputs.items() if name != "labels"}, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    hidden, kept = seen.get("hidden"), getattr(outputs, "logits", None)
    last = hidden[:, -1:] if isinstance(hidden, Tensor) else None
    if hidden is None or kept is None or not (_same(seen.get("rows"), last) and _same(seen.get("answer"), kept)):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its logits are not its output layer's plain answer to its last hidden state (it "
            "scales or caps them, say), so they can't be computed in chunks. Hold them all: chunk_size=None."
        )
    return LazyLogits(hidden, head, kept, seen["autocast"])


def chunked_losses(
    student: LazyLogits,
    teacher: LazyLogits | SparseTargets | None,
    *,
    labels: Tensor | None,
    mask: Tensor | None,
    losses: Sequence[LogitLoss],
    chunk_size: int,
) -> dict[str, Tensor]:
    """The losses of head "causal_tokens", with the logits of at most `chunk_size` positions at a time.

    Positions that count for nothing are dropped first.

    Args:
        student: What the student answered, of (batch, sequence).
        teacher: What the teacher answered, on the same positions; None where only the labels teach. Its head gets no
            gradient.
        labels: Of shape (batch, sequence), −100 where there is none; None leaves the part "labels" out.
        mask: Positions that count in `losses`, (batch, sequence − 1), from `loss_mask`; None counts all.
        losses: Each with a name of its own.
        chunk_size: Positions per chunk.

    Returns:
        "labels": the mean cross-entropy of the positions with a label; and each loss's name: its mean over the mask's
        positions. 0 where none counts.

    Raises:
        SettingError: The two sides have different positions or vocabularies, or there is no teacher for `losses`.
    """
    _check_sides(student, teacher, losses)
    names = ["labels"] * (labels is not None) + [loss.name for loss in losses]
    if not names:
        return {}
    hidden = student.hidden[:, :-1]  # position i predicts token i + 1
    counted = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask
    targets = torch.full_like(counted, IGNORED, dtype=torch.long) if labels is None else labels[:, 1:]
    used = (counted | (targets != IGNORED)).flatten().nonzero().squeeze(-1)
    batch = [_pick(hidden, used), _pick(targets, used), _pick(counted, used), *_teacher_rows(teacher, used)]
    compute = partial(_sums, student, teacher, losses, labels is not None)
    # An empty sum is 0, but has a graph that reaches every parameter: wrappers wait for all of them, in batches where
    # no position counts too.
    sums = student.kept[:0].sum().float().expand(len(names))
    for start in range(0, len(used), chunk_size):
        chunk = [values[start : start + chunk_size] for values in batch]
        sums = sums + checkpoint(compute, *chunk, use_reentrant=False)
    counts = [(targets != IGNORED).sum()] * (labels is not None) + [counted.sum()] * len(losses)
    return {name: sums[i] / count.clamp(min=1) for i, (name, count) in enumerate(zip(names, counts, strict=True))}


def _sums(
    student: LazyLogits,
    teacher: LazyLogits | SparseTargets | None,
    losses: Sequence[LogitLoss],
    labelled: bool,
    hidden: Tensor,
    targets: Tensor,
    counted: Tensor,
    *theirs: Tensor,
) -> Tensor:
    """The sum of each part over the rows of one chunk."""
    ours = student.logits(hidden)
    sums = []
    if losses:
        answer = _answer(teacher, theirs)
        count = counted.sum()
        sums += [loss.compare(ours, answer, counted) * count for loss in losses]
        del answer
    if labelled:  # last, since it keeps a tensor of the logits' size for backward
        wide = ours.to(torch.promote_types(ours.dtype, torch.float32))
        sums.insert(0, F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum"))
    return torch.stack(sums)


def _answer(teacher: Any, rows: Sequence[Tensor]) -> Tensor | SparseTargets:
    if isinstance(teacher, SparseTargets):
        ids, probabilities = rows
        return SparseTargets(ids, probabilities, teacher.tail, teacher.temperature)
    with torch.no_grad():
        return teacher.logits(rows[0])


def _teacher_rows(teacher: LazyLogits | SparseTargets | None, used: Tensor) -> list[Tensor]:
    if teacher is None:
        return []
    parts = (teacher.ids, teacher.probabilities) if isinstance(teacher, SparseTargets) else (teacher.hidden,)
    return [_pick(part[:, :-1], used) for part in parts]


def _pick(values: Tensor, used: Tensor) -> Tensor:
    """Rows of (batch, positions, …), counted through."""
    return values.flatten(0, 1)[used]


def _same(one: Any, two: Any) -> bool:
    """Bitwise equality up to a cast of the second (wrappers return mixed-precision outputs as float32)."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.shape != two.shape:
        return False
    return torch.allclose(one.detach(), two.detach().to(one.dtype), rtol=0.0, atol=0.0, equal_nan=True)


def _check_sides(student: LazyLogits, teacher: LazyLogits | SparseTargets | None, losses: Sequence[LogitLoss]) -> None:
    if teacher is None:
        if losses:
            raise SettingError(
                f"The losses {', '.join(loss.name for loss in losses)} need a teacher's answer, got None."
            )
        return
    theirs = teacher.ids if isinstance(teacher, SparseTargets) else teacher.hidden
    shapes = tuple(student.hidden.shape[:2]), tuple(theirs.shape[:2])
    if shapes[0] != shapes[1]:
        raise SettingError(
            f"The student answered (batch, sequence) {shapes[0]}, the teacher {shapes[1]}; they must match. Do both "
            "read the same tokens?"
        )
