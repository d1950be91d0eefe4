"""Whole networks, composed of the library's modules."""

from dlkernels.models.densenet import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_cifar,
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
    "DenseNet",
    "SENet",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_cifar",
    "senet154",
    "seresnet18",
    "seresnet34",
    "seresnet50",
    "seresnet101",
    "seresnet152",
    "seresnext50_32x4d",
    "seresnext101_32x4d",
]
