"""Triton kernels of squeeze_excite.

A sample is reduced by several programs, each of which writes the sum over its stretch of the area
(``partial`` [N, splits, C]); whoever reads the sums adds the stretches up in order, so that results
are the same in every run. The kernels see maps as [channels, area] tiles of one sample, whichever
of the two lies contiguously in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.memory_format import empty_maps, to_format_of
from dlkernels.triton_support import Budget, MapTiles, launch, relu, strides_of_maps

BLOCK_SQUEEZED = 16
BLOCK_CHANNELS = 64

BUDGETS = {
    "sum_maps_kernel": Budget(registers=56, shared=2048, wide=0.66),
    "hidden_kernel": Budget(registers=48, shared=1024),
    "scale_kernel": Budget(registers=48, shared=1024),
    "scale_maps_kernel": Budget(registers=48, shared=1024, wide=0.66),
    "hidden_backward_kernel": Budget(registers=48, shared=1024),
    "pooled_backward_kernel": Budget(registers=48, shared=1024),
    "scale_maps_backward_kernel": Budget(registers=48, shared=1024, wide=0.5),
    "weight_backward_kernel": Budget(registers=48, shared=4096),
}


# ---- functions of single values -----------------------------------------------------------------


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return relu(z)
    return z * tl.sigmoid(z)


@triton.jit
def _activation_slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s))


@triton.jit
def _gate(z, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return tl.sigmoid(z)
    shifted = relu(z + 3)
    return tl.where(shifted > 6, 6.0, shifted) / 6


@triton.jit
def _gate_slope(scale, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return scale * (1 - scale)
    return tl.where((scale <= 0) | (scale >= 1), 0.0, 1.0 / 6)


# ---- passes over maps ---------------------------------------------------------------------------


@triton.jit
def sum_maps_kernel(
    x,
    grad_out,
    out,
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
    """partial[n, split, c] = sum of x, or of x * grad_out (masked by out > 0), over a stretch."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks  # sample and split
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = row % splits * stretch
    base = row // splits * channels * area
    total = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    for step in range(0, stretch, BLOCK_A):
        a = first + step + tl.arange(0, BLOCK_A)
        mask = (c < channels)[:, None] & (a < area)[None, :]
        offsets = base + c[:, None] * stride_c + a[None, :] * stride_a
        value = tl.load(x + offsets, mask, other=0).to(tl.float32)
        if grad_out is not None:
            value *= tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
        if out is not None:
            value = tl.where(tl.load(out + offsets, mask, other=0) > 0, value, 0.0)
        total += value
    tl.store(partial + row * channels + c, tl.sum(total, 1), c < channels)


