"""The op ``dlkernels::pyramid_pool``: public function, fake kernels, gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dlkernels import backend
from dlkernels.checks import check_maps, describe
from dlkernels.memory_format import empty_maps, new_maps
from dlkernels.pyramid_pool import reference
from dlkernels.watch import watched

_TRITON = "dlkernels.pyramid_pool.triton"


@watched
def pyramid_pool(x: Tensor) -> Tensor:
    r"""Spatial pyramid pooling: maps, and their maxima over windows of 13, 9 and 5 pixels.

    .. code-block:: text

        out = [max 13 x 13, max 9 x 9, max 5 x 5, x]  along the channels; stride 1, "same" padding

    He et al., "Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition"
    (2014), in the form of Bochkovskiy et al., "YOLOv4: Optimal Speed and Accuracy of Object
    Detection" (2020), section 3.4. The kernels read the map once and pool in a cascade: the maximum
    over 9 pixels is that over 5 of the maxima over 5, and so on.

    The output equals separate ``F.max_pool2d`` and ``cat`` bit for bit; a NaN is a maximum. So does
    the gradient up to the rounding of its sums where the maximum of a window is unique; where it is
    not, the gradient goes, as in a cascade of ``F.max_pool2d``, stage by stage to the first maximum
    of the window (the last, if it is NaN), which may be another of the equal pixels.

    float32, bfloat16 and float16 run in the fused kernels with float32 accumulation of gradients,
    float64 in the reference formula. Contiguous and channels_last maps are both read as they are.
    Autocast leaves the dtype as it is.

    Saved for backward: ``x``; the cascade is recomputed.

    Args:
        x: maps [N, C, H, W] with at least one channel, row and column.

    Returns:
        Maps [N, 4 C, H, W] in the dtype and memory format of ``x``.

    Raises:
        TypeError: ``x`` is no tensor, or not of a floating-point dtype.
        ValueError: ``x`` has no such shape.
    """
    check_maps("x", x)
    if 0 in x.shape[1:]:
        raise ValueError(
            f"x must have maps of at least 1 x 1, and one channel or more, but is {describe(x)}"
        )
    if backend.select("pyramid_pool", x) == "reference":
        return reference.pyramid_pool(x)
    return _OP(x)


def _fake(x: Tensor) -> Tensor:
    samples, channels, height, width = x.shape
    return new_maps(x, (samples, (reference.STAGES + 1) * channels, height, width))


def _fake_backward(grad_out: Tensor, x: Tensor) -> Tensor:
    return empty_maps(x)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor) -> Tensor:
    return _BACKWARD_OP(grad_out, *ctx.saved_tensors)


_OP = backend.define("pyramid_pool", "(Tensor x) -> Tensor", _fake, _TRITON)
_BACKWARD_OP = backend.define(
    "pyramid_pool_backward", "(Tensor grad_out, Tensor x) -> Tensor", _fake_backward, _TRITON
)
backend.register_autograd("pyramid_pool", _backward, _setup_context)
backend.refuse_double_backward("pyramid_pool_backward")
