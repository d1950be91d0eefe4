"""``python -m dlkernels demo``: three networks before and after :func:`dlkernels.accelerate`.

A timm SE-ResNet-50 and torchvision's EfficientNet-B0 and DenseNet-121 look at two real photographs.
Their weights are random, since nothing is downloaded; outputs and times do not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import dlkernels
from dlkernels.measure import interleaved_medians, peak_cpu_memory

SIZE = 224
ROUNDS = 5


@dataclass(frozen=True)
class Result:
    """One network, before and after; seconds and bytes as (before, after)."""

    network: str
    swapped: int
    difference: float
    latency: tuple[float, float]
    step: tuple[float, float]
    memory: tuple[int, int]


def photographs() -> Tensor:
    """scikit-learn's two photographs as normalised images [2, 3, 224, 224]."""
    from sklearn.datasets import load_sample_images

    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    batch = torch.stack(images).float() / 255
    batch = F.interpolate(batch, (SIZE, SIZE), mode="bilinear", antialias=True)
    mean, std = batch.mean((0, 2, 3), keepdim=True), batch.std((0, 2, 3), keepdim=True)
    return (batch - mean) / std


def networks() -> dict[str, Callable[[], nn.Module]]:
    """The networks of the demo."""
    import timm
    import torchvision

    return {
        "timm SE-ResNet-50": lambda: timm.create_model("seresnet50"),
        "torchvision EfficientNet-B0": lambda: torchvision.models.efficientnet_b0(),
        "torchvision DenseNet-121": lambda: torchvision.models.densenet121(),
    }


def compare(name: str, make: Callable[[], nn.Module], images: Tensor) -> Result:
    """Measures a network and its accelerated twin, which has the same weights, in turn."""
    torch.manual_seed(0)
    before, after = _settled(make(), images), make()
    after.load_state_dict(before.state_dict())
    report = dlkernels.accelerate(after)
    pair = {"before": before, "after": after}

    def infer(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(images)

    def train(model: nn.Module) -> None:
        model(images).logsumexp(1).sum().backward()
        model.zero_grad()

    for model in pair.values():
        model.eval()
    difference = (infer(before) - infer(after)).abs().max().item()
    latency = interleaved_medians({k: lambda m=m: infer(m) for k, m in pair.items()}, ROUNDS)  # type: ignore[misc]
    for model in pair.values():
        model.train()
    step = interleaved_medians({k: lambda m=m: train(m) for k, m in pair.items()}, ROUNDS)  # type: ignore[misc]
    memory = [peak_cpu_memory(lambda m=m: train(m)) for m in pair.values()]  # type: ignore[misc]
    return Result(
        name,
        len(report.swapped),
        difference,
        (latency["before"], latency["after"]),
        (step["before"], step["after"]),
        (memory[0], memory[1]),
    )


def _settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Gives random weights the batch norm of a trained network, so that every block counts."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # some libraries start a block's last one at zero
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    return model


def run(output: Path) -> list[Result]:
    """Runs the demo, prints its table and writes its chart."""
    console = Console()
    images = photographs()
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(networks()))
        for name, make in networks().items():
            progress.update(task, description=name)
            results.append(compare(name, make, images))
            progress.advance(task)
    console.print(_table(results))
    output.parent.mkdir(parents=True, exist_ok=True)
    _chart(results, output)
    console.print(f"chart: {output}")
    return results


def _table(results: list[Result]) -> Table:
    table = Table(title=f"2 photographs of {SIZE} x {SIZE}, float32, before -> after")
    for column in (
        *("network", "modules swapped", "largest output difference"),
        *("inference ms", "training step ms", "peak memory MiB"),
    ):
        table.add_column(column)
    for result in results:
        table.add_row(
            result.network,
            str(result.swapped),
            f"{result.difference:.1e}",
            _change(result.latency, 1e3),
            _change(result.step, 1e3),
            _change(result.memory, 2.0**-20),
        )
    return table


def _change(pair: tuple[float, float], unit: float) -> str:
    before, after = (value * unit for value in pair)
    return f"{before:.0f} -> {after:.0f} (x{after / before:.2f})"


def _chart(results: list[Result], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    memory = [result.memory for result in results]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    panels: list[tuple[str, list[tuple[float, float]], float]] = [
        ("inference, ms", [result.latency for result in results], 1e3),
        ("training step, ms", [result.step for result in results], 1e3),
        ("peak memory of a step, MiB", [(float(a), float(b)) for a, b in memory], 2.0**-20),
    ]
    names = [result.network.replace(" ", "\n", 1) for result in results]
    for axis, (title, pairs, unit) in zip(axes, panels, strict=True):
        for offset, label in ((0, "before"), (1, "after")):
            positions = [index + 0.4 * offset for index in range(len(pairs))]
            bars = axis.bar(positions, [pair[offset] * unit for pair in pairs], 0.38, label=label)
            axis.bar_label(bars, fmt="%.0f")
        axis.set_xticks([index + 0.2 for index in range(len(pairs))], names, fontsize=8)
        axis.set_title(title)
        axis.margins(y=0.1)
    axes[0].legend()
    figure.savefig(output, dpi=120)
    plt.close(figure)
