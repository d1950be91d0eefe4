"""Triton kernels of depthwise_conv_bn_act.

A lane of a program owns a strip of a few columns and walks down a band of rows. What it has read of
a row it keeps in registers until the last tap has used it, so that the norm and activation of an
input, or the gradient of a raw output, are computed once for all rows of taps, and never stored.
Neighbouring strips and bands overlap by the taps' reach: those values come out of the first- and
second-level caches again, and are computed again.

Forward, the pass over ``x`` writes the raw output and gathers its statistics (Welford's rule in
each lane), or, where statistics are given, the activated output and its sums for the pool.
Backward, one pass over ``grad_out``, ``raw`` and ``x`` gives the gradients of the weight, of the
input and the sums that the input's norm needs; the passes of batch_norm_act come before and after.
Parts of sums are written by each program and added up in a fixed order, so that results are the
same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.batch_norm_act.triton import (
    activate,
    activation_slope,
    add_up,
    batch_norm_act,
    batch_statistics,
    combine_lanes,
    combine_statistics,
    contiguous,
    gradient_sums,
    norm_of_channels,
    pool_of,
    write_gradient,
)
from dlkernels.memory_format import empty_maps, memory_format_of, new_maps, to_format_of
from dlkernels.triton_support import Budget, alignment_of, launch

THREADS = 128
# Rows of a band at most, and at least: lower bands give more programs, as many as a GPU needs.
HIGHEST_BAND, LOWEST_BAND = 16, 4
PROGRAMS = 512
# Channels of a tile of channels_last maps, at least if there are so many.
CHANNELS = 32
# For each kernel size the columns of a strip, and the channels or strips of a thread: as many as
# its registers hold. Backward, columns are those of x, no fewer than the stride.
FORWARD_COLUMNS = {3: 4, 5: 4, 7: 2}
FORWARD_ELEMENTS = {3: 4, 5: 2, 7: 2}
BACKWARD_COLUMNS = {3: 4, 5: 4, 7: 1}
BACKWARD_ELEMENTS = {3: 2, 5: 1, 7: 1}
# For kernels of 7 the assembler would spill a few registers to fit one more program on a processor,
# unless it is told how many it may use.
BACKWARD_REGISTERS = {7: {"maxnreg": 248}}

BUDGETS = {
    "depthwise_kernel": Budget(registers=192, shared=2048),
    "depthwise_backward_kernel": Budget(registers=248, shared=4096),
}


# ---- strips -------------------------------------------------------------------------------------


@triton.jit
def _place(first_sample, lane, strips, bands, band):
    """Sample, first row and strip of lanes, which are counted from a sample's first."""
    line = lane // strips
    return first_sample + line // bands, line % bands * band, lane % strips


@triton.jit
def _at(maps, sample, c, y, x, channels, height, width, CHANNELS_LAST: tl.constexpr):
    """Pointers [channels, lanes] to the pixels (y, x)."""
    pixel = y.to(tl.int64) * width + x
    if CHANNELS_LAST:
        pixel = pixel * channels
    else:
        c = c * height * width
    return maps + (c[:, None] + (sample * channels * height * width + pixel)[None, :])


@triton.jit
def _normalise(value, norm):
    """A tile less its mean over its deviation, and the norm's output."""
    normal = (value - norm[0][:, None]) * norm[1][:, None]
    return normal, normal * norm[2][:, None] + norm[3][:, None]


