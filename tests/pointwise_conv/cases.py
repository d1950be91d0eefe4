"""Inputs of pointwise_conv that the tests share."""

import torch
import torch.nn.functional as F

from dlkernels import ops
from dlkernels.batch_norm_act.reference import NORM_ACTIVATIONS

# (N, C, H, W), O and the reason why the case is here. Tiles have up to 224 pixels, of several
# samples where there is no gate; blocks have 128 channels.
CASES = {
    "one pixel": ((2, 3, 1, 1), 5),
    "one channel": ((2, 1, 7, 5), 1),
    "one row": ((2, 9, 1, 11), 8),
    "one column": ((2, 9, 10, 1), 8),
    "small maps": ((3, 33, 7, 7), 40),
    "a sample fills most of a tile": ((2, 32, 14, 14), 32),
    "samples that end within tiles": ((31, 17, 3, 5), 20),
    "a sample fills a tile": ((2, 17, 14, 16), 33),
    "one pixel more": ((2, 17, 15, 15), 33),
    "tiles that span samples": ((3, 19, 1, 449), 35),
    "many inputs, few outputs": ((2, 300, 9, 9), 40),
    "few inputs, many outputs": ((2, 40, 9, 9), 300),
    "whole blocks": ((1, 128, 16, 15), 256),
    "whole blocks, fewer outputs": ((1, 256, 16, 15), 128),
    "just over whole blocks": ((1, 129, 5, 6), 257),
    "just over, fewer outputs": ((1, 257, 5, 6), 129),
}
NAMES = ("x", "weight", "gate")
ACTIVATIONS = NORM_ACTIVATIONS


def make_tensors(shape, out, dtype=torch.float32, memory_format=torch.contiguous_format):
    """The tensors of NAMES; outputs have a deviation of about 1. The gate is float32."""
    samples, channels = shape[:2]
    x = (torch.randn(shape) + torch.randn(channels, 1, 1)).contiguous(memory_format=memory_format)
    weight = torch.randn(out, channels) / channels**0.5
    return [x.to(dtype), weight.to(dtype), torch.rand(samples, channels) + 0.5]


def make_source(raw, activation="silu", affine=True):
    """A source, and what it gives in the dtype of ``raw``."""
    count = raw.shape[1]
    weight, bias = (torch.rand(count) + 0.5, torch.randn(count)) if affine else (None, None)
    norm = ops.Norm(weight, bias, torch.randn(count), torch.rand(count) + 0.5, 1e-3, activation)
    return ops.Source(raw, norm), apply_norm(raw, norm).to(raw.dtype)


def apply_norm(raw, norm):
    """In float64."""
    weight, bias, mean, var = (None if v is None else v.detach().double() for v in norm[:4])
    z = F.batch_norm(raw.detach().double(), mean, var, weight, bias, eps=norm.eps)
    activations = {"identity": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
    activations |= {"hardswish": F.hardswish, "mish": F.mish}
    return activations[norm.activation](z)


def plain(x, weight, gate=None):
    """The formula in PyTorch's convolution."""
    if gate is not None:
        x = x * gate[:, :, None, None]
    return F.conv2d(x, weight[:, :, None, None])


def as_leaves(tensors, dtype=None):
    """Fresh leaves that keep their memory layout; None stays None."""
    return [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for t in tensors
    ]


def lengths_of(shape, out):
    """How long the sums are of which the output and the gradients of NAMES consist."""
    samples, channels, height, width = shape
    area = height * width
    return {"out": channels, "x": out, "weight": samples * area, "gate": out * area}
