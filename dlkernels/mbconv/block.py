"""The op ``dlkernels::mbconv_block``: a whole inverted residual block in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.batch_norm_act.op import as_float, check_norm
from dlkernels.checks import check_flag, check_maps, check_parameter, describe
from dlkernels.excitation import Excitation, check_excitation
from dlkernels.mbconv import reference
from dlkernels.mbconv.op import check_geometry, sides_of
from dlkernels.mbconv.reference import ConvNorm
from dlkernels.memory_format import new_maps
from dlkernels.watch import watched


@watched
def mbconv_block(
    x: Tensor,
    depthwise: ConvNorm,
    project: ConvNorm,
    expand: ConvNorm | None = None,
    excitation: Excitation | None = None,
    *,
    stride: int = 1,
    padding: int | Sequence[int] = 0,
    residual: bool = False,
) -> Tensor:
    r"""The inverted residual block in evaluation, without a gradient.

    .. code-block:: text

        hidden = depthwise(expand(x))                                            [N, C, H', W']
        out    = project(gate(mean of hidden over H' and W') * hidden) (+ x)     [N, O, H', W']

    where each of the three is a convolution, batch norm with given statistics and an activation:
    Sandler et al., "MobileNetV2" (2018), figure 3; Tan and Le, "EfficientNet" (2019), section 4.

    The CPU kernel folds the norms into weights and biases at each call, so that nothing can be
    stale, and computes the expanded maps a few rows at a time: they never leave the caches. It
    takes float32, bfloat16 and float16 and accumulates in float32; contiguous and channels_last
    maps are both read as they are. Everything else runs the reference formula; on GPUs
    ``nn.MBConv`` composes the block of the family's other ops instead. Nothing is saved for
    backward.

    Args:
        x: maps [N, I, H, W].
        depthwise: weight [C, 1, K, K] with K = 3, 5 or 7.
        project: weight [O, C] of a 1x1 convolution; its norm has the activation ``"identity"``.
        expand: weight [C, I] of a 1x1 convolution, or None where C is I and nothing is expanded.
        excitation: squeeze-and-excitation before the projection, or None.
        stride: 1 or 2, of the depthwise convolution.
        padding: its zeros on each side, or on (left, right, top, bottom) as in ``F.pad``.
        residual: whether ``x`` is added, which needs an output of its shape.

    Returns:
        Maps [N, O, H', W'] in the dtype and memory format of ``x``.

    Raises:
        TypeError: an argument is no tensor, or its dtype is neither that of ``x`` nor float32.
        ValueError: shapes do not fit, devices differ, an option is unknown, a norm has no
            statistics, or a gradient would be recorded.
    """
    check_maps("x", x)
    check_flag("residual", residual)
    sides = sides_of(padding)
    _check_block(x, depthwise, project, expand, excitation, residual, stride, sides)
    run = run_kernel if backend.has_kernel("mbconv_block", x) else reference.mbconv_block
    return run(x, depthwise, project, expand, excitation, stride, sides, residual)


def run_kernel(
    x: Tensor,
    depthwise: ConvNorm,
    project: ConvNorm,
    expand: ConvNorm | None,
    excitation: Excitation | None,
    stride: int,
    padding: Sequence[int],
    residual: bool,
) -> Tensor:
    """:func:`mbconv_block` for arguments that fit, padding given for four sides."""
    no_norm = (None, None, None, None, None, 0.0, "identity")
    return _OP(
        x,
        *(_arguments(expand) if expand else no_norm),
        *_arguments(depthwise),
        *(as_float(value) for value in (excitation[:4] if excitation else [None] * 4)),
        *(excitation[4:] if excitation else ("silu", "sigmoid")),
        *_arguments(project)[:-1],
        stride,
        padding,
        residual,
    )


def _arguments(layer: ConvNorm) -> tuple[Any, ...]:
    weight, norm = layer
    return (weight.float(), *(as_float(value) for value in norm[:4]), norm.eps, norm.activation)


def _check_block(
    x: Tensor,
    depthwise: ConvNorm,
    project: ConvNorm,
    expand: ConvNorm | None,
    excitation: Excitation | None,
    residual: bool,
    stride: int,
    sides: list[int],
) -> None:
    layers = {"depthwise": depthwise, "project": project}
    for name, layer in {**layers, **({} if expand is None else {"expand": expand})}.items():
        if not isinstance(layer, ConvNorm):
            raise TypeError(f"{name} must be a ConvNorm, but is {type(layer).__name__}")
    channels = x.shape[1]
    if expand is not None:
        channels = _check_matrix("expand", expand, channels, x)
    height, width = check_geometry(x, channels, depthwise.weight, stride, sides, "depthwise.weight")
    _check_norm("depthwise", depthwise, channels, x)
    out_channels = _check_matrix("project", project, channels, x)
    if project.norm.activation != "identity":
        raise ValueError(
            f"project.norm.activation must be 'identity', but is {project.norm.activation!r}"
        )
    if excitation is not None:
        check_excitation(excitation, channels, x)
    if residual and (out_channels, height, width) != x.shape[1:]:
        raise ValueError(
            f"residual must be False where the output, {[out_channels, height, width]}, has not "
            f"the shape of x, {list(x.shape[1:])}"
        )
    tensors: dict[str, list[Tensor | None]] = {
        "x": [x],
        "depthwise": depthwise.tensors(),
        "project": project.tensors(),
    }
    tensors["expand"] = expand.tensors() if expand else []
    tensors["excitation"] = list(excitation[:4]) if excitation else []
    for name, values in tensors.items():
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in values):
            raise ValueError(
                f"{name} must not require a gradient, which mbconv_block has not: call it under "
                "torch.no_grad(), or the block as nn.MBConv"
            )


def _check_matrix(name: str, layer: ConvNorm, in_channels: int, x: Tensor) -> int:
    """Checks a 1x1 convolution and its norm; returns the channels of its output."""
    check_parameter(f"{name}.weight", layer.weight, x)
    if layer.weight.dim() != 2 or layer.weight.shape[1] != in_channels:
        raise ValueError(
            f"{name}.weight must have shape [channels, {in_channels}], but is "
            f"{describe(layer.weight)}"
        )
    _check_norm(name, layer, layer.weight.shape[0], x)
    return layer.weight.shape[0]


def _check_norm(name: str, layer: ConvNorm, channels: int, x: Tensor) -> None:
    check_norm(f"{name}.norm", layer.norm, x, channels, reference.ACTIVATIONS)
    if layer.norm.mean is None:
        raise ValueError(f"{name}.norm must have statistics, but its mean is None")


def _fake(x: Tensor, *args: Any) -> Tensor:
    depthwise_weight, project_weight, stride, padding = args[7], args[20], *args[26:28]
    left, right, top, bottom = padding
    size = depthwise_weight.shape[-1]
    height = (x.shape[2] + top + bottom - size) // stride + 1
    width = (x.shape[3] + left + right - size) // stride + 1
    return new_maps(x, (x.shape[0], project_weight.shape[0], height, width))


_NORM = "Tensor? {0}_norm_weight, Tensor? {0}_norm_bias, Tensor{1} {0}_mean, Tensor{1} {0}_var, "
_OP = backend.define(
    "mbconv_block",
    f"(Tensor x, Tensor? expand_weight, {_NORM.format('expand', '?')}float expand_eps, "
    f"str expand_activation, Tensor depthwise_weight, {_NORM.format('depthwise', '')}"
    "float depthwise_eps, str depthwise_activation, Tensor? squeeze_weight, "
    "Tensor? squeeze_bias, Tensor? excite_weight, Tensor? excite_bias, str squeeze_activation, "
    f"str gate, Tensor project_weight, {_NORM.format('project', '')}float project_eps, "
    "int stride, int[] padding, bool residual) -> Tensor",
    _fake,
)
