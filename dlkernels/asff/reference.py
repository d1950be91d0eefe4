"""The formula of adaptively spatial feature fusion in plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FACTORS = (1, 2, 4, 8)
MODES = ("nearest", "bilinear")


def asff_fuse(features: Sequence[Tensor], logits: Tensor, mode: str) -> Tensor:
    """See :func:`dlkernels.ops.asff_fuse`."""
    weights = torch.softmax(logits, 1)
    height = logits.shape[2]
    terms = (
        weights[:, level : level + 1] * upsample(x, height // x.shape[2], mode)
        for level, x in enumerate(features)
    )
    return functools.reduce(torch.add, terms)


def upsample(x: Tensor, factor: int, mode: str) -> Tensor:
    """Maps [N, C, H, W] enlarged to [N, C, factor * H, factor * W]."""
    if factor == 1:
        return x
    align_corners = False if mode == "bilinear" else None
    return F.interpolate(x, scale_factor=factor, mode=mode, align_corners=align_corners)
