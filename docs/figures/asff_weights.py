"""Draws docs/asff-weights.png: which level of the pyramid nn.ASFF takes each pixel from.

A small network learns to label the pixels of a canvas on which handwritten digits (scikit-learn's)
lie in three sizes. It fuses its three levels with nn.ASFF at the finest one.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dlkernels

SIZE = 64
SCALES = (1, 2, 4)
BACKGROUND = 10


class Canvases:
    """Draws canvases with digits from scikit-learn's 8x8 images."""

    def __init__(self) -> None:
        digits = load_digits()
        self.images = torch.from_numpy(digits.images).float() / 16
        self.labels = torch.from_numpy(digits.target)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Images [count, 1, SIZE, SIZE] and the label of every pixel."""
        images = torch.zeros(count, 1, SIZE, SIZE)
        labels = torch.full((count, SIZE, SIZE), BACKGROUND)
        for image, label in zip(images, labels, strict=True):
            for scale, number in zip(SCALES, (5, 3, 1), strict=True):
                for _ in range(number):
                    self._place(image[0], label, scale)
        return images + 0.1 * torch.randn_like(images), labels

    def _place(self, image: Tensor, label: Tensor, scale: int) -> None:
        index = torch.randint(len(self.images), ()).item()
        digit = F.interpolate(self.images[index][None, None], scale_factor=scale, mode="bilinear")
        size = 8 * scale
        y, x = torch.randint(SIZE - size + 1, (2,)).tolist()
        place = slice(y, y + size), slice(x, x + size)
        if (label[place] == BACKGROUND).all():
            image[place] = digit[0, 0]
            label[place] = torch.where(digit[0, 0] > 0.3, self.labels[index], BACKGROUND)


def block(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two convolutions, the first of which halves the size."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, 2, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Network(nn.Module):
    """Three levels, each half the size of the one before, fused at the finest."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(1, 16), block(16, 32), block(32, 64)])
        self.fusion = dlkernels.nn.ASFF(2, (64, 32, 16), out_channels=32, return_weights=True)
        self.head = nn.Conv2d(32, BACKGROUND + 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every pixel, and the fusion weights."""
        fine = self.stages[0](images)
        middle = self.stages[1](fine)
        coarse = self.stages[2](middle)
        fused, weights = self.fusion(coarse, middle, fine)
        return F.interpolate(self.head(fused), scale_factor=2, mode="nearest"), weights


def train(network: Network, canvases: Canvases, steps: int) -> None:
    """Trains with fresh canvases; the background counts less than the digits."""
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    balance = torch.tensor([1.0] * BACKGROUND + [0.1])
    for step in range(steps):
        images, labels = canvases.draw(8)
        logits, _ = network(images)
        loss = F.cross_entropy(logits, labels, balance)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.2f}")


def draw(network: Network, canvases: Canvases, path: Path) -> None:
    """One canvas and the weights of each level."""
    images, _ = canvases.draw(1)
    with torch.no_grad():
        weights = network.eval()(images)[1]
    names = ("level 0 (1/8)", "level 1 (1/4)", "level 2 (1/2)")
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), layout="constrained")
    axes[0].imshow(images[0, 0], cmap="gray")
    axes[0].set_title("input")
    for axis, weight, name in zip(axes[1:], weights[0], names, strict=True):
        shown = axis.imshow(weight, cmap="viridis", vmin=0, vmax=1)
        axis.set_title(f"weight of {name}", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Trains, then draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("docs/asff-weights.png"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network, canvases = Network(), Canvases()
    train(network, canvases, arguments.steps)
    draw(network, canvases, arguments.out)


if __name__ == "__main__":
    main()
