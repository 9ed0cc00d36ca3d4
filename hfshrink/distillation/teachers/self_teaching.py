"""Teachers without a bigger model: an average of the student's own weights, and its own deeper layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfshrink.distillation.checks import check_number, check_weights
from hfshrink.distillation.losses.capture import Wanted
from hfshrink.distillation.losses.divergences import binary_cross_entropy, kl_divergence, mean_squared_error
from hfshrink.distillation.losses.logits import TOKEN_HEADS
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import eval_mode, random_inputs
from hfshrink.labels import IGNORED
from hfshrink.modules import layer_stack

HEADS = ("single_label", "multi_label", "regression", *TOKEN_HEADS)
POOLINGS = ("mean", "first")
PROBE_TOKENS = 2  # of the forward pass that finds the widths


class MovingAverage:
    """A running mean of a model's weights as its own teacher: after each step θ̄ ← d · θ̄ + (1 − d) · θ.

    Mean Teacher (arXiv:1703.01780). SDA-BERT (arXiv:2002.10345) averages the last few steps with equal weights.
    The decay grows, d = min(decay, (1 + step) / (10 + step)), so that the random start is forgotten soon. Buffers are
    copied. Half-precision weights are averaged in float32, where small steps don't round to nothing.

    Args:
        model: The student. The copy of it, `.model`, is frozen and in eval mode.
        decay: d at the end, in [0, 1); about 1 / (1 − d) steps are averaged.

    Attributes:
        model: The teacher.
        step: Updates so far, a tensor of shape ().

    Raises:
        SettingError: `decay` is not in [0, 1).
        UnsupportedModelError: The weights are quantized, and so have no average.

    Example:
        >>> student = nn.Linear(1, 1, bias=False)
        >>> average = MovingAverage(student, decay=0.999)
        >>> _ = nn.init.constant_(average.model.weight, 0.0), nn.init.constant_(student.weight, 1.0)
        >>> average.update(student)
        >>> round(average.model.weight.item(), 4)  # the first decay is 1 / 10
        0.9
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        check_number("decay", decay, "in [0, 1)", lambda value: 0 <= value < 1)
        if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in model.parameters()):
            raise UnsupportedModelError(
                f"The weights of this {type(model).__name__} are quantized: they have no average. Train the float "
                "model."
            )
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for module in self.model.modules():
            if isinstance(vars(module).get("forward"), FunctionType | MethodType):
                # Someone patched it (TRL does): what the patch closes over is not copied, and is the student itself.
                del module.forward
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.grad = None
        self.step = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student's weights; call it after each optimizer step.

        Raises:
            SettingError: The student has other parameters than the model that this average began with.
        """
        step = int(self.step)
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = dict(self.model.named_parameters()), dict(student.named_parameters())
        if ours.keys() != theirs.keys():
            odd = sorted(ours.keys() ^ theirs.keys())
            raise SettingError(f"The student's parameters are not those of its average: {', '.join(odd[:4])} differ.")
        for name, value in ours.items():
            value.lerp_(theirs[name].to(value), 1 - decay)
        fresh = dict(student.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(fresh[name])
        self.step += 1

    def state(self) -> dict[str, Tensor]:
        """Everything that an interrupted run needs: the live tensors by name, to be saved, or to be copied into."""
        return {
            "step": self.step,
            **{f"model.{name}": value for name, value in self.model.named_parameters()},
            **{f"model.{name}": value for name, value in self.model.named_buffers()},
        }


@dataclass(frozen=True)
class DeepToShallowLoss:
    """The model's last layer teaches its shallower ones (Be Your Own Teacher, arXiv:1905.08094).

    Each chosen layer i gets a head of its own, a Linear on the pooled hidden states (on every position for token
    heads), which exists only while training. The mean over the layers of

        T² · KL(softmax(z / T) ‖ softmax(z_i / T)) + label_weight · CE(z_i, labels) + hint_weight · MSE(A_i h_i, h)

    is learned, z being the model's own logits and h its last layer's states, both without gradient. Multi-label heads
    take binary cross entropies, regression squared errors. There is no other teacher.

    Attributes:
        layers: Numbers of layers, or names of modules in models without one stack of layers
            (`"resnet.encoder.stages.0"`); None takes those at a quarter, a half and three quarters of the depth.
        temperature: T of the divergence.
        weight: Factor of this part in the training loss.
        final_weight: The factor at the end of training, linear in between; None keeps it constant.
        label_weight: Factor of the shallow heads' own loss on the labels, where there are any.
        hint_weight: Factor of the distance to the last layer's states through a learned A_i; needs numbered layers.
        pooling: "mean" over the positions that are not padding, or "first" position, for heads with one answer per
            example. Feature maps of images are always averaged.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=1, intermediate_size=8)
        >>> heads = DeepToShallowLoss().prepare(BertForSequenceClassification(config))
        >>> heads.student_wants.outputs
        ('bert.encoder.layer.0', 'bert.encoder.layer.1', 'bert.encoder.layer.2')
    """

    layers: Sequence[int | str] | None = None
    temperature: float = 3.0
    weight: float = 1.0
    final_weight: float | None = None
    label_weight: float = 1.0
    hint_weight: float = 0.0
    pooling: str = "mean"
    name = "deep_to_shallow"
    needs_teacher = False

    def __post_init__(self) -> None:
        check_weights(self.weight, self.final_weight)
        check_number("temperature", self.temperature, "above 0", lambda value: value > 0)
        for name in ("label_weight", "hint_weight"):
            check_number(name, getattr(self, name), "of at least 0", lambda value: value >= 0)
        if self.pooling not in POOLINGS:
            raise SettingError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}.")

    def prepare(self, student_model: nn.Module, teacher_model: nn.Module | None = None) -> nn.Module:
        """The shallow heads for this model, sized by one forward pass; `teacher_model` is not used.

        Raises:
            SettingError: Layers that do not exist or leave nothing deeper, or hints without numbered layers.
            UnsupportedModelError: No single stack of layers and no names given; a head without `logits`.
        """
        names, deepest = _layer_names(student_model, self.layers)
        if self.hint_weight and deepest is None:
            raise SettingError("hint_weight needs layers by number: among named modules none is known as the last.")
        wanted = names if deepest is None or not self.hint_weight else [*names, deepest]
        widths, classes = _probe(student_model, wanted)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same heads on every process
            return ShallowHeads(self, names, deepest if self.hint_weight else None, widths, classes)


class ShallowHeads(nn.Module):
    """The training-only heads of `DeepToShallowLoss`; called as every loss is.

    Args:
        settings: The loss.
        names: The shallow modules.
        deepest: The last layer, whose states are the hint; None without hints.
        widths: Module name -> size of its hidden states, or number of channels.
        classes: Size of the model's logits.
    """

    def __init__(
        self, settings: DeepToShallowLoss, names: list[str], deepest: str | None, widths: dict[str, int], classes: int
    ) -> None:
        super().__init__()
        self.settings, self.names, self.deepest = settings, names, deepest
        self.student_wants = Wanted(outputs=tuple(names if deepest is None else [*names, deepest]))
        self.teacher_wants = Wanted()
        self.heads = nn.ModuleList(nn.Linear(widths[name], classes) for name in names)
        hints = [] if deepest is None else [nn.Linear(widths[name], widths[deepest], bias=False) for name in names]
        self.hints = nn.ModuleList(hints)

    def forward(
        self, student: Any, teacher: Any = None, *, head: str, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """The unweighted loss of one batch; `student` has `.logits` and `.features`.

        Raises:
            SettingError: A kind of head that has no shallow form, or features that are missing.
        """
        if head not in HEADS:
            raise SettingError(f"DeepToShallowLoss knows heads of kind {', '.join(HEADS)}, not {head!r}.")
        missing = [name for name in self.student_wants.outputs if name not in student.features.outputs]
        if missing:
            raise SettingError(f"The student's features lack the outputs of {', '.join(missing)}.")
        settings, target = self.settings, student.logits.detach()
        deep = None if self.deepest is None else self._states(student, self.deepest, head).detach()
        losses = []
        for number, name in enumerate(self.names):
            states = self._states(student, name, head)
            logits = self.heads[number](states)
            loss = _match(logits, target, head, mask, settings.temperature)
            if settings.label_weight and labels is not None:
                loss = loss + settings.label_weight * _label_loss(logits, labels, head, mask)
            if deep is not None:
                hint = self.hints[number](states)
                loss = loss + settings.hint_weight * mean_squared_error(*_shift(hint, deep, head), mask)
            losses.append(loss)
        return torch.stack(losses).mean()

    def _states(self, student: Any, name: str, head: str) -> Tensor:
        """Hidden states in the heads' dtype: (batch, width), or (batch, sequence, width) for token heads."""
        states = student.features.outputs[name].to(self.heads[0].weight.dtype)
        if states.ndim == 4:  # a feature map (batch, channels, height, width)
            return states.mean((2, 3))
        if head in TOKEN_HEADS:
            return states
        if self.settings.pooling == "first":
            return states[:, 0]
        mask = student.features.mask
        if mask is None:
            return states.mean(1)
        counted = mask.to(states).unsqueeze(-1)  # (batch, sequence, 1)
        return (states * counted).sum(1) / counted.sum(1).clamp(min=1)


