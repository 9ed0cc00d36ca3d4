"""GPT-2's Conv1D that lost inputs or outputs of its weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.layers.common import INDEX_DTYPE, checked_index, copied, empty_parameter, read_spec


class ResizedConv1D(Conv1D):
    """A Conv1D with the inputs and outputs of a dense one that were kept. Its weight stands as (in, out).

    Attributes:
        weight: Shape (kept in, kept out).
        bias: Shape (kept out,).
        kept_inputs: The dense number of each input, shape (kept in,), int32, rising; None where none was cut.
        kept_outputs: The dense number of each output, shape (kept out,), int32, rising; None where none was cut.

    Example:
        >>> layer = ResizedConv1D.from_dense(Conv1D(4, 3), outputs=torch.tensor([0, 2]))
        >>> layer
        ResizedConv1D(nx=3, nf=2 of 4)
        >>> layer.to_dense().weight[:, 1].tolist()
        [0.0, 0.0, 0.0]
    """

    kind = "resized_conv1d"
    replaces: type[nn.Module] = Conv1D
    kept_inputs: Tensor | None
    kept_outputs: Tensor | None

    def __init__(self, nx: int, nf: int, dense_nx: int, dense_nf: int) -> None:
        """Shapes only, on the meta device; use `from_dense` for a layer with values."""
        if not (1 <= nx <= dense_nx and 1 <= nf <= dense_nf) or (nx == dense_nx and nf == dense_nf):
            raise SettingError(
                f"A weight of shape ({dense_nx}, {dense_nf}) can't be cut to ({nx}, {nf}): at least one input and one "
                "output must stay, none can be added, and without a cut the layer stays a Conv1D."
            )
        nn.Module.__init__(self)  # Conv1D's own draws random weights
        self.nx, self.nf, self.dense_nx, self.dense_nf = nx, nf, dense_nx, dense_nf
        self.weight, self.bias = empty_parameter(nx, nf), empty_parameter(nf)
        for name, kept, dense in (("kept_inputs", nx, dense_nx), ("kept_outputs", nf, dense_nf)):
            index = torch.empty(kept, dtype=INDEX_DTYPE, device="meta") if kept < dense else None
            self.register_buffer(name, index)

    @classmethod
    def from_dense(cls, conv: Any, outputs: Tensor | None = None, inputs: Tensor | None = None) -> ResizedConv1D:
        """Keep some inputs and outputs of a Conv1D, in its dtype and on its device.

        Args:
            conv: The dense layer, weight of shape (in, out); or one that was resized before, which then shrinks
                further.
            outputs: Outputs to keep, shape (kept out,), integers, rising; None keeps all.
            inputs: Inputs to keep, shape (kept in,), integers, rising; None keeps all.

        Raises:
            SettingError: Indices of a wrong type, order or range, none at all, or nothing is cut.
        """
        nx, nf = conv.weight.shape
        inputs = checked_index(inputs, nx, "inputs").to(conv.weight.device)
        outputs = checked_index(outputs, nf, "outputs").to(conv.weight.device)
        if len(inputs) == nx and len(outputs) == nf:
            raise SettingError(
                f"Nothing is cut: a weight of shape ({nx}, {nf}) keeps all inputs and outputs. Leave it as it is."
            )
        layer = cls(len(inputs), len(outputs), *getattr(conv, "dense_shape", (nx, nf)))
        weight = conv.weight.detach()[inputs][:, outputs]
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=conv.weight.requires_grad)
        layer.register_parameter("bias", copied(conv.bias, outputs))
        for name, index in (("kept_inputs", inputs), ("kept_outputs", outputs)):
            if getattr(layer, name) is not None:
                before = getattr(conv, name, None)
                setattr(layer, name, (index if before is None else before.long()[index]).to(INDEX_DTYPE))
        return layer.train(conv.training)

    @classmethod
    def empty(cls, spec: Mapping[str, Any]) -> ResizedConv1D:
        """The layer of a spec on the meta device, for a checkpoint to fill.

        Raises:
            CheckpointError: The spec has other entries or impossible sizes.
        """
        sizes = read_spec(spec, cls.kind, ("nx", "nf", "dense_nx", "dense_nf"))
        if not spec["bias"]:
            raise CheckpointError("A Conv1D always has a bias, got a spec without one.")
        try:
            return cls(*sizes)
        except SettingError as error:
            raise CheckpointError(str(error)) from None

    def spec(self) -> dict[str, Any]:
        """The JSON-safe description from which `empty` builds the same shapes."""
        sizes = {"nx": self.nx, "nf": self.nf, "dense_nx": self.dense_nx, "dense_nf": self.dense_nf}
        return {"kind": self.kind, **sizes, "bias": True}

    @property
    def dense_shape(self) -> tuple[int, int]:
        """Shape (in, out) of the weight that this layer was cut from."""
        return self.dense_nx, self.dense_nf

    def kept(self) -> tuple[Tensor, Tensor]:
        """The dense output and input numbers that this layer has, shapes (kept out,) and (kept in,), int64.

        Raises:
            CheckpointError: The loaded numbers are not rising within the dense size: the checkpoint is corrupt.
        """
        try:
            outputs = checked_index(self.kept_outputs, self.dense_nf, "kept_outputs")
            inputs = checked_index(self.kept_inputs, self.dense_nx, "kept_inputs")
        except SettingError as error:
            raise CheckpointError(f"The checkpoint is corrupt: {error}") from None
        return outputs.to(self.weight.device), inputs.to(self.weight.device)

    def to_dense(self) -> Conv1D:
        """The Conv1D of the dense size: this layer's values where it kept them, zeros elsewhere.

        Raises:
            CheckpointError: The loaded numbers are corrupt.
        """
        outputs, inputs = self.kept()
        weight = self.weight.new_zeros(self.dense_shape)
        weight[inputs[:, None], outputs] = self.weight.detach()
        bias = self.bias.new_zeros(self.dense_nf)
        bias[outputs] = self.bias.detach()
        return plain_conv1d(weight, bias, like=self)

    def __repr__(self) -> str:
        sizes = ((self.nx, self.dense_nx), (self.nf, self.dense_nf))
        shown = [str(kept) if kept == dense else f"{kept} of {dense}" for kept, dense in sizes]
        return f"ResizedConv1D(nx={shown[0]}, nf={shown[1]})"


def plain_conv1d(weight: Tensor, bias: Tensor, like: Any) -> Conv1D:
    """A Conv1D of `weight` (in, out) and `bias` (out,), trainable and in train mode as `like` is; nothing random."""
    conv = Conv1D.__new__(Conv1D)  # its __init__ draws random weights
    nn.Module.__init__(conv)
    conv.nx, conv.nf = weight.shape
    conv.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=like.weight.requires_grad)
    conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=like.bias.requires_grad)
    return conv.train(like.training)
