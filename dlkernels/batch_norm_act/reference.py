"""The formula of batch norm and what follows it, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
}
# Those that need no parameter.
NORM_ACTIVATIONS = [name for name in ACTIVATIONS if name != "leaky_relu"]


class Norm(NamedTuple):
    """A batch norm and the activation after it.

    Attributes:
        weight: [C] or None for ones.
        bias: [C] or None for zeros.
        mean: [C], a constant; None, and ``var`` too, for the statistics of the batch.
        var: [C].
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"silu"``, ``"hardswish"`` or
            ``"mish"``.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5
    activation: str = "identity"


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of that name; ``negative_slope`` is that of ``"leaky_relu"``."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return ACTIVATIONS[activation](x)


def batch_statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [C]; 0 of an empty batch."""
    if maps.numel() == 0:
        zeros = maps.sum((0, 2, 3))
        return zeros, zeros
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    return mean, variance


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """See :func:`dlkernels.ops.batch_norm_act`; results are out, pooled, mean and var."""
    # All of one dtype, as PyTorch demands.
    small = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean_, var_, weight_, bias_ = (
        value if value is None else value.to(small) for value in (mean, var, weight, bias)
    )
    norm = F.batch_norm(x, mean_, var_, weight_, bias_, mean is None, 0.0, eps)
    out = activate(norm, activation, negative_slope)
    if sample_scale is not None:
        out = out * sample_scale[:, None, None, None].to(x.dtype)
    if residual is not None:
        out = out + residual
    if mean is None or var is None:
        mean, var = batch_statistics(x.detach())
    return out, out.mean((2, 3)) if pool else None, mean, var
