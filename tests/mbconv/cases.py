"""Inputs of depthwise_conv_bn_act that the tests share."""

from typing import NamedTuple

import torch

from dlkernels.mbconv.op import Norm
from dlkernels.mbconv.reference import ConvNorm, Excitation

# (N, C, H, W), K, stride, padding and the reason why the case is here.
CASES = {
    "3x3": ((2, 37, 9, 11), 3, 1, 1),
    "3x3 stride 2": ((2, 37, 9, 11), 3, 2, 1),
    "5x5": ((3, 16, 14, 14), 5, 1, 2),
    "5x5 stride 2": ((2, 20, 17, 34), 5, 2, 2),
    "7x7": ((2, 5, 12, 7), 7, 1, 3),
    "7x7 stride 2": ((2, 5, 12, 7), 7, 2, 3),
    "same as TensorFlow": ((2, 33, 8, 8), 3, 2, (0, 1, 0, 1)),
    "rows that no output reads": ((2, 9, 8, 10), 3, 2, (2, 0, 0, 0)),
    "fewer rows than a block": ((4, 48, 3, 2), 5, 1, 2),
    "long rows": ((1, 3, 40, 131), 3, 1, 1),
    "bands of rows": ((1, 18, 32, 131), 7, 1, 3),
    "bands of rows, stride 2": ((1, 18, 29, 140), 5, 2, 2),
}
NAMES = ("x", "weight", "norm.weight", "norm.bias", "input_norm.weight", "input_norm.bias")


def make_leaves(shape, size, dtype, memory_format, device="cpu"):
    """The tensors of NAMES, then mean and variance for each norm."""
    c = shape[1]
    x = 1.5 * torch.randn(shape) + torch.randn(c, 1, 1)
    values = [torch.randn(c) for _ in range(4)]
    statistics = [torch.randn(c), torch.rand(c) + 0.5, torch.randn(c), torch.rand(c) + 0.5]
    tensors = [x.to(dtype), torch.randn(c, 1, size, size) / size, *values, *statistics]
    tensors = [tensor.to(device) for tensor in tensors]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    return tensors


def as_leaves(tensors, double=False):
    leaves = [t.double() if double else t.clone() for t in tensors]
    return [leaf.requires_grad_() if i < 6 else leaf for i, leaf in enumerate(leaves)]


def norms_of(leaves, evaluation, input_norm=True, activation="silu"):
    """norm and input_norm made of the leaves."""
    statistics = leaves[6:] if evaluation else [None] * 4
    norm = Norm(*leaves[2:4], *statistics[:2], 1e-3, activation)
    before = Norm(*leaves[4:6], *statistics[2:], 1e-5, activation)
    return norm, before if input_norm else None


class Block(NamedTuple):
    """A whole block.

    Attributes:
        shape: (N, I, H, W) of the input.
        hidden: channels of the depthwise convolution; those of the input for no expansion.
        out: channels of the output.
        kernel: size of the depthwise convolution.
        stride: of it.
        squeeze: hidden channels of squeeze-and-excitation, 0 for none.
        padding: of the depthwise convolution.
    """

    shape: tuple[int, int, int, int]
    hidden: int
    out: int
    kernel: int
    stride: int
    squeeze: int
    padding: int | tuple[int, int, int, int]

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.shape[1] == self.out


BLOCKS = {
    "residual": Block((3, 24, 13, 17), 144, 24, 5, 1, 6, 2),
    "stride 2": Block((2, 16, 20, 22), 96, 24, 3, 2, 4, 1),
    "no expansion": Block((2, 32, 9, 30), 32, 16, 3, 1, 8, 1),
    "no expansion, stride 2": Block((1, 20, 9, 30), 20, 20, 5, 2, 0, 2),
    "odd channels": Block((2, 17, 8, 5), 33, 41, 3, 1, 5, 1),
    "few channels": Block((1, 3, 7, 7), 5, 2, 3, 1, 1, 1),
    "7x7": Block((1, 8, 12, 9), 40, 8, 7, 1, 0, 3),
    "same as TensorFlow": Block((1, 24, 30, 28), 72, 40, 5, 2, 6, (1, 2, 1, 2)),
    "columns that no output reads": Block((1, 9, 12, 14), 36, 9, 3, 2, 3, (2, 0, 2, 0)),
    "one row": Block((5, 40, 1, 3), 120, 40, 3, 1, 10, 1),
    "small maps": Block((8, 48, 7, 7), 288, 48, 5, 1, 12, 2),
    "bands of rows": Block((1, 16, 61, 130), 32, 24, 3, 1, 4, 1),
    "samples apart": Block((5, 8, 96, 96), 48, 8, 3, 1, 2, 1),
}


def block_arguments(block, dtype, memory_format, activation="silu", gate="sigmoid"):
    """The arguments of mbconv_block; weights in the dtype, norms in float32."""

    def layer(*shape, activation):
        count = shape[0]
        weight = torch.randn(shape) / (torch.Size(shape[1:]).numel() ** 0.5)
        statistics = (torch.randn(count) / 2, torch.rand(count) + 0.5)
        norm = Norm(torch.rand(count) + 0.5, torch.randn(count), *statistics, 1e-3, activation)
        return ConvNorm(weight.to(dtype), norm)

    channels, hidden, size = block.shape[1], block.hidden, block.kernel
    arguments = {
        "x": torch.randn(block.shape).to(dtype).contiguous(memory_format=memory_format),
        "depthwise": layer(hidden, 1, size, size, activation=activation),
        "project": layer(block.out, hidden, activation="identity"),
        "stride": block.stride,
        "padding": block.padding,
        "residual": block.residual,
    }
    if hidden != channels:
        arguments["expand"] = layer(hidden, channels, activation=activation)
    if block.squeeze:
        arguments["excitation"] = Excitation(
            torch.randn(block.squeeze, hidden).to(dtype) / hidden**0.5,
            torch.randn(block.squeeze).to(dtype),
            torch.randn(hidden, block.squeeze).to(dtype),
            torch.randn(hidden).to(dtype),
            "silu" if activation == "silu" else "relu",
            gate,
        )
    return arguments
