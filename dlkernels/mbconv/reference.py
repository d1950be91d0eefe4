"""The formula of a depthwise convolution between two batch norms, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dlkernels.batch_norm_act import reference as batch_norm_act

ACTIVATIONS = [name for name in batch_norm_act.ACTIVATIONS if name != "leaky_relu"]


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


def apply(x: Tensor, norm: Norm, pool: bool) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Batch norm and activation, the mean over H and W, and the statistics that were used."""
    weight, bias, mean, var, eps, activation = norm
    return batch_norm_act.batch_norm_act(
        x, weight, bias, mean, var, None, None, eps, activation, 0.0, pool
    )


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    input_norm: Norm | None,
    stride: int,
    padding: list[int],
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See :func:`dlkernels.ops.depthwise_conv_bn_act`."""
    input_mean = input_var = None
    if input_norm is not None:
        x, _, input_mean, input_var = apply(x, input_norm, False)
    padded = F.pad(x, padding)
    raw = F.conv2d(padded, weight.to(x.dtype), stride=stride, groups=x.shape[1])
    out, pooled, mean, var = apply(raw, norm, pool)
    return out, raw, pooled, mean, var, input_mean, input_var