@triton.jit
def _side_by_side(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """[channels, lanes * COUNT] of values [channels, lanes], those of a lane one after another."""
    packed = values[FIRST]
    channels: tl.constexpr = packed.shape[0]
    lanes: tl.constexpr = packed.shape[1]
    if COUNT == 2:
        packed = tl.join(packed, values[FIRST + 1])
    elif COUNT == 4:
        even = tl.join(packed, values[FIRST + 2])
        packed = tl.join(even, tl.join(values[FIRST + 1], values[FIRST + 3]))
    return tl.reshape(packed, (channels, lanes * COUNT))


@triton.jit
def _store(
    maps,
    values,
    c,
    first_sample,
    first_lane,
    lanes,
    strips,
    bands,
    band,
    dy,
    dx,
    there,
    channels,
    height,
    width,
    CHANNELS_LAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes a row of every strip: values [channels, lanes] of each of its columns.

    The row is dy below the strip's first, the columns dx beside it. Contiguous maps are written a
    whole strip at a time, which lies in one piece.
    """
    PACK: tl.constexpr = 1 if CHANNELS_LAST else COLUMNS
    lane = first_lane * PACK + tl.arange(0, LANES * PACK)
    sample, y, column = _place(first_sample, lane, strips * PACK, bands, band)
    y += dy
    there = there & (lane < lanes * PACK) & (y >= 0) & (y < height)
    x = column * (COLUMNS // PACK) + dx
    at = _at(maps, sample, c, y, x, channels, height, width, CHANNELS_LAST)
    for first in tl.static_range(0, COLUMNS, PACK):
        inside = there & (x + first >= 0) & (x + first < width)
        mask = (c < channels)[:, None] & inside[None, :]
        tl.store(at, _side_by_side(values, first, PACK), mask)
        at += channels if CHANNELS_LAST else 1


@triton.jit
def _taps_of_block(taps, block, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pointers [CHANNELS] to the first weight of a block in taps [blocks, SIZE * SIZE, CHANNELS].

    Weights are loaded where they are used, out of the first-level cache: they would take more
    registers than anything else.
    """
    return taps + block * (SIZE * SIZE * CHANNELS) + tl.arange(0, CHANNELS)


@triton.jit
def _zeros(COUNT: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    """A tuple of so many tiles."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.zeros((CHANNELS, LANES), tl.float32),)
    return values


@triton.jit
def _add_products(
    sums, weight, read, FIRST: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums, each with weight times every STRIDE-th of what was read, from FIRST on."""
    more = ()
    for i in tl.static_range(COLUMNS):
        more = more + (sums[i] + weight[:, None] * read[FIRST + i * STRIDE],)
    return more


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def _response(weights, pixel, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """What the convolution makes of maps that are this pixel [channels, 1] everywhere.

    Statistics are counted from it, since it is near the mean; any finite value would do.
    """
    total = tl.zeros((CHANNELS, 1), tl.float32)
    for tap in range(SIZE * SIZE):
        total += tl.load(weights + tap * CHANNELS)[:, None] * pixel
    return tl.where(tl.abs(total) < float("inf"), total, 0.0)


@triton.jit
def depthwise_kernel(
    x,
    taps,
    input_weight,
    input_bias,
    input_mean,
    input_var,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_var,
    raw,
    out,
    statistics,
    sizes,
    origins,
    sums,
    channels,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    lanes,
    strips,
    bands,
    band,
    input_eps,
    eps,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Raw output and its statistics, or the activated output (and the raw one) and its sums.

    Statistics are those of a program, mean less the channel's origin and squared deviations; sizes
    are how many values. A lane reads STRIDE rows at a time, which are taps of DEPTH rows of the
    output: so many are under way at once, the one begun last before the others.
    """
    DEPTH: tl.constexpr = (SIZE + STRIDE - 1) // STRIDE
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
    else:
        out_width = out_width // ALIGNMENT * ALIGNMENT
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // c_blocks
    sample = row // tl.cdiv(lanes, BLOCK_S)
    first_lane = (row % tl.cdiv(lanes, BLOCK_S) * BLOCK_S).to(tl.int32)
    lane = first_lane + tl.arange(0, BLOCK_S)
    samples, first_y, strip = _place(sample, lane, strips, bands, band)
    first_x = strip * (COLUMNS * STRIDE) - left
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    weights = _taps_of_block(taps, program % c_blocks, SIZE, BLOCK_C)
    if input_mean is not None:
        before = norm_of_channels(
            input_weight, input_bias, input_mean, input_var, c, exists, input_eps
        )
    if norm_mean is not None:
        after = norm_of_channels(norm_weight, norm_bias, norm_mean, norm_var, c, exists, eps)
    if origins is not None:
        middle = (tl.zeros((1,), tl.int64) + height // 2) * width + width // 2
        first = x + (middle * channels + c if CHANNELS_LAST else c * height * width + middle)
        pixel = tl.load(first, exists, other=0).to(tl.float32)[:, None]
        if input_mean is not None:
            pixel = activate(_normalise(pixel, before)[1], 0.0, INPUT_ACTIVATION)
        origin = _response(weights, pixel, SIZE, BLOCK_C)
    count = tl.zeros((1, BLOCK_S), tl.float32)
    mean = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    unfinished = _zeros(DEPTH * COLUMNS, BLOCK_C, BLOCK_S)
    for step in range(0, band + DEPTH - 1):
        for lower in tl.static_range(STRIDE):
            y = (first_y + step) * STRIDE + lower - top
            rows = (lane < lanes) & (y >= 0) & (y < height)
            at = _at(x, samples, c, y, first_x, channels, height, width, CHANNELS_LAST)
            read = ()
            for i in tl.static_range((COLUMNS - 1) * STRIDE + SIZE):
                inside = rows & (first_x + i >= 0) & (first_x + i < width)
                mask = exists[:, None] & inside[None, :]
                value = tl.load(at, mask, other=0).to(tl.float32)
                at += channels if CHANNELS_LAST else 1
                if input_mean is not None:
                    _, z = _normalise(value, before)
                    value = tl.where(mask, activate(z, 0.0, INPUT_ACTIVATION), 0.0)
                read = read + (value,)
            added = ()
            for i in tl.static_range(DEPTH):
                line = unfinished[i * COLUMNS : (i + 1) * COLUMNS]
                for tap in tl.static_range((lower + i * STRIDE) * SIZE, SIZE * SIZE):
                    if tap // SIZE == lower + i * STRIDE:
                        weight = tl.load(weights + tap * BLOCK_C)
                        line = _add_products(line, weight, read, tap % SIZE, STRIDE, COLUMNS)
                added = added + line
            unfinished = added
        finished = unfinished[(DEPTH - 1) * COLUMNS :]
        unfinished = _zeros(COLUMNS, BLOCK_C, BLOCK_S) + unfinished[: (DEPTH - 1) * COLUMNS]
        started = step >= DEPTH - 1
        dy = step - (DEPTH - 1)
        y = first_y + dy
        rows = started & (lane < lanes) & (y < out_height)
        if raw is not None:
            _store(
                raw,
                finished,
                c,
                sample,
                first_lane,
                lanes,
                strips,
                bands,
                band,
                dy,
                0,
                started,
                channels,
                out_height,
                out_width,
                CHANNELS_LAST,
                COLUMNS,
                BLOCK_S,
            )
        activated = ()
        for i in tl.static_range(COLUMNS):
            inside = rows & (strip * COLUMNS + i < out_width)
            mask = exists[:, None] & inside[None, :]
            value = finished[i]
            if norm_mean is None:
                count += inside[None, :].to(tl.float32)
                value -= origin
                deviation = tl.where(mask, value - mean, 0.0)
                mean += deviation * (1 / tl.where(count > 0, count, 1.0))
                squares += tl.where(mask, deviation * (value - mean), 0.0)
            else:
                _, z = _normalise(value, after)
                value = activate(z, 0.0, ACTIVATION)
                mean += tl.where(mask, value, 0.0)
                activated = activated + (value,)
        if out is not None:
            _store(
                out,
                activated,
                c,
                sample,
                first_lane,
                lanes,
                strips,
                bands,
                band,
                dy,
                0,
                started,
                channels,
                out_height,
                out_width,
                CHANNELS_LAST,
                COLUMNS,
                BLOCK_S,
            )
    if statistics is not None:
        each = tl.broadcast_to(count, (BLOCK_C, BLOCK_S))
        total, whole, squared = combine_lanes(each, mean, squares)
        tl.store(statistics + 2 * row * channels + c, whole, exists)
        tl.store(statistics + (2 * row + 1) * channels + c, squared, exists)
        tl.store(sizes + row + tl.zeros_like(c), total, c == 0)
        tl.store(origins + c, tl.sum(origin, 1), exists & (row == 0))
    if sums is not None:
        tl.store(sums + row * channels + c, tl.sum(mean, 1), exists)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def depthwise_backward_kernel(
    grad_out,
    grad_pooled,
    raw,
    x,
    taps,
    norm_weight,
    norm_bias,
    norm_mean,
    norm_var,
    norm_sums,
    input_weight,
    input_bias,
    input_mean,
    input_var,
    grad_x,
    weight_parts,
    input_parts,
    samples,
    channels,
    height,
    width,
    out_height,
    out_width,
    top,
    left,
    lanes,
    strips,
    bands,
    band,
    eps,
    input_eps,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INPUT_ACTIVATION: tl.constexpr,
    INPUT_BATCH_STATISTICS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The gradients of the input and of the weight, whose parts are those of each program.

    With statistics of the batch behind the input's norm, grad_x is the gradient of that norm's
    output; input_parts are its sums, and those of it times the normalised input. A strip is
    COLUMNS of x. Its pixel (y, x) feeds the output (y - tap) / STRIDE, so that STRIDE rows of it
    need the gradients of DEPTH rows of raw, of which the lane keeps the last, newest first.
    """
    DEPTH: tl.constexpr = (SIZE + STRIDE - 1) // STRIDE
    REACH: tl.constexpr = COLUMNS // STRIDE + DEPTH - 1
    if CHANNELS_LAST:
        channels = channels // ALIGNMENT * ALIGNMENT
    c_blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // c_blocks
    lane = row.to(tl.int32) * BLOCK_S + tl.arange(0, BLOCK_S)
    sample, first_row, strip = _place(0, lane, strips, bands, band)
    sample = sample.to(tl.int64)
    first_x = strip * COLUMNS - left
    first_column = strip * (COLUMNS // STRIDE) - (DEPTH - 1)
    c = program % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    weights = _taps_of_block(taps, program % c_blocks, SIZE, BLOCK_C)
    after = norm_of_channels(norm_weight, norm_bias, norm_mean, norm_var, c, exists, eps)
    slope = after[1] * after[2]
    if norm_sums is not None:
        each = 1 / (samples * 1.0 * out_height * out_width)
        grad_mean = tl.load(norm_sums + c, exists, other=0) * each
        grad_slope = tl.load(norm_sums + channels + c, exists, other=0) * each
    if grad_pooled is not None:
        mask = exists[:, None] & (lane < lanes)[None, :]
        pooled = tl.load(grad_pooled + sample[None, :] * channels + c[:, None], mask, other=0)
        pooled /= out_height * 1.0 * out_width
    if input_mean is not None:
        before = norm_of_channels(
            input_weight, input_bias, input_mean, input_var, c, exists, input_eps
        )
    by_bias = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    by_weight = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    by_tap = _zeros(SIZE * SIZE, BLOCK_C, BLOCK_S)
    known = _zeros(DEPTH * REACH, BLOCK_C, BLOCK_S)
    for step in range(1 - DEPTH, band):
        y = first_row + step
        rows = (lane < lanes) & (y >= 0) & (y < out_height)
        offset = _at(0, sample, c, y, first_column, channels, out_height, out_width, CHANNELS_LAST)
        newest = ()
        for i in tl.static_range(REACH):
            inside = rows & (first_column + i >= 0) & (first_column + i < out_width)
            mask = exists[:, None] & inside[None, :]
            normal, z = _normalise(tl.load(raw + offset, mask, other=0).to(tl.float32), after)
            grad = tl.load(grad_out + offset, mask, other=0).to(tl.float32)
            offset += channels if CHANNELS_LAST else 1
            if grad_pooled is not None:
                grad += pooled
            grad *= activation_slope(z, 0.0, ACTIVATION)
            if norm_sums is not None:
                grad -= grad_mean[:, None] + normal * grad_slope[:, None]
            newest = newest + (tl.where(mask, grad * slope[:, None], 0.0),)
        known = newest + known[: (DEPTH - 1) * REACH]
        for lower in tl.static_range(STRIDE):
            dy = step * STRIDE + lower - top
            y = first_row * STRIDE + dy
            rows = (step >= 0) & (lane < lanes) & (y >= 0) & (y < height)
            at = _at(x, sample, c, y, first_x, channels, height, width, CHANNELS_LAST)
            hidden = ()
            grads = ()
            normals = ()
            slopes = ()
            for i in tl.static_range(COLUMNS):
                inside = rows & (first_x + i >= 0) & (first_x + i < width)
                mask = exists[:, None] & inside[None, :]
                value = tl.load(at, mask, other=0).to(tl.float32)
                at += channels if CHANNELS_LAST else 1
                if input_mean is not None:
                    normal, z = _normalise(value, before)
                    value = tl.where(mask, activate(z, 0.0, INPUT_ACTIVATION), 0.0)
                    normals = normals + (tl.where(mask, normal, 0.0),)
                    slope_here = activation_slope(z, 0.0, INPUT_ACTIVATION)
                    slopes = slopes + (tl.where(mask, slope_here, 0.0),)
                hidden = hidden + (value,)
            grads = _zeros(COLUMNS, BLOCK_C, BLOCK_S)
            totals = ()
            for tap in tl.static_range(SIZE * SIZE):
                total = by_tap[tap]
                if tap // SIZE % STRIDE == lower:
                    weight = tl.load(weights + tap * BLOCK_C)
                    added = ()
                    for i in tl.static_range(COLUMNS):
                        grad = grads[i]
                        if tap % SIZE % STRIDE == i % STRIDE:
                            behind = known[
                                tap // SIZE // STRIDE * REACH
                                + (i // STRIDE + DEPTH - 1 - tap % SIZE // STRIDE)
                            ]
                            grad += weight[:, None] * behind
                            total += hidden[i] * behind
                        added = added + (grad,)
                    grads = added
                totals = totals + (total,)
            by_tap = totals
            if input_mean is not None:
                added = ()
                for i in tl.static_range(COLUMNS):
                    grad = grads[i] * slopes[i]
                    by_bias += grad
                    by_weight += grad * normals[i]
                    if not INPUT_BATCH_STATISTICS:
                        grad *= (before[1] * before[2])[:, None]
                    added = added + (grad,)
                grads = added
            _store(
                grad_x,
                grads,
                c,
                tl.zeros((), tl.int64),
                row.to(tl.int32) * BLOCK_S,
                lanes,
                strips,
                bands,
                band * STRIDE,
                dy,
                -left,
                step >= 0,
                channels,
                height,
                width,
                CHANNELS_LAST,
                COLUMNS,
                BLOCK_S,
            )
    for tap in tl.static_range(SIZE * SIZE):
        at = weight_parts + (row * (SIZE * SIZE) + tap) * channels + c
        tl.store(at, tl.sum(by_tap[tap], 1), exists)
    if input_parts is not None:
        tl.store(input_parts + 2 * row * channels + c, tl.sum(by_bias, 1), exists)
        tl.store(input_parts + (2 * row + 1) * channels + c, tl.sum(by_weight, 1), exists)


# ---- launchers ----------------------------------------------------------------------------------


class _Strips:
    """How maps are cut into strips of columns in bands of rows.

    Attributes:
        rows: programs along the strips; a sample's are its own unless ``together``.
        blocks: of the strips of a sample, or of the batch.
        programs: of a launch.
        extents: lanes, strips, bands and rows of a band, as kernels take them.
        options: of the kernels.
    """

    def __init__(
        self,
        x: Tensor,
        height: int,
        width: int,
        columns: int,
        elements: int,
        *,
        together: bool = False,
    ):
        """Strips of ``columns`` of [height, width] positions in each map of ``x``."""
        samples, channels = x.shape[:2]
        channels_last = memory_format_of(x) == torch.channels_last
        tile = THREADS * elements
        strips = triton.cdiv(width, columns)
        work = samples * channels * height * strips
        highest = min(HIGHEST_BAND, max(LOWEST_BAND, work // (tile * PROGRAMS)))
        bands = triton.cdiv(height, highest)
        lanes = strips * bands * (samples if together else 1)
        narrow = min(CHANNELS if channels_last else 1, triton.next_power_of_2(max(1, channels)))
        block_s = min(tile // narrow, triton.next_power_of_2(max(1, lanes)))
        block_c = min(tile // block_s, triton.next_power_of_2(max(1, channels)))
        self.blocks = triton.cdiv(lanes, block_s)
        self.rows = self.blocks * (1 if together else samples)
        self.programs = self.rows * triton.cdiv(channels, block_c)
        self.extents = lanes, strips, bands, triton.cdiv(height, bands)
        self.options: dict[str, Any] = {
            "CHANNELS_LAST": channels_last,
            "ALIGNMENT": alignment_of(channels if channels_last else width),
            "COLUMNS": columns,
            "BLOCK_C": block_c,
            "BLOCK_S": block_s,
        }


def _taps_of(weight: Tensor, block: int) -> Tensor:
    """[C, 1, K, K] as [blocks, K * K, block], with zeros behind the last channel."""
    padded = F.pad(weight.flatten(1), (0, 0, 0, -len(weight) % block))
    return padded.unflatten(0, (-1, block)).transpose(1, 2).contiguous()


def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    activation: str,
    has_input_norm: bool,
    input_weight: Tensor | None,
    input_bias: Tensor | None,
    input_mean: Tensor | None,
    input_var: Tensor | None,
    input_eps: float,
    input_activation: str,
    stride: int,
    padding: list[int],
    pool: bool,
    keep_raw: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::depthwise_conv_bn_act``; see ``dlkernels.ops``."""
    x = to_format_of(x, x)
    samples, channels, height, width = x.shape
    left, right, top, bottom = padding
    size = weight.shape[-1]
    out_height = (height + top + bottom - size) // stride + 1
    out_width = (width + left + right - size) // stride + 1
    shape = samples, channels, out_height, out_width
    given = norm_mean is not None
    raw = new_maps(x, shape) if keep_raw else x.new_empty((0,))
    out = new_maps(x, shape) if given else raw
    if not has_input_norm:
        input_mean, input_var = x.new_zeros((2, channels), dtype=torch.float32).unbind()
    elif input_mean is None or input_var is None:
        input_mean, input_var = batch_statistics(x)
    before = input_weight, input_bias, input_mean, input_var
    after = norm_weight, norm_bias, norm_mean, norm_var
    strips = _Strips(x, out_height, out_width, FORWARD_COLUMNS[size], FORWARD_ELEMENTS[size])
    statistics = x.new_empty((strips.rows, 2, channels), dtype=torch.float32)
    sizes = statistics.new_empty((strips.rows,))
    origins = statistics.new_zeros((channels,))
    sums = statistics.new_empty((samples, strips.blocks, channels))
    launch(
        depthwise_kernel,
        strips.programs,
        *(
            x,
            _taps_of(weight, strips.options["BLOCK_C"]),
            *(map(contiguous, before) if has_input_norm else (None,) * 4),
        ),
        *(*map(contiguous, after), raw if keep_raw else None, out if given else None),
        *(
            (None, None, None, sums if pool else None)
            if given
            else (statistics, sizes, origins, None)
        ),
        *(channels, height, width, out_height, out_width, top, left, *strips.extents),
        *(input_eps, eps),
        SIZE=size,
        STRIDE=stride,
        INPUT_ACTIVATION=input_activation,
        ACTIVATION=activation,
        **strips.options,
    )
    pooled = statistics.new_empty((0, channels))
    if norm_mean is None or norm_var is None:
        extents = samples, channels, out_height * out_width, 1, 1, 1
        norm_mean, norm_var = combine_statistics(origins, statistics, extents, 1, sizes)
        after = norm_weight, norm_bias, norm_mean, norm_var
        out, pooled, *_ = batch_norm_act(raw, *after, None, None, eps, activation, 0.0, pool)
    elif pool:
        pooled = pool_of(sums, out_height * out_width)
    # Results may not be arguments of the op.
    used = (norm_mean, norm_var, input_mean, input_var)
    return out, raw, pooled, *(t.clone(memory_format=torch.contiguous_format) for t in used)


def depthwise_conv_bn_act_backward(
    grad_out: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor,
    raw: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor,
    norm_var: Tensor,
    norm_batch_statistics: bool,
    eps: float,
    activation: str,
    has_input_norm: bool,
    input_weight: Tensor | None,
    input_bias: Tensor | None,
    input_mean: Tensor,
    input_var: Tensor,
    input_batch_statistics: bool,
    input_eps: float,
    input_activation: str,
    stride: int,
    padding: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::depthwise_conv_bn_act_backward``."""
    x = to_format_of(x, x)
    grad_out, raw = to_format_of(x, grad_out), to_format_of(x, raw)
    grad_pooled = contiguous(grad_pooled)
    samples, channels, height, width = x.shape
    left, _, top, _ = padding
    size = weight.shape[-1]
    columns = max(stride, BACKWARD_COLUMNS[size])
    after = tuple(map(contiguous, (norm_weight, norm_bias, norm_mean, norm_var)))
    before = tuple(map(contiguous, (input_weight, input_bias, input_mean, input_var)))
    sums = gradient_sums(grad_out, grad_pooled, raw, (*after, None), eps, activation, 0.0)

    grad_x = empty_maps(x)
    strips = _Strips(
        *(x, triton.cdiv(height + top, stride), width + left, columns, BACKWARD_ELEMENTS[size]),
        together=True,
    )
    parts = sums.new_empty((strips.rows, size * size, channels))
    input_parts = sums.new_empty((strips.rows, 2, channels)) if has_input_norm else None
    launch(
        depthwise_backward_kernel,
        strips.programs,
        *(grad_out, grad_pooled, raw, x, _taps_of(weight, strips.options["BLOCK_C"]), *after),
        sums if norm_batch_statistics else None,
        *(before if has_input_norm else (None,) * 4),
        *(grad_x, parts, input_parts, samples, channels, height, width, *raw.shape[2:]),
        *(top, left, *strips.extents, eps, input_eps),
        SIZE=size,
        STRIDE=stride,
        ACTIVATION=activation,
        INPUT_ACTIVATION=input_activation,
        INPUT_BATCH_STATISTICS=input_batch_statistics,
        **strips.options,
        **BACKWARD_REGISTERS.get(size, {}),
    )
    grad_weight = add_up(parts).t().contiguous().view(weight.shape)
    if input_parts is None:
        input_sums = torch.zeros_like(sums)
    else:
        input_sums = add_up(input_parts)
        if input_batch_statistics:
            values = (*before, None)
            write_gradient(grad_x, None, x, values, input_sums, grad_x, input_eps, "identity", 0.0)
    of_norms = (part.clone() for part in (sums[1], sums[0], input_sums[1], input_sums[0]))
    return grad_x, grad_weight, *of_norms
