"""Ops on a slice of channels of a larger buffer: its statistics, and norm, ReLU and 1x1 product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.checks import check_integer, check_maps
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
from dlkernels.memory_format import empty_maps, new_maps
from dlkernels.watch import watched


@watched
def channel_statistics(
    maps: Tensor, first: int = 0, count: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the channels [first, first + count) of a buffer, without a copy.

    Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1. Each tile's mean and sum of
    squared deviations are taken about its own mean and merged pairwise. Both results have
    gradients.

    Saved for backward: ``maps`` and the mean.

    Args:
        maps: [N, C, H, W], float32, bfloat16 or float16 (float64 in the reference formula).
        first: the slice's first channel.
        count: channels of the slice; None for all from ``first`` on.

    Returns:
        Mean and variance, [count] each, float32 (float64 for float64 maps).

    Raises:
        TypeError: ``maps`` is no tensor of a floating-point dtype.
        ValueError: ``maps`` is not [N, C, H, W], or the slice does not lie within it.
    """
    check_maps("maps", maps)
    if count is None:
        check_integer("first", first)
        count = maps.shape[1] - first
    _check_slice(maps, first, count)
    if backend.select("channel_statistics", maps) == "reference":
        return reference.channel_statistics(maps, first, count)
    return _STATISTICS(maps, first, count)


@watched
def bn_relu_conv1x1(
    maps: Tensor,
    layer: NormConv,
    *,
    first: int = 0,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Batch norm, ReLU and 1x1 convolution of a slice of a buffer's channels, without a copy.

    .. code-block:: text

        out = weight relu(norm(maps[:, first : first + in]))      [N, out, H, W]

    Huang et al., "Densely Connected Convolutional Networks" (2017), section 3: the first half of
    a DenseNet-B layer. Dtypes, memory formats, autocast and running statistics are those of
    :func:`dlkernels.ops.dense_block`.

    Saved for backward: ``maps``, mean and variance of each channel of the slice (float32), and the
    parameters.

    Args:
        maps: the buffer [N, C, H, W].
        layer: the norm and the convolution, [out, in, 1, 1].
        first: the slice's first channel.
        training: as in :func:`dlkernels.ops.dense_block`.
        momentum: of the running statistics.
        eps: added to the variances.

    Returns:
        Maps [N, out, H, W], the dtype and memory format of ``maps``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: the slice does not lie within ``maps``, shapes do not fit, devices differ,
            running statistics are missing outside training, or a channel has but one value to take
            statistics of.
    """
    check_maps("maps", maps)
    check_options(training, momentum, eps)
    check_is_stage("layer", layer)
    out, count = channels_of_conv1x1("layer.weight", layer.weight)
    _check_slice(maps, first, count)
    check_stage("layer", layer, maps, [out, count, 1, 1], training)
    if training:
        check_batch("maps", maps)
    norm = cast_norms(layer, maps.dtype)
    mean, variance = (None, None) if training else (norm.running_mean, norm.running_var)
    rest = norm.norm_weight, norm.norm_bias, mean, variance, first, eps
    if backend.select("bn_relu_conv1x1", maps) == "reference":
        maps, (weight,) = cast_to_autocast(maps, [layer.weight])
        result, mean, variance = reference.bn_relu_conv1x1(maps, weight, *rest)
    else:
        result, mean, variance = _CONV(maps, layer.weight, *rest)
    if training:
        update_running([layer], [mean], [variance], momentum, maps)
    return result


def _check_slice(maps: Tensor, first: int, count: int) -> None:
    check_integer("first", first)
    check_integer("count", count)
    if not 0 <= first <= first + count <= maps.shape[1]:
        raise ValueError(
            f"first and count: the slice must lie within the {maps.shape[1]} channels of maps, but "
            f"is [{first}, {first + count})"
        )


# ---- the dispatcher's ops -----------------------------------------------------------------------


def _fake_statistics(maps: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    mean = maps.new_empty((count,), dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _fake_statistics_backward(
    grad_mean: Tensor, grad_variance: Tensor, maps: Tensor, mean: Tensor, first: int
) -> Tensor:
    return empty_maps(maps)


def _setup_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, ctx.first, _ = inputs
    ctx.save_for_backward(maps, output[0])


def _statistics_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    grad_mean, grad_variance = (grad.contiguous() for grad in grads)
    grad = _STATISTICS_BACKWARD(grad_mean, grad_variance, *ctx.saved_tensors, ctx.first)
    return grad, None, None


def _fake_conv(
    maps: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    first: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    samples, _, height, width = maps.shape
    count = weight.shape[1] if mean is None else 0
    statistics = maps.new_empty((count,), dtype=torch.float32)
    out = new_maps(maps, (samples, weight.shape[0], height, width))
    return out, statistics, torch.empty_like(statistics)


def _fake_conv_backward(
    grad_out: Tensor,
    maps: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    first: int,
    eps: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return empty_maps(maps), grad_weight, torch.empty_like(norm_weight), torch.empty_like(norm_bias)


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mean, variance, first, eps = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.numbers = first, eps, mean is None
    ctx.save_for_backward(*tensors, *(output[1:] if mean is None else (mean, variance)))


def _conv_backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 8
    grads = _CONV_BACKWARD(grad_out, *ctx.saved_tensors, *ctx.numbers)
    return *grads, None, None, None, None


_STATISTICS = backend.define(
    "channel_statistics",
    "(Tensor maps, int first, int count) -> (Tensor mean, Tensor variance)",
    _fake_statistics,
    "dlkernels.dense_block.triton",
)
_STATISTICS_BACKWARD = backend.define(
    "channel_statistics_backward",
    "(Tensor grad_mean, Tensor grad_variance, Tensor maps, Tensor mean, int first) -> Tensor",
    _fake_statistics_backward,
    "dlkernels.dense_block.triton",
)
_CONV = backend.define(
    "bn_relu_conv1x1",
    "(Tensor maps, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor? mean, "
    "Tensor? variance, int first, float eps) "
    "-> (Tensor out, Tensor batch_mean, Tensor batch_variance)",
    _fake_conv,
    "dlkernels.dense_block.triton",
)
_CONV_BACKWARD = backend.define(
    "bn_relu_conv1x1_backward",
    "(Tensor grad_out, Tensor maps, Tensor weight, Tensor norm_weight, Tensor norm_bias, "
    "Tensor mean, Tensor variance, int first, float eps, bool batch_statistics) "
    "-> (Tensor grad_maps, Tensor grad_weight, Tensor grad_norm_weight, Tensor grad_norm_bias)",
    _fake_conv_backward,
    "dlkernels.dense_block.triton",
)
backend.register_autograd("channel_statistics", _statistics_backward, _setup_statistics)
backend.register_autograd("bn_relu_conv1x1", _conv_backward, _setup_conv)
backend.register_autocast("bn_relu_conv1x1", ("maps", "weight"))
backend.refuse_double_backward("channel_statistics_backward")
backend.refuse_double_backward("bn_relu_conv1x1_backward")
