"""Whole networks, composed of the library's modules."""

from dlkernels.models.efficientnet import (
    EfficientNet,
    efficientnet_b0,
    efficientnet_b1,
    efficientnet_b2,
    efficientnet_b3,
    efficientnet_b4,
    efficientnet_b5,
    efficientnet_b6,
    efficientnet_b7,
)
from dlkernels.models.senet import (
    SENet,
    senet154,
    seresnet18,
    seresnet34,
    seresnet50,
    seresnet101,
    seresnet152,
    seresnext50_32x4d,
    seresnext101_32x4d,
)

__all__ = [
    "EfficientNet",
    "SENet",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_b4",
    "efficientnet_b5",
    "efficientnet_b6",
    "efficientnet_b7",
    "senet154",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
]
