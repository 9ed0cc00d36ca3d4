"""What the Trainer mixins of all techniques share: optimizer groups, a state beside a checkpoint, pushes."""

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

_Trainer: Any = object  # to the type checker any Trainer: the mixin stands before one, and is none itself


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


class PublishingMixin(_Trainer):
    """Makes a Trainer's own pushes those of hfshrink: the record's card, one commit, no file that was not meant.

    `TrainingArguments(push_to_hub=True, hub_strategy=…)` and `trainer.push_to_hub()` work as in the plain Trainer. Of
    a run nothing but the model and, where `hub_strategy` asks for them, its checkpoints are sent; never the pickled
    training arguments, which hold the token.
    """

    _publishing: Any = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check the token and make the repository."""
        from hfshrink.hub.training import open_run

        open_run(self, token, private)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the record; without one the plain Trainer's."""
        from hfshrink.hub.training import CARD_ARGUMENTS, write_card

        if not write_card(self, {**dict(zip(CARD_ARGUMENTS, args, strict=False)), **kwargs}):
            super().create_model_card(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish the model as it is now, with its record and card, in one commit.

        Args:
            commit_message: Its first line.
            blocking: Whether to wait; else a `Future` is returned.
            token: One that may write; None takes `args.hub_token`, or the saved one.
            revision: Branch; None takes `args.hub_revision`.
            private: Of a new repository.
            **kwargs: As of `Trainer.create_model_card`.

        Returns:
            The commit's address, on the main process.
        """
        from hfshrink.hub.training import push_run

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self._publishing is None or token is not None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push_run(self, commit_message or "End of training", blocking, revision, kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        from hfshrink.hub.training import push_checkpoint

        if self.is_world_process_zero():
            push_checkpoint(self, Path(checkpoint_folder))