@triton.jit
def scale_maps_kernel(
    x,
    scale,
    shortcut,
    out,
    channels,
    area,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Out = output_activation(x * scale + shortcut)."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    a_blocks = tl.cdiv(area, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (c_blocks * a_blocks)
    c = program // a_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = program % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (c < channels)[:, None] & (a < area)[None, :]
    offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
    factor = tl.load(scale + sample * channels + c, c < channels, other=0)[:, None]
    value = tl.load(x + offsets, mask, other=0).to(tl.float32) * factor
    if shortcut is not None:
        value += tl.load(shortcut + offsets, mask, other=0).to(tl.float32)
    if RELU:
        value = relu(value)
    tl.store(out + offsets, value, mask)


@triton.jit
def scale_maps_backward_kernel(
    grad_out,
    out,
    scale,
    grad_pooled,
    grad_x,
    grad_shortcut,
    channels,
    area,
    CHANNELS_LAST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """grad_x = grad * scale + grad_pooled / area, where grad is grad_out masked by out > 0."""
    stride_c, stride_a, channels, area = strides_of_maps(channels, area, CHANNELS_LAST, ALIGNMENT)
    c_blocks = tl.cdiv(channels, BLOCK_C)
    a_blocks = tl.cdiv(area, BLOCK_A)
    program = tl.program_id(0).to(tl.int64)
    sample = program // (c_blocks * a_blocks)
    c = program // a_blocks % c_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = program % a_blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    mask = (c < channels)[:, None] & (a < area)[None, :]
    offsets = sample * channels * area + c[:, None] * stride_c + a[None, :] * stride_a
    factor = tl.load(scale + sample * channels + c, c < channels, other=0)[:, None]
    grad_mean = tl.load(grad_pooled + sample * channels + c, c < channels, other=0) / area
    grad = tl.load(grad_out + offsets, mask, other=0).to(tl.float32)
    if out is not None:
        grad = tl.where(tl.load(out + offsets, mask, other=0) > 0, grad, 0.0)
    if grad_shortcut is not None:
        tl.store(grad_shortcut + offsets, grad, mask)
    tl.store(grad_x + offsets, grad * factor + grad_mean[:, None], mask)


# ---- the two small layers -----------------------------------------------------------------------


@triton.jit
def _add_up(partial, sample, c, channels, splits, BLOCK: tl.constexpr):
    """The sums of a sample's channels over all stretches of its area."""
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(partial + (sample * splits + split) * channels + c, c < channels, other=0)
    return total


@triton.jit
def hidden_kernel(
    partial,
    weight,
    bias,
    pooled,
    hidden,
    channels,
    squeezed,
    area,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Pooled = sum / area; hidden = pooled @ weight^T + bias."""
    blocks = tl.cdiv(squeezed, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    r = program % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = _add_up(partial, sample, c, channels, splits, BLOCK_C) / area
        if program % blocks == 0:
            tl.store(pooled + sample * channels + c, mean, c < channels)
        mask = (r < squeezed)[:, None] & (c < channels)[None, :]
        w = tl.load(weight + r[:, None] * channels + c[None, :], mask, other=0).to(tl.float32)
        # Outside the mask the mean is 0 / area, which is NaN for an empty map.
        total += tl.where(mask, w * mean[None, :], 0.0)
    value = tl.sum(total, 1)
    if bias is not None:
        value += tl.load(bias + r, r < squeezed, other=0).to(tl.float32)
    tl.store(hidden + sample * squeezed + r, value, r < squeezed)


@triton.jit
def scale_kernel(
    hidden,
    weight,
    bias,
    scale,
    channels,
    squeezed,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Scale = gate(activation(hidden) @ weight^T + bias)."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in range(0, squeezed, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        h = tl.load(hidden + sample * squeezed + r, r < squeezed, other=0)
        mask = (c < channels)[:, None] & (r < squeezed)[None, :]
        w = tl.load(weight + c[:, None] * squeezed + r[None, :], mask, other=0).to(tl.float32)
        total += w * _activate(h, ACTIVATION)[None, :]
    logits = tl.sum(total, 1)
    if bias is not None:
        logits += tl.load(bias + c, c < channels, other=0).to(tl.float32)
    tl.store(scale + sample * channels + c, _gate(logits, GATE), c < channels)


@triton.jit
def hidden_backward_kernel(
    partial,
    scale,
    hidden,
    weight,
    grad_logits,
    grad_hidden,
    channels,
    squeezed,
    splits,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_logits = sum * gate'; grad_hidden = (grad_logits @ weight) * activation'(hidden)."""
    blocks = tl.cdiv(squeezed, BLOCK_R)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    r = program % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        s = tl.load(scale + sample * channels + c, c < channels, other=0)
        grad = _add_up(partial, sample, c, channels, splits, BLOCK_C) * _gate_slope(s, GATE)
        if program % blocks == 0:
            tl.store(grad_logits + sample * channels + c, grad, c < channels)
        mask = (c < channels)[:, None] & (r < squeezed)[None, :]
        w = tl.load(weight + c[:, None] * squeezed + r[None, :], mask, other=0).to(tl.float32)
        total += w * grad[:, None]
    h = tl.load(hidden + sample * squeezed + r, r < squeezed, other=0)
    value = tl.sum(total, 0) * _activation_slope(h, ACTIVATION)
    tl.store(grad_hidden + sample * squeezed + r, value, r < squeezed)


@triton.jit
def pooled_backward_kernel(
    grad_hidden,
    weight,
    grad_pooled,
    channels,
    squeezed,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """grad_pooled = grad_hidden @ weight."""
    blocks = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, squeezed, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        grad = tl.load(grad_hidden + sample * squeezed + r, r < squeezed, other=0)
        mask = (r < squeezed)[:, None] & (c < channels)[None, :]
        w = tl.load(weight + r[:, None] * channels + c[None, :], mask, other=0).to(tl.float32)
        total += w * grad[:, None]
    tl.store(grad_pooled + sample * channels + c, tl.sum(total, 0), c < channels)


@triton.jit
def weight_backward_kernel(
    grad,
    value,
    grad_weight,
    grad_bias,
    samples,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """grad_weight = grad^T @ value, grad_bias = sum of grad over samples."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    j = program // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    total_bias = tl.zeros((BLOCK_ROWS,), tl.float32)
    for sample in range(samples):
        g = tl.load(grad + sample * rows + j, j < rows, other=0)
        v = tl.load(value + sample * columns + k, k < columns, other=0)
        if ACTIVATION is not None:
            v = _activate(v, ACTIVATION)
        total += g[:, None] * v[None, :]
        total_bias += g
    mask = (j < rows)[:, None] & (k < columns)[None, :]
    tl.store(grad_weight + j[:, None] * columns + k[None, :], total, mask)
    if program % blocks == 0:
        tl.store(grad_bias + j, total_bias, j < rows)


# ---- launchers ----------------------------------------------------------------------------------


class _Maps(MapTiles):
    """Maps, and the sums over their stretches."""

    def sums(self, x: Tensor, grad_out: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        partial = x.new_empty((self.samples, self.splits, self.channels), dtype=torch.float32)
        launch(
            sum_maps_kernel,
            self.samples * self.splits * self.c_blocks,
            x,
            grad_out,
            out,
            partial,
            self.channels,
            self.area,
            self.splits,
            self.stretch,
            **self.options,
        )
        return partial


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    shortcut: Tensor | None,
    activation: str,
    gate: str,
    output_activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::squeeze_excite``; see :func:`dlkernels.ops.squeeze_excite`."""
    out = empty_maps(x)
    x = to_format_of(out, x)
    shortcut = None if shortcut is None else to_format_of(out, shortcut)
    reduce_weight, expand_weight = reduce_weight.contiguous(), expand_weight.contiguous()
    reduce_bias = None if reduce_bias is None else reduce_bias.contiguous()
    expand_bias = None if expand_bias is None else expand_bias.contiguous()
    maps = _Maps(out)
    samples, channels, squeezed = maps.samples, maps.channels, reduce_weight.shape[0]
    pooled = x.new_empty((samples, channels), dtype=torch.float32)
    hidden = x.new_empty((samples, squeezed), dtype=torch.float32)
    scale = torch.empty_like(pooled)
    blocks = {"BLOCK_R": BLOCK_SQUEEZED, "BLOCK_C": BLOCK_CHANNELS}

    launch(
        hidden_kernel,
        samples * triton.cdiv(squeezed, BLOCK_SQUEEZED),
        maps.sums(x),
        reduce_weight,
        reduce_bias,
        pooled,
        hidden,
        channels,
        squeezed,
        maps.area,
        maps.splits,
        **blocks,
    )
    launch(
        scale_kernel,
        samples * triton.cdiv(channels, BLOCK_CHANNELS),
        hidden,
        expand_weight,
        expand_bias,
        scale,
        channels,
        squeezed,
        ACTIVATION=activation,
        GATE=gate,
        **blocks,
    )
    launch(
        scale_maps_kernel,
        maps.tiles,
        x,
        scale,
        shortcut,
        out,
        channels,
        maps.area,
        RELU=output_activation == "relu",
        **maps.options,
    )
    return out, pooled, hidden, scale


def squeeze_excite_backward(
    grad_out: Tensor,
    x: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    out: Tensor | None,
    pooled: Tensor,
    hidden: Tensor,
    scale: Tensor,
    activation: str,
    gate: str,
    shortcut_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``dlkernels::squeeze_excite_backward``."""
    grad_x = empty_maps(x)
    x, grad_out = to_format_of(grad_x, x), to_format_of(grad_x, grad_out)
    out = None if out is None else to_format_of(grad_x, out)
    reduce_weight, expand_weight = reduce_weight.contiguous(), expand_weight.contiguous()
    pooled, hidden, scale = pooled.contiguous(), hidden.contiguous(), scale.contiguous()
    maps = _Maps(grad_x)
    samples, channels, squeezed = maps.samples, maps.channels, reduce_weight.shape[0]
    grad_shortcut = torch.empty_like(grad_x) if shortcut_grad else x.new_empty((0,))
    grad_logits, grad_hidden = torch.empty_like(scale), torch.empty_like(hidden)
    grad_pooled = torch.empty_like(pooled)
    blocks = {"BLOCK_R": BLOCK_SQUEEZED, "BLOCK_C": BLOCK_CHANNELS}

    launch(
        hidden_backward_kernel,
        samples * triton.cdiv(squeezed, BLOCK_SQUEEZED),
        maps.sums(x, grad_out, out),
        scale,
        hidden,
        expand_weight,
        grad_logits,
        grad_hidden,
        channels,
        squeezed,
        maps.splits,
        ACTIVATION=activation,
        GATE=gate,
        **blocks,
    )
    launch(
        pooled_backward_kernel,
        samples * triton.cdiv(channels, BLOCK_CHANNELS),
        grad_hidden,
        reduce_weight,
        grad_pooled,
        channels,
        squeezed,
        **blocks,
    )
    launch(
        scale_maps_backward_kernel,
        maps.tiles,
        grad_out,
        out,
        scale,
        grad_pooled,
        grad_x,
        grad_shortcut if shortcut_grad else None,
        channels,
        maps.area,
        **maps.options,
    )
    grad_expand = _weight_backward(grad_logits, hidden, activation, x.dtype)
    grad_reduce = _weight_backward(grad_hidden, pooled, None, x.dtype)
    return grad_x, *grad_reduce, *grad_expand, grad_shortcut


def _weight_backward(
    grad: Tensor, value: Tensor, activation: str | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    samples, rows = grad.shape
    columns = value.shape[1]
    grad_weight = grad.new_empty((rows, columns), dtype=dtype)
    grad_bias = grad.new_empty((rows,), dtype=dtype)
    launch(
        weight_backward_kernel,
        triton.cdiv(rows, 16) * triton.cdiv(columns, 64),
        grad,
        value,
        grad_weight,
        grad_bias,
        samples,
        rows,
        columns,
        ACTIVATION=activation,
        BLOCK_ROWS=16,
        BLOCK_COLUMNS=64,
    )
    return grad_weight, grad_bias
