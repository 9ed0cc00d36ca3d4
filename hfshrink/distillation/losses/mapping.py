"""Which layer of the teacher each layer of the student is matched with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from hfshrink.errors import SettingError

LAYER_MAPS = ("uniform", "skip", "last")
NEAREST = "nearest"
"""Not a fixed map: the pairs are found anew in every batch, by `match_rising`."""
TAUGHT_LAYERS = 4  # as many of the teacher's as in CoFi


def map_layers(student_depth: int, teacher_depth: int, layers: str | Mapping[int, int] = "uniform") -> dict[int, int]:
    """Student layer -> teacher layer, both counted from 0.

    With m = 1 … N_S counting the student's layers from 1:

    - `"uniform"`: g(m) = m · N_T / N_S, rounded (TinyBERT, arXiv:1909.10351): the last matches the last.
    - `"skip"`: the same without the last layer, which is left to the logits (PKD-Skip, arXiv:1908.09355).
    - `"last"`: g(m) = N_T − N_S + m, without the last layer (PKD-Last).

    Args:
        student_depth: N_S, layers of the student.
        teacher_depth: N_T, layers of the teacher.
        layers: One of the names, or {student layer: teacher layer}, where negative numbers count from the end. A
            student made by `make_student` from some of the teacher's layers may be given just those.

    Raises:
        SettingError: An unknown name; a student that is deeper than its teacher; a layer that is not there.

    Example:
        >>> map_layers(4, 12)
        {0: 2, 1: 5, 2: 8, 3: 11}
        >>> map_layers(6, 12, "skip")
        {0: 1, 1: 3, 2: 5, 3: 7, 4: 9}
        >>> map_layers(6, 12, "last")
        {0: 6, 1: 7, 2: 8, 3: 9, 4: 10}
        >>> map_layers(6, 12, {0: 0, -1: -1})
        {0: 0, 5: 11}
    """
    if not isinstance(layers, str):
        return _explicit(student_depth, teacher_depth, layers)
    if layers not in LAYER_MAPS:
        raise SettingError(
            f"layers must be one of {', '.join(LAYER_MAPS)} or a mapping, got {layers!r}. "
            f'Only HiddenLoss takes "{NEAREST}".'
        )
    if student_depth > teacher_depth:
        raise SettingError(
            f"The student has {student_depth} layers, the teacher only {teacher_depth}: the map {layers!r} needs a "
            "teacher that is at least as deep. Give layers={student layer: teacher layer}."
        )
    if layers == "uniform":
        return {i: _stretch(i, student_depth, teacher_depth) for i in range(student_depth)}
    if student_depth == 1:
        raise SettingError(
            f"The map {layers!r} leaves out the last layer, and the student has only one (the teacher "
            f'{teacher_depth}). Use layers="uniform".'
        )
    if layers == "skip":
        return {i: _stretch(i, student_depth, teacher_depth) for i in range(student_depth - 1)}
    return {i: teacher_depth - student_depth + i for i in range(student_depth - 1)}


def teaching_layers(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's layers that teach a student being pruned, evenly spread, with the last (CoFi, arXiv:2204.00408).

    Four of them, which is every third of 12 as in the paper; fewer where a model has fewer layers.

    Args:
        student_depth: Layers of the student, which may be deeper than its teacher.
        teacher_depth: Layers of the teacher.

    Example:
        >>> teaching_layers(12, 12), teaching_layers(6, 6), teaching_layers(3, 12)
        ((2, 5, 8, 11), (1, 2, 4, 5), (3, 7, 11))
    """
    count = min(TAUGHT_LAYERS, student_depth, teacher_depth)
    return tuple(_stretch(i, count, teacher_depth) for i in range(count))


def match_rising(distances: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The student's layers m_1 < m_2 < … < m_k of least Σ_j distances[m_j][j], one for each layer of the teacher.

    The order-constrained match of CoFi (arXiv:2204.00408), found exactly by dynamic programming. Of equal sums it
    takes the lower layers: a layer that passes its input on loses to the one below it, which made that state.

    Args:
        distances: Of shape (layers of the student, layers of the teacher). Not-a-number, as in a run that diverged,
            still gives some rising match.

    Raises:
        SettingError: The student has fewer layers than are to be matched.

    Example:
        >>> match_rising([[3.0, 0.0], [1.0, 5.0], [4.0, 2.0]])
        (1, 2)
    """
    depth, count = len(distances), len(distances[0])
    if depth < count:
        raise SettingError(f"The student has {depth} layers, too few to match {count} layers of the teacher.")
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * depth
    for j in range(count):  # best[k]: the first j of the teacher's layers, with student layers below j + k
        ends = [
            (total + distances[i][j], (*taken, i)) for i, (total, taken) in zip(range(j, depth), best, strict=False)
        ]
        best = list(accumulate(ends, min))
    return best[-1][1]


def find_layer(number: int, depth: int, side: str) -> int:
    """A layer's number counted from 0; negative numbers count from the end.

    Args:
        number: From −depth to depth − 1.
        depth: Layers that there are.
        side: "student" or "teacher", for the error.

    Raises:
        SettingError: There is no such layer.

    Example:
        >>> find_layer(-1, 12, "teacher")
        11
    """
    if not isinstance(number, int) or isinstance(number, bool) or not -depth <= number < depth:
        raise SettingError(
            f"The {side} has {depth} layers, 0..{depth - 1} (or −{depth}..−1 from the end), got layer {number!r}."
        )
    return number % depth


def _stretch(i: int, student_depth: int, teacher_depth: int) -> int:
    """round((i + 1) · N_T / N_S) − 1 in whole numbers, halves up: no two layers meet."""
    return (2 * (i + 1) * teacher_depth + student_depth) // (2 * student_depth) - 1


def _explicit(student_depth: int, teacher_depth: int, layers: Mapping[int, int]) -> dict[int, int]:
    if not isinstance(layers, Mapping) or not layers:
        raise SettingError(
            f"layers must be one of {', '.join(LAYER_MAPS)}, or name at least one pair as "
            f"{{student layer: teacher layer}}, got {layers!r}."
        )
    found: dict[int, int] = {}
    for ours, theirs in layers.items():
        student = find_layer(ours, student_depth, "student")
        if student in found:
            raise SettingError(f"layers names the student's layer {student} twice: {dict(layers)}.")
        found[student] = find_layer(theirs, teacher_depth, "teacher")
    return found
