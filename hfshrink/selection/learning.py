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

    def draw(self, generator: np.random.Generator, size: int) -> Tensor:
        """(classes, size, …) rows; of a class with fewer, some are drawn more than once."""
        return torch.stack([self.read(self._some(rows, generator, size)) for rows in self.members])

    def first(self, generator: np.random.Generator, size: int) -> Tensor:
        """(classes, size, …) different rows: where the synthetic ones start."""
        return torch.stack([self.read(np.sort(generator.permutation(rows)[:size])) for rows in self.members])

    def _some(self, rows: NDArray[np.int64], generator: np.random.Generator, size: int) -> NDArray[np.int64]:
        return np.sort(generator.choice(rows, size, replace=len(rows) < size))


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

    def run(self, per_class: int) -> tuple[Tensor, list[float]]:
        """Learn.

        Args:
            per_class: Synthetic rows of each class.

        Returns:
            (classes, per_class, …) synthetic rows, and the loss of each step.
        """
        generator = np.random.default_rng(self.seed)
        synthetic = self.real.first(generator, per_class).requires_grad_()
        optimizer = torch.optim.Adam([synthetic], lr=self.rate)
        losses = []
        network = self.make_network(0)
        for step in progress(range(self.steps), f"matching ({self.method})"):
            if self.method == "distribution" or step % INNER_STEPS == 0:
                network = self.make_network(int(generator.integers(2**31)))
            real = self.real.draw(generator, self.batch_rows)
            loss = self._loss(network, real, synthetic)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if self.bounds is not None:
                with torch.no_grad():
                    synthetic.clamp_(*self.bounds)
            if self.method == "gradient":
                teach(network, synthetic.detach())
            losses.append(float(loss.detach()))
        return synthetic.detach(), losses

    def _loss(self, network: RandomNetwork, real: Tensor, synthetic: Tensor) -> Tensor:
        if self.method == "distribution":
            with torch.no_grad():
                target = network.body(real.flatten(0, 1)).unflatten(0, real.shape[:2])
            return mean_gap(target, network.body(synthetic.flatten(0, 1)).unflatten(0, synthetic.shape[:2]))
        total = synthetic.new_zeros(())
        for label in range(len(real)):
            wanted = loss_gradients(network, real[label], label)
            total = total + gradient_distance(wanted, loss_gradients(network, synthetic[label], label, True))
        return total


def teach(network: RandomNetwork, synthetic: Tensor) -> None:
    """Some steps of the network on the synthetic rows, so that gradients match along a training."""
    labels = torch.arange(len(synthetic)).repeat_interleave(synthetic.shape[1])
    optimizer = torch.optim.SGD(network.parameters(), lr=NETWORK_RATE, momentum=0.5)
    for _ in range(NETWORK_STEPS):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(synthetic.flatten(0, 1)), labels).backward()
        optimizer.step()
