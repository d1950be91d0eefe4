"""Triton kernels of pyramid_pool.

A program holds a tile of pixels of a few channels and pools it again and again: a window of 5 x 5
pixels along its rows, then along its columns. Maps of up to 32 x 64 pixels are one tile. Tiles of
larger maps overlap by what the windows reach, which the L2 cache serves.

Backward recomputes the cascade, keeping the place of each maximum in its window; then each pixel
gathers the gradients of the windows whose maximum it is, stage after stage in a fixed order, so
that results are the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dlkernels.memory_format import empty_maps, new_maps, to_format_of
from dlkernels.triton_support import Budget, alignment_of, launch

STAGES = 3
# Of a window of 5 pixels, to either side.
REACH = tl.constexpr(2)
# Bits for a place in a window, and the place of none.
BITS = tl.constexpr(3)
NONE = tl.constexpr(7)
# Rows and columns of a tile at most: what fits in registers, and the elements of a tile.
LARGEST = (32, 64)
TILE = 2048

# Rows of 13 pixels begin anywhere, so that accesses of contiguous maps are narrow.
BUDGETS = {
    "forward_kernel": Budget(registers=128, shared=16384),
    "backward_kernel": Budget(registers=168, shared=16384),
}


# ---- tiles ---------------------------------------------------------------------------------------


@triton.jit
def _tile(channels, height, width, STEPS: tl.constexpr, BLOCKS: tl.constexpr):
    """The program's sample, and its tile's first channel, row and column."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(width, STEPS[1])
    rows = tl.cdiv(height, STEPS[0])
    groups = tl.cdiv(channels, BLOCKS[0])
    row = program // columns % rows
    group = program // (columns * rows) % groups
    return (
        program // (columns * rows * groups),
        group * BLOCKS[0],
        (row * STEPS[0]).to(tl.int32),
        (program % columns * STEPS[1]).to(tl.int32),
    )


@triton.jit
def _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Offsets [channels, rows, columns] into maps."""
    pixel = y[None, :, None] * width + x[None, None, :]
    if CHANNELS_LAST:
        return (sample * height * width + pixel) * channels + c[:, None, None]
    return (sample * channels + c[:, None, None]) * (height * width) + pixel


@triton.jit
def _inside(positions, first, size, STEP: tl.constexpr, HALO: tl.constexpr):
    """Whether positions lie in the part of a tile, and of the map, that the program writes."""
    return (positions >= first) & (positions < first + STEP) & (positions < size)


# ---- windows along one axis ----------------------------------------------------------------------


@triton.jit
def _neighbours(values, TAP: tl.constexpr, AXIS: tl.constexpr):
    """The values that lie TAP farther along the axis; any values past the tile's end."""
    if TAP == 0:
        return values
    length: tl.constexpr = values.shape[AXIS]
    index = tl.minimum(tl.maximum(tl.arange(0, length) + TAP, 0), length - 1)
    index = index[None, :, None] if AXIS == 1 else index[None, None, :]
    return tl.gather(values, tl.broadcast_to(index, values.shape), AXIS)


@triton.jit
def _is_there(positions, size, TAP: tl.constexpr, AXIS: tl.constexpr):
    """Whether that neighbour lies in the tile and in the map; positions are the tile's."""
    length: tl.constexpr = positions.shape[0]
    own = tl.arange(0, length) + TAP
    there = (own >= 0) & (own < length) & (positions + TAP >= 0) & (positions + TAP < size)
    return there[None, :, None] if AXIS == 1 else there[None, None, :]


@triton.jit
def _pooled(values, positions, size, AXIS: tl.constexpr):
    """The maxima over windows, and their places there; of several NaNs the last counts."""
    best = tl.full(values.shape, float("-inf"), tl.float32)
    places = tl.full(values.shape, NONE, tl.int32)
    for tap in tl.static_range(-REACH, REACH + 1):
        value = _neighbours(values, tap, AXIS)
        better = (value > best) | (value != value) | (places == NONE)
        better = better & _is_there(positions, size, tap, AXIS)
        best = tl.where(better, value, best)
        places = tl.where(better, tap + REACH, places)
    return best, places


