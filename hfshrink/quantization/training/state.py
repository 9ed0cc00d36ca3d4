"""The fake quantization of one training run: in the forward pass by hooks, moved after each step, saved, folded."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfshrink.errors import CheckpointError, SettingError
from hfshrink.quantization.training.settings import QAT
from hfshrink.quantization.training.sites import Site, make_sites

logger = logging.getLogger(__name__)


class FakeQuantization:
    """Quantizes inputs and weights of a model in its forward pass; nothing of it is registered on the model.

    While a module runs, its weight is hidden behind one on the grid; parameters, `state_dict` and optimizer see only
    the float one. Ranges stand still within an optimizer step, so that micro-batches and recomputed passes agree, and
    move after it by what all of its batches, on all processes, have shown.

    Attributes:
        sites: The modules.
        active: Whether fake quantization has begun.
        moving: Whether ranges and learned scales still move.
    """

    def __init__(self, model: nn.Module, quantization: QAT) -> None:
        """Select what is quantized; nothing happens before `installed`."""
        self.model, self.quantization = model, quantization
        self.sites: list[Site] = make_sites(model, quantization)
        self.active, self.moving = False, True
        self._mask: Any = None
        self._scales_begun = False
        if quantization.activation_ranges == "lsq":
            for site in self._with_input():
                site.input_scale = nn.Parameter(torch.ones((), device=site.low.device))

    def _with_input(self) -> list[Site]:
        return [site for site in self.sites if site.has_input]

    # -- in the forward pass

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Quantize in every forward pass of the model until the context ends."""

        def take_mask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._mask = kwargs.get("attention_mask")  # kept for the recomputed passes of gradient checkpointing

        with ExitStack() as stack:
            handle = self.model.register_forward_pre_hook(take_mask, with_kwargs=True)
            stack.callback(handle.remove)
            for site in self.sites:
                before, after = _make_hooks(self, site)
                handle = site.module.register_forward_pre_hook(before, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(site.module.register_forward_hook(after, always_call=True).remove)
            try:
                yield
            finally:
                self._mask = None

    def enter(self, site: Site, values: Tensor) -> Tensor:
        """What a module reads: watched in training, and on its grid once that has begun."""
        if site.has_input and site.module.training and self.moving:
            site.see(values, self._mask)
        if not self.active:
            return values
        weight = site.weight()  # first: what raises here leaves the module as it was
        quantized = site.input(values) if site.has_input else values
        site.module.__dict__["weight"] = weight  # found before the parameter, which stays registered
        return quantized

    # -- around the optimizer's step

    def learned(self) -> list[nn.Parameter]:
        """The trained scales."""
        scales = [scale for site in self.sites for scale in (site.weight_scale, site.input_scale)]
        return [scale for scale in scales if isinstance(scale, nn.Parameter)]

    def set_progress(self, progress: float) -> None:
        """Begin or freeze, by the share of all steps that is done."""
        self.active = progress >= self.quantization.start
        self.moving = progress < 1 - self.quantization.freeze
        if self.active and not self._scales_begun:
            self._begin_scales()

    @torch.no_grad()
    def _begin_scales(self) -> None:
        """Learned scales of weights start from the weights as they are now."""
        from hfshrink.quantization.training.fake import first_scale

        self._scales_begun = True
        for site in self.sites:
            if site.weight_scale is not None:
                site.weight_scale.copy_(first_scale(site.rows(), self.quantization.weight_bits))

    def after_step(self, progress: float) -> None:
        """Move the ranges, keep learned scales where they may be, and begin or freeze."""
        if self.moving:
            self._move_ranges()
        self.set_progress(progress)
        for site in self.sites:
            site.project()

    @torch.no_grad()
    def _move_ranges(self) -> None:
        sites = self._with_input()
        if not sites:
            return
        seen = torch.stack([torch.stack((site.seen_low, -site.seen_high)) for site in sites])
        seen = torch.where(torch.isfinite(seen).all(1, keepdim=True), seen, torch.inf)  # overflow moves nothing
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MIN)
        usable = torch.isfinite(seen).all(1).tolist()
        for site, (low, high), is_usable in zip(sites, seen, usable, strict=True):
            site.forget()
            if not is_usable or self._is_learning(site):
                continue
            site.move(low, -high)
            self._read_range(site)

    def _is_learning(self, site: Site) -> bool:
        return isinstance(site.input_scale, nn.Parameter) and site.zero_point is not None and self.active

    @torch.no_grad()
    def _read_range(self, site: Site) -> None:
        scale = site.input_scale
        site.read_range()
        if (
            isinstance(scale, nn.Parameter) and site.input_scale is not None
        ):  # it starts from the range, and is learned
            scale.copy_(site.input_scale)
            site.input_scale = scale

    # -- what it comes to

    @property
    def is_complete(self) -> bool:
        """Whether the model runs as the quantized one: begun, and with a range for every input that was seen."""
        inputs = self._with_input()
        return self.active and (not inputs or any(site.zero_point is not None for site in inputs))

    def quantized(self) -> list[Site]:
        """All sites but those whose module never ran in training: there is no range for its input, so it stays float.

        Such are experts that no token chose, or layers that a parent reads the weight of.
        """
        if all(site.zero_point is None for site in self._with_input()):  # before the first step nothing is known
            return list(self.sites)
        return [site for site in self.sites if not site.has_input or site.zero_point is not None]

    def share(self) -> float:
        """Share of the model's parameters that are quantized now."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        return sum(site.module.weight.numel() for site in self.sites) / total if self.active else 0.0

    def ranges(self) -> dict[str, list[float]]:
        """Module -> [low, high] of every quantized input: −z · s and (255 − z) · s."""
        found = {}
        for site in self._with_input():
            if site.input_scale is not None and site.zero_point is not None:
                scale, zero_point = float(site.input_scale.detach()), float(site.zero_point)
                found[site.name] = [-zero_point * scale, (255 - zero_point) * scale]
        return found

    @torch.no_grad()
    def fold(self) -> None:
        """Put the weights on their grid, for good.

        Raises:
            SettingError: Training diverged: there are weights that are not finite.
        """
        quantized = self.quantized()
        names = {site.name for site in quantized}
        if idle := [site.name for site in self.sites if site.name not in names]:
            logger.warning("%s never ran in training and stay float.", ", ".join(idle))
        for site in quantized:
            if not bool(torch.isfinite(site.module.weight).all()):
                raise SettingError(
                    f"{site.name}.weight has NaN or infinity: training diverged. Lower the learning rate."
                )
            site.module.weight.copy_(site.weight())

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Weights on their grid for as long as something is written."""
        sites = self.quantized() if self.active else []
        latent = [site.module.weight.detach().clone() for site in sites]
        with torch.no_grad():
            for site in sites:
                site.module.weight.copy_(site.weight())
        try:
            yield
        finally:
            with torch.no_grad():
                for site, weight in zip(sites, latent, strict=True):
                    site.module.weight.copy_(weight)

    # -- interrupted runs

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint's folded weights don't hold, by name."""
        found: dict[str, Tensor] = {"scales_begun": torch.tensor(self._scales_begun)}
        for site in self.sites:
            found[f"latent.{site.name}"] = site.module.weight.detach()
            if site.weight_scale is not None:
                found[f"weight_scale.{site.name}"] = site.weight_scale.detach()
            if site.has_input:
                found |= {f"low.{site.name}": site.low, f"high.{site.name}": site.high}
            if site.has_input and site.zero_point is not None and site.input_scale is not None:
                found[f"zero_point.{site.name}"] = site.zero_point
                found[f"input_scale.{site.name}"] = site.input_scale.detach()
        return found

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Take up a saved state.

        Raises:
            CheckpointError: It is of another model or of other settings.
        """
        own = self.state()
        optional = {f"{name}.{site.name}" for site in self._with_input() for name in ("zero_point", "input_scale")}
        odd = sorted((set(own) ^ set(saved)) - optional)
        odd += [name for name in own if name in saved and own[name].shape != saved[name].shape]
        if odd:
            raise CheckpointError(
                f"The saved quantization does not fit this run: {', '.join(odd[:3])}. Resume with the same model and "
                "quantization=."
            )
        self._scales_begun = bool(saved["scales_begun"])
        for site in self.sites:
            _restore(site, saved)


@torch.no_grad()
def _restore(site: Site, saved: Mapping[str, Tensor]) -> None:
    site.module.weight.copy_(saved[f"latent.{site.name}"])
    if site.weight_scale is not None:
        site.weight_scale.copy_(saved[f"weight_scale.{site.name}"])
    if not site.has_input:
        return
    device = site.low.device
    site.low, site.high = (saved[f"{end}.{site.name}"].to(device) for end in ("low", "high"))
    if f"zero_point.{site.name}" not in saved:
        return
    site.zero_point = saved[f"zero_point.{site.name}"].to(device)
    scale = saved[f"input_scale.{site.name}"].to(device)
    if isinstance(site.input_scale, nn.Parameter):
        site.input_scale.copy_(scale)
    else:
        site.input_scale = scale


def _make_hooks(quantization: FakeQuantization, site: Site) -> tuple[Any, Any]:
    """What runs before and after a module; copies of the model made meanwhile are left alone."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is not site.module:
            return None
        if args:
            return (quantization.enter(site, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": quantization.enter(site, kwargs["input"])}

    def after(module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop("weight", None)

    return before, after
