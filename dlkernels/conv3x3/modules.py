"""``nn.Conv2d``, a drop-in for PyTorch's that runs the op where it pays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlkernels import backend
from dlkernels.conv3x3.op import PADDINGS, conv3x3

# What the transforms of maps cost is won back by the products of at least so many channels, in and
# out, and what those of the weight cost by at least so many output pixels of all samples.
MIN_CHANNELS = 32
MIN_PIXELS = 1024
# The gradient of the weight transforms no weight, but more maps.
MIN_PIXELS_OF_WEIGHT_GRADIENT = 256
MIN_PRODUCTS_OF_WEIGHT_GRADIENT = 32 * 64


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, whose 3x3 convolutions of stride 1 run :func:`dlkernels.ops.conv3x3` on CPUs.

    Constructor, parameters and state-dict keys are those of ``nn.Conv2d``. Convolutions of another
    size, stride, dilation, groups or padding mode, float32 or not, on other devices, in an export,
    and those too small for it to pay are PyTorch's own, see :func:`pays`. So are those under
    autocast: bfloat16 and float16 have hardware of their own in PyTorch's convolution.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if fits(self) and pays(input, weight, padding_of(self)):
            return conv3x3(input, weight, bias, padding=padding_of(self))
        return super()._conv_forward(input, weight, bias)


def fits(conv: nn.Conv2d) -> bool:
    """Whether the convolution has the geometry that the op computes."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and padding_of(conv) in PADDINGS
    )


def padding_of(conv: nn.Conv2d) -> int:
    """The padding on each side of a 3x3 convolution; -1 where sides differ."""
    if isinstance(conv.padding, str):
        return {"same": 1, "valid": 0}[conv.padding]
    rows, columns = conv.padding
    return rows if rows == columns else -1


def pays(x: object, weight: Tensor, padding: int = 1) -> bool:
    """Whether the op can run, and is faster than PyTorch's convolution.

    That is so for float32 maps on a CPU that give enough output pixels, of enough channels; what
    counts under autocast is the dtype in which the convolution will run.

    Args:
        x: the input; maps [N, C, H, W], or else it does not pay.
        weight: [O, C, 3, 3].
        padding: as in :func:`dlkernels.ops.conv3x3`.
    """
    return _output_pixels(x, weight, padding) >= MIN_PIXELS and _has_channels(weight)


def weight_gradient_pays(x: object, weight: Tensor, padding: int = 1) -> bool:
    """The same for the gradient of the weight alone."""
    enough = weight.shape[0] * weight.shape[1] >= MIN_PRODUCTS_OF_WEIGHT_GRADIENT
    pixels = _output_pixels(x, weight, padding)
    return pixels >= MIN_PIXELS_OF_WEIGHT_GRADIENT and enough and _has_channels(weight)


def _has_channels(weight: Tensor) -> bool:
    return min(weight.shape[:2]) >= MIN_CHANNELS


def _output_pixels(x: object, weight: Tensor, padding: int) -> int:
    """Of all samples; none where there is no kernel, or PyTorch will raise."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not _has_kernel(x, weight):
        return 0
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    has_outputs = min(x.shape[2:]) > 0 and min(height, width) > 0
    return x.shape[0] * height * width if has_outputs and x.shape[1] == weight.shape[1] else 0


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and backend.has_kernel("conv3x3", x)
        and not torch.is_autocast_enabled("cpu")
    )
