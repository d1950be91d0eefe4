"""EfficientNet by its compound scaling rule.

Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks" (2019): the
baseline B0 of table 1, scaled by equation 3 in depth by alpha^phi, in width by beta^phi and in
resolution by gamma^phi.

State dicts of torchvision's models of the same names load unchanged; timm's through
:func:`from_timm`.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import Any, NamedTuple

from torch import Tensor, nn

from dlkernels.batch_norm_act.modules import BatchNormAct2d
from dlkernels.mbconv.modules import MBConv
from dlkernels.pointwise_conv.op import pointwise_conv

ALPHA, BETA, GAMMA = 1.2, 1.1, 1.15
BASE_RESOLUTION = 224


class Stage(NamedTuple):
    """A row of table 1: layers of the same kind.

    Attributes:
        expansion: channels of the depthwise convolution over those of the input.
        kernel_size: of the depthwise convolution.
        stride: of the first layer.
        channels: of the output.
        layers: how many.
    """

    expansion: int
    kernel_size: int
    stride: int
    channels: int
    layers: int


B0 = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)
STEM_CHANNELS = 32


class Scaling(NamedTuple):
    """How much deeper and wider than B0 a network is, and the size of its images.

    Attributes:
        depth: factor of the layers.
        width: factor of the channels.
        resolution: pixels of a side of the images.
        dropout: before the classifier.
    """

    depth: float
    width: float
    resolution: int
    dropout: float

    @classmethod
    def compound(cls, phi: float) -> Scaling:
        """Equation 3 for any phi; the dropout grows as it does from B0 to B7."""
        return cls(
            ALPHA**phi,
            BETA**phi,
            round(BASE_RESOLUTION * GAMMA**phi),
            min(0.5, 0.2 + 0.05 * phi),
        )


# The published networks round the rule's factors.
PUBLISHED = {
    "b0": Scaling(1.0, 1.0, 224, 0.2),
    "b1": Scaling(1.1, 1.0, 240, 0.2),
    "b2": Scaling(1.2, 1.1, 260, 0.3),
    "b3": Scaling(1.4, 1.2, 300, 0.3),
    "b4": Scaling(1.8, 1.4, 380, 0.4),
    "b5": Scaling(2.2, 1.6, 456, 0.4),
    "b6": Scaling(2.6, 1.8, 528, 0.5),
    "b7": Scaling(3.1, 2.0, 600, 0.5),
}


def scaled_channels(channels: int, width: float) -> int:
    """The scaled number, rounded to a multiple of 8 and never down by more than a tenth."""
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * scaled else rounded + 8


def scaled_layers(layers: int, depth: float) -> int:
    """The scaled number, rounded up."""
    return math.ceil(layers * depth)


class EfficientNet(nn.Module):
    """A network of MBConv blocks.

    Args:
        scaling: :meth:`Scaling.compound` of a phi, or one of ``PUBLISHED``.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        drop_path: probability of stochastic depth in the last block; it grows linearly from 0.
        eps: of the batch norms.
        momentum: of the batch norms.
    """

    def __init__(
        self,
        scaling: Scaling = PUBLISHED["b0"],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float = 0.2,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ):
        super().__init__()
        depths = [scaled_layers(stage.layers, scaling.depth) for stage in B0]
        total, index = sum(depths), 0
        channels = scaled_channels(STEM_CHANNELS, scaling.width)
        stages: list[nn.Module] = [_convolution(in_channels, channels, 3, 2, eps, momentum)]
        for stage, depth in zip(B0, depths, strict=True):
            out_channels = scaled_channels(stage.channels, scaling.width)
            blocks = []
            for layer in range(depth):
                blocks.append(
                    MBConv(
                        channels,
                        out_channels,
                        scaled_channels(channels * stage.expansion, 1.0),
                        stage.kernel_size,
                        stage.stride if layer == 0 else 1,
                        squeeze_channels=max(1, channels // 4),
                        drop_path=drop_path * index / total,
                        eps=eps,
                        momentum=momentum,
                    )
                )
                channels, index = out_channels, index + 1
            stages.append(nn.Sequential(*blocks))
        head = 4 * channels
        stages.append(_convolution(channels, head, 1, 1, eps, momentum))
        self.features = nn.Sequential(*stages)
        self.classifier = nn.Sequential(nn.Dropout(scaling.dropout), nn.Linear(head, num_classes))
        self.resolution = scaling.resolution
        self.apply(_initialize)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """The maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size, deepest blocks each."""
        maps: list[Tensor] = []
        for stage in list(self.features)[:-1]:
            x = stage(x)
            if maps and maps[-1].shape[-2:] == x.shape[-2:]:
                maps.pop()
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, num_classes]."""
        for stage in list(self.features)[:-1]:
            x = stage(x)
        conv, norm = self.features[-1].children()
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, BatchNormAct2d)
        raw = pointwise_conv(x, conv.weight.flatten(1).to(x.dtype))
        return self.classifier(norm.pooled(raw)[1])


