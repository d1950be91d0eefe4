"""Convolutions that compute their input again in backward instead of saving it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels import backend
from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.batch_norm_act.reference import Norm
from dlkernels.conv3x3 import modules as conv3x3
from dlkernels.conv3x3.op import conv3x3_gradients
from dlkernels.residual_sum.op import channel_products


class Geometry(NamedTuple):
    """What a convolution does beside its weight."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Recipe(NamedTuple):
    """How the input of a convolution came about.

    Attributes:
        raw: the maps that were normalised.
        norm: with the statistics that were used.
        gate: factors [N, C] of the normalised and activated maps, or None.
    """

    raw: Tensor
    norm: Norm
    gate: Tensor | None = None


def convolve(conv: nn.Conv2d, x: Tensor, recipe: Recipe | None = None) -> Tensor:
    """The convolution of ``x``, times the gate where there is one; without bias.

    Args:
        conv: with zeros as padding.
        x: maps [N, C, H, W].
        recipe: of ``x``; backward then keeps ``recipe.raw`` in place of ``x``.

    Returns:
        Maps in the dtype of ``x``.
    """
    weight = conv.weight.to(x.dtype)
    geometry = Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
    if recipe is None or not _recomputes(x):
        gate = None if recipe is None else recipe.gate
        return _convolution(_gated(x, gate), weight, geometry)
    return _Recomputed.apply(x, weight, recipe.gate, recipe.raw, recipe.norm, geometry)


def _recomputes(x: Tensor) -> bool:
    """Not where the plain formula serves: autograd differentiates that, twice if need be."""
    return torch.is_grad_enabled() and backend.select("batch_norm_act", x) != "reference"


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate[:, :, None, None]


class _Recomputed(torch.autograd.Function):
    """A convolution of gated ``x``, what ``norm`` made of ``raw``; backward keeps ``raw`` alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate: Tensor | None,
        raw: Tensor,
        norm: Norm,
        geometry: Geometry,
    ) -> Tensor:
        """The convolution."""
        ctx.save_for_backward(weight, gate, raw, *norm[:4])
        ctx.options = norm.eps, norm.activation, geometry
        return _convolution(_gated(x, gate), weight, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and gate."""
        weight, gate, raw, *values = ctx.saved_tensors
        eps, activation, geometry = ctx.options
        x = raw  # but for its values, all that the gradient of x needs
        if any(ctx.needs_input_grad[1:3]):
            x = batch_norm_act(raw, *values, eps=eps, activation=activation).out
        needs = [any(ctx.needs_input_grad[0:3:2]), ctx.needs_input_grad[1]]
        grad_x, grad_weight = _gradients(grad, _gated(x, gate), weight, geometry, needs)
        grad_gate = None
        if gate is not None and grad_x is not None:
            grad_gate = channel_products(grad_x, x).to(gate.dtype)
            grad_x = _gated(grad_x, gate)
        return grad_x, grad_weight, grad_gate, None, None, None


# ---- the convolutions themselves ----------------------------------------------------------------


def _is_3x3(weight: Tensor, geometry: Geometry) -> bool:
    one = (1, 1)
    padding = geometry.padding
    fits = geometry == Geometry(one, padding, one, 1) and padding in ((0, 0), one, (2, 2))
    return weight.shape[2:] == (3, 3) and fits


def _convolution(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    padding = geometry.padding[0]
    if _is_3x3(weight, geometry) and conv3x3.pays(x, weight, padding):
        return conv3x3.conv3x3(x, weight, padding=padding)
    return F.conv2d(x, weight, None, *geometry)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of ``x`` and ``weight``, where they are needed."""
    padding = geometry.padding[0]
    grads: tuple[Tensor, ...]
    if _is_3x3(weight, geometry) and conv3x3.pays(x, weight, padding):
        grads = conv3x3_gradients(grad, x, weight, padding, needs)
    else:
        grads = torch.ops.aten.convolution_backward(
            grad,
            x,
            weight,
            None,
            *geometry[:3],
            False,
            [0, 0],
            geometry.groups,
            [*needs, False],
        )
    return (grads[0] if needs[0] else None, grads[1] if needs[1] else None)