@triton.jit
def _pooled_backward(grad, places, positions, size, AXIS: tl.constexpr):
    """Each pixel's sum of the gradients of the windows whose maximum it is."""
    total = tl.zeros(grad.shape, tl.float32)
    for tap in tl.static_range(-REACH, REACH + 1):
        is_mine = _neighbours(places, tap, AXIS) == REACH - tap
        is_mine = is_mine & _is_there(positions, size, tap, AXIS)
        total += tl.where(is_mine, _neighbours(grad, tap, AXIS), 0.0)
    return total


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def forward_kernel(
    x,
    out,
    channels,
    height,
    width,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    HALOS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of all four blocks of the output."""
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
    sample, channel, row, column = _tile(channels, height, width, STEPS, BLOCKS)
    c = channel + tl.arange(0, BLOCKS[0])
    rows = row - HALOS[0] + tl.arange(0, BLOCKS[1])
    columns = column - HALOS[1] + tl.arange(0, BLOCKS[2])
    has_channel = (c < channels)[:, None, None]
    is_row = ((rows >= 0) & (rows < height))[None, :, None]
    is_column = ((columns >= 0) & (columns < width))[None, None, :]
    is_mine = (
        has_channel
        & _inside(rows, row, height, STEPS[0], HALOS[0])[None, :, None]
        & _inside(columns, column, width, STEPS[1], HALOS[1])[None, None, :]
    )
    offsets = _offsets(sample, c, rows, columns, channels, height, width, CHANNELS_LAST)
    value = tl.load(x + offsets, has_channel & is_row & is_column, other=0)
    values = value.to(tl.float32)
    for stage in tl.static_range(STAGES + 1):
        if stage > 0:
            values, _ = _pooled(values, columns, width, 2)
            values, _ = _pooled(values, rows, height, 1)
        block = c + (STAGES - stage) * channels
        to = _offsets(
            sample, block, rows, columns, (STAGES + 1) * channels, height, width, CHANNELS_LAST
        )
        tl.store(out + to, values, is_mine)


@triton.jit
def backward_kernel(
    grad_out,
    x,
    grad_x,
    channels,
    height,
    width,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,
    HALOS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of the gradient of x."""
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
    sample, channel, row, column = _tile(channels, height, width, STEPS, BLOCKS)
    c = channel + tl.arange(0, BLOCKS[0])
    rows = row - HALOS[0] + tl.arange(0, BLOCKS[1])
    columns = column - HALOS[1] + tl.arange(0, BLOCKS[2])
    has_channel = (c < channels)[:, None, None]
    is_row = ((rows >= 0) & (rows < height))[None, :, None]
    is_column = ((columns >= 0) & (columns < width))[None, None, :]
    is_there = has_channel & is_row & is_column
    offsets = _offsets(sample, c, rows, columns, channels, height, width, CHANNELS_LAST)
    values = tl.load(x + offsets, is_there, other=0).to(tl.float32)
    # The places of all stages and axes, side by side in the bits of a number.
    packed = tl.zeros(values.shape, tl.int32)
    for stage in tl.static_range(STAGES):
        values, places = _pooled(values, columns, width, 2)
        packed = packed | (places << (2 * stage * BITS))
        values, places = _pooled(values, rows, height, 1)
        packed = packed | (places << ((2 * stage + 1) * BITS))
    grad = tl.zeros(values.shape, tl.float32)
    for block in tl.static_range(STAGES + 1):
        of_block = _offsets(
            sample,
            c + block * channels,
            rows,
            columns,
            (STAGES + 1) * channels,
            height,
            width,
            CHANNELS_LAST,
        )
        grad += tl.load(grad_out + of_block, is_there, other=0).to(tl.float32)
        if block < STAGES:
            of_columns = packed >> ((2 * (STAGES - 1 - block) + 1) * BITS)
            grad = _pooled_backward(grad, of_columns & NONE, rows, height, 1)
            of_rows = packed >> (2 * (STAGES - 1 - block) * BITS)
            grad = _pooled_backward(grad, of_rows & NONE, columns, width, 2)
    is_mine = (
        has_channel
        & _inside(rows, row, height, STEPS[0], HALOS[0])[None, :, None]
        & _inside(columns, column, width, STEPS[1], HALOS[1])[None, None, :]
    )
    tl.store(grad_x + offsets, grad, is_mine)


# ---- launchers -----------------------------------------------------------------------------------


def _extent(size: int, largest: int, reach: int) -> tuple[int, int, int]:
    """Of tiles along an axis: pixels, of these the ones that are written, and those before them."""
    block = min(largest, max(2, triton.next_power_of_2(size)))
    return (block, block, 0) if size <= block else (block, block - 2 * reach, reach)


def _launch(kernel: Any, x: Tensor, tensors: Sequence[Tensor], reach: int) -> None:
    """Over tiles whose results depend on pixels as far away as ``reach``."""
    samples, channels, height, width = x.shape
    channels_last = not x.is_contiguous()
    extents = [_extent(*sizes, reach) for sizes in zip((height, width), LARGEST, strict=True)]
    blocks, steps, halos = zip(*extents, strict=True)
    fitting = max(1, TILE // (blocks[0] * blocks[1]))
    group = min(fitting, triton.next_power_of_2(channels))
    tiles = triton.cdiv(height, steps[0]) * triton.cdiv(width, steps[1])
    launch(
        kernel,
        samples * triton.cdiv(channels, group) * tiles,
        *tensors,
        channels,
        height,
        width,
        CHANNELS_LAST=channels_last,
        ALIGNMENT=alignment_of(channels) if channels_last else 1,
        BLOCKS=(group, *blocks),
        STEPS=steps,
        HALOS=halos,
        STAGES=STAGES,
        num_warps=8,
    )


def pyramid_pool(x: Tensor) -> Tensor:
    """The op ``dlkernels::pyramid_pool``; see :func:`dlkernels.ops.pyramid_pool`."""
    x = to_format_of(x, x)
    samples, channels, height, width = x.shape
    out = new_maps(x, (samples, (STAGES + 1) * channels, height, width))
    _launch(forward_kernel, x, (x, out), STAGES * REACH.value)
    return out


def pyramid_pool_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    """The op ``dlkernels::pyramid_pool_backward``."""
    x = to_format_of(x, x)
    grad_out = to_format_of(x, grad_out)
    grad_x = empty_maps(x)
    # Which windows have a pixel as their maximum depends on what these windows hold, too.
    _launch(backward_kernel, x, (grad_out, x, grad_x), 2 * STAGES * REACH.value)
    return grad_x
