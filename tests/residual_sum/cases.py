"""Inputs of residual_sum that the tests share."""

import torch
from torch import Tensor

from dlkernels.ops import Excitation, Norm

# (N, C, H, W, S) and the reason why the shape is here; S channels squeezed, 0 for no excitation.
SHAPES = {
    "minimal": (2, 1, 3, 1, 0),
    "one squeezed channel": (3, 9, 4, 4, 1),
    "non-aligned": (2, 7, 5, 3, 2),
    "no excitation": (3, 33, 5, 5, 0),
    "maps of one pixel": (6, 33, 1, 1, 8),
    "stage of a network": (3, 64, 14, 14, 16),
    "wide": (2, 530, 7, 7, 20),
    "long reduction": (2, 5, 129, 131, 3),
}
NAMES = ("x", "shortcut", "weight", "bias", "squeeze_weight", "squeeze_bias")
NAMES += ("excite_weight", "excite_bias")
CHOICES = {
    "SE-ResNet": ("relu", "sigmoid", "relu"),
    "others": ("silu", "hard_sigmoid", "identity"),
}


def make_leaves(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    biases: bool = True,
) -> list[Tensor | None]:
    """The tensors of NAMES, leaves that require gradients."""
    n, c, h, w, s = shape
    x = torch.randn(n, c, h, w) + 2  # means that do not cancel
    tensors: list[Tensor | None] = [
        x.contiguous(memory_format=memory_format),
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        torch.rand(c) + 0.5,
        # Away from zero, which keeps pooled values, and so all gradients, well conditioned.
        torch.randn(c) + 1 if biases or s else None,
    ]
    layers = [torch.randn(s, c) / c**0.5, torch.randn(s) + 0.5]
    layers += [torch.randn(c, s) / max(1, s) ** 0.5, torch.randn(c)]
    if not biases:
        layers[1] = layers[3] = None
    tensors += layers if s else [None] * 4
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


def copies(tensors: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Fresh leaves, in another dtype if given."""
    return [
        None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
        for t in tensors
    ]


def arguments_of(
    leaves: list[Tensor | None],
    choices: tuple[str, str, str] = CHOICES["SE-ResNet"],
    evaluation: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor | None, Tensor | None, Norm, Excitation | None, str]:
    """The op's arguments; in evaluation, statistics that are not those of ``x``."""
    x, shortcut, weight, bias, *layers = leaves
    mean = var = None
    if evaluation:
        channels = torch.arange(x.shape[1], dtype=torch.float32)
        mean, var = 0.2 + 0.01 * channels.cos(), 1 + 0.5 * channels.sin()
    excitation = None if layers[0] is None else Excitation(*layers, *choices[:2])
    return x, shortcut, Norm(weight, bias, mean, var, eps), excitation, choices[2]
