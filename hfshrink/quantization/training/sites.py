"""The modules that a training run quantizes: each with its range, its scales and its place in the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import SettingError
from hfshrink.modules import head_names, select_modules
from hfshrink.quantization.training import fake
from hfshrink.quantization.training.settings import QAT


@dataclass
class Site:
    """One module whose weight, and perhaps input, is quantized.

    Attributes:
        name: Of the module.
        module: That holds the weight.
        quantization: The settings.
        low: Moving average of the smallest input, 0-d float32; +inf before the first step.
        high: Of the largest; −inf before.
        seen_low: Smallest input since the last optimizer step.
        seen_high: Largest input since then.
        weight_scale: Learned size of the scale, (outputs, groups, 1); None where the largest weight decides.
        input_scale: Learned or from the range, 0-d; None before there is a range, and where inputs stay float.
        zero_point: 0-d whole number in 0..255.
    """

    name: str
    module: Any
    quantization: QAT
    low: Tensor
    high: Tensor
    seen_low: Tensor
    seen_high: Tensor
    weight_scale: nn.Parameter | None = None
    input_scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def has_input(self) -> bool:
        """Whether its input is quantized: table lookups have none."""
        return self.quantization.activation_bits is not None and not isinstance(self.module, nn.Embedding)

    @property
    def transposed(self) -> bool:
        """Whether scales belong to the second axis of its weight."""
        return is_transposed(self.module, self.quantization.group_size)

    def rows(self) -> Tensor:
        """Its weight as (outputs, groups, numbers that share a scale)."""
        return fake.as_rows(self.module.weight, self.quantization.group_size, self.transposed)

    def weight(self) -> Tensor:
        """Its weight on the grid, with gradients straight through."""
        bits, rows = self.quantization.weight_bits, self.rows()
        scale = fake.weight_scale(rows, bits)
        if self.weight_scale is not None:
            scale = self.weight_scale * scale.sign()
        low, high = fake.code_range(bits)
        on_grid = fake.fake_quantize(rows, scale, low, high, fake.gradient_scale(rows.shape[-1], high))
        return fake.from_rows(on_grid, self.module.weight, self.transposed)

    def input(self, values: Tensor) -> Tensor:
        """Its input on the grid of its range; as it is before there is one."""
        if self.input_scale is None or self.zero_point is None:
            return values
        features = values.shape[-1] if values.ndim < 4 else values[0].numel()
        factor = fake.gradient_scale(features, fake.UNSIGNED)
        return fake.fake_quantize(values, self.input_scale, -self.zero_point, fake.UNSIGNED - self.zero_point, factor)

    @torch.no_grad()
    def see(self, values: Tensor, mask: Any) -> None:
        """Widen what was seen since the last step; padded positions don't count.

        Seeing the same batch twice, as gradient checkpointing does, changes nothing.
        """
        if mask is not None and values.ndim == 3 and mask.shape == values.shape[:2]:
            values = values[mask.bool()]
        if values.numel():
            low, high = torch.aminmax(values.detach())
            self.seen_low = torch.minimum(self.seen_low, low.float())
            self.seen_high = torch.maximum(self.seen_high, high.float())

    def forget(self) -> None:
        """Begin a new optimizer step."""
        self.seen_low, self.seen_high = _nothing_seen(self.low.device)

    @torch.no_grad()
    def move(self, low: Tensor, high: Tensor) -> None:
        """Move the range towards what an optimizer step saw, numbers that are finite."""
        if torch.isfinite(self.low):
            self.low = torch.lerp(low, self.low, self.quantization.decay)
            self.high = torch.lerp(high, self.high, self.quantization.decay)
        else:
            self.low, self.high = low.clone(), high.clone()

    @torch.no_grad()
    def read_range(self) -> None:
        """Take scale and zero point from the range."""
        self.input_scale, self.zero_point = fake.affine(self.low, self.high)

    @torch.no_grad()
    def project(self) -> None:
        """Keep learned scales above 0, and those of weights where the outermost code is used: s ≤ max|w| / Q.

        So they can be read off the folded weights, max|ŵ| = Q · s.
        """
        if self.weight_scale is not None:
            most = fake.weight_scale(self.rows(), self.quantization.weight_bits).abs()
            self.weight_scale.copy_(torch.minimum(self.weight_scale.clamp(min=SMALLEST_SCALE), most))
        if isinstance(self.input_scale, nn.Parameter):
            self.input_scale.clamp_(min=SMALLEST_SCALE)


SMALLEST_SCALE = 1e-8
"""Of learned scales, which a large step could carry below 0."""


def make_sites(model: nn.Module, quantization: QAT) -> list[Site]:
    """Everything that the settings select.

    Raises:
        SettingError: Nothing to quantize, a group size that does not divide, weights that hold NaN, that are not
            float32, or that another module uses too.
    """
    modules = _selected(model, quantization)
    holders = _holders(model)
    found = []
    for name, module in modules.items():
        _check_weight(name, module, quantization, holders[id(module.weight)])
        device = module.weight.device
        site = Site(name, module, quantization, *_nothing_seen(device), *_nothing_seen(device))
        if quantization.weight_ranges == "lsq":
            site.weight_scale = nn.Parameter(fake.first_scale(site.rows(), quantization.weight_bits))
        found.append(site)
    return found


def is_transposed(module: Any, group_size: int | None = None) -> bool:
    """Whether scales belong to a weight's second axis: GPT-2's Conv1D is (in, out), tables have a scale per column."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D) or (isinstance(module, nn.Embedding) and group_size is None)


def _selected(model: nn.Module, quantization: QAT) -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    types: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, Conv1D)
    types += (nn.Embedding,) if quantization.embeddings else ()
    exclude = head_names(model) if quantization.exclude is None else quantization.exclude
    found = select_modules(model, types, quantization.include, exclude)
    convolutions = [name for name, module in found.items() if isinstance(module, nn.Conv2d)]
    if quantization.exclude is None and len(convolutions) == 1 and len(found) > 1:
        del found[convolutions[0]]  # the patches of a transformer, which static exports keep in float too
    if not found:
        raise SettingError(
            f"There is nothing to quantize in {type(model).__name__}: no Linear, Conv2d or Conv1D matches "
            f"include={quantization.include!r} without {list(exclude) if exclude else 'exclude'}."
        )
    return found


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """The names that each parameter has, by its id."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def _check_weight(name: str, module: Any, quantization: QAT, holders: list[str]) -> None:
    weight, size = module.weight, quantization.group_size
    if weight.dtype != torch.float32:
        raise SettingError(
            f"QAT needs float32 weights, got {weight.dtype} ({name}). Load with dtype=torch.float32; bf16=True in the "
            "TrainingArguments still computes in half precision."
        )
    if not bool(torch.isfinite(weight).all()):
        raise SettingError(f"{name}.weight has NaN or infinity; it can't be quantized.")
    if len(holders) > 1:
        raise SettingError(
            f"{' and '.join(holders)} are one tied weight, which can't be on a grid in one place only. Exclude {name}."
        )
    inputs = weight.shape[0] if is_transposed(module, size) else weight[0].numel()
    if size is not None and inputs % size:
        raise SettingError(
            f"group_size {size} does not divide the {inputs} inputs of {name}. Exclude it, or set another."
        )


def _nothing_seen(device: Any) -> tuple[Tensor, Tensor]:
    return torch.tensor(torch.inf, device=device), torch.tensor(-torch.inf, device=device)
