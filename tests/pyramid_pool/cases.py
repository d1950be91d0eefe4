"""Inputs of pyramid_pool that the tests share."""

import torch
import torch.nn.functional as F
from torch import Tensor

# (N, C, H, W) and the reason why the shape is here.
SHAPES = {
    "one pixel": (2, 3, 1, 1),
    "smaller than a window": (2, 5, 2, 3),
    "one row": (1, 17, 1, 9),
    "one column": (1, 9, 11, 1),
    "SPP of YOLOv4": (2, 40, 13, 13),
    "odd sizes": (1, 33, 20, 7),
    "larger than all windows": (2, 16, 40, 40),
}


def make_maps(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def make_ties(
    shape: tuple[int, ...], memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Maps of few different values: most windows have several maxima."""
    return torch.randint(-1, 2, shape).float().contiguous(memory_format=memory_format)


def cascade(x: Tensor) -> Tensor:
    """The formula, written once more."""
    five = F.max_pool2d(x, 5, 1, 2)
    nine = F.max_pool2d(five, 5, 1, 2)
    return torch.cat([F.max_pool2d(nine, 5, 1, 2), nine, five, x], 1)


def separate(x: Tensor) -> Tensor:
    """Three pools that know nothing of each other."""
    return torch.cat([*(F.max_pool2d(x, size, 1, size // 2) for size in (13, 9, 5)), x], 1)


def run(function, x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x; that of the output is 1 where none is given."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    out.backward(torch.ones_like(out) if grad is None else grad.to(out.dtype))
    return out.detach(), leaf.grad


def make_grad(x: Tensor) -> Tensor:
    """A gradient of the output, whose sums are exact."""
    samples, channels, height, width = x.shape
    return torch.randint(-4, 5, (samples, 4 * channels, height, width)).to(x.dtype)
