"""The op ``dlkernels::conv3x3``: public function, fake kernels, gradient, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.checks import check_integer, check_like, check_maps, check_shape, describe
from dlkernels.conv3x3 import reference
from dlkernels.memory_format import empty_maps, new_maps
from dlkernels.watch import watched

PADDINGS = (0, 1, 2)


@watched
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 1) -> Tensor:
    r"""3x3 convolution of stride 1, without dilation and groups, by minimal filtering.

    .. code-block:: text

        out[n, o] = sum over c of the correlation of x[n, c] with weight[o, c]  (+ bias[o])

    The CPU kernels compute tiles of 2x2 outputs by Winograd's F(2x2, 3x3), which takes 16 products
    where the plain sum takes 36: Lavin and Gray, "Fast Algorithms for Convolutional Neural
    Networks" (2016), section 4.1. The gradient of ``x`` is such a convolution, too, with the kernel
    turned.

    float32, bfloat16 and float16 run in the CPU kernels with float32 accumulation; contiguous and
    channels_last maps are both read as they are. float64 and other devices run PyTorch's own
    convolution: cuDNN has Winograd kernels of its own. Under autocast all tensors are cast to the
    autocast dtype.

    The outputs of a 2x2 tile, the first of which lies at the first output, come from the same sums.
    A NaN or infinity in ``x`` makes all outputs that it is part of NaN or infinite, and may do so
    to the rest of their tiles, which the plain sum leaves finite (the numeric watch,
    ``DLKERNELS_CHECK=1``, takes that for an error); outputs farther away are not touched. In
    ``weight`` it does so to a whole output channel. Sums of four values of ``x``, or of the nine of
    a kernel, must be finite in float32.

    Saved for backward: ``x`` and ``weight``.

    Args:
        x: maps [N, C, H, W] with at least one channel, row and column.
        weight: [O, C, 3, 3]; dtype and device of ``x``.
        bias: [O] or None; likewise.
        padding: zeros on each side, 0, 1 or 2.

    Returns:
        Maps [N, O, H + 2 padding - 2, W + 2 padding - 2] in the dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ, or
            ``padding`` is no integer.
        ValueError: shapes do not fit, the kernel is larger than the padded maps, devices differ, or
            ``padding`` is out of range.
    """
    check_maps("x", x)
    _check_weight(weight, x)
    if bias is not None:
        check_like("bias", bias, "x", x)
        check_shape("bias", bias, weight.shape[:1], "one value per output channel")
    check_integer("padding", padding)
    if padding not in PADDINGS:
        raise ValueError(f"padding must be 0, 1 or 2, but is {padding}")
    if min(x.shape[2:]) == 0 or min(_output_shape(x, weight, padding)[2:]) < 1:
        raise ValueError(
            f"x must have maps of at least 1 x 1 that are with padding {padding} at least 3 x 3, "
            f"but is {describe(x)}"
        )
    run = _OP if backend.has_kernel("conv3x3", x) else reference.conv3x3
    return run(x, weight, bias, padding)


def _check_weight(weight: Any, x: Tensor) -> None:
    check_like("weight", weight, "x", x)
    fits = weight.dim() == 4 and list(weight.shape[1:]) == [x.shape[1], 3, 3]
    if not fits or min(weight.shape[:2]) == 0:
        raise ValueError(
            f"weight must have shape [O, {x.shape[1]}, 3, 3] for x with {x.shape[1]} channels, at "
            f"least one of each, but is {describe(weight)}"
        )


def _output_shape(x: Tensor, weight: Tensor, padding: int) -> tuple[int, int, int, int]:
    samples, _, height, width = x.shape
    return samples, weight.shape[0], height + 2 * padding - 2, width + 2 * padding - 2


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    return new_maps(x, _output_shape(x, weight, padding))


def _fake_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, padding: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        empty_maps(x) if needs[0] else x.new_empty((0,)),
        grad_weight if needs[1] else weight.new_empty((0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.padding = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 4
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    grads: Sequence[Tensor] = (grad_out, grad_out)
    if any(needs):
        grads = conv3x3_gradients(grad_out, x, weight, ctx.padding, needs)
    wanted = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    grad_bias = grad_out.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
    return *wanted, grad_bias, None


def _setup_gradients_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, x, weight, ctx.padding, ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_out, x, weight)


def _gradients_backward(
    ctx: Any, direction_x: Tensor | None, direction_weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients are linear in ``grad_out``, and in ``weight`` or ``x``."""
    grad_out, x, weight = ctx.saved_tensors
    padding, needs = ctx.padding, ctx.needs_input_grad
    of_grad_out = of_x = of_weight = None
    if direction_x is not None and ctx.needs[0]:
        if needs[0]:
            of_grad_out = _OP(direction_x, weight, None, padding)
        if needs[2]:
            _, of_weight = conv3x3_gradients(grad_out, direction_x, weight, padding, [False, True])
    if direction_weight is not None and ctx.needs[1]:
        if needs[0]:
            other = _OP(x, direction_weight, None, padding)
            of_grad_out = other if of_grad_out is None else of_grad_out + other
        if needs[1]:
            of_x, _ = conv3x3_gradients(grad_out, x, direction_weight, padding, [True, False])
    return of_grad_out, of_x, of_weight, None, None


_OP = backend.define(
    "conv3x3", "(Tensor x, Tensor weight, Tensor? bias, int padding) -> Tensor", _fake
)
conv3x3_gradients = backend.define(
    "conv3x3_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, int padding, bool[2] needs) "
    "-> (Tensor grad_x, Tensor grad_weight)",
    _fake_backward,
)
backend.register_autograd("conv3x3", _backward, _setup_context)
backend.register_autograd("conv3x3_backward", _gradients_backward, _setup_gradients_context)
backend.register_autocast("conv3x3")
