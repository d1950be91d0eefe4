"""Triton kernels of residual_sum.

A sample is reduced by several programs, each of which writes two sums over its stretch of the area
(``partial`` [N, splits, 2, C]); ``combine`` kernels add the stretches up in order, so that results
are the same in every run. Maps are seen as [channels, area] tiles of one sample, whichever of the
two lies contiguously in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.batch_norm_act.triton import combine_lanes
from dlkernels.memory_format import empty_maps, to_format_of
from dlkernels.triton_support import Budget, MapTiles, launch, relu, strides_of_maps

BLOCK_CHANNELS = 64

BUDGETS = {
    "moments_kernel": Budget(registers=80, shared=2048, wide=0.25),
    "combine_moments_kernel": Budget(registers=48, shared=1024),
    "sum_kernel": Budget(registers=64, shared=1024, wide=0.4),
    "gradient_sums_kernel": Budget(registers=96, shared=2048, wide=0.3),
    "combine_sums_kernel": Budget(registers=48, shared=1024),
    "gradient_kernel": Budget(registers=72, shared=1024, wide=0.4),
}


# ---- reductions ---------------------------------------------------------------------------------


@triton.jit
def moments_kernel(
    x,
    partial,
    channels,
    area,
    splits,
    stretch,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """partial[n, split] = mean less the channel's first value in the sample, squared deviations."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks  # sample and split
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = row // splits * channels * area
    origin = tl.load(x + base + c * stride_c, c < channels, other=0).to(tl.float32)
    count = tl.zeros((1, BLOCK_A), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    for step in range(0, stretch, BLOCK_A):
        a = row % splits * stretch + step + tl.arange(0, BLOCK_A)
        mask = (c < channels)[:, None] & (a < area)[None, :]
        offsets = base + c[:, None] * stride_c + a[None, :] * stride_a
        value = tl.load(x + offsets, mask, other=0).to(tl.float32) - origin[:, None]
        count += (a < area)[None, :].to(tl.float32)
        deviation = tl.where(mask, value - mean, 0.0)
        mean += deviation * (1 / tl.where(count > 0, count, 1.0))
        squares += tl.where(mask, deviation * (value - mean), 0.0)
    _, whole, squared = combine_lanes(tl.broadcast_to(count, (BLOCK_C, BLOCK_A)), mean, squares)
    tl.store(partial + 2 * row * channels + c, whole, c < channels)
    tl.store(partial + (2 * row + 1) * channels + c, squared, c < channels)


@triton.jit
def combine_moments_kernel(
    x,
    partial,
    mean,
    squares,
    channels,
    area,
    splits,
    stretch,
    stride_c,
    BLOCK_C: tl.constexpr,
):
    """Mean and squared deviations [N, C] of all stretches (Chan, Golub and LeVeque 1979)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.0
    whole = tl.zeros((BLOCK_C,), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        at = partial + 2 * (sample * splits + split) * channels + c
        size = tl.minimum(stretch, area - split * stretch).to(tl.float32)
        delta = tl.load(at, c < channels, other=0) - whole
        weight = size / (count + size)
        whole += delta * weight
        total += tl.load(at + channels, c < channels, other=0) + delta * delta * (count * weight)
        count += size
    whole += tl.load(x + sample * channels * area + c * stride_c, c < channels, other=0).to(
        tl.float32
    )
    tl.store(mean + sample * channels + c, whole, c < channels)
    tl.store(squares + sample * channels + c, total, c < channels)


@triton.jit
def gradient_sums_kernel(
    grad_out,
    out,
    x,
    mean,
    partial,
    channels,
    area,
    splits,
    stretch,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """partial[n, split] = sums of grad and grad * (x - mean), grad being grad_out where out > 0."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks  # sample and split
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    base = row // splits * channels * area
    centre = tl.load(mean + c, c < channels, other=0)
    total = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    product = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    for step in range(0, stretch, BLOCK_A):
        a = row % splits * stretch + step + tl.arange(0, BLOCK_A)
        mask = (c < channels)[:, None] & (a < area)[None, :]
        offsets = base + c[:, None] * stride_c + a[None, :] * stride_a
        grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
        if out is not None:
            grad = tl.where(tl.load(out + offsets, mask, other=0) > 0, grad, 0.0)
        deviation = tl.load(x + offsets, mask, other=0).to(tl.float32) - centre[:, None]
        total += grad
        product += tl.where(mask, grad * deviation, 0.0)
    tl.store(partial + 2 * row * channels + c, tl.sum(total, 1), c < channels)
    tl.store(partial + (2 * row + 1) * channels + c, tl.sum(product, 1), c < channels)


@triton.jit
def combine_sums_kernel(partial, total, product, channels, splits, BLOCK_C: tl.constexpr):
    """Both sums [N, C] over all stretches."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.zeros((BLOCK_C,), tl.float32)
    second = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        at = partial + 2 * (sample * splits + split) * channels + c
        first += tl.load(at, c < channels, other=0)
        second += tl.load(at + channels, c < channels, other=0)
    tl.store(total + sample * channels + c, first, c < channels)
    tl.store(product + sample * channels + c, second, c < channels)


# ---- passes that write maps ---------------------------------------------------------------------


@triton.jit
def sum_kernel(
    x,
    shortcut,
    mean,
    slope,
    offset,
    out,
    channels,
    area,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Out = activation((x - mean) * slope + offset + shortcut)."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    a_blocks = tl.cdiv(area, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (c_blocks * a_blocks)
    c = program // a_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = program % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (c < channels)[:, None] & (a < area)[None, :]
    offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
    centre = tl.load(mean + c, c < channels, other=0)
    factor = tl.load(slope + sample * channels + c, c < channels, other=0)
    shift = tl.load(offset + sample * channels + c, c < channels, other=0)
    value = tl.load(x + offsets, mask, other=0).to(tl.float32) - centre[:, None]
    value = value * factor[:, None] + shift[:, None]
    value += tl.load(shortcut + offsets, mask, other=0).to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(out + offsets, value, mask)


@triton.jit
def gradient_kernel(
    grad_out,
    out,
    x,
    mean,
    slope,
    offset,
    tilt,
    grad_x,
    grad_shortcut,
    channels,
    area,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """grad_x = grad * slope + offset + (x - mean) * tilt, grad being grad_out where out > 0."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    a_blocks = tl.cdiv(area, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (c_blocks * a_blocks)
    c = program // a_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = program % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (c < channels)[:, None] & (a < area)[None, :]
    offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
    centre = tl.load(mean + c, c < channels, other=0)
    factor = tl.load(slope + sample * channels + c, c < channels, other=0)
    shift = tl.load(offset + sample * channels + c, c < channels, other=0)
    by_deviation = tl.load(tilt + c, c < channels, other=0)
    grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
    if out is not None:
        grad = tl.where(tl.load(out + offsets, mask, other=0) > 0, grad, 0.0)
    if grad_shortcut is not None:
        tl.store(grad_shortcut + offsets, grad, mask)
    deviation = tl.load(x + offsets, mask, other=0).to(tl.float32) - centre[:, None]
    value = grad * factor[:, None] + shift[:, None] + deviation * by_deviation[:, None]
    tl.store(grad_x + offsets, value, mask)


# ---- launchers ----------------------------------------------------------------------------------


class _Reduction(MapTiles):
    """Two values of each sample's channels, from those of its stretches."""

    def __init__(self, x: Tensor):
        super().__init__(x)
        shape = self.samples, self.channels
        parts = self.samples, self.splits, 2, self.channels
        self.partial = x.new_empty(parts, dtype=torch.float32)
        self.first = x.new_zeros(shape, dtype=torch.float32)
        self.second = torch.zeros_like(self.first)

    def run(self, kernel: Any, *maps: Tensor | None) -> None:
        launch(
            kernel,
            self.samples * self.splits * self.c_blocks if self.area else 0,
            *(*maps, self.partial, self.channels, self.area, self.splits, self.stretch),
            **self.options,
        )

    def combine(self, kernel: Any, *args: Any) -> tuple[Tensor, Tensor]:
        programs = self.samples * triton.cdiv(self.channels, BLOCK_CHANNELS)
        launch(kernel, programs if self.area else 0, *args, BLOCK_C=BLOCK_CHANNELS)
        return self.first, self.second


def residual_sum_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The op ``dlkernels::residual_sum_moments``."""
    x = to_format_of(x, x)
    maps = _Reduction(x)
    maps.run(moments_kernel, x)
    stride_c = 1 if maps.options["CHANNELS_LAST"] else maps.area
    return maps.combine(
        combine_moments_kernel,
        *(x, maps.partial, maps.first, maps.second),
        *(maps.channels, maps.area, maps.splits, maps.stretch, stride_c),
    )


def residual_sum(
    x: Tensor, shortcut: Tensor, mean: Tensor, slope: Tensor, offset: Tensor, relu: bool
) -> Tensor:
    """The op ``dlkernels::residual_sum``; see :func:`dlkernels.ops.residual_sum`."""
    out = empty_maps(x)
    maps = MapTiles(out)
    launch(
        sum_kernel,
        maps.tiles,
        *(to_format_of(out, x), to_format_of(out, shortcut)),
        *(mean.contiguous(), slope.contiguous(), offset.contiguous()),
        *(out, maps.channels, maps.area),
        RELU=relu,
        **maps.options,
    )
    return out


def residual_sum_reduce(
    grad_out: Tensor, out: Tensor | None, x: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """The op ``dlkernels::residual_sum_reduce``."""
    x = to_format_of(x, x)
    maps = _Reduction(x)
    mask = None if out is None else to_format_of(x, out)
    maps.run(gradient_sums_kernel, to_format_of(x, grad_out), mask, x, mean.contiguous())
    return maps.combine(
        combine_sums_kernel,
        *(maps.partial, maps.first, maps.second, maps.channels, maps.splits),
    )


def residual_sum_backward(
    grad_out: Tensor,
    out: Tensor | None,
    x: Tensor,
    mean: Tensor,
    slope: Tensor,
    offset: Tensor,
    tilt: Tensor,
    shortcut_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The op ``dlkernels::residual_sum_backward``."""
    grad_x = empty_maps(x)
    grad_shortcut = torch.empty_like(grad_x) if shortcut_grad else x.new_empty((0,))
    maps = MapTiles(grad_x)
    launch(
        gradient_kernel,
        maps.tiles,
        to_format_of(grad_x, grad_out),
        None if out is None else to_format_of(grad_x, out),
        to_format_of(grad_x, x),
        *(mean.contiguous(), slope.contiguous(), offset.contiguous(), tilt.contiguous()),
        *(grad_x, grad_shortcut if shortcut_grad else None, maps.channels, maps.area),
        **maps.options,
    )
    return grad_x, grad_shortcut
