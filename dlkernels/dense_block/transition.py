"""The op ``dlkernels::norm_relu_pool`` and the transition between dense blocks made of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels import backend
from dlkernels.checks import check_maps
from dlkernels.dense_block import reference
from dlkernels.dense_block.op import (
    NormConv,
    cast_norms,
    cast_to_autocast,
    channels_of_conv1x1,
    check_batch,
    check_is_stage,
    check_options,
    check_stage,
    update_running,
)
from dlkernels.memory_format import empty_maps, memory_format_of
from dlkernels.watch import watched


@watched
def transition(
    x: Tensor,
    layer: NormConv,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""The layer between dense blocks: batch norm, ReLU, 1x1 convolution and 2x2 average pool.

    .. code-block:: text

        pooled = average of relu(norm(x)) over 2x2      [N, C, H // 2, W // 2]
        out    = weight pooled                          [N, K, H // 2, W // 2]

    Huang et al., "Densely Connected Convolutional Networks" (2017), section 3, "Pooling layers".
    The paper convolves before it pools; the two commute, and this order has a quarter of the
    products. An odd last row or column is dropped, as by ``torch.nn.AvgPool2d(2)``.

    Dtypes, memory formats, autocast and running statistics are those of
    :func:`dlkernels.ops.dense_block`.

    Saved for backward: ``x``, its mean and variance per channel (float32), ``pooled``, and the
    parameters.

    Args:
        x: maps [N, C, H, W].
        layer: the norm and the 1x1 convolution.
        training: as in :func:`dlkernels.ops.dense_block`.
        momentum: of the running statistics.
        eps: added to the variances.

    Returns:
        Maps [N, K, H // 2, W // 2], the dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: shapes do not fit, devices differ, running statistics are missing outside
            training, a channel has but one value to take statistics of, or the maps are smaller
            than 2x2.
    """
    check_maps("x", x)
    channels = x.shape[1]
    check_options(training, momentum, eps)
    check_is_stage("layer", layer)
    out, _ = channels_of_conv1x1("layer.weight", layer.weight)
    check_stage("layer", layer, x, [out, channels, 1, 1], training)
    if min(x.shape[2:]) < 2:
        raise ValueError(f"x must be at least 2x2, but has shape {list(x.shape)}")
    if training:
        check_batch("x", x)
    norm = cast_norms(layer, x.dtype)
    mean, variance = (None, None) if training else (norm.running_mean, norm.running_var)
    rest = norm.norm_weight, norm.norm_bias, mean, variance, eps
    if backend.select("norm_relu_pool", x) == "reference":
        x, (weight,) = cast_to_autocast(x, [layer.weight])
        pooled, mean, variance = reference.norm_relu_pool(x, *rest)
    else:
        weight = layer.weight
        pooled, mean, variance = _OP(x, *rest)
    result = F.conv2d(pooled, weight)
    if training:  # last, when nothing can run out of memory any more
        update_running([layer], [mean], [variance], momentum, x)
    return result


def _fake(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, channels, height, width = x.shape
    out = torch.empty(
        (samples, channels, height // 2, width // 2),
        dtype=x.dtype,
        device=x.device,
        memory_format=memory_format_of(x),
    )
    statistics = x.new_empty((channels if mean is None else 0,), dtype=torch.float32)
    return out, statistics, torch.empty_like(statistics)


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_maps(x), torch.empty_like(norm_weight), torch.empty_like(norm_bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, norm_weight, norm_bias, mean, variance, ctx.eps = inputs
    _, batch_mean, batch_variance = output
    ctx.mark_non_differentiable(batch_mean, batch_variance)
    ctx.set_materialize_grads(False)
    ctx.batch_statistics = mean is None
    statistics = (batch_mean, batch_variance) if mean is None else (mean, variance)
    ctx.save_for_backward(x, norm_weight, norm_bias, *statistics)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 6
    grads = _BACKWARD_OP(grad_out, *ctx.saved_tensors, ctx.eps, ctx.batch_statistics)
    return *grads, None, None, None


_OP = backend.define(
    "norm_relu_pool",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor? mean, Tensor? variance, float eps) "
    "-> (Tensor out, Tensor batch_mean, Tensor batch_variance)",
    _fake,
    "dlkernels.dense_block.triton",
)
_BACKWARD_OP = backend.define(
    "norm_relu_pool_backward",
    "(Tensor grad_out, Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor mean, "
    "Tensor variance, float eps, bool batch_statistics) "
    "-> (Tensor grad_x, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    _fake_backward,
    "dlkernels.dense_block.triton",
)
backend.register_autograd("norm_relu_pool", _backward, _setup_context)
backend.register_autocast("norm_relu_pool", ("x",))
backend.refuse_double_backward("norm_relu_pool_backward")
