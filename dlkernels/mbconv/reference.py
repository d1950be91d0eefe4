"""The formula of a depthwise convolution between two batch norms, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dlkernels.batch_norm_act import reference as batch_norm_act
from dlkernels.batch_norm_act.reference import NORM_ACTIVATIONS, Norm
from dlkernels.excitation import Excitation

ACTIVATIONS = NORM_ACTIVATIONS


class ConvNorm(NamedTuple):
    """A convolution without bias and the norm after it.

    Attributes:
        weight: of the convolution; a matrix [O, I] for one of 1x1.
        norm: of its output.
    """

    weight: Tensor
    norm: Norm

    def tensors(self) -> list[Tensor | None]:
        """Those that may have a gradient, in order."""
        return [self.weight, *self.norm[:2]]


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


def mbconv_block(
    x: Tensor,
    depthwise: ConvNorm,
    project: ConvNorm,
    expand: ConvNorm | None,
    excitation: Excitation | None,
    stride: int,
    padding: list[int],
    residual: bool,
) -> Tensor:
    """See :func:`dlkernels.ops.mbconv_block`."""
    hidden = x if expand is None else _pointwise(x, expand)
    padded = F.pad(hidden, padding)
    weight = depthwise.weight.to(x.dtype)
    raw = F.conv2d(padded, weight, stride=stride, groups=hidden.shape[1])
    hidden = apply(raw, depthwise.norm, False)[0]
    if excitation is not None:
        values = [v.to(x.dtype) if isinstance(v, Tensor) else v for v in excitation]
        gates = Excitation(*values).gates(hidden.mean((2, 3)))  # type: ignore[arg-type]
        hidden = hidden * gates[:, :, None, None]
    out = _pointwise(hidden, project)
    return out + x if residual else out


def _pointwise(x: Tensor, layer: ConvNorm) -> Tensor:
    raw = F.conv2d(x, layer.weight.to(x.dtype)[:, :, None, None])
    return apply(raw, layer.norm, False)[0]
