"""Triton kernels of asff_fuse.

The softmax weights are computed once, in float32 [N, L, H, W]; then each program fuses a tile of
pixels, channel block after channel block. A tile covers whole cells of every level, so that a level
is read once although several pixels share its cells, and its gradient is the sum over cells inside
a tile. Bilinear, where cells reach into neighbouring tiles, it reads the pixels around it, too.

The gradient of the weights is summed over a span of channels by each program (``dots``
[N, spans, L, H, W]); whoever reads it adds the spans up in order, so that results are the same in
every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.memory_format import empty_maps, finest, memory_format_of, new_maps, to_format_of
from dlkernels.triton_support import Budget, alignment_of, launch

SPAN = 64
BLOCK_PIXELS = 256
# By mode and whether maps are channels_last: rows and columns of a tile at most, its elements, and
# the warps that work on it. Bilinear tiles are taller: there is less around them to be read again.
TILES = {
    ("nearest", False): (4, 64, 1024, 4),
    ("nearest", True): (4, 8, 1024, 4),
    ("bilinear", False): (8, 64, 512, 8),
    ("bilinear", True): (8, 8, 512, 4),
}

# By mode. The smaller levels of contiguous maps are read cell by cell, which is never wide.
BUDGETS = {
    "nearest": {
        "softmax_kernel": Budget(registers=32, shared=1024),
        "fuse_kernel": Budget(registers=72, shared=1024, wide=0.09),
        "fuse_backward_kernel": Budget(registers=144, shared=2048, wide=0.09),
        "softmax_backward_kernel": Budget(registers=40, shared=1024),
    },
    "bilinear": {
        "softmax_kernel": Budget(registers=32, shared=1024),
        "fuse_kernel": Budget(registers=80, shared=1024),
        "fuse_backward_kernel": Budget(registers=160, shared=1024),
        "softmax_backward_kernel": Budget(registers=40, shared=1024),
    },
}


# ---- tiles and resizing --------------------------------------------------------------------------


@triton.jit
def _tile(height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """What is left of the program's number, the tile's first row and column, and its pixels."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(width, BLOCK_W)
    tiles = columns * tl.cdiv(height, BLOCK_H)
    tile = (program % tiles).to(tl.int32)  # a plane has fewer than 2^31 pixels; maps may have more
    row = tile // columns * BLOCK_H
    column = tile % columns * BLOCK_W
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    y = row + p // BLOCK_W
    x = column + p % BLOCK_W
    return program // tiles, row, column, y, x, (y < height) & (x < width)


