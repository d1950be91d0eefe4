"""The op ``dlkernels::squeeze_excite``: public function, fake kernels, gradient, autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.checks import check_choice, check_like, check_maps, check_shape, describe
from dlkernels.memory_format import empty_maps
from dlkernels.squeeze_excite import reference
from dlkernels.watch import watched

_TRITON = "dlkernels.squeeze_excite.triton"


@watched
def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    shortcut: Tensor | None = None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    output_activation: str = "identity",
) -> Tensor:
    r"""Squeeze-and-excitation, optionally with the residual sum and ReLU that follow it.

    .. code-block:: text

        pooled = mean of x over H and W                                  [N, C]
        hidden = reduce_weight pooled + reduce_bias                      [N, R]
        scale  = gate(expand_weight activation(hidden) + expand_bias)    [N, C]
        out    = output_activation(x * scale + shortcut)                 [N, C, H, W]

    Hu, Shen and Sun, "Squeeze-and-Excitation Networks" (2018), section 3, equations 2 to 4;
    SE-ResNet's sum and ReLU from its figure 3.

    float32, bfloat16 and float16 run in the fused kernels with float32 accumulation, float64 in
    the reference formula. Contiguous and channels_last maps are both read as they are; the result
    has the memory format of ``x``. Under autocast all tensors are cast to the autocast dtype.

    Saved for backward: ``x``, ``pooled``, ``hidden`` and ``scale`` (the last three in float32),
    the two weights, and ``out`` if ``output_activation`` is ``"relu"``.

    Args:
        x: maps [N, C, H, W].
        reduce_weight: [R, C], or [R, C, 1, 1] as of a 1x1 convolution; dtype and device of ``x``.
        reduce_bias: [R] or None.
        expand_weight: [C, R] or [C, R, 1, 1].
        expand_bias: [C] or None.
        shortcut: added to the scaled maps; shape of ``x``, or None.
        activation: between the linear layers, ``"relu"`` or ``"silu"``.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"`` (clamp(z + 3, 0, 6) / 6).
        output_activation: ``"identity"`` or ``"relu"``.

    Returns:
        Maps of the shape, dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: shapes do not fit, devices differ, or a name is unknown.
    """
    check_maps("x", x)
    channels = x.shape[1]
    _check_weight("reduce_weight", reduce_weight, x, (None, channels))
    squeezed = reduce_weight.shape[0]
    _check_weight("expand_weight", expand_weight, x, (channels, squeezed))
    _check_bias("reduce_bias", reduce_bias, x, squeezed)
    _check_bias("expand_bias", expand_bias, x, channels)
    if shortcut is not None:
        check_like("shortcut", shortcut, "x", x)
        check_shape("shortcut", shortcut, x.shape, "the shape of x")
    check_choice("activation", activation, reference.ACTIVATIONS)
    check_choice("gate", gate, reference.GATES)
    check_choice("output_activation", output_activation, reference.OUTPUT_ACTIVATIONS)

    arguments = (
        x,
        reduce_weight.flatten(1),
        reduce_bias,
        expand_weight.flatten(1),
        expand_bias,
        shortcut,
        activation,
        gate,
        output_activation,
    )
    if backend.select("squeeze_excite", x) == "reference":
        return reference.squeeze_excite(*arguments)
    return _OP(*arguments)[0]


def _check_weight(name: str, weight: Any, x: Tensor, shape: tuple[int | None, int]) -> None:
    check_like(name, weight, "x", x)
    rows, columns = shape
    fits = (
        weight.dim() in (2, 4)
        and weight.shape[1] == columns
        and (rows is None or weight.shape[0] == rows)
        and all(size == 1 for size in weight.shape[2:])
    )
    if not fits:
        first = "R" if rows is None else rows
        raise ValueError(
            f"{name} must have shape [{first}, {columns}] or [{first}, {columns}, 1, 1] for x with "
            f"{x.shape[1]} channels, but is {describe(weight)}"
        )


def _check_bias(name: str, bias: Any, x: Tensor, size: int) -> None:
    if bias is not None:
        check_like(name, bias, "x", x)
        check_shape(name, bias, [size], "one value per output of its layer")


def _fake(
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
    samples, channels = x.shape[:2]
    pooled = x.new_empty((samples, channels), dtype=torch.float32)
    hidden = x.new_empty((samples, reduce_weight.shape[0]), dtype=torch.float32)
    return empty_maps(x), pooled, hidden, torch.empty_like(pooled)


def _fake_backward(
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
    squeezed, channels = reduce_weight.shape
    return (
        empty_maps(x),
        x.new_empty((squeezed, channels)),
        x.new_empty((squeezed,)),
        x.new_empty((channels, squeezed)),
        x.new_empty((channels,)),
        empty_maps(x) if shortcut_grad else x.new_empty((0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, reduce_weight, _, expand_weight, _, _, activation, gate, output_activation = inputs
    out, pooled, hidden, scale = output
    ctx.mark_non_differentiable(pooled, hidden, scale)
    ctx.set_materialize_grads(False)
    masks = output_activation == "relu"
    ctx.save_for_backward(
        x, reduce_weight, expand_weight, out if masks else None, pooled, hidden, scale
    )
    ctx.names = activation, gate


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    x, reduce_weight, expand_weight, out, pooled, hidden, scale = ctx.saved_tensors
    wants_shortcut = ctx.needs_input_grad[5]
    masks = out is not None
    grads = _BACKWARD_OP(
        grad_out,
        x,
        reduce_weight,
        expand_weight,
        out,
        pooled,
        hidden,
        scale,
        *ctx.names,
        wants_shortcut and masks,
    )
    grad_shortcut = (grads[5] if masks else grad_out) if wants_shortcut else None
    wanted = (
        grad if needed else None
        for grad, needed in zip(grads[:5], ctx.needs_input_grad[:5], strict=True)
    )
    return *wanted, grad_shortcut, None, None, None


_OP = backend.define(
    "squeeze_excite",
    "(Tensor x, Tensor reduce_weight, Tensor? reduce_bias, Tensor expand_weight, "
    "Tensor? expand_bias, Tensor? shortcut, str activation, str gate, str output_activation) "
    "-> (Tensor out, Tensor pooled, Tensor hidden, Tensor scale)",
    _fake,
    _TRITON,
)
_BACKWARD_OP = backend.define(
    "squeeze_excite_backward",
    "(Tensor grad_out, Tensor x, Tensor reduce_weight, Tensor expand_weight, Tensor? out, "
    "Tensor pooled, Tensor hidden, Tensor scale, str activation, str gate, bool shortcut_grad) "
    "-> (Tensor grad_x, Tensor grad_reduce_weight, Tensor grad_reduce_bias, "
    "Tensor grad_expand_weight, Tensor grad_expand_bias, Tensor grad_shortcut)",
    _fake_backward,
    _TRITON,
)
backend.register_autograd("squeeze_excite", _backward, _setup_context)
backend.refuse_double_backward("squeeze_excite_backward")
backend.register_autocast("squeeze_excite")
