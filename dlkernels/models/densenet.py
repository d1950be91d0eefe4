"""DenseNet for ImageNet, and DenseNet-BC for CIFAR.

Huang, Liu, van der Maaten and Weinberger, "Densely Connected Convolutional Networks" (2017), table
1 and section 4.1.

torchvision's state dicts load unchanged, those of old checkpoints too (keys with ``norm.1`` for
``norm1``); timm's load unchanged as well.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels.batch_norm_act.modules import norm_act
from dlkernels.dense_block.modules import DenseBlock, Transition


class DenseNet(nn.Module):
    """A DenseNet-BC: dense blocks with bottlenecks, and transitions that compress between them.

    Args:
        growth_rate: k, the channels that each layer adds.
        block_config: layers of each block.
        num_init_features: channels after the stem.
        bn_size: the bottlenecks have ``bn_size * growth_rate`` channels; None for layers of one
            3x3 convolution.
        drop_rate: probability of dropout after each layer.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        small_images: a stem for images such as CIFAR's: one 3x3 convolution that keeps the size.
        memory: as in :func:`dlkernels.ops.dense_block`.
    """

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        small_images: bool = False,
        memory: str = "balanced",
    ):
        super().__init__()
        self.features = nn.Sequential(_stem(in_channels, num_init_features, small_images))
        channels = num_init_features
        for index, layers in enumerate(block_config, start=1):
            block = DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory)
            self.features.add_module(f"denseblock{index}", block)
            channels += layers * growth_rate
            if index < len(block_config):
                self.features.add_module(f"transition{index}", Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps after each dense block, the last with norm and ReLU.

        They are at 1/4, 1/8, 1/16 and 1/32 of the image's size.
        """
        maps: list[Tensor] = []
        in_planes = hasattr(self.features, "pool0") and x.device.type == "cpu" and x.is_contiguous()
        if in_planes:  # PyTorch's max pool is several times faster in channels_last maps
            x = x.to(memory_format=torch.channels_last)
        for name, module in self.features.named_children():
            if name == "relu0":
                continue  # part of the pass of the norm before it
            x = _norm_relu(module, x) if name.startswith("norm") else module(x)
            if in_planes and name == "pool0":
                x = x.contiguous()
            if name.startswith("denseblock"):
                maps.append(x)
        return [*maps[:-1], x]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        return self.classifier(self.forward_features(x)[-1].mean((2, 3)))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Renames the keys of old torchvision checkpoints before they are loaded."""
        for key in list(state_dict):
            renamed = _OLD_KEY.sub(r"\1\2", key)
            if renamed != key:
                state_dict[renamed] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm and ReLU in one pass, unless the norm is one of another kind, or has hooks."""
    if type(norm) is not nn.BatchNorm2d or norm._forward_hooks or norm._forward_pre_hooks:
        return F.relu(norm(x))
    return norm_act(norm, x, activation="relu").out


_OLD_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def _stem(in_channels: int, channels: int, small_images: bool) -> OrderedDict[str, nn.Module]:
    if small_images:
        conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        return OrderedDict([("conv0", conv)])
    return OrderedDict(
        [
            ("conv0", nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False)),
            ("norm0", nn.BatchNorm2d(channels)),
            ("relu0", nn.ReLU(inplace=True)),
            ("pool0", nn.MaxPool2d(3, stride=2, padding=1)),
        ]
    )


def densenet121(**options: Any) -> DenseNet:
    """DenseNet-121; options are those of :class:`DenseNet`."""
    return DenseNet(32, (6, 12, 24, 16), 64, **options)


def densenet161(**options: Any) -> DenseNet:
    """DenseNet-161, of growth rate 48."""
    return DenseNet(48, (6, 12, 36, 24), 96, **options)


def densenet169(**options: Any) -> DenseNet:
    """DenseNet-169."""
    return DenseNet(32, (6, 12, 32, 32), 64, **options)


def densenet201(**options: Any) -> DenseNet:
    """DenseNet-201."""
    return DenseNet(32, (6, 12, 48, 32), 64, **options)


def densenet264(**options: Any) -> DenseNet:
    """DenseNet-264."""
    return DenseNet(32, (6, 12, 64, 48), 64, **options)


def densenet_cifar(depth: int = 100, growth_rate: int = 12, **options: Any) -> DenseNet:
    """DenseNet-BC (L = depth, k = growth_rate) for images of 32x32, section 4.1 of the paper.

    Args:
        depth: L, all convolutions and the classifier; depth - 4 is a multiple of 6.
        growth_rate: k.
        options: those of :class:`DenseNet`.

    Raises:
        ValueError: no such depth.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise ValueError(f"depth must be 4 plus a positive multiple of 6, but is {depth}")
    layers = (depth - 4) // 6
    options = {"num_classes": 10, **options}
    return DenseNet(growth_rate, (layers,) * 3, 2 * growth_rate, small_images=True, **options)
