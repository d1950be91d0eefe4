"""The op ``dlkernels::pointwise_conv``: public function, fake kernels, gradient, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlkernels import backend
from dlkernels.batch_norm_act.op import as_float, batch_norm_act, check_norm
from dlkernels.batch_norm_act.reference import NORM_ACTIVATIONS, Norm
from dlkernels.checks import (
    check_device,
    check_like,
    check_maps,
    check_shape,
    check_tensor,
    describe,
)
from dlkernels.memory_format import empty_maps, new_maps
from dlkernels.pointwise_conv import reference
from dlkernels.watch import watched


class Source(NamedTuple):
    """What a convolution's input was made of.

    Attributes:
        raw: maps [N, C, H, W].
        norm: with the statistics that it normalised ``raw`` with; its result is the input.
    """

    raw: Tensor
    norm: Norm


@watched
def pointwise_conv(
    x: Tensor, weight: Tensor, gate: Tensor | None = None, source: Source | None = None
) -> Tensor:
    r"""1x1 convolution, with the gate of squeeze-and-excitation folded in.

    .. code-block:: text

        out[n, o] = sum over c of weight[o, c] * gate[n, c] * x[n, c]       [N, O, H, W]

    The projection of an inverted residual block: Sandler et al., "MobileNetV2" (2018), table 1, and
    Tan and Le, "EfficientNet" (2019), section 4. Gated maps are never stored.

    float32, bfloat16 and float16 run in the CPU kernels with float32 accumulation; contiguous and
    channels_last maps are both read as they are. float64 and other devices run PyTorch's matrix
    products (cuBLAS on GPUs). Under autocast x and weight are cast to the autocast dtype.

    Saved for backward: ``x``, ``weight`` and ``gate``; with a ``source`` that in place of ``x``,
    which backward computes again, tile by tile in the CPU kernels. The batch norm before the
    convolution keeps the same ``raw`` anyway. float64 and the reference backend save ``x`` with a
    source, too, since they have second derivatives, which otherwise are refused.

    Args:
        x: maps [N, C, H, W].
        weight: [O, C] or [O, C, 1, 1], at least one of each; dtype and device of ``x``.
        gate: factors [N, C] of the input's channels, of float32 or the dtype of ``x``, or None.
        source: what ``x`` was made of, or None to save ``x`` itself. It gets no gradient: what made
            ``x`` of it has one of its own.

    Returns:
        Maps [N, O, H, W] in the dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: shapes do not fit, devices differ, or the source's norm has no statistics.
    """
    check_maps("x", x)
    _check_weight(weight, x)
    if gate is not None:
        _check_gate(gate, x)
    if source is not None:
        _check_source(source, x)
    matrix = weight.flatten(1)
    # The plain formula, which has second derivatives, saves x.
    if source is not None and backend.has_kernel("batch_norm_act", x):
        x, matrix = (_as_in_autocast(maps) for maps in (x, matrix))
        return _OfSource.apply(x, matrix, gate, source.raw.detach(), source.norm)
    return _forward(x, matrix, gate)


def _check_weight(weight: Any, x: Tensor) -> None:
    check_like("weight", weight, "x", x)
    channels = x.shape[1]
    fits = weight.dim() in (2, 4) and weight.shape[1] == channels
    if not fits or min(weight.shape[:2]) == 0 or any(size != 1 for size in weight.shape[2:]):
        raise ValueError(
            f"weight must have shape [O, {channels}] or [O, {channels}, 1, 1] for x with "
            f"{channels} channels, at least one of each, but is {describe(weight)}"
        )


def _check_gate(gate: Any, x: Tensor) -> None:
    check_tensor("gate", gate)
    check_device("gate", gate, "x", x)
    check_shape("gate", gate, x.shape[:2], "one factor per sample and channel")
    if gate.dtype not in (torch.float32, x.dtype):
        raise TypeError(
            f"gate must be float32 or have the dtype of x, {x.dtype}, but is {gate.dtype}"
        )


def _check_source(source: Any, x: Tensor) -> None:
    if not isinstance(source, Source):
        raise TypeError(f"source must be a Source, but is {type(source).__name__}")
    check_like("source.raw", source.raw, "x", x)
    check_shape("source.raw", source.raw, x.shape, "the shape of x")
    check_norm("source.norm", source.norm, x, x.shape[1], NORM_ACTIVATIONS)
    if source.norm.mean is None:
        raise ValueError("source.norm must have a mean and a var, but has None")


def _as_in_autocast(tensor: Tensor) -> Tensor:
    """In the dtype to which the op casts it, so that its gradient is cast back."""
    device = tensor.device.type
    cast = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device)) if cast else tensor


def _forward(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    if backend.has_kernel("pointwise_conv", x):
        return _OP(x, weight, as_float(gate))
    return reference.pointwise_conv(x, weight, None if gate is None else gate.to(x.dtype))


class _OfSource(torch.autograd.Function):
    """The convolution that keeps what its input was made of."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gate: Tensor | None, raw: Tensor, norm: Norm
    ) -> Tensor:
        """As of the op."""
        ctx.save_for_backward(weight, gate, raw, *norm[:4])
        ctx.options = norm.eps, norm.activation
        return _forward(x, weight, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and gate."""
        weight, gate, raw, *values = ctx.saved_tensors
        norm = Norm(*values, *ctx.options)
        raw = raw.to(weight.dtype)
        return *_gradients(grad, raw, weight, gate, norm, ctx.needs_input_grad[:3]), None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    norm: Norm | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, weight and gate; with a norm, x is what that made the input of."""
    grads: Sequence[Tensor | None]
    if backend.has_kernel("pointwise_conv", x):
        values = [as_float(value) for value in (norm or Norm())[:4]]
        options = (1e-5, "identity") if norm is None else norm[4:]
        grads = _BACKWARD_OP(grad, x, weight, as_float(gate), *values, *options, list(needs))
    else:
        if norm is not None:
            x = batch_norm_act(x, *norm[:4], eps=norm.eps, activation=norm.activation).out
        grads = reference.gradients(grad, x, weight, None if gate is None else gate.to(x.dtype))
    results = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if gate is not None and results[2] is not None:
        results[2] = results[2].to(gate.dtype)
    return results


def _fake(x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    return new_maps(x, (x.shape[0], weight.shape[0], *x.shape[2:]))


def _fake_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_mean: Tensor | None,
    norm_var: Tensor | None,
    eps: float,
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    samples = x.shape[0] if needs[2] and gate is not None else 0
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (
        empty_maps(x) if needs[0] else x.new_empty((0,)),
        grad_weight if needs[1] else weight.new_empty((0,)),
        x.new_empty((samples, x.shape[1]), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 3
    x, weight, gate = ctx.saved_tensors
    return tuple(_gradients(grad_out, x, weight, gate, None, ctx.needs_input_grad))


_OP = backend.define("pointwise_conv", "(Tensor x, Tensor weight, Tensor? gate) -> Tensor", _fake)
_BACKWARD_OP = backend.define(
    "pointwise_conv_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? gate, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor? norm_mean, Tensor? norm_var, float eps, str activation, "
    "bool[3] needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_gate)",
    _fake_backward,
)
backend.register_autograd("pointwise_conv", _backward, _setup_context)
backend.refuse_double_backward("pointwise_conv_backward")
backend.register_autocast("pointwise_conv", ("x", "weight"))
