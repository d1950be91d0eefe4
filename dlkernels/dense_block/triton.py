"""Triton kernels of dense_block and of its pieces.

The kernels see a slice of the channels of maps as a matrix of pixels by channels, whichever of the
two lies contiguously in memory; channels_last maps are one sample of all pixels. Batch norm and
ReLU are the prologue of the product with a 1x1 convolution's weight, forward and for the weight's
gradient, and the epilogue of the product that gives the input's. Sums over pixels are taken per
program (``partial`` [rows, ...]) and added up in a fixed order, so that results are the same in
every run. The 3x3 convolutions are PyTorch's (cuDNN).

float32 products run on tensor cores as sums of three TF32 products, which keep float32's digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.batch_norm_act.triton import (
    add_up,
    batch_statistics,
    contiguous,
    norm_of_channels,
)
from dlkernels.memory_format import memory_format_of, new_maps, to_format_of
from dlkernels.triton_support import Budget, alignment_of, launch, relu, strides_of_maps

# Pixels of a tile, and channels or pixels that a product sums over at a time.
BLOCK_A = 64
BLOCK_SUM = 32
# Channels of a product's tile, at most.
WIDEST = 128
# Tiles of pixels whose part of a weight's gradient one program sums.
WEIGHT_STEPS = 128
# Cells times channels of a tile of the transition.
TILE = 1024

BUDGETS = {
    "norm_relu_conv_kernel": Budget(registers=192, shared=81920, wide=0.3),
    "conv_backward_kernel": Budget(registers=216, shared=73728, wide=0.3),
    "weight_backward_kernel": Budget(registers=176, shared=40960, wide=0.5),
    "correct_kernel": Budget(registers=64, shared=1024, wide=0.5),
    "pool_kernel": Budget(registers=80, shared=4096, wide=0.2),
    "pool_backward_kernel": Budget(registers=136, shared=4096, wide=0.15),
}


# ---- tiles --------------------------------------------------------------------------------------


@triton.jit
def _offsets(sample, a, c, buffer, area, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Of a tile [pixels, channels] in maps of ``buffer`` channels."""
    stride_c, stride_a, buffer, area = strides_of_maps(buffer, area, CHANNELS_LAST, ALIGNMENT)
    return sample * buffer * area + a[:, None] * stride_a + c[None, :] * stride_c


