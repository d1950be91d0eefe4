"""The convolution of YOLO networks, with the batch norm and activation after it.

In training a convolution keeps its raw result only. What batch norm and activation make of it is
computed again in backward, for the weight's gradient of every convolution that read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels.batch_norm_act.modules import BatchNormAct2d
from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.conv3x3.modules import Conv2d, fits, padding_of, pays, weight_gradient_pays
from dlkernels.conv3x3.op import conv3x3_gradients
from dlkernels.memory_format import columns

LEAKY_SLOPE = 0.1
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


# ---- maps that can be computed again ------------------------------------------------------------


class Source(NamedTuple):
    """What some channels of activated maps are computed from.

    Attributes:
        raw: result of a convolution, [N, C, H, W].
        values: weight, bias, mean and variance of the batch norm, [C] each.
        eps: of the batch norm.
        activation: a name that :func:`dlkernels.ops.batch_norm_act` knows.
        enlarged: factor of the nearest upsampling afterwards.
    """

    raw: Tensor
    values: tuple[Tensor, ...]
    eps: float
    activation: str
    enlarged: int = 1


class Maps(NamedTuple):
    """Maps [N, C, H, W], and what they are computed from, channels after channels.

    Attributes:
        value: the maps.
        sources: empty where the maps cannot be computed again, so that backward must keep them.
    """

    value: Tensor
    sources: tuple[Source, ...] = ()


def concatenated(*parts: Maps) -> Maps:
    """The channels of all parts, one part after the other."""
    known = all(part.sources for part in parts)
    sources = tuple(source for part in parts for source in part.sources) if known else ()
    return Maps(torch.cat([part.value for part in parts], 1), sources)


def enlarged(maps: Maps, factor: int = 2) -> Maps:
    """Nearest upsampling in height and width."""
    sources = (s._replace(enlarged=s.enlarged * factor) for s in maps.sources)
    return Maps(F.interpolate(maps.value, scale_factor=factor), tuple(sources))


def convolved(conv: nn.Conv2d, maps: Maps) -> Tensor:
    """``conv(maps.value)``, whose backward computes the input again where it can."""
    if not torch.is_grad_enabled() or not conv.weight.requires_grad:
        return conv(maps.value)
    tensors = [tensor for s in maps.sources for tensor in (s.raw, *s.values)]
    options = [(s.eps, s.activation, s.enlarged) for s in maps.sources]
    return _Convolution.apply(maps.value, conv.weight, conv.bias, conv, options, *tensors)


class _Convolution(torch.autograd.Function):
    """A convolution that keeps the sources of its input, where there are any, and not the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv: nn.Conv2d,
        options: Sequence[tuple[float, str, int]],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, *(tensors or (x,)))
        ctx.conv = conv
        ctx.options = options
        return conv._conv_forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        x = _computed_again(tensors, ctx.options) if ctx.options else tensors[0]
        grad = grad.to(x.dtype)
        grads = _gradients(ctx.conv, grad, x, weight, ctx.needs_input_grad[:3])
        grad_x, *found = (
            g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)
        )
        found = [g if g is None else g.to(weight.dtype) for g in found]
        return grad_x, *found, None, None, *(None,) * (len(ctx.needs_input_grad) - 5)


