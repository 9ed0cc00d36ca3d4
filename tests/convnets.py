"""Tiny seeded convolutional nets with biases and batch statistics that hide no mistake, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

IMAGE = 32
LABELS = 4


class Vgg(nn.Sequential):
    """Two convolutions and two Linears; the first Linear reads 16 positions of each channel."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)),
            *(nn.Flatten(), nn.Linear(12 * 16, 10), nn.ReLU(), nn.Linear(10, LABELS)),
        )


def resnet(**settings: object) -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], **settings}
    return ResNetForImageClassification(ResNetConfig(num_labels=LABELS, **sizes))


def mobilenet(**settings: object) -> nn.Module:
    sizes = {"depth_multiplier": 0.1, "depth_divisible_by": 4, "min_depth": 4, "finegrained_output": False}
    return MobileNetV2ForImageClassification(
        MobileNetV2Config(num_labels=LABELS, image_size=IMAGE, **{**sizes, **settings})
    )


def efficientnet() -> nn.Module:
    sizes = {"width_coefficient": 0.3, "depth_divisor": 4, "hidden_dim": 384, "depth_coefficient": 0.6}
    blocks = {
        "in_channels": [32, 16, 24],
        "out_channels": [16, 24, 40],
        "kernel_sizes": [3, 3, 5],
        "strides": [1, 2, 2],
        "num_block_repeats": [1, 2, 2],
        "expand_ratios": [1, 6, 6],
    }
    return EfficientNetForImageClassification(
        EfficientNetConfig(num_labels=LABELS, image_size=IMAGE, **sizes, **blocks)
    )


MAKERS = {
    "resnet": lambda: resnet(layer_type="basic"),
    "bottleneck": lambda: resnet(layer_type="bottleneck", hidden_sizes=[16, 32]),
    "mobilenet_v2": mobilenet,
    "mobilenet_v2 without tf padding": lambda: mobilenet(tf_padding=False),
    "efficientnet": efficientnet,
    "vgg": Vgg,
}
TRANSFORMERS = [name for name in MAKERS if name != "vgg"]
"""The nets that `save_pretrained` can write."""


def model(name: str, seed: int = 0) -> nn.Module:
    """A net of `MAKERS` in eval mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shaken(MAKERS[name]())


def shaken(network: nn.Module) -> nn.Module:
    """Weights of a size that keeps signals alive, and biases, scales and statistics away from 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.weight.data = 1 + 0.2 * torch.randn_like(module.weight)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked += 7
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.3)
    return network.eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    """Shape (batch, 3, 32, 32)."""
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def logits(network: nn.Module, batch: Tensor) -> Tensor:
    """Shape (batch, labels), without gradients."""
    with torch.no_grad():
        output = network(batch)
    return getattr(output, "logits", output)
