"""Blocks of torchvision and timm, and the fused ones that take their places."""

import timm.models.regnet as timm_regnet
import timm.models.resnet as timm_resnet
import timm.models.senet as timm_senet
import torch
from timm.layers import SEModule
from torch import nn
from torchvision.models import regnet, resnet

from dlkernels.nn import ResidualBlock

CHANNELS = 32


def downsample(out_channels, stride):
    return nn.Sequential(
        nn.Conv2d(CHANNELS, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def pooled(out_channels):
    """The shortcut of a ResNet-D."""
    return nn.Sequential(
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(CHANNELS, out_channels, 1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def torchvision_regnet(out_channels, stride, se_ratio):
    return regnet.ResBottleneckBlock(
        CHANNELS, out_channels, stride, nn.BatchNorm2d, nn.ReLU, 16, 1.0, se_ratio
    )


def with_se(block, *args, **options):
    return block(*args, attn_layer=SEModule, **options)


# A block of another library, and what nn.ResidualBlock is to be given for the same.
PEERS = {
    "torchvision BasicBlock": (
        lambda: resnet.BasicBlock(CHANNELS, CHANNELS),
        lambda: ResidualBlock(CHANNELS, CHANNELS),
    ),
    "torchvision BasicBlock of stride 2": (
        lambda: resnet.BasicBlock(CHANNELS, 48, 2, downsample(48, 2)),
        lambda: ResidualBlock(CHANNELS, 48, stride=2),
    ),
    "torchvision Bottleneck of a ResNeXt": (
        lambda: resnet.Bottleneck(CHANNELS, 16, 2, downsample(64, 2), groups=4, base_width=16),
        lambda: ResidualBlock(CHANNELS, 64, 16, 2, 4),
    ),
    "torchvision RegNetX": (
        lambda: torchvision_regnet(CHANNELS, 1, None),
        lambda: ResidualBlock(CHANNELS, CHANNELS, CHANNELS, 1, 2, style="regnet"),
    ),
    "torchvision RegNetY": (
        lambda: torchvision_regnet(64, 2, 0.25),
        lambda: ResidualBlock(
            CHANNELS,
            64,
            64,
            2,
            4,
            squeeze_channels=8,
            squeeze_place="before_last",
            style="regnet",
        ),
    ),
    "timm SE-ResNet Bottleneck": (
        lambda: with_se(timm_resnet.Bottleneck, CHANNELS, 16, 2, downsample(64, 2)),
        lambda: ResidualBlock(CHANNELS, 64, 16, 2, squeeze_channels=8),
    ),
    "timm SE-ResNet BasicBlock": (
        lambda: with_se(timm_resnet.BasicBlock, CHANNELS, CHANNELS),
        lambda: ResidualBlock(CHANNELS, CHANNELS, squeeze_channels=8),
    ),
}
# Further blocks that accelerate() swaps.
SWAPPED = {
    **{name: make for name, (make, _) in PEERS.items()},
    "timm ResNet-D": lambda: timm_resnet.Bottleneck(CHANNELS, 16, 2, pooled(64)),
    "timm dilated": lambda: timm_resnet.Bottleneck(
        CHANNELS, 16, 1, downsample(64, 1), dilation=2, first_dilation=1
    ),
    "timm RegNetY": lambda: timm_regnet.Bottleneck(CHANNELS, 64, 2, group_size=16),
    "timm RegNetX": lambda: timm_regnet.Bottleneck(CHANNELS, CHANNELS, group_size=16, se_ratio=0.0),
    "timm RegNet with a linear output": lambda: timm_regnet.Bottleneck(
        CHANNELS, CHANNELS, group_size=16, linear_out=True
    ),
    "timm legacy SENet": lambda: timm_senet.SEBottleneck(CHANNELS, 8, 2, 4),
    "timm legacy SE-ResNet": lambda: timm_senet.SEResNetBottleneck(
        CHANNELS, 16, 1, 4, 2, downsample(64, 2)
    ),
    "timm legacy SE-ResNeXt": lambda: timm_senet.SEResNeXtBottleneck(
        CHANNELS, 16, 4, 4, 1, downsample(64, 1)
    ),
}


def make_maps(memory_format=torch.contiguous_format, dtype=torch.float32):
    """Maps [3, CHANNELS, 12, 9] that require a gradient."""
    x = torch.randn(3, CHANNELS, 12, 9, dtype=dtype)
    return x.contiguous(memory_format=memory_format).requires_grad_()
