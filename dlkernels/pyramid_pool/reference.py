"""Spatial pyramid pooling in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STAGES = 3
WINDOW = 5


def pyramid_pool(x: Tensor) -> Tensor:
    """See :func:`dlkernels.ops.pyramid_pool`."""
    pooled = [x]
    for _ in range(STAGES):
        pooled.append(F.max_pool2d(pooled[-1], WINDOW, 1, WINDOW // 2))
    return torch.cat(pooled[::-1], 1)
