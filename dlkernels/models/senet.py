"""SE-ResNet, SE-ResNeXt and SENet-154.

Hu, Shen and Sun, "Squeeze-and-Excitation Networks" (2018), section 4 and appendix; He et al.,
"Deep Residual Learning" (2016); Xie et al., "Aggregated Residual Transformations" (2017). Strides
sit in the 3x3 convolutions, as in torchvision's and timm's ResNets.

State dicts of timm's models of the same names load unchanged; those of timm's
``legacy_senet154`` through :func:`from_timm_legacy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels.conv3x3.modules import Conv2d
from dlkernels.residual_block.modules import STYLES, ResidualBlock

EXPANSION = 4  # channels of a bottleneck block's output, over its planes


@dataclass(frozen=True)
class Widths:
    """Channels inside a bottleneck block, as multiples of the stage's base width.

    Attributes:
        reduce: of the first 1x1 convolution.
        spatial: of the 3x3 convolution.
        groups: of the 3x3 convolution.
    """

    reduce: float = 1
    spatial: float = 1
    groups: int = 1


def _layers(in_channels: int, planes: int, stride: int, widths: Widths | None) -> list[nn.Conv2d]:
    """The convolutions of a block: two of 3x3, or with ``widths`` a bottleneck's three."""

    def conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)

    if widths is None:
        return [conv(in_channels, planes, 3, stride), conv(planes, planes, 3)]
    reduced, spatial = int(planes * widths.reduce), int(planes * widths.spatial)
    return [
        conv(in_channels, reduced, 1),
        conv(reduced, spatial, 3, stride, widths.groups),
        conv(spatial, planes * EXPANSION, 1),
    ]


def _block(
    in_channels: int, planes: int, stride: int, downsample: nn.Module | None, widths: Widths | None
) -> ResidualBlock:
    """Convolutions, squeeze-excite, sum and ReLU."""
    parts: dict[str, nn.Module] = {}
    layers = _layers(in_channels, planes, stride, widths)
    for index, conv in enumerate(layers, 1):
        parts |= {f"conv{index}": conv, f"norm{index}": nn.BatchNorm2d(conv.out_channels)}
    channels = layers[-1].out_channels
    # The paper's reduction of 16, at least 8 hidden channels as in timm.
    squeezed = max(8, (channels // 16 + 4) // 8 * 8)
    parts |= {
        "squeeze": nn.Conv2d(channels, squeezed, 1),
        "excite": nn.Conv2d(squeezed, channels, 1),
    }
    if downsample is not None:
        parts["shortcut"] = downsample
    return ResidualBlock.from_parts(parts, STYLES["resnet"])


class SENet(nn.Module):
    """A ResNet of squeeze-excite blocks.

    Args:
        depths: blocks in each of the four stages.
        widths: channels inside the bottlenecks; None for blocks of two 3x3 convolutions, those of
            the networks of 18 and 34 layers.
        deep_stem: three 3x3 convolutions (64, 64, 128 channels) in place of one 7x7, a 3x3
            convolution in place of 1x1 in the shortcuts of stages 2 to 4, and a pool that rounds
            up: SENet-154's stem.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        dropout: probability before the classifier.
        width: planes of the first stage; each stage doubles them.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        widths: Widths | None = Widths(),
        *,
        deep_stem: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        width: int = 64,
    ):
        super().__init__()
        self.deep_stem = deep_stem
        if deep_stem:
            self.conv1 = nn.Conv2d(in_channels, 64, 3, 2, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(64)
            self.conv2 = Conv2d(64, 64, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(64)
            self.conv3 = Conv2d(64, 128, 3, 1, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(128)
            self.maxpool = nn.MaxPool2d(3, 2, ceil_mode=True)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 128 if deep_stem else width
        for stage, depth in enumerate(depths):
            planes, stride = width << stage, 1 if stage == 0 else 2
            kernel = 3 if deep_stem and stage > 0 else 1
            blocks: list[nn.Module] = []
            for index in range(depth):
                first = index == 0
                out_channels = planes * (1 if widths is None else EXPANSION)
                downsample = None
                if first and (stride != 1 or channels != out_channels):
                    downsample = nn.Sequential(
                        nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False),
                        nn.BatchNorm2d(out_channels),
                    )
                blocks.append(_block(channels, planes, stride if first else 1, downsample, widths))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps after each stage, at 1/4, 1/8, 1/16 and 1/32 of the image's size."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        if self.deep_stem:
            x = F.relu(self.bn2(self.conv2(x)), inplace=True)
            x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = self.maxpool(x)
        features = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        return self.fc(self.dropout(self.forward_features(x)[-1].mean((2, 3))))


def from_timm_legacy(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turns a state dict of timm's ``legacy_senet154`` into one of :func:`senet154`."""

    def renamed(key: str) -> str:
        key = key.removeprefix("layer0.").replace("se_module.", "se.")
        return key.replace("last_linear.", "fc.")

    return {renamed(key): value for key, value in state_dict.items()}


def seresnet18(**options: Any) -> SENet:
    """SE-ResNet-18; options are those of :class:`SENet`."""
    return SENet((2, 2, 2, 2), None, **options)


def seresnet34(**options: Any) -> SENet:
    """SE-ResNet-34."""
    return SENet((3, 4, 6, 3), None, **options)


def seresnet50(**options: Any) -> SENet:
    """SE-ResNet-50."""
    return SENet((3, 4, 6, 3), **options)


def seresnet101(**options: Any) -> SENet:
    """SE-ResNet-101."""
    return SENet((3, 4, 23, 3), **options)


def seresnet152(**options: Any) -> SENet:
    """SE-ResNet-152."""
    return SENet((3, 8, 36, 3), **options)


def seresnext50_32x4d(**options: Any) -> SENet:
    """SE-ResNeXt-50 (32x4d)."""
    return SENet((3, 4, 6, 3), Widths(2, 2, groups=32), **options)


def seresnext101_32x4d(**options: Any) -> SENet:
    """SE-ResNeXt-101 (32x4d)."""
    return SENet((3, 4, 23, 3), Widths(2, 2, groups=32), **options)


def senet154(**options: Any) -> SENet:
    """SENet-154."""
    options = {"dropout": 0.2, **options}
    return SENet((3, 8, 36, 3), Widths(2, 4, groups=64), deep_stem=True, **options)
