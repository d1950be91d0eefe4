"""EfficientNet-B0 on handwritten digits: torchvision's and this library's, from the same seeds.

Both networks start from the same weights and see the same images in the same order. Prints the
test accuracies and times, and draws the curves. Needs scikit-learn, torchvision, rich, matplotlib.

    python examples/train_digits_classifier.py --seeds 3 --epochs 6 --plot out/digits.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from matplotlib import pyplot
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dlkernels import models

NETWORKS = ("torchvision", "dlkernels")


class Digits(NamedTuple):
    """Images [N, 3, S, S] and labels [N], a part to train on and a part to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Run(NamedTuple):
    """The test accuracy after each epoch, and the seconds spent in training steps."""

    accuracies: list[float]
    seconds: float


def load(size: int) -> Digits:
    """scikit-learn's 1797 digits, upsampled; every fifth is kept for the test."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)
    test = torch.arange(len(labels)) % 5 == 0
    return Digits(images[~test].contiguous(), labels[~test], images[test], labels[test])


def build(network: str, seed: int) -> nn.Module:
    """The network with the weights that torchvision draws for this seed."""
    torch.manual_seed(seed)
    theirs = torchvision.models.efficientnet_b0(num_classes=10)
    if network == "torchvision":
        return theirs
    ours = models.efficientnet_b0(num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    return ours


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The share of the test images that the model names rightly."""
    model.eval()
    with torch.no_grad():
        chosen = [model(images).argmax(1) for images in digits.test_images.split(128)]
    return float((torch.cat(chosen) == digits.test_labels).float().mean())


def train(
    network: str, digits: Digits, seed: int, options: argparse.Namespace, progress: Progress
) -> Run:
    """Trains by AdamW at a rate that falls along a cosine."""
    model = build(network, seed)
    size = len(digits.train_labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    batches = size // options.batch
    steps = options.epochs * batches
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    seconds = 0.0
    name = f"{network}, seed {seed}"
    bar = progress.add_task(name, total=steps)
    for _ in range(options.epochs):
        model.train()
        for batch in torch.randperm(size, generator=order).split(options.batch)[:batches]:
            start = time.perf_counter()
            loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - start
            progress.advance(bar)
        accuracies.append(accuracy(model, digits))
        progress.update(bar, description=f"{name}: {accuracies[-1]:.3f}")
    return Run(accuracies, seconds)


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    """The accuracy over the epochs, a line for each run."""
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for index, (network, of_network) in enumerate(runs.items()):
        for seed, run in enumerate(of_network):
            epochs = range(1, len(run.accuracies) + 1)
            label = network if seed == 0 else None
            axes.plot(epochs, run.accuracies, f"C{index}", label=label, alpha=0.7)
    axes.set(xlabel="epoch", ylabel="test accuracy", title="EfficientNet-B0 on digits")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """Trains each network from each seed, prints a table and draws the curves."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each network")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--plot", type=Path, default=Path("out/digits.png"))
    options = parser.parse_args(arguments)

    digits = load(options.size)
    runs: dict[str, list[Run]] = {network: [] for network in NETWORKS}
    with Progress() as progress:
        for seed in range(options.seeds):
            for network in NETWORKS:
                runs[network].append(train(network, digits, seed, options, progress))
    for network, of_network in runs.items():
        last = [run.accuracies[-1] for run in of_network]
        seconds = statistics.mean(run.seconds for run in of_network)
        each = ", ".join(f"{value:.4f}" for value in last)
        print(f"{network:12} accuracy {statistics.mean(last):.4f} ({each}), {seconds:.1f} s a run")
    plot(runs, options.plot)
    print(f"drawn: {options.plot}")
    return runs


if __name__ == "__main__":
    main()
