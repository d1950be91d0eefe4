"""Inputs of asff_fuse that the tests share."""

import torch
from torch import Tensor

# (N, C, H, W), the levels' factors, and the reason why the pyramid is here.
PYRAMIDS = {
    "minimal": ((1, 1, 1, 1), (1, 1)),
    "non-aligned": ((2, 7, 6, 10), (2, 1)),
    "pyramid of ASFF": ((2, 37, 20, 12), (4, 2, 1)),
    "one size": ((3, 20, 5, 7), (1, 1, 1)),
    "one cell": ((2, 5, 8, 8), (8, 1, 2)),
    "every factor": ((1, 19, 16, 40), (8, 4, 2, 1)),
    "no level in full size": ((2, 70, 8, 24), (2, 4)),
    "five levels, many channels": ((1, 150, 4, 4), (1, 2, 4, 2, 1)),
    "several strips": ((1, 3, 56, 136), (2, 8, 1)),
}
MODES = ("nearest", "bilinear")


def make_inputs(
    shape: tuple[int, int, int, int],
    factors: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> list[Tensor]:
    """The features, then the logits."""
    n, c, h, w = shape
    features = [torch.randn(n, c, h // s, w // s, device=device) for s in factors]
    logits = 2 * torch.randn(n, len(factors), h, w, device=device)
    return [t.to(dtype).contiguous(memory_format=memory_format) for t in (*features, logits)]


def leaves_of(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaves that require gradients, in another dtype if given."""
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def names_of(tensors: list[Tensor]) -> list[str]:
    return [*(f"features[{i}]" for i in range(len(tensors) - 1)), "logits"]
