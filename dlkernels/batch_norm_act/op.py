"""The op ``dlkernels::batch_norm_act``: public function, fake kernels, gradient."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.batch_norm_act import reference
from dlkernels.checks import (
    check_choice,
    check_constant,
    check_device,
    check_flag,
    check_like,
    check_maps,
    check_number,
    check_shape,
    check_tensor,
)
from dlkernels.memory_format import empty_maps
from dlkernels.watch import watched

_TRITON = "dlkernels.batch_norm_act.triton"


class BatchNormActOutput(NamedTuple):
    """What :func:`batch_norm_act` returns.

    Attributes:
        out: maps [N, C, H, W].
        pooled: mean of ``out`` over H and W, [N, C], or None if it was not asked for.
        mean: the mean that each channel was normalised with, [C]; no gradient flows through it.
        var: the biased variance likewise.
    """

    out: Tensor
    pooled: Tensor | None
    mean: Tensor
    var: Tensor


@watched
def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    sample_scale: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float = 0.01,
    pool: bool = False,
) -> BatchNormActOutput:
    r"""Batch norm, activation, and optionally a residual sum or an average pool.

    .. code-block:: text

        norm   = (x - mean) / sqrt(var + eps) * weight + bias
        out    = activation(norm) * sample_scale[n] + residual           [N, C, H, W]
        pooled = mean of out over H and W                                [N, C]

    Without ``mean`` and ``var`` the statistics are those of the batch, as in training; with them
    they are constants, as in evaluation. Ioffe and Szegedy, "Batch Normalization" (2015),
    algorithm 1; variances are computed from deviations in two passes (channels_last: per block of
    pixels, blocks combined by the rule of Chan, Golub and LeVeque, 1979). ``sample_scale`` serves
    stochastic depth: Huang et al. (2016), equation 2.

    float32, bfloat16 and float16 run in the fused kernels with float32 accumulation, float64 in
    the reference formula. Contiguous and channels_last maps are both read as they are; the result
    has the memory format of ``x``. Autocast leaves the op's dtypes as they are.

    Saved for backward: ``x``, ``mean``, ``var`` and, if given, ``weight``, ``bias`` and
    ``sample_scale``; the activation is computed again ("memory-efficient Swish"). The running
    statistics are left to the caller, which :class:`dlkernels.nn.BatchNormAct2d` is one of.

    Args:
        x: maps [N, C, H, W].
        weight: [C], of float32 or the dtype of ``x``; None for ones.
        bias: [C] likewise; None for zeros.
        mean: [C] likewise, given together with ``var``; both without gradient.
        var: [C] likewise.
        residual: shape and dtype of ``x``, added after the activation, or None.
        sample_scale: [N], factors of the samples, without gradient, or None.
        eps: added to the variance.
        activation: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``,
            ``"hardswish"`` or ``"mish"``.
        negative_slope: of ``"leaky_relu"``.
        pool: whether to compute ``pooled``; not together with a residual.

    Returns:
        out, pooled, mean and var.

    Raises:
        TypeError: an argument is no tensor, or its dtype is neither that of ``x`` nor float32.
        ValueError: shapes do not fit, devices differ, a name is unknown, ``eps`` is out of range,
            only one of ``mean`` and ``var`` is given, they or ``sample_scale`` require a gradient,
            batch statistics are to be taken of a single value per channel, or ``pool`` meets a
            residual.
    """
    check_maps("x", x)
    check_channel_values("weight", weight, x, x.shape[1])
    check_channel_values("bias", bias, x, x.shape[1])
    check_statistics("", mean, var, x, x.shape[1])
    check_eps("eps", eps, training=mean is None)
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_number("negative_slope", negative_slope)
    check_flag("pool", pool)
    if residual is not None:
        check_like("residual", residual, "x", x)
        check_shape("residual", residual, x.shape, "the shape of x")
    if sample_scale is not None:
        check_tensor("sample_scale", sample_scale)
        check_device("sample_scale", sample_scale, "x", x)
        check_shape("sample_scale", sample_scale, x.shape[:1], "one factor per sample")
        check_constant("sample_scale", sample_scale)
    if pool and residual is not None:
        raise ValueError("pool must be False when a residual is added")
    if mean is None:
        check_batch(x)

    options = (eps, activation, negative_slope, pool)
    if backend.select("batch_norm_act", x) == "reference":
        values = reference.batch_norm_act(
            x, weight, bias, mean, var, residual, sample_scale, *options
        )
        return BatchNormActOutput(*values)
    small = [as_float(value) for value in (weight, bias, mean, var)]
    out, pooled, mean, var = _OP(x, *small, residual, as_float(sample_scale), *options)
    return BatchNormActOutput(out, pooled.to(x.dtype) if pool else None, mean, var)


def as_float(value: Tensor | None) -> Tensor | None:
    """In float32, as the kernels take values of channels."""
    return None if value is None else value.float()


def check_statistics(name: str, mean: Any, var: Any, x: Tensor, channels: int) -> None:
    """Given statistics ``{name}mean`` and ``{name}var`` are [channels], and require no gradient.

    Raises:
        TypeError: one is no tensor, or of another dtype.
        ValueError: only one is given, or it has another shape or device, or requires a gradient.
    """
    for field, value in (("mean", mean), ("var", var)):
        check_channel_values(f"{name}{field}", value, x, channels)
        if value is not None:
            check_constant(f"{name}{field}", value)
    if (mean is None) != (var is None):
        raise ValueError(f"{name}mean and {name}var must be given both or neither")


def check_channel_values(name: str, value: Any, x: Tensor, channels: int) -> None:
    """``value`` is None, or [channels] of float32 or the dtype of ``x``, on its device.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape or device.
    """
    if value is None:
        return
    check_tensor(name, value)
    if value.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name} must be float32 or have the dtype of x, {x.dtype}, but is {value.dtype}"
        )
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, but is on {value.device}")
    check_shape(name, value, [channels], "one value per channel")


def check_eps(name: str, eps: Any, training: bool) -> None:
    """``eps`` can be added to a variance: to one of a batch, which may be 0, more than 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range, as in ``torch.nn.functional.batch_norm``.
    """
    check_number(name, eps)
    if not (0 < eps < math.inf or (eps == 0 and not training)):
        needed = "above 0 with batch statistics" if training else "at least 0"
        raise ValueError(f"{name} must be finite and {needed}, but is {eps}")


def check_norm(
    name: str, norm: Any, x: Tensor, channels: int, activations: Collection[str]
) -> None:
    """Checks the norm of maps with that many channels, of the dtype and on the device of ``x``."""
    if not isinstance(norm, reference.Norm):
        raise TypeError(f"{name} must be a Norm, but is {type(norm).__name__}")
    check_channel_values(f"{name}.weight", norm.weight, x, channels)
    check_channel_values(f"{name}.bias", norm.bias, x, channels)
    check_statistics(f"{name}.", norm.mean, norm.var, x, channels)
    check_eps(f"{name}.eps", norm.eps, training=norm.mean is None)
    check_choice(f"{name}.activation", norm.activation, activations)


def check_batch(x: Tensor) -> None:
    """Batch statistics of ``x`` exist: there is more than one value per channel.

    Raises:
        ValueError: there is exactly one, as in ``nn.BatchNorm2d``.
    """
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"x must have more than one value per channel for batch statistics, but has shape "
            f"{list(x.shape)}"
        )


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    residual: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    activation: str,
    negative_slope: float,
    pool: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, channels = x.shape[:2]
    pooled = x.new_empty((samples if pool else 0, channels), dtype=torch.float32)
    statistic = x.new_empty((channels,), dtype=torch.float32)
    return empty_maps(x), pooled, statistic, torch.empty_like(statistic)


def _fake_backward(
    grad_out: Tensor,
    grad_pooled: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    sample_scale: Tensor | None,
    batch_statistics: bool,
    eps: float,
    activation: str,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_maps(x), torch.empty_like(mean), torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, given_mean, _, _, sample_scale, *options, pool = inputs
    _, _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, var, sample_scale)
    ctx.options = (given_mean is None, *options)
    ctx.pool = pool


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_pooled: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_out is None and grad_pooled is None:
        return (None,) * 11
    x, weight, bias, mean, var, sample_scale = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = (None, None, None)
    if any(needs[:3]):
        grads = _BACKWARD_OP(
            torch.zeros_like(x) if grad_out is None else grad_out,
            grad_pooled if ctx.pool else None,
            *(x, weight, bias, mean, var, sample_scale),
            *ctx.options,
        )
    wanted = (grad if need else None for grad, need in zip(grads, needs[:3], strict=True))
    return *wanted, None, None, grad_out if needs[5] else None, *(None,) * 5


_OP = backend.define(
    "batch_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? residual, "
    "Tensor? sample_scale, float eps, str activation, float negative_slope, bool pool) "
    "-> (Tensor out, Tensor pooled, Tensor mean, Tensor var)",
    _fake,
    _TRITON,
)
_BACKWARD_OP = backend.define(
    "batch_norm_act_backward",
    "(Tensor grad_out, Tensor? grad_pooled, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor var, Tensor? sample_scale, bool batch_statistics, float eps, str activation, "
    "float negative_slope) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    _TRITON,
)
backend.register_autograd("batch_norm_act", _backward, _setup_context)
backend.refuse_double_backward("batch_norm_act_backward")
