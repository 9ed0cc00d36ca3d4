"""What the Trainer mixins of all techniques share: optimizer groups of their own, a state beside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hfshrink.data import LANGUAGE_TASKS
from hfshrink.errors import CheckpointError, HfshrinkError
from hfshrink.loading import infer_task


def counts_tokens(model: Any) -> bool:
    """Whether a model's own loss divides by the number of items that the Trainer tells it."""
    try:
        return infer_task(model) in LANGUAGE_TASKS
    except HfshrinkError:  # a model of the user's own
        return False


def is_sharded(trainer: Any) -> bool:
    """Whether a Trainer's processes hold parts of each weight."""
    return bool(
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.is_distributed_loading_by_transformers
    )


def add_group(optimizer: Any, parameters: Sequence[nn.Parameter], **options: Any) -> None:
    """Give parameters that are not the model's a group of their own, without decay, where they have none yet."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if parameters and not any(id(parameter) in known for parameter in parameters):
        optimizer.add_param_group({"params": list(parameters), "weight_decay": 0.0, **options})


def forget_group(optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
    """Take that group out again: another run would go on using it, and the next checkpoint could not be written."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    own = {id(parameter) for parameter in parameters}
    if own and optimizer is not None:
        groups = optimizer.param_groups
        groups[:] = [group for group in groups if not own & {id(parameter) for parameter in group["params"]}]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def write_state(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors beside a checkpoint."""
    save_file({name: value.cpu().contiguous() for name, value in state.items()}, str(file))


def read_state(file: Path, keyword: str) -> dict[str, Tensor]:
    """Read what `write_state` wrote.

    Args:
        file: In the checkpoint's folder.
        keyword: Of the trainer, without which none is written.

    Raises:
        CheckpointError: There is none, or it is corrupt.
    """
    try:
        return load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file.parent} has no readable {file.name} ({error}), without which the run can't go on exactly. "
            f"Was it saved with save_only_model, or without {keyword}=? Start anew."
        ) from error
