"""The op ``dlkernels::depthwise_conv_bn_act``: public function, fake kernels, gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.batch_norm_act.op import (
    as_float,
    check_batch,
    check_norm,
)
from dlkernels.batch_norm_act.reference import Norm
from dlkernels.checks import (
    check_flag,
    check_integer,
    check_maps,
    check_tensor,
    describe,
)
from dlkernels.mbconv import reference
from dlkernels.memory_format import memory_format_of
from dlkernels.watch import watched

_TRITON = "dlkernels.mbconv.triton"
KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)


class DepthwiseOutput(NamedTuple):
    """What :func:`depthwise_conv_bn_act` returns.

    Attributes:
        out: maps [N, C, H', W'].
        pooled: mean of ``out`` over H' and W', [N, C], or None if it was not asked for.
        raw: the convolution's output before the norm, without gradient; None where it was not
            stored.
        mean: the mean that ``norm`` normalised with, [C]; likewise without gradient.
        var: the biased variance.
        input_mean: the same of ``input_norm``, None without one.
        input_var: the same.
    """

    out: Tensor
    pooled: Tensor | None
    raw: Tensor | None
    mean: Tensor
    var: Tensor
    input_mean: Tensor | None
    input_var: Tensor | None


@watched
def depthwise_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    norm: Norm,
    input_norm: Norm | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    pool: bool = False,
) -> DepthwiseOutput:
    r"""Depthwise convolution between two batch norms with activations, and an average pool.

    .. code-block:: text

        raw    = depthwise convolution of input_norm(x), padded with zeros       [N, C, H', W']
        out    = norm(raw)                                                       [N, C, H', W']
        pooled = mean of out over H' and W'                                      [N, C]

    where a norm is ``activation((x - mean) / sqrt(var + eps) * weight + bias)`` with statistics of
    the batch, or given ones. It is the inside of the inverted residual block: Sandler et al.,
    "MobileNetV2" (2018), table 1; Tan and Le, "EfficientNet" (2019), section 4, with Swish as
    activation and the pool that squeeze-and-excitation begins with.

    Neither the normalised input nor its activation is ever stored, and ``raw`` only where the
    batch's statistics or a backward pass need it. float32, bfloat16 and float16 run in the fused
    kernels with float32 accumulation, float64 in the reference formula; contiguous and
    channels_last maps are both read as they are, and the result has the memory format of ``x``.

    Saved for backward: ``x``, ``raw`` and values of the size of the channels.

    Args:
        x: maps [N, C, H, W].
        weight: [C, 1, K, K] with K = 3, 5 or 7, of float32 or the dtype of ``x``.
        norm: of the convolution's output.
        input_norm: of ``x``, or None for none.
        stride: 1 or 2.
        padding: zeros on each side, or on (left, right, top, bottom) as in ``F.pad``; TensorFlow's
            'same' padding is not symmetric. Less than K.
        pool: whether to compute ``pooled``.

    Returns:
        out, pooled, raw and the statistics.

    Raises:
        TypeError: an argument is no tensor, or its dtype is neither that of ``x`` nor float32.
        ValueError: shapes do not fit, a kernel is larger than the padded maps, devices differ, an
            option is unknown, or batch statistics are to be taken of a single value per channel.
    """
    check_maps("x", x)
    check_flag("pool", pool)
    sides = sides_of(padding)
    height, width = check_geometry(x, x.shape[1], weight, stride, sides)
    check_norm("norm", norm, x, x.shape[1], reference.ACTIVATIONS)
    if input_norm is not None:
        check_norm("input_norm", input_norm, x, x.shape[1], reference.ACTIVATIONS)
        if input_norm.mean is None:
            check_batch(x)
    if norm.mean is None and x.shape[0] * height * width == 1:
        raise ValueError(
            f"x must give more than one output per channel for batch statistics, but has shape "
            f"{list(x.shape)}"
        )
    if backend.select("depthwise_conv_bn_act", x) == "reference":
        formula = reference.depthwise_conv_bn_act
        out, raw, pooled, *statistics = formula(x, weight, norm, input_norm, stride, sides, pool)
        return DepthwiseOutput(out, pooled, raw.detach(), *statistics)  # type: ignore[arg-type]
    keep_raw = norm.mean is None or (input_norm is not None and input_norm.mean is None)
    keep_raw = keep_raw or _gets_gradient(x, weight, norm, input_norm)
    out, raw, pooled, *statistics = _OP(
        x,
        weight.float(),
        *_arguments(norm),
        input_norm is not None,
        *_arguments(input_norm or Norm()),
        stride,
        sides,
        pool,
        keep_raw,
    )
    if input_norm is None:
        statistics[2:] = None, None
    return DepthwiseOutput(
        out, pooled.to(x.dtype) if pool else None, raw if keep_raw else None, *statistics
    )


def _gets_gradient(x: Tensor, weight: Tensor, norm: Norm, input_norm: Norm | None) -> bool:
    tensors = (x, weight, norm.weight, norm.bias, *(input_norm or ())[:2])
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _arguments(norm: Norm) -> tuple[Any, ...]:
    return (*(as_float(value) for value in norm[:4]), norm.eps, norm.activation)


def sides_of(padding: Any) -> list[int]:
    """The padding of the four sides."""
    if isinstance(padding, (list, tuple)):
        for index, side in enumerate(padding):
            check_integer(f"padding[{index}]", side)
        return list(padding)
    check_integer("padding", padding)
    return [padding] * 4


def check_geometry(
    x: Tensor, channels: int, weight: Any, stride: int, padding: list[int], name: str = "weight"
) -> tuple[int, int]:
    """Checks the arguments of a convolution of maps as large as those of ``x``.

    Returns:
        The height and width of its output.
    """
    check_tensor(name, weight)
    size = weight.shape[-1] if weight.dim() == 4 else 0
    if list(weight.shape) != [channels, 1, size, size] or size not in KERNEL_SIZES:
        raise ValueError(
            f"{name} must have shape [{channels}, 1, K, K] with K = 3, 5 or 7 (groups equal to the "
            f"channels of its input), but is {describe(weight)}"
        )
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name} must be float32 or have the dtype of x, {x.dtype}, but is {weight.dtype}"
        )
    if weight.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, but is {weight.device}")
    check_integer("stride", stride)
    if stride not in STRIDES:
        raise ValueError(f"stride must be 1 or 2, but is {stride}")
    if len(padding) != 4 or not all(0 <= side < size for side in padding):
        raise ValueError(
            f"padding must be one number or four, each from 0 to {size - 1}, but is {padding}"
        )
    height = x.shape[2] + padding[2] + padding[3]
    width = x.shape[3] + padding[0] + padding[1]
    if min(height, width) < size or min(x.shape[2:]) == 0:
        raise ValueError(
            f"{name} has a kernel of size {size}, which must not be larger than the padded maps of "
            f"x, {height} x {width}"
        )
    return _output_shape(x, weight, stride, padding)[2:]


def _output_shape(
    x: Tensor, weight: Tensor, stride: int, padding: list[int]
) -> tuple[int, int, int, int]:
    samples, channels, height, width = x.shape
    left, right, top, bottom = padding
    size = weight.shape[-1]
    out_height = (height + top + bottom - size) // stride + 1
    out_width = (width + left + right - size) // stride + 1
    return samples, channels, out_height, out_width


def _fake(
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
) -> tuple[Tensor, ...]:
    shape = _output_shape(x, weight, stride, padding)
    samples, channels = shape[:2]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))
    raw = torch.empty_like(out) if keep_raw else x.new_empty((0,))
    pooled = x.new_empty((samples if pool else 0, channels), dtype=torch.float32)
    statistics = (x.new_empty((channels,), dtype=torch.float32) for _ in range(4))
    return out, raw, pooled, *statistics


def _fake_backward(
    grad_out: Tensor, grad_pooled: Tensor | None, x: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=memory_format_of(x))
    grads = (x.new_empty((x.shape[1],), dtype=torch.float32) for _ in range(4))
    return grad_x, torch.empty_like(weight, memory_format=torch.contiguous_format), *grads


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight = inputs[:2]
    norm_weight, norm_bias, given_mean, _, eps, activation = inputs[2:8]
    has_input_norm = inputs[8]
    input_weight, input_bias, given_input_mean, _, input_eps, input_activation = inputs[9:15]
    stride, padding, pool, _ = inputs[15:]
    _, raw, _, mean, var, input_mean, input_var = output
    ctx.mark_non_differentiable(raw, mean, var, input_mean, input_var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        *(x, weight, raw, norm_weight, norm_bias, mean, var),
        *(input_weight, input_bias, input_mean, input_var),
    )
    ctx.norm = given_mean is None, eps, activation
    ctx.input_norm = has_input_norm and given_input_mean is None, input_eps, input_activation
    ctx.has_input_norm = has_input_norm
    ctx.geometry = stride, padding
    ctx.pool = pool


def _backward(
    ctx: Any, grad_out: Tensor | None, _: Any, grad_pooled: Tensor | None, *__: Any
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_pooled is None:
        return (None,) * 19
    x, weight, raw, *values = ctx.saved_tensors
    grads = _BACKWARD_OP(
        torch.zeros_like(raw) if grad_out is None else grad_out,
        grad_pooled if ctx.pool else None,
        *(x, weight, raw, *values[:4]),
        *ctx.norm,
        ctx.has_input_norm,
        *values[4:],
        *ctx.input_norm,
        *ctx.geometry,
    )
    needs = ctx.needs_input_grad
    places = (0, 1, 2, 3, 9, 10)
    result: list[Tensor | None] = [None] * 19
    for place, grad in zip(places, grads, strict=True):
        result[place] = grad if needs[place] else None
    return tuple(result)


_NORM = "Tensor? {0}_weight, Tensor? {0}_bias, Tensor? {0}_mean, Tensor? {0}_var, "
_SAVED_NORM = (
    "Tensor? {0}_weight, Tensor? {0}_bias, Tensor {0}_mean, Tensor {0}_var, "
    "bool {0}_batch_statistics, "
)

_OP = backend.define(
    "depthwise_conv_bn_act",
    f"(Tensor x, Tensor weight, {_NORM.format('norm')}float eps, str activation, "
    f"bool has_input_norm, {_NORM.format('input')}float input_eps, str input_activation, "
    "int stride, int[] padding, bool pool, bool keep_raw) -> (Tensor out, Tensor raw, "
    "Tensor pooled, Tensor mean, Tensor var, Tensor input_mean, Tensor input_var)",
    _fake,
    _TRITON,
)
_BACKWARD_OP = backend.define(
    "depthwise_conv_bn_act_backward",
    "(Tensor grad_out, Tensor? grad_pooled, Tensor x, Tensor weight, Tensor raw, "
    f"{_SAVED_NORM.format('norm')}float eps, str activation, bool has_input_norm, "
    f"{_SAVED_NORM.format('input')}float input_eps, str input_activation, int stride, "
    "int[] padding) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_norm_weight, "
    "Tensor grad_norm_bias, Tensor grad_input_weight, Tensor grad_input_bias)",
    _fake_backward,
    _TRITON,
)
backend.register_autograd("depthwise_conv_bn_act", _backward, _setup_context)
backend.refuse_double_backward("depthwise_conv_bn_act_backward")