def _shift(ours: Tensor, theirs: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """For causal language models, position i of the mask belongs to the prediction made at i, of token i + 1."""
    return (ours[:, :-1], theirs[:, :-1]) if head == "causal_tokens" else (ours, theirs)


def _match(logits: Tensor, target: Tensor, head: str, mask: Tensor | None, temperature: float) -> Tensor:
    if head == "regression":
        return mean_squared_error(logits, target)
    if head == "multi_label":
        return binary_cross_entropy(logits, target, temperature)
    return kl_divergence(*_shift(logits, target, head), temperature, mask if head in TOKEN_HEADS else None)


def _label_loss(logits: Tensor, labels: Tensor, head: str, mask: Tensor | None) -> Tensor:
    if head == "regression":
        return mean_squared_error(logits.reshape(-1), labels.reshape(-1))
    if head == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits))
    if head == "causal_tokens":
        logits, labels = logits[:, :-1], labels[:, 1:]
    if head in TOKEN_HEADS and mask is not None:
        labels = labels.masked_fill(~mask, IGNORED)
    summed = F.cross_entropy(logits.flatten(end_dim=-2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    # An example without label (-100) adds nothing, but is an item; a position without label is none.
    items = labels.new_tensor(len(labels)) if head == "single_label" else (labels != IGNORED).sum()
    return summed / items.clamp(min=1)


def _layer_names(model: nn.Module, layers: Sequence[int | str] | None) -> tuple[list[str], str | None]:
    """Names of the shallow modules, and of the last layer where the layers are numbered."""
    if layers is not None and (isinstance(layers, str) or not layers or len(set(layers)) != len(layers)):
        raise SettingError(f"layers must be a list of different layers, got {layers!r}.")
    if layers is not None and all(isinstance(layer, str) for layer in layers):
        known = dict(model.named_modules())
        unknown = [str(layer) for layer in layers if layer not in known]
        if unknown:
            raise SettingError(f"{type(model).__name__} has no modules called {', '.join(unknown)}.")
        return [str(layer) for layer in layers], None
    stack, modules = layer_stack(model)
    depth = len(modules)
    if depth < 2:
        raise SettingError("The model has a single layer: there is none below the last.")
    if layers is None:
        layers = sorted({round(depth * part / 4) - 1 for part in (1, 2, 3)} & set(range(depth - 1)))
    if not all(isinstance(layer, int) and 0 <= layer < depth - 1 for layer in layers):
        raise SettingError(f"layers must lie below the last, in 0..{depth - 2}, got {list(layers)}.")
    return [f"{stack}.{layer}" for layer in layers], f"{stack}.{depth - 1}"


def _probe(model: nn.Module, names: list[str]) -> tuple[dict[str, int], int]:
    """The width of each module's output and of the logits, seen in one forward pass on random inputs."""
    widths: dict[str, int] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if not isinstance(states, Tensor) or states.ndim not in (3, 4):
                raise UnsupportedModelError(
                    f"{name} gives {type(states).__name__}, expected hidden states (batch, sequence, width) or a "
                    "feature map (batch, channels, height, width)."
                )
            widths[name] = states.shape[1] if states.ndim == 4 else states.shape[2]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
    try:
        with eval_mode(model), torch.no_grad():
            outputs = model(**random_inputs(model, 1, PROBE_TOKENS))
    finally:
        for handle in handles:
            handle.remove()
    if getattr(outputs, "logits", None) is None or set(widths) != set(names):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no logits, or does not run {', '.join(names)} in its forward pass."
        )
    return widths, outputs.logits.shape[-1]