@triton.jit
def _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Offsets [channels, pixels] into maps of the given size."""
    pixel = y * width + x
    if CHANNELS_LAST:
        return (sample * height * width + pixel)[None, :] * channels + c[:, None]
    return (sample * channels + c)[:, None] * (height * width) + pixel[None, :]


@triton.jit
def _centre(position, size, FACTOR: tl.constexpr):
    """Which cell an enlarged row shows at a position: between two, a mixture of both."""
    return tl.minimum(tl.maximum((position.to(tl.float32) + 0.5) / FACTOR - 0.5, 0.0), size - 1)


@triton.jit
def _enlarged(
    level,
    sample,
    c,
    y,
    x,
    mask,
    channels,
    height,
    width,
    FACTOR: tl.constexpr,
    BILINEAR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The level's values [channels, pixels] at pixels of the output."""
    if FACTOR == 1:
        offsets = _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST)
        return tl.load(level + offsets, mask, other=0).to(tl.float32)
    h = height // FACTOR
    w = width // FACTOR
    if not BILINEAR:
        offsets = _offsets(sample, c, y // FACTOR, x // FACTOR, channels, h, w, CHANNELS_LAST)
        return tl.load(level + offsets, mask, other=0).to(tl.float32)
    y_centre = _centre(y, h, FACTOR)
    x_centre = _centre(x, w, FACTOR)
    upper = y_centre.to(tl.int32)
    left = x_centre.to(tl.int32)
    right_share = (x_centre - left)[None, :]
    lower_share = (y_centre - upper)[None, :]
    # In the last row and column the share of the next is 0.
    has_right = mask & (left + 1 < w)[None, :]
    has_lower = mask & (upper + 1 < h)[None, :]
    step = channels if CHANNELS_LAST else 1
    first = level + _offsets(sample, c, upper, left, channels, h, w, CHANNELS_LAST)
    upper_left = tl.load(first, mask, other=0).to(tl.float32)
    upper_right = tl.load(first + step, has_right, other=0).to(tl.float32)
    lower_left = tl.load(first + w * step, has_lower, other=0).to(tl.float32)
    lower_right = tl.load(first + (w + 1) * step, has_right & has_lower, other=0).to(tl.float32)
    above = upper_left * (1 - right_share) + upper_right * right_share
    below = lower_left * (1 - right_share) + lower_right * right_share
    return above * (1 - lower_share) + below * lower_share


@triton.jit
def _aligned(channels, width, CHANNELS_LAST: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The extents, that of the contiguous dimension known to be aligned."""
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
    else:
        width = width // ALIGNMENT * ALIGNMENT
    return channels, width


# ---- softmax -------------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(
    logits,
    weights,
    area,
    stride_level,
    stride_pixel,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weights = softmax of logits over levels."""
    blocks = tl.cdiv(area, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    p = program % blocks * BLOCK + tl.arange(0, BLOCK)
    base = logits + sample * LEVELS * area + p * stride_pixel
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    values = ()
    for level in tl.static_range(LEVELS):
        z = tl.load(base + level * stride_level, p < area, other=0).to(tl.float32)
        values = values + (z,)
        largest = tl.maximum(largest, z)
    total = tl.zeros((BLOCK,), tl.float32)
    exponentials = ()
    for level in tl.static_range(LEVELS):
        exponential = tl.exp(values[level] - largest)
        exponentials = exponentials + (exponential,)
        total += exponential
    for level in tl.static_range(LEVELS):
        row = weights + (sample * LEVELS + level) * area
        tl.store(row + p, exponentials[level] / total, p < area)


@triton.jit
def softmax_backward_kernel(
    weights,
    dots,
    grad_logits,
    area,
    spans,
    stride_level,
    stride_pixel,
    LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_logits = weights * (dots - sum over levels of weights * dots)."""
    blocks = tl.cdiv(area, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    p = program % blocks * BLOCK + tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK,), tl.float32)
    factors = ()
    totals = ()
    for level in tl.static_range(LEVELS):
        weight = tl.load(weights + (sample * LEVELS + level) * area + p, p < area, other=0)
        total = tl.zeros((BLOCK,), tl.float32)
        for span in range(spans):
            row = dots + ((sample * spans + span) * LEVELS + level) * area
            total += tl.load(row + p, p < area, other=0)
        factors = factors + (weight,)
        totals = totals + (total,)
        mean += weight * total
    for level in tl.static_range(LEVELS):
        grad = factors[level] * (totals[level] - mean)
        row = grad_logits + sample * LEVELS * area + level * stride_level
        tl.store(row + p * stride_pixel, grad, p < area)


# ---- fusion --------------------------------------------------------------------------------------


@triton.jit
def _weight(
    weights,
    sample,
    y,
    x,
    inside,
    height,
    width,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """The level's weight at pixels."""
    row = (sample * LEVELS + LEVEL) * height + y
    return tl.load(weights + row * width + x, inside, other=0)


@triton.jit
def fuse_kernel(
    features,
    weights,
    out,
    channels,
    height,
    width,
    FACTORS: tl.constexpr,
    BILINEAR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Out = sum over levels of weights * enlarged feature, for a tile and a span of channels."""
    channels, width = _aligned(channels, width, CHANNELS_LAST, ALIGNMENT)
    program, _, _, y, x, inside = _tile(height, width, BLOCK_H, BLOCK_W)
    spans = tl.cdiv(channels, SPAN)
    sample = program // spans
    factors = ()
    for level in tl.static_range(len(features)):
        factors = factors + (
            _weight(weights, sample, y, x, inside, height, width, level, len(features)),
        )
    first = program % spans * SPAN
    for begin in range(first, tl.minimum(first + SPAN, channels), BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        mask = (c < channels)[:, None] & inside[None, :]
        total = tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), tl.float32)
        for level in tl.static_range(len(features)):
            value = _enlarged(
                features[level],
                sample,
                c,
                y,
                x,
                mask,
                channels,
                height,
                width,
                FACTORS[level],
                BILINEAR,
                CHANNELS_LAST,
            )
            total += factors[level][None, :] * value
        offsets = _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST)
        tl.store(out + offsets, total, mask)


@triton.jit
def _corner(y, x, inside, height, width, FACTOR: tl.constexpr, CORNER: tl.constexpr):
    """Steps from pixels to those half a cell away towards a corner, and which of these exist.

    Bilinear, the pixels that read a cell are those at the four corners of each pixel of the cell.
    """
    down = CORNER // 2 * FACTOR - FACTOR // 2
    right = CORNER % 2 * FACTOR - FACTOR // 2
    exists = (y + down >= 0) & (y + down < height) & (x + right >= 0) & (x + right < width)
    return down, right, inside & exists


@triton.jit
def _corner_weights(
    weights,
    sample,
    y,
    x,
    inside,
    height,
    width,
    FACTOR: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """For each corner of the pixels the level's weight, times the share that the cell has there."""
    result = ()
    for corner in tl.static_range(4):
        down, right, exists = _corner(y, x, inside, height, width, FACTOR, corner)
        weight = _weight(weights, sample, y + down, x + right, exists, height, width, LEVEL, LEVELS)
        weight *= 1 - tl.abs(_centre(y + down, height // FACTOR, FACTOR) - y // FACTOR)
        weight *= 1 - tl.abs(_centre(x + right, width // FACTOR, FACTOR) - x // FACTOR)
        result = result + (weight,)
    return result


@triton.jit
def _store_cell_sums(
    grad_level,
    grad,
    sample,
    c,
    row,
    column,
    channels,
    height,
    width,
    FACTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """grad_level = the sums over the cells of a tile [channels, pixels]."""
    ROWS: tl.constexpr = BLOCK_H // FACTOR
    COLUMNS: tl.constexpr = BLOCK_W // FACTOR
    cells = tl.reshape(grad, (BLOCK_C, ROWS, FACTOR, COLUMNS, FACTOR))
    sums = tl.reshape(tl.sum(tl.sum(cells, 4), 2), (BLOCK_C, ROWS * COLUMNS))
    p = tl.arange(0, ROWS * COLUMNS)
    y = row // FACTOR + p // COLUMNS
    x = column // FACTOR + p % COLUMNS
    h = height // FACTOR
    w = width // FACTOR
    mask = (c < channels)[:, None] & ((y < h) & (x < w))[None, :]
    offsets = _offsets(sample, c, y, x, channels, h, w, CHANNELS_LAST)
    tl.store(grad_level + offsets, sums, mask)


@triton.jit
def fuse_backward_kernel(
    grad_out,
    features,
    weights,
    grads,
    dots,
    channels,
    height,
    width,
    FACTORS: tl.constexpr,
    BILINEAR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Gradients of the weights, summed over a span of channels, and of the features."""
    channels, width = _aligned(channels, width, CHANNELS_LAST, ALIGNMENT)
    LEVELS: tl.constexpr = len(features)
    program, row, column, y, x, inside = _tile(height, width, BLOCK_H, BLOCK_W)
    spans = tl.cdiv(channels, SPAN)
    sample = program // spans
    factors = ()
    sums = ()
    for level in tl.static_range(LEVELS):
        if BILINEAR and FACTORS[level] > 1:
            factor = _corner_weights(
                weights, sample, y, x, inside, height, width, FACTORS[level], level, LEVELS
            )
        else:
            factor = _weight(weights, sample, y, x, inside, height, width, level, LEVELS)
        factors = factors + (factor,)
        sums = sums + (tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), tl.float32),)
    first = program % spans * SPAN
    for begin in range(first, tl.minimum(first + SPAN, channels), BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        mask = (c < channels)[:, None] & inside[None, :]
        offsets = _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST)
        grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
        next_sums = ()
        for level in tl.static_range(LEVELS):
            value = _enlarged(
                features[level],
                sample,
                c,
                y,
                x,
                mask,
                channels,
                height,
                width,
                FACTORS[level],
                BILINEAR,
                CHANNELS_LAST,
            )
            next_sums = next_sums + (sums[level] + grad * value,)
            if BILINEAR and FACTORS[level] > 1:
                weighted = tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), tl.float32)
                for corner in tl.static_range(4):
                    down, right, exists = _corner(
                        y, x, inside, height, width, FACTORS[level], corner
                    )
                    step = (down * width + right) * (channels if CHANNELS_LAST else 1)
                    near = tl.load(grad_out + offsets + step, mask & exists[None, :], other=0).to(
                        tl.float32
                    )
                    weighted += near * factors[level][corner][None, :]
            else:
                weighted = grad * factors[level][None, :]
            if FACTORS[level] == 1:
                tl.store(grads[level] + offsets, weighted, mask)
            else:
                _store_cell_sums(
                    grads[level],
                    weighted,
                    sample,
                    c,
                    row,
                    column,
                    channels,
                    height,
                    width,
                    FACTORS[level],
                    CHANNELS_LAST,
                    BLOCK_C,
                    BLOCK_H,
                    BLOCK_W,
                )
        sums = next_sums
    for level in tl.static_range(LEVELS):
        offset = (program * LEVELS + level) * height * width
        tl.store(dots + offset + y * width + x, tl.sum(sums[level], 0), inside)


# ---- launchers -----------------------------------------------------------------------------------


class _Fusion:
    """A pyramid in the memory format of its result, its weights, and how it is cut into tiles."""

    def __init__(self, features: Sequence[Tensor], logits: Tensor, mode: str):
        self.like = finest(features)
        memory_format = memory_format_of(self.like)
        self.features = tuple(x.contiguous(memory_format=memory_format) for x in features)
        self.channels_last = memory_format == torch.channels_last
        self.mode = mode
        self.samples, self.levels, self.height, self.width = logits.shape
        self.channels = self.like.shape[1]
        self.factors = tuple(self.height // x.shape[2] for x in features)
        self.spans = triton.cdiv(self.channels, SPAN)
        self.weights = self._softmax(to_format_of(logits, logits))

    def logits_strides(self, logits: Tensor) -> tuple[int, int]:
        """Of level and pixel."""
        area = self.height * self.width
        return (area, 1) if logits.is_contiguous() else (1, self.levels)

    def over_tiles(self, kernel: Any, *args: Any) -> None:
        """Launches a kernel whose programs have a tile of whole cells and a span of channels."""
        cell = max(self.factors)
        rows, columns, elements, warps = TILES[self.mode, self.channels_last]
        rows = max(cell, min(rows, triton.next_power_of_2(self.height)))
        columns = max(cell, min(columns, triton.next_power_of_2(self.width)))
        channels = max(1, triton.next_power_of_2(self.channels))
        tiles = triton.cdiv(self.height, rows) * triton.cdiv(self.width, columns)
        launch(
            kernel,
            self.samples * self.spans * tiles,
            *args,
            self.channels,
            self.height,
            self.width,
            FACTORS=self.factors,
            BILINEAR=self.mode == "bilinear",
            CHANNELS_LAST=self.channels_last,
            ALIGNMENT=alignment_of(self.channels if self.channels_last else self.width),
            SPAN=SPAN,
            BLOCK_C=min(SPAN, elements // (rows * columns), channels),
            BLOCK_H=rows,
            BLOCK_W=columns,
            num_warps=warps,
        )

    def over_pixels(self, kernel: Any, *args: Any) -> None:
        """Launches a kernel over the pixels of every sample, for all levels at once."""
        blocks = triton.cdiv(self.height * self.width, BLOCK_PIXELS)
        options = {"LEVELS": self.levels, "BLOCK": BLOCK_PIXELS}
        launch(kernel, self.samples * blocks, *args, **options)

    def _softmax(self, logits: Tensor) -> Tensor:
        weights = torch.empty(
            (self.samples, self.levels, self.height, self.width),
            dtype=torch.float32,
            device=logits.device,
        )
        area = self.height * self.width
        self.over_pixels(softmax_kernel, logits, weights, area, *self.logits_strides(logits))
        return weights


def asff_fuse(features: Sequence[Tensor], logits: Tensor, mode: str) -> Tensor:
    """The op ``dlkernels::asff_fuse``; see :func:`dlkernels.ops.asff_fuse`."""
    fusion = _Fusion(features, logits, mode)
    samples, _, height, width = logits.shape
    out = new_maps(fusion.like, (samples, fusion.channels, height, width))
    fusion.over_tiles(fuse_kernel, fusion.features, fusion.weights, out)
    return out


def asff_fuse_backward(
    grad_out: Tensor, features: Sequence[Tensor], logits: Tensor, mode: str
) -> tuple[list[Tensor], Tensor]:
    """The op ``dlkernels::asff_fuse_backward``."""
    fusion = _Fusion(features, logits, mode)
    samples, levels, height, width = logits.shape
    grad_out = to_format_of(fusion.like, grad_out)
    grads = [new_maps(fusion.like, x.shape) for x in features]
    dots = fusion.weights.new_empty((samples, fusion.spans, levels, height, width))
    fusion.over_tiles(
        fuse_backward_kernel, grad_out, fusion.features, fusion.weights, tuple(grads), dots
    )
    grad_logits = empty_maps(logits)
    fusion.over_pixels(
        softmax_backward_kernel,
        fusion.weights,
        dots,
        grad_logits,
        height * width,
        fusion.spans,
        *fusion.logits_strides(grad_logits),
    )
    return grads, grad_logits
