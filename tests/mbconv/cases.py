"""Inputs of depthwise_conv_bn_act that the tests share."""

import torch

from dlkernels.mbconv.op import Norm

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