@triton.jit
def _inside(a, c, area, channels, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Which of a tile [pixels, channels] there are."""
    _, _, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    return (a < area)[:, None] & (c < channels)[None, :]


@triton.jit
def _normalise(x, norm_weight, norm_bias, mean, var, c, channels, eps):
    """A tile less its mean over its deviation, and the norm's output."""
    centre, inverse, scale, shift = norm_of_channels(
        norm_weight, norm_bias, mean, var, c, c < channels, eps
    )
    normal = (x.to(tl.float32) - centre[None, :]) * inverse[None, :]
    return normal, normal * scale[None, :] + shift[None, :]


# ---- products -----------------------------------------------------------------------------------


@triton.jit
def norm_relu_conv_kernel(
    x,
    weight,
    norm_weight,
    norm_bias,
    mean,
    var,
    out,
    channels,
    outputs,
    buffer,
    area,
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out = relu(norm(x)) times the weight [outputs, channels], or alone where that is None."""
    a_blocks = tl.cdiv(area, BLOCK_A)
    k_blocks = tl.cdiv(outputs, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (a_blocks * k_blocks)
    a = program // k_blocks % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    k = program % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    to = _offsets(sample, a, k, outputs, area, CHANNELS_LAST, ALIGNMENT)
    to_mask = _inside(a, k, area, outputs, CHANNELS_LAST, ALIGNMENT)
    if weight is None:
        at = _offsets(sample, a, k, buffer, area, CHANNELS_LAST, ALIGNMENT)
        tile = tl.load(x + at, to_mask, other=0)
        _, z = _normalise(tile, norm_weight, norm_bias, mean, var, k, channels, eps)
        tl.store(out + to, relu(z), to_mask)
    else:
        total = tl.zeros((BLOCK_A, BLOCK_K), tl.float32)
        for first in range(0, channels, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            mask = _inside(a, c, area, channels, CHANNELS_LAST, ALIGNMENT)
            at = _offsets(sample, a, c, buffer, area, CHANNELS_LAST, ALIGNMENT)
            tile = tl.load(x + at, mask, other=0)
            _, z = _normalise(tile, norm_weight, norm_bias, mean, var, c, channels, eps)
            w_mask = (k < outputs)[:, None] & (c < channels)[None, :]
            w = tl.load(weight + k[:, None] * channels + c[None, :], w_mask, other=0)
            total = tl.dot(relu(z).to(w.dtype), tl.trans(w), total, input_precision="tf32x3")
        tl.store(out + to, total, to_mask)


@triton.jit
def conv_backward_kernel(
    grad_out,
    weight,
    x,
    norm_weight,
    norm_bias,
    mean,
    var,
    grad_x,
    partial,
    channels,
    outputs,
    buffer,
    grad_buffer,
    area,
    eps,
    ACCUMULATE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of x, the statistics being constants, is written or added to grad_x.

    partial[row] = sums of the gradient of norm(x), and of it times the normalised x. The gradient
    of relu(norm(x)) is grad_out times the weight, or grad_out where that is None.
    """
    a_blocks = tl.cdiv(area, BLOCK_A)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // c_blocks
    sample = row // a_blocks
    a = row % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = _inside(a, c, area, channels, CHANNELS_LAST, ALIGNMENT)
    if weight is None:
        at = _offsets(sample, a, c, channels, area, CHANNELS_LAST, ALIGNMENT)
        grad = tl.load(grad_out + at, mask, other=0).to(tl.float32)
    else:
        grad = tl.zeros((BLOCK_A, BLOCK_C), tl.float32)
        for first in range(0, outputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            at = _offsets(sample, a, k, outputs, area, CHANNELS_LAST, ALIGNMENT)
            k_mask = _inside(a, k, area, outputs, CHANNELS_LAST, ALIGNMENT)
            g = tl.load(grad_out + at, k_mask, other=0)
            w_mask = (k < outputs)[:, None] & (c < channels)[None, :]
            w = tl.load(weight + k[:, None] * channels + c[None, :], w_mask, other=0)
            grad = tl.dot(g, w, grad, input_precision="tf32x3")
    at = _offsets(sample, a, c, buffer, area, CHANNELS_LAST, ALIGNMENT)
    tile = tl.load(x + at, mask, other=0)
    normal, z = _normalise(tile, norm_weight, norm_bias, mean, var, c, channels, eps)
    # A gradient passes where z is NaN, as in PyTorch.
    grad = tl.where(mask & ~(z <= 0), grad, 0.0)
    tl.store(partial + 2 * row * channels + c, tl.sum(grad, 0), c < channels)
    products = tl.where(mask, grad * normal, 0.0)
    tl.store(partial + (2 * row + 1) * channels + c, tl.sum(products, 0), c < channels)
    _, inverse, scale, _ = norm_of_channels(norm_weight, norm_bias, mean, var, c, c < channels, eps)
    to = _offsets(sample, a, c, grad_buffer, area, CHANNELS_LAST, ALIGNMENT)
    value = grad * (inverse * scale)[None, :]
    if ACCUMULATE:
        value += tl.load(grad_x + to, mask, other=0)
    tl.store(grad_x + to, value, mask)


@triton.jit
def weight_backward_kernel(
    grad_out,
    x,
    norm_weight,
    norm_bias,
    mean,
    var,
    partial,
    samples,
    channels,
    outputs,
    buffer,
    area,
    steps,
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[row] = grad_out^T relu(norm(x)) [outputs, channels] of ``steps`` tiles of pixels."""
    a_blocks = tl.cdiv(area, BLOCK_A)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    k_blocks = tl.cdiv(outputs, BLOCK_K)
    program = tl.program_id(0).to(tl.int64)
    row = program // (c_blocks * k_blocks)
    k = program // c_blocks % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for tile in range(row * steps, tl.minimum((row + 1) * steps, samples * a_blocks)):
        sample = tile // a_blocks
        a = tile % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
        mask = _inside(a, c, area, channels, CHANNELS_LAST, ALIGNMENT)
        at = _offsets(sample, a, c, buffer, area, CHANNELS_LAST, ALIGNMENT)
        value = tl.load(x + at, mask, other=0)
        _, z = _normalise(value, norm_weight, norm_bias, mean, var, c, channels, eps)
        k_mask = _inside(a, k, area, outputs, CHANNELS_LAST, ALIGNMENT)
        at = _offsets(sample, a, k, outputs, area, CHANNELS_LAST, ALIGNMENT)
        g = tl.load(grad_out + at, k_mask, other=0)
        total = tl.dot(tl.trans(g), relu(z).to(g.dtype), total, input_precision="tf32x3")
    to = partial + (row * outputs + k[:, None]) * channels + c[None, :]
    tl.store(to, total, (k < outputs)[:, None] & (c < channels)[None, :])


@triton.jit
def correct_kernel(
    grad,
    x,
    mean,
    scale,
    shift,
    out,
    channels,
    buffer,
    grad_buffer,
    out_buffer,
    area,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Out = grad, or zero where that is None, + (x - mean) * scale + shift."""
    a_blocks = tl.cdiv(area, BLOCK_A)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (a_blocks * c_blocks)
    a = program // c_blocks % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = _inside(a, c, area, channels, CHANNELS_LAST, ALIGNMENT)
    at = _offsets(sample, a, c, buffer, area, CHANNELS_LAST, ALIGNMENT)
    value = tl.load(x + at, mask, other=0).to(tl.float32)
    value -= tl.load(mean + c, c < channels, other=0)[None, :]
    value *= tl.load(scale + c, c < channels, other=0)[None, :]
    value += tl.load(shift + c, c < channels, other=0)[None, :]
    if grad is not None:
        at = _offsets(sample, a, c, grad_buffer, area, CHANNELS_LAST, ALIGNMENT)
        value += tl.load(grad + at, mask, other=0)
    tl.store(out + _offsets(sample, a, c, out_buffer, area, CHANNELS_LAST, ALIGNMENT), value, mask)


# ---- transition ---------------------------------------------------------------------------------


@triton.jit
def _aligned(width, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The width, known to be aligned where pixels lie side by side."""
    return width if CHANNELS_LAST else width // ALIGNMENT * ALIGNMENT


@triton.jit
def _upper_pixels(
    first, width, BLOCK_A: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr
):
    """Row of 2x2 cells and column of pixels, for the upper pixels of the cells from first on."""
    i = 2 * first + tl.arange(0, 2 * BLOCK_A)
    width = _aligned(width, CHANNELS_LAST, ALIGNMENT)
    return i // width, i % width


@triton.jit
def pool_kernel(
    x,
    norm_weight,
    norm_bias,
    mean,
    var,
    out,
    channels,
    height,
    width,
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Out = average of relu(norm(x)) over cells of 2x2; an odd last row or column is dropped."""
    cells = (height // 2) * (width // 2)
    a_blocks = tl.cdiv(cells, BLOCK_A)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (a_blocks * c_blocks)
    first = program // c_blocks % a_blocks * BLOCK_A
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pitch = _aligned(width, CHANNELS_LAST, ALIGNMENT)
    row, column = _upper_pixels(first, width // 2 * 2, BLOCK_A, CHANNELS_LAST, ALIGNMENT)
    mask = (row < height // 2)[:, None] & (c < channels)[None, :]
    total = tl.zeros((2 * BLOCK_A, BLOCK_C), tl.float32)
    for lower in tl.static_range(2):
        a = (2 * row + lower) * pitch + column
        at = _offsets(sample, a, c, channels, height * width, CHANNELS_LAST, ALIGNMENT)
        tile = tl.load(x + at, mask, other=0)
        _, z = _normalise(tile, norm_weight, norm_bias, mean, var, c, channels, eps)
        total += relu(z)
    pooled = tl.sum(tl.reshape(total, (BLOCK_A, 2, BLOCK_C)), 1) * 0.25
    a = first + tl.arange(0, BLOCK_A)
    to = _offsets(sample, a, c, channels, cells, CHANNELS_LAST, OUT_ALIGNMENT)
    tl.store(out + to, pooled, (a < cells)[:, None] & (c < channels)[None, :])


@triton.jit
def pool_backward_kernel(
    grad_out,
    x,
    norm_weight,
    norm_bias,
    mean,
    var,
    scale,
    shift,
    grad_x,
    partial,
    channels,
    height,
    width,
    eps,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    OUT_ALIGNMENT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[row] as in conv_backward_kernel, and grad_x, each where it is given.

    grad_x has the correction of correct_kernel where scale and shift are given.
    """
    columns = tl.cdiv(width, 2)
    cells = tl.cdiv(height, 2) * columns
    a_blocks = tl.cdiv(cells, BLOCK_A)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    part = program // c_blocks
    sample = part // a_blocks
    first = part % a_blocks * BLOCK_A
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    cell = first + tl.arange(0, BLOCK_A)
    pooled = (cell // columns < height // 2) & (cell % columns < width // 2)
    at = _offsets(
        sample,
        cell // columns * (width // 2) + cell % columns,
        c,
        channels,
        (height // 2) * (width // 2),
        CHANNELS_LAST,
        OUT_ALIGNMENT,
    )
    tile = tl.load(grad_out + at, pooled[:, None] & (c < channels)[None, :], other=0)
    grad = tl.broadcast_to(tile.to(tl.float32)[:, None, :] * 0.25, (BLOCK_A, 2, BLOCK_C))
    grad = tl.reshape(grad, (2 * BLOCK_A, BLOCK_C))
    pitch = _aligned(width, CHANNELS_LAST, ALIGNMENT)
    row, column = _upper_pixels(first, 2 * columns, BLOCK_A, CHANNELS_LAST, ALIGNMENT)
    centre, inverse, factor, _ = norm_of_channels(
        norm_weight, norm_bias, mean, var, c, c < channels, eps
    )
    by_bias = tl.zeros((BLOCK_C,), tl.float32)
    by_weight = tl.zeros((BLOCK_C,), tl.float32)
    for lower in tl.static_range(2):
        y = 2 * row + lower
        mask = ((y < height) & (column < pitch))[:, None] & (c < channels)[None, :]
        a = y * pitch + column
        at = _offsets(sample, a, c, channels, height * width, CHANNELS_LAST, ALIGNMENT)
        tile = tl.load(x + at, mask, other=0)
        normal, z = _normalise(tile, norm_weight, norm_bias, mean, var, c, channels, eps)
        grad_z = tl.where(mask & ~(z <= 0), grad, 0.0)
        by_bias += tl.sum(grad_z, 0)
        by_weight += tl.sum(tl.where(mask, grad_z * normal, 0.0), 0)
        if grad_x is not None:
            value = grad_z * (inverse * factor)[None, :]
            if scale is not None:
                slope = tl.load(scale + c, c < channels, other=0)
                constant = tl.load(shift + c, c < channels, other=0)
                value += (tile.to(tl.float32) - centre[None, :]) * slope[None, :]
                value += constant[None, :]
            tl.store(grad_x + at, value, mask)
    if partial is not None:
        tl.store(partial + 2 * part * channels + c, by_bias, c < channels)
        tl.store(partial + (2 * part + 1) * channels + c, by_weight, c < channels)


# ---- launchers of the kernels -------------------------------------------------------------------


@dataclass(frozen=True)
class _Slice:
    """The channels [first, first + count) of maps in one of the two formats."""

    maps: Tensor
    first: int
    count: int

    @property
    def view(self) -> Tensor:
        """Where the slice begins."""
        return self.maps[:, self.first :]

    @property
    def buffer(self) -> int:
        """Channels of the maps."""
        return self.maps.shape[1]


@dataclass(frozen=True)
class _Norm:
    """A batch norm with the statistics that it normalises with."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(map(contiguous, (self.weight, self.bias, self.mean, self.var)))

    @property
    def scale(self) -> Tensor:
        return self.weight * (self.var + self.eps).rsqrt()


def _whole(maps: Tensor) -> _Slice:
    return _Slice(maps, 0, maps.shape[1])


def _native(maps: Tensor) -> Tensor:
    return to_format_of(maps, maps)


class _Pixels:
    """How the pixels of maps are cut into tiles, and what kernels may rely on."""

    def __init__(self, source: _Slice, *channels: int, block: int | None = None):
        """All maps of a launch lie in memory as those of ``source``, with these channels."""
        samples, _, height, width = source.maps.shape
        channels_last = memory_format_of(source.maps) == torch.channels_last
        # Without neighbours, all pixels of channels_last maps are alike.
        self.samples, self.area = (samples, height * width)
        if channels_last:
            self.samples, self.area = 1, samples * height * width
        block = block or BLOCK_A
        self.tiles = self.samples * triton.cdiv(self.area, block)
        inner = (source.count, source.buffer, *channels) if channels_last else (self.area,)
        self.options = {
            "CHANNELS_LAST": channels_last,
            "ALIGNMENT": math.gcd(16, *inner),
            "BLOCK_A": block,
        }


def _block(channels: int, most: int) -> int:
    """The tile's width for so many channels; products need 16 at least."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def _warps(block: int) -> int:
    """Of a product whose tile is so wide."""
    return 8 if block == 128 else 4


def _norm_relu_conv(
    source: _Slice, norm: _Norm, weight: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """relu(norm(source)), times the weight of a 1x1 convolution where it is given."""
    if out is None:
        outputs = source.count if weight is None else weight.shape[0]
        samples, _, height, width = source.maps.shape
        out = new_maps(source.maps, (samples, outputs, height, width))
    outputs = out.shape[1]
    pixels = _Pixels(source, outputs)
    block = _block(outputs, WIDEST)
    launch(
        norm_relu_conv_kernel,
        pixels.tiles * triton.cdiv(outputs, block),
        *(source.view, contiguous(weight), *norm.tensors, out),
        *(source.count, outputs, source.buffer, pixels.area, norm.eps),
        BLOCK_C=BLOCK_SUM,
        BLOCK_K=block,
        num_warps=_warps(block) if source.maps.dtype == torch.float32 else 4,
        num_stages=2,
        **pixels.options,
    )
    return out


def _conv_backward(
    grad_out: Tensor,
    weight: Tensor | None,
    source: _Slice,
    norm: _Norm,
    grad: _Slice,
    *,
    accumulate: bool = False,
) -> Tensor:
    """Writes or adds the gradient of the source, the statistics being constants.

    Returns the sums [2, channels] of conv_backward_kernel: the gradients of the norm's bias and
    weight.
    """
    outputs = grad_out.shape[1]
    pixels = _Pixels(source, outputs, grad.buffer)
    block = _block(source.count, WIDEST // 2 if weight is None else WIDEST)
    partial = norm.mean.new_empty((pixels.tiles, 2, source.count))
    launch(
        conv_backward_kernel,
        pixels.tiles * triton.cdiv(source.count, block),
        *(grad_out, contiguous(weight), source.view, *norm.tensors, grad.view, partial),
        *(source.count, outputs, source.buffer, grad.buffer, pixels.area, norm.eps),
        ACCUMULATE=accumulate,
        BLOCK_C=block,
        BLOCK_K=BLOCK_SUM,
        num_warps=_warps(block),
        num_stages=2,
        **pixels.options,
    )
    return add_up(partial)


def _weight_backward(grad_out: Tensor, source: _Slice, norm: _Norm, weight: Tensor) -> Tensor:
    """The gradient of a 1x1 convolution's weight."""
    outputs = grad_out.shape[1]
    pixels = _Pixels(source, outputs, block=BLOCK_SUM)
    rows = triton.cdiv(pixels.tiles, WEIGHT_STEPS)
    block_c, block_k = (_block(channels, WIDEST // 2) for channels in (source.count, outputs))
    partial = norm.mean.new_empty((rows, outputs, source.count))
    launch(
        weight_backward_kernel,
        rows * triton.cdiv(source.count, block_c) * triton.cdiv(outputs, block_k),
        *(grad_out, source.view, *norm.tensors, partial),
        *(pixels.samples, source.count, outputs, source.buffer, pixels.area, WEIGHT_STEPS),
        norm.eps,
        BLOCK_C=block_c,
        BLOCK_K=block_k,
        num_stages=2,
        **pixels.options,
    )
    return add_up(partial).to(weight.dtype).view(weight.shape)


def _correct(
    grad: _Slice | None, source: _Slice, mean: Tensor, scale: Tensor, shift: Tensor, out: _Slice
) -> None:
    """Out = grad + (source - mean) * scale + shift, on every pixel."""
    grad_buffer = out.buffer if grad is None else grad.buffer
    pixels = _Pixels(source, grad_buffer, out.buffer)
    launch(
        correct_kernel,
        pixels.tiles * triton.cdiv(source.count, BLOCK_SUM),
        *(None if grad is None else grad.view, source.view),
        *map(contiguous, (mean, scale, shift)),
        *(out.view, source.count, source.buffer, grad_buffer, out.buffer, pixels.area),
        BLOCK_C=BLOCK_SUM,
        **pixels.options,
    )


class _Correction:
    """What reaches channels through their statistics, summed over all norms that read them.

    The gradient of x is that with constant statistics, plus (x - mean) * scale + shift.
    """

    def __init__(self, mean: Tensor, var: Tensor, eps: float, pixels: int):
        self.mean = mean
        self._inverse = (var + eps).reciprocal() / -max(1, pixels)
        self._pixels = max(1, pixels)
        self._sums = mean.new_zeros((2, mean.numel()))

    def add(self, first: int, norm: _Norm, sums: Tensor) -> None:
        """Adds the share of a norm that reads the channels from ``first`` on."""
        part = self._sums[:, first : first + sums.shape[1]]
        part += sums * torch.stack([norm.scale, norm.weight])

    def of(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of the channels from ``first`` on."""
        shift, scale = self._sums[:, first : first + count]
        return scale * self._inverse[first : first + count], shift / -self._pixels

    def apply(self, first: int, grad: _Slice, source: _Slice, out: _Slice) -> None:
        """Out = the gradient of the source, whose channels are those from ``first`` on."""
        mean = self.mean[first : first + source.count]
        _correct(grad, source, mean, *self.of(first, source.count), out)


# ---- the ops on a slice -------------------------------------------------------------------------


def channel_statistics(maps: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """The op ``dlkernels::channel_statistics``; see :func:`dlkernels.ops.channel_statistics`."""
    return batch_statistics(_native(maps), first, count)


def channel_statistics_backward(
    grad_mean: Tensor, grad_variance: Tensor, maps: Tensor, mean: Tensor, first: int
) -> Tensor:
    """The op ``dlkernels::channel_statistics_backward``."""
    source = _Slice(_native(maps), first, mean.numel())
    grad = torch.zeros_like(source.maps)
    pixels = max(1, maps.numel() // max(1, maps.shape[1]))
    scale, shift = grad_variance * (2 / pixels), grad_mean / pixels
    _correct(None, source, mean, scale, shift, _Slice(grad, first, source.count))
    return grad


def bn_relu_conv1x1(
    maps: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    first: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``dlkernels::bn_relu_conv1x1``; see :func:`dlkernels.ops.bn_relu_conv1x1`."""
    source = _Slice(_native(maps), first, weight.shape[1])
    given = mean is not None
    if mean is None or variance is None:
        mean, variance = batch_statistics(source.maps, first, source.count)
    out = _norm_relu_conv(source, _Norm(norm_weight, norm_bias, mean, variance, eps), weight)
    return out, *_batch_only(mean, variance, given)


def _batch_only(mean: Tensor, variance: Tensor, given: bool) -> tuple[Tensor, Tensor]:
    """The statistics, or empty ones where they were given: no output may be an input."""
    return (mean.new_empty(0), mean.new_empty(0)) if given else (mean, variance)


def bn_relu_conv1x1_backward(
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
    """The op ``dlkernels::bn_relu_conv1x1_backward``."""
    source = _Slice(_native(maps), first, weight.shape[1])
    grad_out = to_format_of(source.maps, grad_out)
    norm = _Norm(norm_weight, norm_bias, mean, variance, eps)
    grad_maps = torch.empty_like(source.maps)
    grad_maps[:, :first] = 0
    grad_maps[:, first + source.count :] = 0
    to = _Slice(grad_maps, first, source.count)
    if batch_statistics:
        grad = _whole(_new_float(source.maps, source.count))
        sums = _conv_backward(grad_out, weight, source, norm, grad)
        correction = _Correction(mean, variance, eps, _pixel_count(maps))
        correction.add(0, norm, sums)
        correction.apply(0, grad, source, to)
    else:
        sums = _conv_backward(grad_out, weight, source, norm, to)
    grad_weight = _weight_backward(grad_out, source, norm, weight)
    return grad_maps, grad_weight, sums[1].clone(), sums[0].clone()


def _new_float(like: Tensor, channels: int) -> Tensor:
    """Uninitialised float32 maps of so many channels."""
    shape = like.shape[0], channels, *like.shape[2:]
    return torch.empty(
        shape, dtype=torch.float32, device=like.device, memory_format=memory_format_of(like)
    )


def _pixel_count(maps: Tensor) -> int:
    return maps.shape[0] * maps.shape[2] * maps.shape[3]


# ---- the transition -----------------------------------------------------------------------------


class _Cells:
    """How the 2x2 cells of maps are cut into tiles, and what kernels may rely on."""

    def __init__(self, x: Tensor, rows: int, columns: int):
        samples, channels, height, width = x.shape
        channels_last = memory_format_of(x) == torch.channels_last
        cells, pooled = rows * columns, (height // 2) * (width // 2)
        block_a = min(32 if channels_last else 256, triton.next_power_of_2(max(1, cells)))
        block_c = min(TILE // block_a, triton.next_power_of_2(max(1, channels)))
        self.rows = samples * triton.cdiv(cells, block_a)
        self.programs = self.rows * triton.cdiv(channels, block_c)
        self.extents = channels, height, width
        self.options = {
            "CHANNELS_LAST": channels_last,
            "ALIGNMENT": alignment_of(channels if channels_last else width),
            "OUT_ALIGNMENT": alignment_of(channels if channels_last else pooled),
            "BLOCK_A": block_a,
            "BLOCK_C": block_c,
        }


def norm_relu_pool(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``dlkernels::norm_relu_pool``, the transition's."""
    x = _native(x)
    samples, channels, height, width = x.shape
    out = new_maps(x, (samples, channels, height // 2, width // 2))
    given = mean is not None
    if mean is None or variance is None:
        mean, variance = batch_statistics(x)
    norm = _Norm(norm_weight, norm_bias, mean, variance, eps)
    cells = _Cells(x, height // 2, width // 2)
    launch(
        pool_kernel,
        cells.programs,
        *(x, *norm.tensors, out, *cells.extents, eps),
        **cells.options,
    )
    return out, *_batch_only(mean, variance, given)


def norm_relu_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    batch_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``dlkernels::norm_relu_pool_backward``."""
    x = _native(x)
    grad_out = to_format_of(x, grad_out)
    grad_x = torch.empty_like(x)
    norm = _Norm(norm_weight, norm_bias, mean, variance, eps)
    cells = _Cells(x, triton.cdiv(x.shape[2], 2), triton.cdiv(x.shape[3], 2))
    partial = mean.new_empty((cells.rows, 2, x.shape[1]))

    def run(scale: Tensor | None, shift: Tensor | None, *results: Tensor | None) -> None:
        launch(
            pool_backward_kernel,
            cells.programs,
            *(grad_out, x, *norm.tensors, scale, shift, *results, *cells.extents, eps),
            **cells.options,
        )

    run(None, None, None if batch_statistics else grad_x, partial)
    sums = add_up(partial)
    if batch_statistics:
        correction = _Correction(mean, variance, eps, _pixel_count(x))
        correction.add(0, norm, sums)
        run(*correction.of(0, x.shape[1]), grad_x, None)
    return grad_x, sums[1].clone(), sums[0].clone()


# ---- the block ----------------------------------------------------------------------------------


class _Block:
    """A block's shape, and its norms and convolutions in the order in which they run."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        norm_weights: Sequence[Tensor],
        norm_biases: Sequence[Tensor],
        means: Sequence[Tensor],
        variances: Sequence[Tensor],
        eps: float,
    ):
        self.weights, self.norm_weights, self.norm_biases = weights, norm_weights, norm_biases
        self.means, self.variances, self.eps = means, variances, eps
        self.inputs = weights[0].shape[1]
        self.growth = weights[-1].shape[0]
        self.width = weights[0].shape[0] if weights[0].shape[2] == 1 else 0
        self.layers = len(weights) // (2 if self.width else 1)
        self.mean = self.var = weights[0].new_empty((0,), dtype=torch.float32)

    @property
    def channels(self) -> int:
        return self.read_by(self.layers)

    def read_by(self, layer: int) -> int:
        """Channels that the layer reads."""
        return self.inputs + layer * self.growth

    def last_conv(self, layer: int) -> int:
        return 2 * layer + 1 if self.width else layer

    def statistics_between(self, layer: int) -> int:
        """Where the bottleneck's statistics begin, which follow those of the block's channels."""
        return self.channels + layer * self.width

    def norm(self, index: int, first: int) -> _Norm:
        """The norm before a convolution, whose channels' statistics begin at ``first``."""
        if self.means:
            mean, var = self.means[index], self.variances[index]
        else:
            channels = slice(first, first + self.weights[index].shape[1])
            mean, var = self.mean[channels], self.var[channels]
        return _Norm(self.norm_weights[index], self.norm_biases[index], mean, var, self.eps)

    def take_statistics(self, first: int, source: _Slice) -> None:
        """Of channels just written, if the batch's own statistics serve."""
        if not self.means:
            mean, var = batch_statistics(source.maps, source.first, source.count)
            self.mean[first : first + source.count] = mean
            self.var[first : first + source.count] = var

    def conv_1x1(self, layer: int, maps: Tensor, between: Tensor) -> None:
        index = self.last_conv(layer) - 1
        source = _Slice(maps, 0, self.read_by(layer))
        _norm_relu_conv(source, self.norm(index, 0), self.weights[index], between)


def _bottlenecks(memory: Tensor, layers: int, like: Tensor) -> list[Tensor]:
    """Maps [N, width, H, W] that lie as ``like``, in memory [layers * N, H, W, width]."""
    samples, _, height, width = like.shape
    channels = memory.shape[3]
    shape = samples, channels, height, width
    if memory_format_of(like) == torch.channels_last:
        parts = memory.view(layers, samples, height, width, channels).movedim(4, 2)
    else:
        parts = memory.view(layers, *shape)
    return list(parts)


def _kept(kept: Tensor, layer: int, dropout: float) -> Tensor:
    """What a layer's result is multiplied with."""
    return kept[layer].permute(0, 3, 1, 2) / (1 - dropout)


def dense_block(
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    kept: Tensor | None,
    dropout: float,
    eps: float,
    save_bottlenecks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::dense_block``; see :func:`dlkernels.ops.dense_block`."""
    block = _Block(weights, norm_weights, norm_biases, means, variances, eps)
    samples, _, height, width = x.shape
    out = new_maps(x, (samples, block.channels, height, width))
    if not means:
        block.mean, block.var = out.new_empty(
            (2, block.statistics_between(block.layers)), dtype=torch.float32
        )
    rooms = block.layers if save_bottlenecks else 1
    memory = out.new_empty((rooms * samples, height, width, block.width))
    bottlenecks = _bottlenecks(memory, rooms, out)
    out[:, : block.inputs] = x
    block.take_statistics(0, _Slice(out, 0, block.inputs))
    for layer in range(block.layers):
        channels, first = block.read_by(layer), 0
        source = _Slice(out, 0, channels)
        if block.width:
            source = _whole(bottlenecks[layer % rooms])
            block.conv_1x1(layer, out, source.maps)
            first = block.statistics_between(layer)
            block.take_statistics(first, source)
        index = block.last_conv(layer)
        activated = _norm_relu_conv(source, block.norm(index, first))
        new = F.conv2d(activated, weights[index], padding=1)
        if kept is not None:
            new = new * _kept(kept, layer, dropout)
        out[:, channels : channels + block.growth] = new
        block.take_statistics(channels, _Slice(out, channels, block.growth))
    memory = memory if save_bottlenecks else memory.new_empty((0, height, width, block.width))
    return out, memory, block.mean, block.var


class _BlockBackward(_Block):
    """The gradients of a block.

    One float32 buffer of the block's shape gathers what every reader of a channel sends back.
    """

    def __init__(self, out: Tensor, grad_out: Tensor, mean: Tensor, var: Tensor, *parameters: Any):
        super().__init__(*parameters)
        self.out, self.mean, self.var = out, mean, var
        self.grad = _new_float(out, self.channels).copy_(grad_out)
        self.correction = None
        if not self.means:
            self.correction = _Correction(mean, var, self.eps, _pixel_count(out))
        self.grad_weights = [torch.empty(0)] * len(self.weights)
        self.grad_norm_weights = list(self.grad_weights)
        self.grad_norm_biases = list(self.grad_weights)

    def gradient(self, first: int, count: int) -> Tensor:
        """The gradient of some of the block's channels, once all their readers had their turn."""
        grad, source = _Slice(self.grad, first, count), _Slice(self.out, first, count)
        return self.corrected(first, grad, source)

    def corrected(self, first: int, grad: _Slice, source: _Slice) -> Tensor:
        """A gradient with what came through the statistics, in the dtype of the maps."""
        samples, _, height, width = self.out.shape
        result = new_maps(self.out, (samples, source.count, height, width))
        if self.correction is None:
            return result.copy_(grad.view[:, : source.count])
        self.correction.apply(first, grad, source, _whole(result))
        return result

    def conv_3x3(self, index: int, source: _Slice, first: int, grad_new: Tensor) -> Tensor:
        """The gradient of relu(norm(source)) through a 3x3 convolution."""
        activated = _norm_relu_conv(source, self.norm(index, first))
        grad, self.grad_weights[index], _ = torch.ops.aten.convolution_backward(
            *(grad_new, activated, self.weights[index], None, [1, 1], [1, 1], [1, 1]),
            *(False, [0, 0], 1, [True, True, False]),
        )
        return to_format_of(self.out, grad)

    def norm_relu(
        self,
        index: int,
        source: _Slice,
        first: int,
        grad_out: Tensor,
        grad: _Slice,
        weight: Tensor | None = None,
        *,
        accumulate: bool = False,
    ) -> None:
        """See _conv_backward; keeps the sums."""
        norm = self.norm(index, first)
        sums = _conv_backward(grad_out, weight, source, norm, grad, accumulate=accumulate)
        self.grad_norm_biases[index], self.grad_norm_weights[index] = sums.clone()
        if self.correction is not None:
            self.correction.add(first, norm, sums)

    def weight_1x1(self, layer: int, below: _Slice, grad_out: Tensor) -> None:
        index = self.last_conv(layer) - 1
        norm = self.norm(index, 0)
        self.grad_weights[index] = _weight_backward(grad_out, below, norm, self.weights[index])


def dense_block_backward(
    grad_out: Tensor,
    out: Tensor,
    bottlenecks: Tensor,
    mean: Tensor,
    variance: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    kept: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The op ``dlkernels::dense_block_backward``."""
    out = _native(out)
    parameters = weights, norm_weights, norm_biases, means, variances, eps
    block = _BlockBackward(out, grad_out, mean, variance, *parameters)
    saved = bottlenecks.numel() > 0
    rooms = block.layers if saved else 1
    if not saved:
        bottlenecks = out.new_empty((*out.shape[:1], *out.shape[2:], block.width))
    betweens = _bottlenecks(bottlenecks.contiguous(), rooms, out)
    for layer in reversed(range(block.layers)):
        channels = block.read_by(layer)
        grad = block.gradient(channels, block.growth)
        if kept is not None:
            grad = grad * _kept(kept, layer, dropout)
        index = block.last_conv(layer)
        below, read = _Slice(out, 0, channels), _Slice(block.grad, 0, channels)
        if not block.width:
            grad = block.conv_3x3(index, below, 0, grad)
            block.norm_relu(index, below, 0, grad, read, accumulate=True)
            continue
        between, first = _whole(betweens[layer % rooms]), block.statistics_between(layer)
        if not saved:
            block.conv_1x1(layer, out, between.maps)
        grad = block.conv_3x3(index, between, first, grad)
        raw = _whole(_new_float(out, block.width))
        block.norm_relu(index, between, first, grad, raw)
        grad = block.corrected(first, raw, between)
        block.weight_1x1(layer, below, grad)
        block.norm_relu(index - 1, below, 0, grad, read, weights[index - 1], accumulate=True)
    grad_x = block.gradient(0, block.inputs)
    return grad_x, block.grad_weights, block.grad_norm_weights, block.grad_norm_biases
