"""Finds 3x3 convolutions that the op computes, by their type and options."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dlkernels.accelerate.match import Match, shared_differences, whole
from dlkernels.conv3x3.modules import MIN_CHANNELS, Conv2d, fits

DEVICES = ("cpu", "meta")  # a model on meta gets its memory later


def matches(module: nn.Module) -> Iterator[Match]:
    """The module, if it is a convolution for which the op can pay.

    Others are no match: there is nothing to report of them.
    """
    if type(module) is nn.Conv2d and fits(module) and _can_pay(module):
        yield from whole(shared_differences(module), lambda: _fused(module), "dlkernels.nn.Conv2d")


def _can_pay(conv: nn.Conv2d) -> bool:
    weight = conv.weight
    is_served = weight.dtype == torch.float32 and weight.device.type in DEVICES
    return is_served and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS


def _fused(conv: nn.Conv2d) -> Conv2d:
    """The convolution's class alone changes: both hold the same parameters and attributes."""
    fused = Conv2d.__new__(Conv2d)
    vars(fused).update(vars(conv))
    return fused
