"""The 1x1 convolution of gated maps and its gradients, as PyTorch's matrix products.

PyTorch's product reads maps of either layout as they lie in memory. A gate multiplies the input's
channels, sample by sample: W diag(s) x is the same as scaling x, and moves fewer bytes where a
sample has more pixels than W has rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.memory_format import columns, memory_format_of


def pointwise_conv(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """See :func:`dlkernels.ops.pointwise_conv`; gates have the dtype of ``x``."""
    if gate is not None and _is_small(x, weight):
        x, gate = x * gate[:, :, None, None], None
    if memory_format_of(x) == torch.channels_last:
        pixels = x.permute(0, 2, 3, 1)
        if gate is None:
            return F.linear(pixels, weight).permute(0, 3, 1, 2)
        rows = torch.bmm(pixels.flatten(1, 2), (weight * gate[:, None]).transpose(1, 2))
        return rows.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
    gated = weight.expand(x.shape[0], -1, -1) if gate is None else weight * gate[:, None]
    return torch.bmm(gated, x.flatten(2)).unflatten(2, x.shape[2:])


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Those of x, weight and gate."""
    grad_gated = pointwise_conv(grad, weight.t().contiguous(), None)
    of_weight = _of_small_maps if _is_small(x, weight) else _of_large_maps
    grad_weight, grad_gate = of_weight(grad, x, weight, gate, grad_gated)
    grad_x = grad_gated if gate is None else grad_gated.mul_(gate[:, :, None, None])
    return grad_x, grad_weight, grad_gate


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether a sample has fewer values in its maps [C, H, W] than the weight [O, C] has."""
    return x.shape[2] * x.shape[3] < weight.shape[0]


def _of_small_maps(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, grad_gated: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and gate, from one product over all samples."""
    if gate is None:
        return columns(grad) @ columns(x).t(), None
    grad_weight = columns(grad) @ columns(x * gate[:, :, None, None]).t()
    return grad_weight, (grad_gated * x).sum((2, 3))


def _of_large_maps(
    grad: Tensor, x: Tensor, weight: Tensor, gate: Tensor | None, grad_gated: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of weight and gate, from a product of each sample; reads the maps once."""
    # [N, O, C]: the weight's gradient of each sample, but for the gate.
    products = torch.bmm(_rows(grad), _rows(x).transpose(1, 2))
    if gate is None:
        return products.sum(0), None
    # Not by einsum, which would multiply channel by channel.
    grad_weight = (products * gate[:, None]).sum(0)
    return grad_weight, (products * weight).sum(1)


def _rows(maps: Tensor) -> Tensor:
    """[N, C, H * W] without a copy of maps in either format."""
    if memory_format_of(maps) == torch.channels_last:
        return maps.permute(0, 2, 3, 1).flatten(1, 2).transpose(1, 2)
    return maps.contiguous().flatten(2)
