"""The teacher: put beside the student, aligned with it, asked for its logits."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import SettingError
from hfshrink.loading import find_processor, infer_task, load
from hfshrink.modules import max_positions

logger = logging.getLogger(__name__)

CLASS_TASKS = ("text-classification", "token-classification", "image-classification")


def load_teacher(teacher: Any) -> tuple[nn.Module, Any]:
    """Load a teacher (or take the loaded one), and find its tokenizer or processor.

    Raises:
        SettingError: It is no PyTorch model.
    """
    model, processor = load(teacher)
    if not isinstance(model, nn.Module):
        raise SettingError(
            f"The teacher must be a PyTorch model, got {type(model).__name__}. Distil from the float model."
        )
    return model, processor


def head_kind(task: str, config: Any, teacher: Any = None, labels: Any = None) -> str:
    """Which form of a logit loss a model's head needs.

    Args:
        task: The student's task.
        config: The student's config.
        teacher: The teacher, whose config may name the problem type where the student's does not.
        labels: Labels of a batch: of several numbers each where the problem type is known to neither.

    Returns:
        "single_label", "multi_label", "regression", "tokens", "causal_tokens" or "span".

    Raises:
        SettingError: The head has no logits.
    """
    if task == "feature-extraction":
        name = type(config).__name__
        raise SettingError(f"The student ({name}) has no head and so no logits to distil. Load it with a head.")
    kinds = {"question-answering": "span", "text-generation": "causal_tokens"}
    if task in ("token-classification", *LANGUAGE_TASKS, "question-answering"):
        return kinds.get(task, "tokens")
    problem = config.problem_type or getattr(getattr(teacher, "config", None), "problem_type", None)
    if problem == "regression" or (problem is None and config.num_labels == 1):
        return "regression"
    if problem == "multi_label_classification" or (
        problem is None and labels is not None and labels.is_floating_point()
    ):
        return "multi_label"
    return "single_label"


def align(
    student: Any,
    teacher: Any,
    student_processor: Any = None,
    teacher_processor: Any = None,
    *,
    same_tokens: bool = True,
) -> Tensor | None:
    """Check that a teacher can teach a student, and find how its labels map onto the student's.

    Args:
        student: The student model.
        teacher: The teacher model.
        student_processor: Its tokenizer or processor; None looks beside the model.
        teacher_processor: The teacher's.
        same_tokens: Whether both must read the same token ids; False where each has its own tokenizer.

    Returns:
        The permutation `order` that puts the teacher's logits into the student's label order, `logits[..., order]`;
        None where they agree already.

    Raises:
        SettingError: Different tasks, labels, vocabularies or tokenizers; the message names both sides.
    """
    tasks = infer_task(student), infer_task(teacher)
    if tasks[0] != tasks[1]:
        raise SettingError(f"The student does {tasks[0]}, the teacher {tasks[1]}; they need the same kind of head.")
    if same_tokens:
        _check_vocabulary(student, teacher, student_processor, teacher_processor, tasks[0])
    sizes = (sum(p.numel() for p in student.parameters()), sum(p.numel() for p in teacher.parameters()))
    if sizes[0] > sizes[1]:
        logger.warning(
            "The student (%s parameters) is larger than its teacher (%s).", f"{sizes[0]:,}", f"{sizes[1]:,}"
        )
    return label_order(student.config, teacher.config) if tasks[0] in CLASS_TASKS else None


def label_order(student: Any, teacher: Any) -> Tensor | None:
    """The teacher's label id for each of the student's, by name (in any case of letters); None where they agree.

    Args:
        student: Config of the student.
        teacher: Config of the teacher.

    Raises:
        SettingError: The names differ; the message shows both maps.

    Example:
        >>> from transformers import BertConfig
        >>> student = BertConfig(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
        >>> teacher = BertConfig(id2label={0: "Yes", 1: "No"}, label2id={"Yes": 0, "No": 1})
        >>> label_order(student, teacher)
        tensor([1, 0])
    """
    ours, theirs = (
        {str(name).casefold(): int(i) for name, i in config.label2id.items()} for config in (student, teacher)
    )
    if student.num_labels == teacher.num_labels == 1:
        return None
    if ours.keys() != theirs.keys() or len(ours) != student.num_labels:
        raise SettingError(
            f"The student's labels {student.label2id} are not the teacher's {teacher.label2id}. If they mean the "
            f"same in this order, "
            "say so: student.config.label2id, student.config.id2label = teacher.config.label2id, "
            "teacher.config.id2label."
        )
    order = [theirs[name] for name in sorted(ours, key=ours.__getitem__)]
    return None if order == list(range(len(order))) else torch.tensor(order)


def check_lengths(longest: int | None, student: Any, teacher: Any) -> None:
    """Raise `SettingError` where a row is longer than what one of the two models can read; unknown lengths pass."""
    for role, model in (("student", student), ("teacher", teacher)):
        limit = None if model is None else max_positions(model)
        if longest is not None and limit is not None and longest > limit:
            raise SettingError(
                f"The longest row has {longest} tokens, but the {role} reads at most {limit}. "
                f"Tokenize with truncation=True, max_length={limit}."
            )


def ask_teacher(teacher: nn.Module, inputs: dict[str, Any], accepted: set[str], label_names: set[str]) -> Any:
    """The teacher's outputs on a batch: no gradient, no labels, only the inputs it takes, in its own float dtype."""
    dtype = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
    device = next(teacher.parameters()).device
    kept = {
        name: _fitted(value, device, dtype)
        for name, value in inputs.items()
        if name in accepted and name not in label_names
    }
    with torch.no_grad():
        return teacher(**kept)


def check_finite(value: Tensor, what: str) -> None:
    """Raise `SettingError` where a tensor holds NaN or infinity."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise SettingError(
            f"{what} hold NaN or infinity in {bad} of {value.numel()} places. Check the model's weights, the "
            f"learning rate, and "
            "mixed precision (bf16 overflows less than fp16)."
        )


def _fitted(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _check_vocabulary(student: Any, teacher: Any, ours: Any, theirs: Any, task: str) -> None:
    sizes = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    if sizes[0] != sizes[1] and task in LANGUAGE_TASKS:
        raise SettingError(
            f"The student predicts {sizes[0]} tokens, the teacher {sizes[1]}; logits of different vocabularies can't "
            "be matched token by token. losses=[CrossTokenizerLoss()] compares them by rank."
        )
    own, other = _vocabulary(ours or find_processor(student)), _vocabulary(theirs or find_processor(teacher))
    if own is not None and other is not None:
        _check_tokenizers(own, other)
    elif None not in sizes and sizes[0] != sizes[1]:
        raise SettingError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}: they do not read the same "
            "token ids. If they share a tokenizer, prove it: pass processing_class= and give the teacher as a "
            "folder or Hub id with its tokenizer."
        )


def _check_tokenizers(ours: dict[str, int], theirs: dict[str, int]) -> None:
    if ours == theirs:
        return
    token = next(t for t in sorted({**ours, **theirs}) if ours.get(t) != theirs.get(t))
    raise SettingError(
        f"Student and teacher have different tokenizers ({len(ours)} and {len(theirs)} entries; for instance "
        f"{token!r} is {ours.get(token)} for the student and {theirs.get(token)} for the teacher). Take a student "
        "with the teacher's tokenizer."
    )


def _vocabulary(processor: Any) -> dict[str, int] | None:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else None
