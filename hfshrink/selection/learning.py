"""The learning of synthetic rows: a few per class, moved until they match the real ones in random networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hfshrink.selection.matching import gradient_distance, loss_gradients, mean_gap
from hfshrink.selection.random_networks import RandomNetwork
from hfshrink.terminal import progress

INNER_STEPS = 10  # steps of gradient matching on one network, which learns from the synthetic rows in between
NETWORK_RATE, NETWORK_STEPS = 0.01, 5  # of that learning, by SGD


@dataclass(frozen=True, eq=False)
class ClassRows:
    """Real rows by class, read where they are needed.

    Attributes:
        members: Row numbers of each class, rising.
        read: Rising row numbers -> (m, …) float32 rows as the networks see them.
    """

    members: list[NDArray[np.int64]]
    read: Callable[[NDArray[np.int64]], Tensor]

    def draw(self, label: int, generator: np.random.Generator, size: int) -> Tensor:
        """(size, …) random rows of a class; of a class with fewer all."""
        rows = self.members[label]
        return self.read(np.sort(generator.choice(rows, min(size, len(rows)), replace=False)))

    def first(self, generator: np.random.Generator, size: int) -> list[Tensor]:
        """Of each class (size, …) different rows: where the synthetic ones start."""
        return [self.draw(label, generator, size) for label in range(len(self.members))]


@dataclass(frozen=True, eq=False)
class Learning:
    """One run: what is matched, in which networks, for how long.

    Attributes:
        real: Real rows.
        make_network: Seed -> a network with random weights.
        method: "distribution" or "gradient".
        steps: Updates of the synthetic rows.
        rate: Step of Adam, in units of the rows' standard deviation.
        batch_rows: Real rows of a class in a step.
        bounds: Smallest and largest value of a synthetic row; None has none.
        seed: Of all draws.
    """

    real: ClassRows
    make_network: Callable[[int], RandomNetwork]
    method: str
    steps: int
    rate: float
    batch_rows: int
    bounds: tuple[Tensor, Tensor] | None = None
    seed: int = 0

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def run(self, per_class: int) -> tuple[Tensor, list[float]]:
        """Learn. In memory at once are the answers of one network for one class.

        Args:
            per_class: Synthetic rows of each class.

        Returns:
            (classes, per_class, …) synthetic rows, and the loss of each step.
        """
        generator = np.random.default_rng(self.seed)
        synthetic = [rows.requires_grad_() for rows in self.real.first(generator, per_class)]
        optimizer = torch.optim.Adam(synthetic, lr=self.rate)
        losses, every = [], 1 if self.method == "distribution" else INNER_STEPS
        for step in progress(range(self.steps), f"matching ({self.method})"):
            if step % every == 0:
                network = self.make_network(int(generator.integers(2**31)))
            optimizer.zero_grad()
            total = 0.0
            for label, rows in enumerate(synthetic):
                loss = self._loss(network, self.real.draw(label, generator, self.batch_rows), rows, label)
                loss.backward(inputs=[rows])
                total += float(loss.detach())
            optimizer.step()
            if self.bounds is not None:
                for rows in synthetic:
                    rows.detach().clamp_(*self.bounds)
            if self.method == "gradient":
                teach(network, torch.stack(synthetic).detach())
            losses.append(total)
        return torch.stack(synthetic).detach(), losses

    def _loss(self, network: RandomNetwork, real: Tensor, synthetic: Tensor, label: int) -> Tensor:
        """Of one class; both methods add up over the classes."""
        if self.method == "distribution":
            with torch.no_grad():
                target = network.body(real)
            return mean_gap(target, network.body(synthetic))
        wanted = loss_gradients(network, real, label)
        return gradient_distance(wanted, loss_gradients(network, synthetic, label, differentiable=True))


def teach(network: RandomNetwork, synthetic: Tensor) -> None:
    """Some steps of the network on the synthetic rows, so that gradients match along a training."""
    labels = torch.arange(len(synthetic)).repeat_interleave(synthetic.shape[1])
    optimizer = torch.optim.SGD(network.parameters(), lr=NETWORK_RATE, momentum=0.5)
    for _ in range(NETWORK_STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(synthetic.flatten(0, 1)), labels).backward()
        optimizer.step()
