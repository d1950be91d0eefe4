"""Inputs of batch_norm_act that the tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

# (N, C, H, W) and the reason why the shape is here.
SHAPES = {
    "two values": (2, 1, 1, 1),
    "non-aligned": (2, 7, 5, 3),
    "one pixel": (5, 33, 1, 1),
    "stage of a network": (3, 64, 14, 14),
    "several blocks of rows": (2, 130, 37, 31),
    "long reduction": (1, 3, 129, 131),
}
ACTIVATIONS = ["identity", "relu", "relu6", "leaky_relu", "silu", "hardswish", "mish"]
NAMES = ("x", "weight", "bias", "mean", "var", "residual", "sample_scale")


@dataclass
class Inputs:
    """Arguments of the op, in the order of NAMES."""

    tensors: list[Tensor | None]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Fresh leaves; those that get gradients require them."""
        leaves = [None if t is None else t.detach().to(dtype or t.dtype) for t in self.tensors]
        for name, leaf in zip(NAMES, leaves, strict=True):
            if leaf is not None and name in ("x", "weight", "bias", "residual"):
                leaf.requires_grad_()
        return [None if leaf is None else leaf for leaf in leaves]


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    *,
    affine: bool = True,
    statistics: bool = False,
    residual: bool = False,
    sample_scale: bool = False,
    device: str = "cpu",
) -> Inputs:
    n, c = shape[:2]
    x = torch.randn(shape, device=device)
    # A mean away from zero, as large as the deviation, as raw outputs of convolutions have it.
    x = (1.5 * x + torch.randn(c, 1, 1, device=device)).contiguous(memory_format=memory_format)
    values = lambda: torch.randn(c, device=device)  # noqa: E731
    return Inputs(
        [
            x.to(dtype),
            values() if affine else None,
            values() if affine else None,
            values() if statistics else None,
            values().exp() if statistics else None,
            torch.randn_like(x).to(dtype) if residual else None,
            torch.rand(n, device=device) + 0.5 if sample_scale else None,
        ]
    )
