"""Small networks with random weights, in whose features real and synthetic rows are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

CONV_BLOCKS = 3
LEAST_MAP = 3  # pixels of the last map's side: normalized maps of 2 x 2 have nearly the same mean for all images
LEAST_SIDE = 4  # pixels of an image's


class RandomNetwork(nn.Module):
    """Features and, on them, a linear classifier.

    Attributes:
        body: (m, …) rows -> (m, features).
        head: (m, features) -> (m, classes) logits.
    """

    def __init__(self, body: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(features, classes)

    def forward(self, rows: Tensor) -> Tensor:
        """Logits (m, classes)."""
        logits: Tensor = self.head(self.body(rows))
        return logits


def random_convnet(shape: Sequence[int], classes: int, width: int, seed: int) -> RandomNetwork:
    """Up to three blocks of 3 × 3 convolution, instance normalization, ReLU and 2 × 2 mean (arXiv:2006.05929, 4.1).

    Args:
        shape: Channels, height and width of an image, in pixels; at least 4 × 4.
        classes: Of the head.
        width: Channels of each block.
        seed: Of the weights; the global generator stays as it is.

    Example:
        >>> random_convnet((1, 28, 28), 10, 16, seed=0)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    channels, height, breadth = shape
    fitting = (number for number in range(CONV_BLOCKS, 0, -1) if min(height, breadth) >> number >= LEAST_MAP)
    blocks = next(fitting, 1)
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in range(blocks):
            layers.append(nn.Conv2d(width if block else channels, width, 3, padding=1))
            layers += [nn.GroupNorm(width, width, affine=False), nn.ReLU(), nn.AvgPool2d(2)]
        body = nn.Sequential(*layers, nn.Flatten())
        return RandomNetwork(body, width * (height >> blocks) * (breadth >> blocks), classes)


def random_layer(dimensions: int, classes: int, width: int, seed: int) -> RandomNetwork:
    """ReLU(A x + b) with A ~ N(0, 1/d) and b ~ N(0, 1), so that rows of unit variance bend every feature.

    Args:
        dimensions: Of a row.
        classes: Of the head.
        width: Features.
        seed: Of the weights; the global generator stays as it is.

    Example:
        >>> random_layer(8, 2, 16, seed=0).body(torch.zeros(3, 8)).shape
        torch.Size([3, 16])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(dimensions, width)
        nn.init.normal_(layer.weight, std=dimensions**-0.5)
        nn.init.normal_(layer.bias)
        return RandomNetwork(nn.Sequential(layer, nn.ReLU()), width, classes)
