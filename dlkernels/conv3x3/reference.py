"""The 3x3 convolution in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """See :func:`dlkernels.ops.conv3x3`."""
    return F.conv2d(x, weight, bias, padding=padding)
