"""Inputs of dense_block that the tests share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlkernels.ops import NormConv


@dataclass
class Shape:
    """Maps [n, c, h, w]; layers of growth k, with a bottleneck of that width unless it is 0."""

    n: int
    c: int
    h: int
    w: int
    layers: int
    k: int
    width: int

    @property
    def channels(self) -> int:
        return self.c + self.layers * self.k

    def convs(self) -> list[list[tuple[int, int, int]]]:
        """For each layer its convolutions' (in, out, kernel)."""
        ins = [self.c + index * self.k for index in range(self.layers)]
        if self.width == 0:
            return [[(channels, self.k, 3)] for channels in ins]
        return [[(channels, self.width, 1), (self.width, self.k, 3)] for channels in ins]


SHAPES = {
    "one pixel per map": Shape(40, 3, 1, 1, 2, 2, 5),
    "non-aligned": Shape(2, 7, 5, 3, 3, 5, 9),
    "no bottleneck": Shape(2, 20, 9, 11, 2, 12, 0),
    "last block of a network": Shape(3, 130, 7, 7, 2, 32, 128),
    "several tiles": Shape(2, 16, 31, 29, 2, 8, 32),
    "wider than a block of channels": Shape(1, 150, 6, 5, 2, 40, 160),
    "no bottleneck, several blocks": Shape(2, 140, 6, 7, 1, 24, 0),
}
SMALL = Shape(2, 6, 5, 4, 2, 4, 8)


def make_layers(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    shift: float = 2.0,
    device: str = "cpu",
) -> list[list[NormConv]]:
    """Layers whose norms shift by plus or minus ``shift``.

    Few values then lie near the ReLU's kink, on whose sides rounding may put them: the derivative
    jumps there, and one value on the other side would drown every other error.
    """

    def norm_conv(channels: int, out: int, kernel: int) -> NormConv:
        signs = torch.where(torch.rand(channels) < 0.5, -1.0, 1.0)
        weight = torch.randn(out, channels, kernel, kernel) / (channels * kernel**2) ** 0.5
        return NormConv(
            (torch.rand(channels) + 0.5).to(device),
            (signs * shift + torch.randn(channels) * 0.1 if shift < 4 else signs**2 * shift).to(
                device
            ),
            torch.randn(channels).to(device) * 0.1,
            (torch.rand(channels) + 0.5).to(device),
            weight.to(device, dtype),
        )

    return [[norm_conv(*sizes) for sizes in layer] for layer in shape.convs()]


def make_maps(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> Tensor:
    x = torch.randn(shape.n, shape.c, shape.h, shape.w, device=device) + 0.5
    return x.to(dtype).contiguous(memory_format=memory_format)


def leaves_of(
    layers: list[list[NormConv]], dtype: torch.dtype | None = None
) -> list[list[NormConv]]:
    """Copies whose parameters require gradients, all in another dtype if given."""

    def copy(stage: NormConv) -> NormConv:
        tensors = [t.detach().to(dtype or t.dtype).clone() for t in stage]
        for index in (0, 1, 4):
            tensors[index].requires_grad_()
        return NormConv(*tensors)

    return [[copy(stage) for stage in layer] for layer in layers]


def gradients_of(layers: list[list[NormConv]]) -> dict[str, Tensor]:
    return {
        f"layers[{i}][{j}].{field}": getattr(stage, field).grad
        for i, layer in enumerate(layers)
        for j, stage in enumerate(layer)
        for field in ("norm_weight", "norm_bias", "weight")
    }


def running_of(layers: list[list[NormConv]]) -> dict[str, Tensor]:
    return {
        f"layers[{i}][{j}].{field}": getattr(stage, field)
        for i, layer in enumerate(layers)
        for j, stage in enumerate(layer)
        for field in ("running_mean", "running_var")
    }
