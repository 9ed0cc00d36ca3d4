"""The losses on features, fitted to two models: what to record of each, projections, and the checks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from hfshrink.distillation.losses.capture import AttentionStates, Features, Wanted, probe
from hfshrink.distillation.losses.features import (
    attention_mse,
    cosine_distance,
    default_relation_heads,
    feature_map_mse,
    first_tokens,
    hidden_mse,
    normalized_distance,
    relation_loss,
)
from hfshrink.distillation.losses.mapping import NEAREST, find_layer, map_layers, match_rising, teaching_layers
from hfshrink.errors import SettingError, UnsupportedModelError
from hfshrink.inputs import random_inputs
from hfshrink.modules import layer_stack

DISTANCES = {"mse": hidden_mse, "cosine": cosine_distance}
STATES = ("query", "key", "value")


class MatchedHidden(nn.Module):
    """A `HiddenLoss` for two models.

    Attributes:
        student_wants: What to record of the student.
        teacher_wants: What to record of the teacher, in the same order; with `layers="nearest"` any of the student's
            outputs may be matched with them.
        layer_projection: The student's width -> the teacher's, shared by all layers.
        embedding_projection: The same for the embeddings.
    """

    def __init__(self, loss: Any, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        (ours, depth), (theirs, teacher_depth) = _stack(student), _stack(teacher)
        self.nearest = loss.layers == NEAREST
        learners, taught = _layers(loss, depth, teacher_depth)
        by_default = not (loss.first_token or self.nearest)
        embeddings = by_default if loss.embeddings is None else loss.embeddings
        self.student_wants = Wanted(tuple(f"{ours}.{i}" for i in learners), (f"{ours}.0",) * embeddings)
        self.teacher_wants = Wanted(tuple(f"{theirs}.{j}" for j in taught), (f"{theirs}.0",) * embeddings)
        seen = probe(student, self.student_wants), probe(teacher, self.teacher_wants)
        layer_widths = _widths([side.outputs for side in seen], 3)
        embedding_widths = _widths([side.inputs for side in seen], 3) if embeddings else (0, 0)
        self.layer_projection = _projection(nn.Linear, layer_widths, loss, student, seed=0)
        self.embedding_projection = _projection(nn.Linear, embedding_widths, loss, student, seed=1)

    def forward(self, student: Any, teacher: Any, **_: Any) -> Tensor:
        """The unweighted loss of one batch; `student` and `teacher` have `.features`."""
        ours, theirs = student.features, teacher.features
        distances = [
            self._compare(ours.outputs[a], theirs.outputs[b], ours.mask, self.layer_projection)
            for a, b in self.pairs(ours, theirs)
        ]
        distances += [
            self._compare(ours.inputs[a], theirs.inputs[b], ours.mask, self.embedding_projection)
            for a, b in zip(self.student_wants.inputs, self.teacher_wants.inputs, strict=True)
        ]
        return torch.stack(distances).mean()

    def pairs(self, student: Features, teacher: Features) -> list[tuple[str, str]]:
        """(student module, teacher module) of the layers that are matched in this batch."""
        ours, theirs = self.student_wants.outputs, self.teacher_wants.outputs
        if self.nearest:
            ours = tuple(ours[i] for i in match_rising(self._distances(student, teacher)))
        return list(zip(ours, theirs, strict=True))

    @torch.no_grad()
    def _distances(self, student: Features, teacher: Features) -> list[list[float]]:
        """Of every recorded layer of the student from every one of the teacher; inf where no rising match takes it."""
        ours, theirs = self.student_wants.outputs, self.teacher_wants.outputs
        above = len(ours) - len(theirs)
        table = torch.full((len(ours), len(theirs)), torch.inf)
        table = table.to(student.outputs[ours[0]].device)  # read once: each look at a GPU's number waits for it
        for i, name in enumerate(ours):
            projected = self.layer_projection(student.outputs[name].float())
            for j in range(max(0, i - above), min(i + 1, len(theirs))):
                table[i, j] = self._compare(projected, teacher.outputs[theirs[j]], student.mask, nn.Identity())
        return table.tolist()

    def _compare(self, ours: Tensor, theirs: Tensor, mask: Tensor | None, projection: nn.Module) -> Tensor:
        check_positions(ours.shape[:2], theirs.shape[:2], mask)
        theirs = theirs.to(ours.device)
        if self.loss.first_token:
            ours, theirs, mask = first_tokens(ours, mask), first_tokens(theirs, mask), None
        distance = normalized_distance if self.loss.normalize else DISTANCES[self.loss.distance]
        return distance(projection(ours.float()), theirs, mask)


class MatchedAttention(nn.Module):
    """An `AttentionLoss` for two models.

    Attributes:
        student_wants: What to record of the student.
        teacher_wants: What to record of the teacher, in the same order.
    """

    def __init__(self, loss: Any, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        layers = map_layers(_stack(student)[1], _stack(teacher)[1], loss.layers)
        self.student_wants = Wanted(attention=tuple(layers))
        self.teacher_wants = Wanted(attention=tuple(layers.values()))
        ours, theirs = probe(student, self.student_wants).attention, probe(teacher, self.teacher_wants).attention
        for i, j in layers.items():
            heads = ours[i].query.shape[1], theirs[j].query.shape[1]
            if heads[0] != heads[1]:
                raise SettingError(
                    f"AttentionLoss needs as many heads in both models; layer {i} of the student has {heads[0]}, "
                    f"layer {j} of the teacher {heads[1]}. Use RelationLoss, which fits any numbers."
                )

    def forward(self, student: Any, teacher: Any, **_: Any) -> Tensor:
        """The unweighted loss of one batch; `student` and `teacher` have `.features`."""
        distances = []
        for i, j in zip(self.student_wants.attention, self.teacher_wants.attention, strict=True):
            ours, theirs, pairs = _attention_of(student.features, i, teacher.features, j)
            distances.append(
                attention_mse(ours.scores, theirs.scores.to(ours.query.device), student.features.mask, pairs)
            )
        return torch.stack(distances).mean()


class MatchedRelations(nn.Module):
    """A `RelationLoss` for two models.

    Attributes:
        student_wants: What to record of the student.
        teacher_wants: What to record of the teacher.
        relation_heads: Heads of the relations.
    """

    def __init__(self, loss: Any, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.student_layer = find_layer(loss.student_layer, _stack(student)[1], "student")
        self.teacher_layer = find_layer(loss.teacher_layer, _stack(teacher)[1], "teacher")
        self.student_wants = Wanted(attention=(self.student_layer,))
        self.teacher_wants = Wanted(attention=(self.teacher_layer,))
        ours = _state_widths(probe(student, self.student_wants).attention[self.student_layer], loss)
        theirs = _state_widths(probe(teacher, self.teacher_wants).attention[self.teacher_layer], loss)
        self.relation_heads = loss.relation_heads or default_relation_heads(*ours.values(), *theirs.values())
        for side, widths in (("student", ours), ("teacher", theirs)):
            for kind, width in widths.items():
                if width % self.relation_heads:
                    raise SettingError(
                        f"relation_heads must divide all widths, got {self.relation_heads}; the {side}'s {kind} "
                        f"states are {width} wide (student {ours}, teacher {theirs}). None takes one that fits."
                    )

    def forward(self, student: Any, teacher: Any, **_: Any) -> Tensor:
        """The unweighted loss of one batch; `student` and `teacher` have `.features`."""
        ours, theirs, pairs = _attention_of(student.features, self.student_layer, teacher.features, self.teacher_layer)
        total, shares = ours.query.new_zeros((), dtype=torch.float32), 0.0
        for kind in STATES:
            share = self.loss.share(kind)
            if share:
                a, b = getattr(ours, kind), getattr(theirs, kind).to(ours.query.device)
                total = total + share * relation_loss(a, b, self.relation_heads, student.features.mask, pairs)
                shares += share
        return total / shares


class MatchedFeatureMaps(nn.Module):
    """A `FeatureMapLoss` for two models.

    Attributes:
        student_wants: What to record of the student.
        teacher_wants: What to record of the teacher, in the same order.
        projections: For each matched stage the student's channels -> the teacher's.
    """

    def __init__(self, loss: Any, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        images = random_inputs(student, 1, 1)
        stages = match_stages(student, teacher, images) if loss.stages is None else dict(loss.stages)
        self.student_wants = Wanted(tuple(stages))
        self.teacher_wants = Wanted(tuple(stages.values()))
        ours = probe(student, self.student_wants, images).outputs
        theirs = probe(teacher, self.teacher_wants, images).outputs
        self.projections = nn.ModuleList(
            _projection(nn.Conv2d, _widths([{a: ours[a]}, {b: theirs[b]}], 4), loss, student, seed=stage)
            for stage, (a, b) in enumerate(stages.items())
        )

    def forward(self, student: Any, teacher: Any, **_: Any) -> Tensor:
        """The unweighted loss of one batch; `student` and `teacher` have `.features`."""
        distances = []
        names = zip(self.student_wants.outputs, self.teacher_wants.outputs, strict=True)
        for (a, b), projection in zip(names, self.projections, strict=True):
            ours, theirs = student.features.outputs[a], teacher.features.outputs[b]
            distances.append(feature_map_mse(projection(ours.float()), theirs.to(ours.device)))
        return torch.stack(distances).mean()


def match_stages(student: nn.Module, teacher: nn.Module, images: dict[str, Tensor]) -> dict[str, str]:
    """Student module -> teacher module: the last block at each size of feature maps that both models have.

    Raises:
        UnsupportedModelError: One of them has no blocks that make feature maps, or they share no size.
    """
    ours, theirs = _stages(student, images, "student"), _stages(teacher, images, "teacher")
    matched = {name: theirs[size] for size, name in ours.items() if size in theirs}
    if not matched:
        raise UnsupportedModelError(
            f"The student's feature maps have the sizes {', '.join(map(str, ours))}, the teacher's "
            f"{', '.join(map(str, theirs))}: none in common. Give stages={{student module: teacher module}}."
        )
    return matched


def check_positions(ours: Iterable[int], theirs: Iterable[int], mask: Tensor | None) -> None:
    """Check that both models and the mask speak of the same positions.

    Args:
        ours: (batch, sequence) of the student's states.
        theirs: The same of the teacher's.
        mask: Booleans (batch, sequence) or None.

    Raises:
        SettingError: They differ.
    """
    student, teacher = tuple(ours), tuple(theirs)
    if student != teacher:
        raise SettingError(
            f"The student's states are of (batch, sequence) = {student}, the teacher's of {teacher}; they must match. "
            "Both must read the same tokens, or images in as many patches."
        )
    if mask is not None and tuple(mask.shape) != student:
        raise SettingError(
            f"The mask of padding is of (batch, sequence) = {tuple(mask.shape)}, the states of {student}; they must "
            "match. A model that adds or merges positions can't be matched position by position."
        )


def _layers(loss: Any, depth: int, teacher_depth: int) -> tuple[list[int], list[int]]:
    """The student's layers to record, and the teacher's."""
    if loss.layers == NEAREST:
        return list(range(depth)), list(teaching_layers(depth, teacher_depth))
    layers = map_layers(depth, teacher_depth, loss.layers)
    return list(layers), list(layers.values())


def _stack(model: nn.Module) -> tuple[str, int]:
    name, layers = layer_stack(model)
    return name, len(layers)


def _widths(sides: list[dict[str, Tensor]], dimensions: int) -> tuple[int, int]:
    """The one width of the student's tensors, and that of the teacher's: last of 3 dimensions, channels of 4."""
    found = []
    for side, tensors in zip(("student", "teacher"), sides, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        widths = {shape[1 if dimensions == 4 else -1] for shape in shapes.values()}
        batches = {shape[0] for shape in shapes.values()}  # a probe has one row
        if len(widths) != 1 or batches != {1} or any(len(shape) != dimensions for shape in shapes.values()):
            wanted, other = {
                3: ("(batch, sequence, width) of one row, all of one width", "FeatureMapLoss compares maps of images"),
                4: ("(batch, channels, height, width) of one row", "HiddenLoss compares sequences of states"),
            }[dimensions]
            raise UnsupportedModelError(f"Expected states of shape {wanted}, got from the {side} {shapes}. {other}.")
        found.append(widths.pop())
    return found[0], found[1]


def _projection(kind: type[nn.Module], widths: tuple[int, int], loss: Any, student: Any, seed: int) -> nn.Module:
    """A learned map between widths that differ: float32, on the student's device, the same in every process."""
    ours, theirs = widths
    if ours == theirs:
        return nn.Identity()
    if not loss.projection:
        raise SettingError(
            f"The student is {ours} wide, the teacher {theirs}, which {type(loss).__name__}(projection=False) can't "
            "compare. Leave projection=True to learn a map between them."
        )
    size = (1,) if kind is nn.Conv2d else ()
    made = skip_init(kind, ours, theirs, *size, bias=False)  # draws nothing from the caller's random state
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.normal_(std=ours**-0.5, generator=generator)  # states keep their size
    return made.to(student.device, torch.float32)


