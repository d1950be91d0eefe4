"""Inputs of conv3x3 that the tests share."""

import torch

# (N, C, H, W), O, padding and the reason why the case is here.
CASES = {
    "one pixel": ((2, 3, 1, 1), 5, 1),
    "one output": ((3, 17, 3, 3), 4, 0),
    "one channel": ((2, 1, 7, 5), 1, 1),
    "one row": ((2, 9, 1, 11), 8, 1),
    "one column": ((2, 9, 10, 1), 8, 2),
    "even sizes": ((2, 32, 14, 14), 32, 1),
    "odd sizes": ((2, 33, 13, 15), 40, 1),
    "without padding": ((2, 33, 12, 9), 17, 0),
    "wide padding": ((1, 17, 7, 8), 33, 2),
    "many channels": ((2, 130, 6, 7), 147, 1),
    "sums in several blocks": ((1, 300, 5, 5), 20, 1),
    "several blocks of tiles": ((2, 19, 41, 67), 35, 1),
    "long rows": ((1, 3, 4, 301), 5, 1),
    "many samples": ((37, 20, 3, 2), 20, 1),
}
NAMES = ("x", "weight", "bias")


def make_tensors(shape, out, dtype=torch.float32, memory_format=torch.contiguous_format):
    """The tensors of NAMES; outputs have a deviation of about 1."""
    channels = shape[1]
    x = (torch.randn(shape) + torch.randn(channels, 1, 1)).contiguous(memory_format=memory_format)
    weight = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5
    return [tensor.to(dtype) for tensor in (x, weight, torch.randn(out))]


def as_leaves(tensors, dtype=None):
    """Fresh leaves that keep their memory layout; None stays None."""
    return [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for t in tensors
    ]


def lengths_of(shape, out_shape):
    """How long the sums are of which the output and the gradients of NAMES consist."""
    samples, channels = shape[:2]
    pixels = samples * out_shape[2] * out_shape[3]
    return {"out": 9 * channels, "x": 9 * out_shape[1], "weight": pixels, "bias": pixels}
