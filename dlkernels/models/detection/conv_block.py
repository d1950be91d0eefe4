"""The convolution of YOLO networks, with the batch norm and activation after it."""

from __future__ import annotations

from torch import Tensor, nn

from dlkernels.batch_norm_act.modules import BatchNormAct2d

LEAKY_SLOPE = 0.1


class ConvBlock(nn.Module):
    """Convolution without bias, batch norm and activation.

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
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = BatchNormAct2d(out_channels, activation=activation, negative_slope=LEAKY_SLOPE)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Maps [N, in_channels, H, W]; ``residual`` is added after the activation."""
        return self.norm(self.conv(x), residual)


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

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, channels, H, W]."""
        return self.expand(self.reduce(x), residual=x)


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
