"""Inputs of squeeze_excite that the tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

# (N, C, H, W, R) and the reason why the shape is here.
SHAPES = {
    "minimal": (1, 1, 1, 1, 1),
    "non-aligned": (2, 7, 5, 3, 2),
    "one map of one pixel": (3, 33, 1, 1, 8),
    "stage of a network": (3, 64, 14, 14, 16),
    "wide": (2, 530, 7, 7, 20),
    "long reduction": (1, 5, 129, 131, 3),
    "large sample": (2, 130, 57, 31, 11),
}
OPTIONS = {
    "plain": {"activation": "relu", "gate": "sigmoid", "output_activation": "identity"},
    "mobilenet": {"activation": "relu", "gate": "hard_sigmoid", "output_activation": "identity"},
    "efficientnet": {"activation": "silu", "gate": "sigmoid", "output_activation": "identity"},
    "se-resnet": {"activation": "relu", "gate": "sigmoid", "output_activation": "relu"},
}
NAMES = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "shortcut")


@dataclass
class Inputs:
    tensors: list[Tensor | None]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Fresh leaves that require gradients, in another dtype if given."""
        return [
            None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_()
            for t in self.tensors
        ]


def make_inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    bias: bool = True,
    shortcut: bool = False,
    device: str = "cpu",
) -> Inputs:
    n, c, h, w, r = shape
    x = torch.randn(n, c, h, w, device=device)
    tensors = [
        # A mean away from zero keeps the pooled values, and so all gradients, well conditioned.
        (x + 0.5).contiguous(memory_format=memory_format),
        torch.randn(r, c, device=device) / c**0.5,
        torch.randn(r, device=device) + 0.5 if bias else None,
        torch.randn(c, r, device=device) / r**0.5,
        torch.randn(c, device=device) if bias else None,
        torch.randn_like(x) if shortcut else None,
    ]
    return Inputs([None if t is None else t.to(dtype) for t in tensors])
