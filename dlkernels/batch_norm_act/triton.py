"""Triton kernels of batch_norm_act.

Sums over a channel are split: a program passes over a stretch of the area of one sample or, where
maps are small, of several samples (a *row*), and writes its part (``partial`` [rows, 2, C]);
``combine`` kernels add the rows up in a fixed order, so that results are the same in every run.
Statistics are taken of deviations from the channel's first value, in which means far from zero lose
no digits: Welford's rule in each lane, the rule of Chan, Golub and LeVeque (1979) between lanes and
rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.memory_format import empty_maps, to_format_of
from dlkernels.triton_support import Budget, MapTiles, launch, relu, strides_of_maps

# Bytes of a tile of the gradients' sums: one wide access for each thread.
SUMS_TILE = 2048
BLOCK_ROWS = 16
BLOCK_CHANNELS = 32

BUDGETS = {
    "statistics_kernel": Budget(registers=80, shared=2048, wide=0.3),
    "combine_statistics_kernel": Budget(registers=48, shared=1024),
    "norm_act_kernel": Budget(registers=72, shared=1024, wide=0.2),
    "pool_kernel": Budget(registers=48, shared=1024),
    "norm_act_sums_kernel": Budget(registers=128, shared=2048, wide=0.2),
    "combine_sums_kernel": Budget(registers=48, shared=1024),
    "norm_act_backward_kernel": Budget(registers=64, shared=1024, wide=0.2),
}


# ---- functions of single values -----------------------------------------------------------------


@triton.jit
def _clamp6(z):
    """NaN stays NaN."""
    return tl.where(z > 6, 6.0, relu(z))


@triton.jit
def _tanh_of_softplus(z):
    """tanh(ln(1 + exp(z))) without overflow."""
    e = tl.exp(-tl.abs(z))
    numerator = tl.where(z > 0, 1 + 2 * e, e * (e + 2))
    return numerator / (numerator + tl.where(z > 0, 2 * e * e, 2.0))


@triton.jit
def activate(z, negative_slope, ACTIVATION: tl.constexpr):
    """The activation of that name."""
    if ACTIVATION == "relu":
        return relu(z)
    if ACTIVATION == "relu6":
        return _clamp6(z)
    if ACTIVATION == "leaky_relu":
        return tl.where(z < 0, negative_slope * z, z)
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    if ACTIVATION == "hardswish":
        return z * _clamp6(z + 3) / 6
    if ACTIVATION == "mish":
        return z * _tanh_of_softplus(z)
    return z


@triton.jit
def activation_slope(z, negative_slope, ACTIVATION: tl.constexpr):
    """Its derivative."""
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    if ACTIVATION == "relu6":
        return tl.where((z > 0) & (z < 6), 1.0, 0.0)
    if ACTIVATION == "leaky_relu":
        return tl.where(z > 0, 1.0, negative_slope)
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    if ACTIVATION == "hardswish":
        return tl.where(z < -3, 0.0, tl.where(z > 3, 1.0, z / 3 + 0.5))
    if ACTIVATION == "mish":
        t = _tanh_of_softplus(z)
        return t + z * tl.sigmoid(z) * (1 - t * t)
    return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def norm_of_channels(weight, bias, mean, var, c, inside, eps):
    """Mean, 1 / deviation, weight and bias of channels."""
    inverse = 1 / tl.sqrt_rn(tl.load(var + c, inside, other=1) + eps)
    scale = tl.full(c.shape, 1.0, tl.float32)
    shift = tl.zeros(c.shape, tl.float32)
    if weight is not None:
        scale = tl.load(weight + c, inside, other=0)
    if bias is not None:
        shift = tl.load(bias + c, inside, other=0)
    return tl.load(mean + c, inside, other=0), inverse, scale, shift


# ---- statistics ---------------------------------------------------------------------------------


@triton.jit
def combine_lanes(count, mean, squares):
    """Count, mean and squared deviations [channels] of lanes [channels, pixels]."""
    total = tl.sum(count, 1)
    whole = tl.sum(count * mean, 1) / tl.where(total > 0, total, 1.0)
    deviation = mean - whole[:, None]
    return total, whole, tl.sum(squares + count * deviation * deviation, 1)


@triton.jit
def statistics_kernel(
    x,
    partial,
    samples,
    channels,
    area,
    splits,
    stretch,
    group,
    buffer,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """partial[row] = mean of the row less the channel's first value, and squared deviations.

    x is where the channels begin in maps of ``buffer`` channels.
    """
    _, _, channels, _ = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    stride_c, stride_a, buffer, area = strides_of_maps(buffer, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    origin = tl.load(x + c * stride_c, c < channels, other=0).to(tl.float32)
    count = tl.zeros((1, BLOCK_A), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    steps = stretch // BLOCK_A
    for step in range(0, group * steps):
        sample = row // splits * group + step // steps
        a = row % splits * stretch + step % steps * BLOCK_A + tl.arange(0, BLOCK_A)
        inside = (a < area) & (sample < samples)
        mask = (c < channels)[:, None] & inside[None, :]
        offsets = sample * buffer * area + c[:, None] * stride_c + a[None, :] * stride_a
        value = tl.load(x + offsets, mask, other=0).to(tl.float32) - origin[:, None]
        count += inside[None, :].to(tl.float32)
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1 / tl.where(count > 0, count, 1.0))
        squares += tl.where(mask, deviation * (value - mean), 0.0)
    _, whole, squared = combine_lanes(tl.broadcast_to(count, (BLOCK_C, BLOCK_A)), mean, squares)
    tl.store(partial + 2 * row * channels + c, whole, c < channels)
    tl.store(partial + (2 * row + 1) * channels + c, squared, c < channels)


@triton.jit
def _row_sizes(sizes, row, rows, samples, area, splits, stretch, group):
    """How many values of a channel each row has: those of ``sizes`` unless it is None."""
    if sizes is not None:
        return tl.load(sizes + row, row < rows, other=0)
    pixels = tl.minimum(stretch, area - row % splits * stretch)
    return (tl.minimum(group, samples - row // splits * group) * pixels).to(tl.float32)


@triton.jit
def combine_statistics_kernel(
    x,
    partial,
    sizes,
    mean,
    var,
    rows,
    samples,
    channels,
    area,
    splits,
    stretch,
    group,
    stride_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and biased variance of the rows, whose means are counted from a channel's first value.

    x is None if they are counted from zero.
    """
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        size = _row_sizes(sizes, row, rows, samples, area, splits, stretch, group)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        at = partial + 2 * row.to(tl.int64)[:, None] * channels + c[None, :]
        total += size[:, None] * tl.load(at, mask, other=0)
    count = samples * 1.0 * area
    whole = tl.sum(total, 0) / count
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        size = _row_sizes(sizes, row, rows, samples, area, splits, stretch, group)
        mask = (row < rows)[:, None] & (c < channels)[None, :]
        at = partial + 2 * row.to(tl.int64)[:, None] * channels + c[None, :]
        deviation = tl.load(at, mask, other=0) - whole[None, :]
        squares = tl.load(at + channels, mask, other=0)
        total += tl.where(mask, squares + size[:, None] * deviation * deviation, 0.0)
    tl.store(var + c, tl.sum(total, 0) / count, c < channels)
    if x is not None:
        whole += tl.load(x + c * stride_c, c < channels, other=0).to(tl.float32)
    tl.store(mean + c, whole, c < channels)


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def norm_act_kernel(
    x,
    weight,
    bias,
    mean,
    var,
    residual,
    sample_scale,
    out,
    partial,
    channels,
    area,
    splits,
    stretch,
    eps,
    negative_slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Out = activation(norm(x)) * sample_scale + residual; of a stretch its sum, if partial is."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks  # sample and split
    sample = row // splits
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, inverse, scale, shift = norm_of_channels(weight, bias, mean, var, c, c < channels, eps)
    factor = (inverse * scale)[:, None]
    total = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    for step in range(0, stretch, BLOCK_A):
        a = row % splits * stretch + step + tl.arange(0, BLOCK_A)
        mask = (c < channels)[:, None] & (a < area)[None, :]
        offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
        z = tl.load(x + offsets, mask, other=0).to(tl.float32) - centre[:, None]
        value = activate(z * factor + shift[:, None], negative_slope, ACTIVATION)
        if sample_scale is not None:
            value *= tl.load(sample_scale + sample)
        if residual is not None:
            value += tl.load(residual + offsets, mask, other=0).to(tl.float32)
        tl.store(out + offsets, value, mask)
        if partial is not None:
            total += tl.where(mask, value, 0.0)
    if partial is not None:
        tl.store(partial + row * channels + c, tl.sum(total, 1), c < channels)


@triton.jit
def pool_kernel(partial, pooled, channels, area, splits, BLOCK_C: tl.constexpr):
    """Pooled = the sum over splits / area."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (sample * splits + split) * channels + c, c < channels, other=0)
    tl.store(pooled + sample * channels + c, total / area, c < channels)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def _norm_gradient(
    grad_out,
    grad_pooled,
    x,
    sample_scale,
    offsets,
    mask,
    sample,
    c,
    channels,
    area,
    centre,
    inverse,
    scale,
    shift,
    negative_slope,
    ACTIVATION: tl.constexpr,
):
    """The gradient of the norm's output, and the normalised input [channels, pixels]."""
    normal = tl.load(x + offsets, mask, other=0).to(tl.float32) - centre[:, None]
    normal *= inverse[:, None]
    grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
    if grad_pooled is not None:
        at = grad_pooled + sample * channels + c
        grad += (tl.load(at, c < channels, other=0) / area)[:, None]
    if sample_scale is not None:
        grad *= tl.load(sample_scale + sample)
    z = normal * scale[:, None] + shift[:, None]
    return grad * activation_slope(z, negative_slope, ACTIVATION), normal


@triton.jit
def norm_act_sums_kernel(
    grad_out,
    grad_pooled,
    x,
    weight,
    bias,
    mean,
    var,
    sample_scale,
    grad_x,
    partial,
    samples,
    channels,
    area,
    splits,
    stretch,
    group,
    eps,
    negative_slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """partial[row] = sums of the norm's gradient, and of it times the normalised input.

    If grad_x is given, the statistics are constants and it is written in the same pass.
    """
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    centre, inverse, scale, shift = norm_of_channels(weight, bias, mean, var, c, c < channels, eps)
    by_bias = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    by_weight = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    steps = stretch // BLOCK_A
    for step in range(0, group * steps):
        sample = row // splits * group + step // steps
        a = row % splits * stretch + step % steps * BLOCK_A + tl.arange(0, BLOCK_A)
        mask = (c < channels)[:, None] & ((a < area) & (sample < samples))[None, :]
        offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
        grad, normal = _norm_gradient(
            grad_out,
            grad_pooled,
            x,
            sample_scale,
            offsets,
            mask,
            tl.minimum(sample, samples - 1),
            c,
            channels,
            area,
            centre,
            inverse,
            scale,
            shift,
            negative_slope,
            ACTIVATION,
        )
        grad = tl.where(mask, grad, 0.0)
        by_bias += grad
        by_weight += tl.where(mask, grad * normal, 0.0)
        if grad_x is not None:
            tl.store(grad_x + offsets, grad * (inverse * scale)[:, None], mask)
    tl.store(partial + 2 * row * channels + c, tl.sum(by_bias, 1), c < channels)
    tl.store(partial + (2 * row + 1) * channels + c, tl.sum(by_weight, 1), c < channels)


@triton.jit
def combine_sums_kernel(
    partial,
    sums,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums [columns] of partial [rows, columns]."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (c < columns)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * columns + c[None, :], mask, other=0)
    tl.store(sums + c, tl.sum(total, 0), c < columns)


@triton.jit
def norm_act_backward_kernel(
    grad_out,
    grad_pooled,
    x,
    weight,
    bias,
    mean,
    var,
    sample_scale,
    sums,
    grad_x,
    samples,
    channels,
    area,
    eps,
    negative_slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """grad_x through the batch's statistics, from the sums [2, C] over the batch."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    a_blocks = tl.cdiv(area, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (c_blocks * a_blocks)
    c = program // a_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = program % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    centre, inverse, scale, shift = norm_of_channels(weight, bias, mean, var, c, c < channels, eps)
    count = samples * 1.0 * area
    grad_mean = tl.load(sums + c, c < channels, other=0) / count
    grad_slope = tl.load(sums + channels + c, c < channels, other=0) / count
    mask = (c < channels)[:, None] & (a < area)[None, :]
    offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
    grad, normal = _norm_gradient(
        grad_out,
        grad_pooled,
        x,
        sample_scale,
        offsets,
        mask,
        sample,
        c,
        channels,
        area,
        centre,
        inverse,
        scale,
        shift,
        negative_slope,
        ACTIVATION,
    )
    grad -= grad_mean[:, None] + normal * grad_slope[:, None]
    tl.store(grad_x + offsets, grad * (inverse * scale)[:, None], mask)


# ---- launchers ----------------------------------------------------------------------------------


class Rows:
    """How the values of a channel are cut into rows, whose parts are then combined."""

    def __init__(self, tiles: MapTiles):
        self.group = 1
        if tiles.splits == 1:
            most = max(1, tiles.longest // max(1, tiles.stretch))
            self.group = min(most, max(1, tiles.samples))
        self.count = triton.cdiv(tiles.samples, self.group) * tiles.splits if tiles.area else 0
        self.extents = (
            tiles.samples,
            tiles.channels,
            tiles.area,
            tiles.splits,
            tiles.stretch,
            self.group,
        )


def contiguous(value: Tensor | None) -> Tensor | None:
    """Values of channels or samples, one after another."""
    return None if value is None else value.contiguous()


def combine_statistics(
    x: Tensor | None,
    partial: Tensor,
    extents: tuple[int, ...],
    stride_c: int,
    sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of the parts [rows, 2, C] that kernels wrote.

    Args:
        x: maps whose first values the means are counted from, or these values; None for zero.
        partial: mean and squared deviations of each row.
        extents: those of Rows.
        stride_c: of ``x``.
        sizes: values of a channel in each row, float32 [rows]; None where rows are those of Rows.
    """
    channels = partial.shape[2]
    mean = partial.new_empty((channels,))
    var = torch.empty_like(mean)
    launch(
        combine_statistics_kernel,
        triton.cdiv(channels, BLOCK_CHANNELS),
        *(x, partial, sizes, mean, var, len(partial), *extents, stride_c),
        BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_CHANNELS,
    )
    return mean, var


def batch_statistics(x: Tensor, first: int = 0, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of maps in one of the two layouts, or of some of their channels.

    Args:
        x: the maps.
        first: the first of the channels.
        count: how many channels; None for all from ``first`` on.
    """
    samples, buffer, *size = x.shape
    tiles = MapTiles(x, (samples, buffer - first if count is None else count, *size))
    rows = Rows(tiles)
    options = dict(tiles.options)
    if options["CHANNELS_LAST"]:
        options["ALIGNMENT"] = math.gcd(options["ALIGNMENT"], buffer)
    part = x[:, first:]
    partial = x.new_empty((rows.count, 2, tiles.channels), dtype=torch.float32)
    launch(
        statistics_kernel,
        rows.count * tiles.c_blocks,
        *(part, partial, *rows.extents, buffer),
        **options,
    )
    stride_c = 1 if options["CHANNELS_LAST"] else tiles.area
    origin = part if part.numel() else None
    return combine_statistics(origin, partial, rows.extents, stride_c)


def add_up(partial: Tensor) -> Tensor:
    """The sum over the first dimension, in a fixed order."""
    rows, *shape = partial.shape
    sums = partial.new_empty(shape)
    launch(
        combine_sums_kernel,
        triton.cdiv(sums.numel(), BLOCK_CHANNELS),
        *(partial, sums, rows, sums.numel()),
        BLOCK_R=BLOCK_ROWS,
        BLOCK_C=BLOCK_CHANNELS,
    )
    return sums


def pool_of(partial: Tensor, area: int) -> Tensor:
    """Means [N, C] of the sums [N, splits, C] over stretches of the area."""
    samples, splits, channels = partial.shape
    pooled = partial.new_empty((samples, channels))
    launch(
        pool_kernel,
        samples * triton.cdiv(channels, BLOCK_CHANNELS),
        *(partial, pooled, channels, area, splits),
        BLOCK_C=BLOCK_CHANNELS,
    )
    return pooled


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::batch_norm_act``; see :func:`dlkernels.ops.batch_norm_act`."""
    out = empty_maps(x)
    x = to_format_of(out, x)
    residual = None if residual is None else to_format_of(out, residual)
    if mean is None or var is None:
        mean, var = batch_statistics(x)
    else:
        mean, var = (t.clone(memory_format=torch.contiguous_format) for t in (mean, var))
    tiles = MapTiles(out)
    splits, stretch = tiles.splits, tiles.stretch
    if not pool:
        # Few tiles, but more than one, so that the channels' values weigh little beside them.
        stretch = max(1, min(4, tiles.a_blocks)) * tiles.options["BLOCK_A"]
        splits = triton.cdiv(tiles.area, stretch)
    partial = x.new_empty((tiles.samples, splits, tiles.channels), dtype=torch.float32)
    launch(
        norm_act_kernel,
        tiles.samples * splits * tiles.c_blocks,
        *(x, contiguous(weight), contiguous(bias), mean, var, residual, contiguous(sample_scale)),
        *(out, partial if pool else None, tiles.channels, tiles.area, splits, stretch),
        *(eps, negative_slope),
        ACTIVATION=activation,
        **tiles.options,
    )
    pooled = pool_of(partial, tiles.area) if pool else partial.new_empty((0, tiles.channels))
    return out, pooled, mean, var


def gradient_sums(
    grad_out: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    values: Sequence[Tensor | None],
    eps: float,
    activation: str,
    negative_slope: float,
    grad_x: Tensor | None = None,
) -> Tensor:
    """Sums [2, C] of the norm's gradient, and of it times the normalised input.

    Args:
        grad_out: lies in memory as ``x`` does.
        grad_pooled: of the pool, [N, C], or None.
        x: maps in one of the two layouts.
        values: weight, bias, mean, var and sample_scale, contiguous.
        eps: of the norm.
        activation: of the norm.
        negative_slope: of the activation.
        grad_x: written in the same pass, the statistics being constants, or None.
    """
    tiles = MapTiles(x, tile=SUMS_TILE // x.element_size(), steps=32)
    rows = Rows(tiles)
    partial = x.new_empty((rows.count, 2, tiles.channels), dtype=torch.float32)
    launch(
        norm_act_sums_kernel,
        rows.count * tiles.c_blocks,
        *(grad_out, grad_pooled, x, *values, grad_x, partial, *rows.extents),
        *(eps, negative_slope),
        ACTIVATION=activation,
        **tiles.options,
    )
    return add_up(partial)


def write_gradient(
    grad_out: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    values: Sequence[Tensor | None],
    sums: Tensor,
    grad_x: Tensor,
    eps: float,
    activation: str,
    negative_slope: float,
) -> None:
    """Writes grad_x through the batch's statistics; see gradient_sums. It may be grad_out."""
    tiles = MapTiles(grad_x)
    launch(
        norm_act_backward_kernel,
        tiles.tiles,
        *(grad_out, grad_pooled, x, *values, sums, grad_x),
        *(tiles.samples, tiles.channels, tiles.area, eps, negative_slope),
        ACTIVATION=activation,
        **tiles.options,
    )


def batch_norm_act_backward(
    grad_out: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sample_scale: Tensor | None,
    batch_statistics: bool,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``dlkernels::batch_norm_act_backward``."""
    grad_x = empty_maps(x)
    values = tuple(map(contiguous, (weight, bias, mean, var, sample_scale)))
    maps = (
        to_format_of(grad_x, grad_out),
        contiguous(grad_pooled),
        to_format_of(grad_x, x),
    )
    options = eps, activation, negative_slope
    sums = gradient_sums(*maps, values, *options, None if batch_statistics else grad_x)
    if batch_statistics:
        write_gradient(*maps, values, sums, grad_x, *options)
    return grad_x, sums[1].clone(), sums[0].clone()