def _gradients(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, weight and bias, those that are needed."""
    padding = padding_of(conv)
    filtered = [
        needs[0] and fits(conv) and pays(x, weight, padding),
        needs[1] and fits(conv) and weight_gradient_pays(x, weight, padding),
    ]
    rest = [need and not done for need, done in zip(needs, [*filtered, False], strict=True)]
    grads: list[Tensor | None] = [None] * 3
    if any(rest):
        grads = _torch_gradients(conv, grad, x, weight, rest)
    if any(filtered):
        found = conv3x3_gradients(grad, x, weight, padding, filtered)
        for index in (0, 1):
            grads[index] = found[index] if filtered[index] else grads[index]
    return grads


def _torch_gradients(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The same from PyTorch's convolutions."""
    needs_x, *needs_rest = needs

    def gradients(
        grad: Tensor, x: Tensor, memory_format: torch.memory_format, *needs: bool
    ) -> Sequence[Tensor | None]:
        like = weight.to(x.dtype, memory_format=memory_format)
        sizes = [weight.shape[0]]
        geometry = list(conv.stride), list(conv.padding), [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(grad, x, like, sizes, *geometry, needs)

    if _contiguous_is_faster(weight, x):
        like_x = x.new_empty(()).expand_as(x)
        x = x.contiguous()
        _, *found = gradients(grad.contiguous(), x, torch.contiguous_format, False, *needs_rest)
        del x  # before the input's gradient, which is as large, is made
        grad_x, *_ = gradients(grad, like_x, torch.channels_last, needs_x, False, False)
        return [grad_x, *found]
    if needs[1] and _is_matrix_product(weight, x, conv):
        grad_x, _, grad_bias = gradients(grad, x, torch.preserve_format, needs_x, False, needs[2])
        return [grad_x, (columns(grad) @ columns(x).t()).view_as(weight), grad_bias]
    return list(gradients(grad, x, torch.preserve_format, *needs))


def _is_matrix_product(weight: Tensor, x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether the weight's gradient is better a product of matrices than oneDNN's.

    Which is up to six times slower on small maps of many channels.
    """
    return (
        x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and (*weight.shape[2:], *conv.stride, *conv.padding) == (1, 1, 1, 1, 0, 0)
    )


def _contiguous_is_faster(weight: Tensor, x: Tensor) -> bool:
    """Whether copies of channels_last maps pay for the weight's gradient.

    Where they have many pixels, oneDNN finds it several times faster in contiguous maps with AVX2;
    with AVX-512 it is as fast in channels_last maps, and the copies would cost a third of backward.
    """
    return (
        x.device.type == "cpu"
        and not _HAS_AVX512
        and min(weight.shape[1:3]) > 1
        and x.shape[2] * x.shape[3] >= 20 * 20
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _computed_again(tensors: Sequence[Tensor], options: Sequence[Any]) -> Tensor:
    parts = []
    for index, (eps, activation, factor) in enumerate(options):
        raw, *values = tensors[5 * index : 5 * index + 5]
        part = batch_norm_act(
            raw, *values, eps=eps, activation=activation, negative_slope=LEAKY_SLOPE
        ).out
        parts.append(part if factor == 1 else F.interpolate(part, scale_factor=factor))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# ---- modules ------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm and activation.

    Saved for backward: the convolution's raw result, and the input where it has no sources.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel: side of the kernel; the input is padded by half of it.
        stride: of the convolution.
        activation: a name that :func:`dlkernels.ops.batch_norm_act` knows; the slope of
            ``"leaky_relu"`` is 0.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        activation: str = "mish",
    ):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = BatchNormAct2d(out_channels, activation=activation, negative_slope=LEAKY_SLOPE)

    def forward(self, x: Maps, residual: Tensor | None = None) -> Maps:
        """Maps of ``in_channels``; ``residual`` is added after the activation."""
        norm = self.norm
        raw = convolved(self.conv, x)
        if not isinstance(norm, BatchNormAct2d):  # a norm put in its place
            return Maps(norm(raw, residual))
        result = norm.apply_to(raw, residual)
        if residual is not None:
            return Maps(result.out)
        values = (norm.weight, norm.bias, result.mean, result.var)
        return Maps(result.out, (Source(raw, values, norm.eps, norm.activation),))


class Residual(nn.Module):
    """A 1x1 and a 3x3 convolution, and the sum with the input.

    Args:
        channels: of the input and the output.
        hidden: between the convolutions.
        activation: see :class:`ConvBlock`.
    """

    def __init__(self, channels: int, hidden: int, activation: str = "mish"):
        super().__init__()
        self.reduce = ConvBlock(channels, hidden, 1, activation=activation)
        self.expand = ConvBlock(hidden, channels, 3, activation=activation)

    def forward(self, x: Maps) -> Maps:
        """Maps of ``channels``."""
        return self.expand(self.reduce(x), residual=x.value)


class Output(nn.Module):
    """A 3x3 block that doubles the channels, and the last 1x1 convolution of a level.

    Args:
        channels: of the input.
        last: the convolution.
    """

    def __init__(self, channels: int, last: nn.Conv2d):
        super().__init__()
        self.block = ConvBlock(channels, 2 * channels, 3, activation="leaky_relu")
        self.last = last

    def forward(self, x: Maps) -> Tensor:
        """Maps of ``channels`` to raw outputs."""
        return convolved(self.last, self.block(x))


def scaled(channels: int, width: float) -> int:
    """A number of channels times ``width``, as a multiple of 8 and at least 8."""
    return max(8, round(channels * width / 8) * 8)


def alternating(in_channels: int, hidden: int, count: int, activation: str) -> nn.Sequential:
    """Convolutions 1x1 to ``hidden`` channels and 3x3 to twice as many, in turn."""
    blocks = []
    for index in range(count):
        out, kernel = (hidden, 1) if index % 2 == 0 else (2 * hidden, 3)
        blocks.append(ConvBlock(in_channels, out, kernel, activation=activation))
        in_channels = out
    return nn.Sequential(*blocks)