def _attention_of(
    student: Features, i: int, teacher: Features, j: int
) -> tuple[AttentionStates, AttentionStates, Tensor | None]:
    """Both models' states, and the pairs that both may look at."""
    ours, theirs = student.attention[i], teacher.attention[j]
    shapes = [(len(states.query), states.query.shape[2]) for states in (ours, theirs)]
    check_positions(shapes[0], shapes[1], student.mask)
    allowed = [states.pairs.to(ours.query.device) for states in (ours, theirs) if states.pairs is not None]
    return ours, theirs, reduce(torch.logical_and, allowed) if allowed else None


def _state_widths(states: AttentionStates, loss: Any) -> dict[str, int]:
    """Heads × head width of the states that the loss compares."""
    tensors = {kind: getattr(states, kind) for kind in STATES if loss.share(kind)}
    return {kind: tensor.shape[1] * tensor.shape[3] for kind, tensor in tensors.items()}


def _stages(model: nn.Module, images: dict[str, Tensor], side: str) -> dict[tuple[int, ...], str]:
    """(height, width) -> the last of the model's blocks (items of its outermost ModuleLists) that makes such maps."""
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = tuple(f"{name}.{number}" for name in outermost for number in range(lists[name]))
    outputs = probe(model, Wanted(blocks), images).outputs if blocks else {}
    found = {tuple(output.shape[2:]): name for name, output in outputs.items() if output.ndim == 4}
    if not found:
        raise UnsupportedModelError(
            f"The {side} ({type(model).__name__}) has no list of blocks that make feature maps, as ResNet, MobileNet "
            "and EfficientNet have. Give stages={student module: teacher module}, or use HiddenLoss."
        )
    return found
