"""Triton kernels of asff_fuse.

The softmax weights are computed once, in float32 [N, L, H, W]; then each program fuses a tile of
pixels, channel block after channel block. A tile covers whole cells of every level, so that a level
is read once although several pixels share its cells, and its gradient is the sum over cells inside
a tile. Bilinear, where cells reach into neighbouring tiles, another kernel gathers that gradient.

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

TILE = {"nearest": 1024, "bilinear": 512}
SPAN = 64
BLOCK_PIXELS = 256

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
        "fuse_kernel": Budget(registers=128, shared=1024),
        "fuse_backward_kernel": Budget(registers=168, shared=2048),
        "shrink_kernel": Budget(registers=80, shared=1024),
        "softmax_backward_kernel": Budget(registers=40, shared=1024),
    },
}


# ---- tiles and resizing --------------------------------------------------------------------------


@triton.jit
def _tile(program, height, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """What is left of the program's number, and row and column of the tile's first pixel."""
    columns = tl.cdiv(width, BLOCK_W)
    tiles = columns * tl.cdiv(height, BLOCK_H)
    tile = (program % tiles).to(tl.int32)  # a plane has fewer than 2^31 pixels; maps may have more
    return program // tiles, tile // columns * BLOCK_H, tile % columns * BLOCK_W


@triton.jit
def _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Offsets [channels, pixels] into maps of the given size."""
    pixel = y * width + x
    if CHANNELS_LAST:
        return (sample * height * width + pixel)[None, :] * channels + c[:, None]
    return (sample * channels + c)[:, None] * (height * width) + pixel[None, :]


@triton.jit
def _source(position, size, FACTOR: tl.constexpr):
    """The two cells that an enlarged row mixes at a position, and the share of the second."""
    centre = (position.to(tl.float32) + 0.5) / FACTOR - 0.5
    inside = tl.maximum(centre, 0.0)
    first = inside.to(tl.int32)
    return first, tl.minimum(first + 1, size - 1), inside - first


@triton.jit
def _share(position, cell, size, FACTOR: tl.constexpr):
    """How much of a position's value the enlarged row takes from the cell."""
    first, second, share = _source(position, size, FACTOR)
    return tl.where(first == cell, 1 - share, 0.0) + tl.where(second == cell, share, 0.0)


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
    upper, lower, y_share = _source(y, h, FACTOR)
    left, right, x_share = _source(x, w, FACTOR)
    offsets = _offsets(sample, c, upper, left, channels, h, w, CHANNELS_LAST)
    upper_left = tl.load(level + offsets, mask, other=0).to(tl.float32)
    offsets = _offsets(sample, c, upper, right, channels, h, w, CHANNELS_LAST)
    upper_right = tl.load(level + offsets, mask, other=0).to(tl.float32)
    offsets = _offsets(sample, c, lower, left, channels, h, w, CHANNELS_LAST)
    lower_left = tl.load(level + offsets, mask, other=0).to(tl.float32)
    offsets = _offsets(sample, c, lower, right, channels, h, w, CHANNELS_LAST)
    lower_right = tl.load(level + offsets, mask, other=0).to(tl.float32)
    above = upper_left * (1 - x_share)[None, :] + upper_right * x_share[None, :]
    below = lower_left * (1 - x_share)[None, :] + lower_right * x_share[None, :]
    return above * (1 - y_share)[None, :] + below * y_share[None, :]


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
def _weights_of(weights, sample, y, x, inside, height, width, LEVELS: tl.constexpr):
    """For each level its weight at the pixels."""
    result = ()
    for level in tl.static_range(LEVELS):
        row = (sample * LEVELS + level) * height + y
        result = result + (tl.load(weights + row * width + x, inside, other=0),)
    return result


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
    program, row, column = _tile(tl.program_id(0).to(tl.int64), height, width, BLOCK_H, BLOCK_W)
    spans = tl.cdiv(channels, SPAN)
    sample = program // spans
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    y = row + p // BLOCK_W
    x = column + p % BLOCK_W
    inside = (y < height) & (x < width)
    factors = _weights_of(weights, sample, y, x, inside, height, width, len(features))
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
    """Gradients of the weights, summed over a span of channels, and of the features.

    Features that are enlarged bilinearly are left to shrink_kernel.
    """
    channels, width = _aligned(channels, width, CHANNELS_LAST, ALIGNMENT)
    LEVELS: tl.constexpr = len(features)
    program, row, column = _tile(tl.program_id(0).to(tl.int64), height, width, BLOCK_H, BLOCK_W)
    spans = tl.cdiv(channels, SPAN)
    sample = program // spans
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    y = row + p // BLOCK_W
    x = column + p % BLOCK_W
    inside = (y < height) & (x < width)
    factors = _weights_of(weights, sample, y, x, inside, height, width, LEVELS)
    sums = ()
    for _ in tl.static_range(LEVELS):
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
            weighted = grad * factors[level][None, :]
            if FACTORS[level] == 1:
                tl.store(grads[level] + offsets, weighted, mask)
            elif not BILINEAR:
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