def _convolution(
    in_channels: int, channels: int, size: int, stride: int, eps: float, momentum: float
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, BatchNormAct2d(channels, eps, momentum, activation="silu"))


def _initialize(module: nn.Module) -> None:
    """As torchvision: normal by fan-out, and a classifier uniform by its outputs."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        bound = 1.0 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.zeros_(module.bias)


def from_timm(state_dict: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Turns a state dict of timm's ``efficientnet_b0`` to ``b7`` into one of this module's.

    timm's ``tf_efficientnet`` networks pad as TensorFlow does, which these do not.
    """
    return OrderedDict((_from_timm(key), value) for key, value in state_dict.items())


# timm's name in a block, without and with expansion: the index in torchvision's.
_TIMM_PARTS = {
    False: {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "2.0", "bn2": "2.1"},
    True: {
        "conv_pw": "0.0",
        "bn1": "0.1",
        "conv_dw": "1.0",
        "bn2": "1.1",
        "conv_pwl": "3.0",
        "bn3": "3.1",
    },
}
_TIMM_OUTSIDE = {
    "conv_stem": "features.0.0",
    "bn1": "features.0.1",
    "conv_head": "features.8.0",
    "bn2": "features.8.1",
    "classifier": "classifier.1",
}


def _from_timm(key: str) -> str:
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(.+)", key)
    if match is None:
        name, _, rest = key.partition(".")
        return f"{_TIMM_OUTSIDE[name]}.{rest}"
    stage, layer, name, rest = match.groups()
    expands = stage != "0"
    prefix = f"features.{int(stage) + 1}.{layer}.block"
    if name == "se":
        rest = rest.replace("conv_reduce", "fc1").replace("conv_expand", "fc2")
        return f"{prefix}.{2 if expands else 1}.{rest}"
    return f"{prefix}.{_TIMM_PARTS[expands][name]}.{rest}"


def _published(name: str, **options: Any) -> EfficientNet:
    return EfficientNet(PUBLISHED[name], **options)


def efficientnet_b0(**options: Any) -> EfficientNet:
    """EfficientNet-B0; options are those of :class:`EfficientNet`."""
    return _published("b0", **options)


def efficientnet_b1(**options: Any) -> EfficientNet:
    """EfficientNet-B1."""
    return _published("b1", **options)


def efficientnet_b2(**options: Any) -> EfficientNet:
    """EfficientNet-B2."""
    return _published("b2", **options)


def efficientnet_b3(**options: Any) -> EfficientNet:
    """EfficientNet-B3."""
    return _published("b3", **options)


def efficientnet_b4(**options: Any) -> EfficientNet:
    """EfficientNet-B4."""
    return _published("b4", **options)


def efficientnet_b5(**options: Any) -> EfficientNet:
    """EfficientNet-B5; its published weights have batch norms with eps 1e-3, momentum 0.01."""
    return _published("b5", **{"eps": 1e-3, "momentum": 0.01, **options})


def efficientnet_b6(**options: Any) -> EfficientNet:
    """EfficientNet-B6; batch norms as in B5."""
    return _published("b6", **{"eps": 1e-3, "momentum": 0.01, **options})


def efficientnet_b7(**options: Any) -> EfficientNet:
    """EfficientNet-B7; batch norms as in B5."""
    return _published("b7", **{"eps": 1e-3, "momentum": 0.01, **options})