@triton.jit
def shrink_kernel(
    grad_out,
    weights,
    grad_level,
    channels,
    height,
    width,
    level,
    levels,
    FACTOR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The gradient of one bilinear level: for each cell, the sum over the pixels that read it."""
    channels, width = _aligned(channels, width, CHANNELS_LAST, ALIGNMENT)
    h = height // FACTOR
    w = width // FACTOR
    program, row, column = _tile(tl.program_id(0).to(tl.int64), h, w, BLOCK_H, BLOCK_W)
    spans = tl.cdiv(channels, SPAN)
    sample = program // spans
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    cell_y = row + p // BLOCK_W
    cell_x = column + p % BLOCK_W
    is_cell = (cell_y < h) & (cell_x < w)
    plane = weights + (sample * levels + level) * height * width
    first = program % spans * SPAN
    for begin in range(first, tl.minimum(first + SPAN, channels), BLOCK_C):
        c = begin + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C, BLOCK_H * BLOCK_W), tl.float32)
        for dy in range(2 * FACTOR):
            y = cell_y * FACTOR - FACTOR // 2 + dy
            y_share = _share(y, cell_y, h, FACTOR)
            for dx in range(2 * FACTOR):
                x = cell_x * FACTOR - FACTOR // 2 + dx
                inside = is_cell & (y >= 0) & (y < height) & (x >= 0) & (x < width)
                weight = tl.load(plane + y * width + x, inside, other=0)
                weight *= y_share * _share(x, cell_x, w, FACTOR)
                offsets = _offsets(sample, c, y, x, channels, height, width, CHANNELS_LAST)
                mask = (c < channels)[:, None] & inside[None, :]
                grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
                total += grad * weight[None, :]
        offsets = _offsets(sample, c, cell_y, cell_x, channels, h, w, CHANNELS_LAST)
        tl.store(grad_level + offsets, total, (c < channels)[:, None] & is_cell[None, :])


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

    def programs(self, tile: dict[str, int], factor: int = 1) -> int:
        """Of a kernel whose programs have a tile of maps [H / factor, W / factor] and a span."""
        rows = triton.cdiv(self.height // factor, tile["BLOCK_H"])
        columns = triton.cdiv(self.width // factor, tile["BLOCK_W"])
        return self.samples * self.spans * rows * columns

    def tile(self, cell: int) -> dict[str, int]:
        """The extents of a tile that consists of whole cells."""
        widest = 8 if self.channels_last else 64
        rows = max(cell, min(4, triton.next_power_of_2(self.height)))
        columns = max(cell, min(widest, triton.next_power_of_2(self.width)))
        channels = min(SPAN, TILE[self.mode] // (rows * columns))
        channels = max(1, min(channels, triton.next_power_of_2(self.channels)))
        return {"BLOCK_C": channels, "BLOCK_H": rows, "BLOCK_W": columns}

    @property
    def layout(self) -> dict[str, Any]:
        inner = self.channels if self.channels_last else self.width
        return {
            "CHANNELS_LAST": self.channels_last,
            "ALIGNMENT": alignment_of(inner),
            "SPAN": SPAN,
        }

    def logits_strides(self, logits: Tensor) -> tuple[int, int]:
        """Of level and pixel."""
        area = self.height * self.width
        return (area, 1) if logits.is_contiguous() else (1, self.levels)

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
    tile = fusion.tile(max(fusion.factors))
    launch(
        fuse_kernel,
        fusion.programs(tile),
        fusion.features,
        fusion.weights,
        out,
        fusion.channels,
        height,
        width,
        FACTORS=fusion.factors,
        BILINEAR=mode == "bilinear",
        **fusion.layout,
        **tile,
    )
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
    tile = fusion.tile(max(fusion.factors))
    launch(
        fuse_backward_kernel,
        fusion.programs(tile),
        grad_out,
        fusion.features,
        fusion.weights,
        tuple(grads),
        dots,
        fusion.channels,
        height,
        width,
        FACTORS=fusion.factors,
        BILINEAR=mode == "bilinear",
        **fusion.layout,
        **tile,
    )
    if mode == "bilinear":
        for level, (factor, grad) in enumerate(zip(fusion.factors, grads, strict=True)):
            if factor > 1:
                _shrink(fusion, level, factor, grad_out, grad)
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


def _shrink(fusion: _Fusion, level: int, factor: int, grad_out: Tensor, grad: Tensor) -> None:
    tile = fusion.tile(1)
    launch(
        shrink_kernel,
        fusion.programs(tile, factor),
        grad_out,
        fusion.weights,
        grad,
        fusion.channels,
        fusion.height,
        fusion.width,
        level,
        fusion.levels,
        FACTOR=factor,
        **fusion.layout,
        **tile,
    )
