"""dense_block against torchvision (plain and memory_efficient), torch.compile and onnxruntime.

The last benchmark draws peak memory over depth into docs/figures/dense_block_memory.png.
"""

import copy
from pathlib import Path

import numpy
import pytest
import torch
from torchvision.models import densenet as torchvision_densenet

from benchmarks.peers import DEVICE, FORMATS, compare, onnxruntime_call, rows
from dlkernels import models, nn
from dlkernels.measure import peak_cpu_memory

# (layers, C, H = W): the four blocks of DenseNet-121.
BLOCKS = [(6, 64, 56), (12, 128, 28), (24, 256, 14), (16, 512, 7)]
DEPTHS = [40, 100, 190]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "x".join(map(str, block)))
def test_block(benchmark, block, training, memory_format):
    layers, channels, size = block
    x = torch.randn(8, channels, size, size, device=DEVICE).contiguous(memory_format=memory_format)
    theirs = torchvision_densenet._DenseBlock(layers, channels, 4, 32, 0.0)
    modules = {
        "balanced": nn.DenseBlock(layers, channels, 4, 32),
        "minimal": nn.DenseBlock(layers, channels, 4, 32, memory="minimal"),
        "torchvision": theirs,
        "torch.compile": torch.compile(theirs),
    }
    for module in modules.values():
        module.to(DEVICE, memory_format=memory_format).train(training)
    run(benchmark, modules, x, training)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_densenet121_training(benchmark, memory_format):
    x = torch.randn(8, 3, 224, 224, device=DEVICE).contiguous(memory_format=memory_format)
    modules = {
        "balanced": models.densenet121(),
        "minimal": models.densenet121(memory="minimal"),
        "torchvision": torchvision_densenet.densenet121(),
        "memory_efficient": torchvision_densenet.densenet121(memory_efficient=True),
        "torch.compile": torch.compile(torchvision_densenet.densenet121()),
    }
    for module in modules.values():
        module.to(DEVICE, memory_format=memory_format)
    run(benchmark, modules, x, True)


def run(benchmark, modules, x, training):
    compare(
        benchmark,
        modules,
        (x,),
        training,
        floor=x.clone,
        memory=DEVICE == "cpu",
        rounds=5,
        also_ours=("minimal",),
    )


@pytest.mark.skipif(DEVICE != "cpu", reason="onnxruntime runs on the CPU here")
def test_densenet121_inference(benchmark):
    theirs = torchvision_densenet.densenet121().eval()
    ours = models.densenet121().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(8, 3, 224, 224)

    def in_channels_last(model):
        model = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return lambda x: model(x.contiguous(memory_format=torch.channels_last))

    functions = {
        "contiguous": ours,
        "channels_last": in_channels_last(ours),
        "torchvision": theirs,
        "torchvision channels_last": in_channels_last(theirs),
        "torch.compile": torch.compile(theirs),
    }
    onnxruntime = onnxruntime_call(theirs, x)
    functions["onnxruntime"] = onnxruntime and (lambda _: onnxruntime())
    compare(
        benchmark, functions, (x,), False, floor=x.clone, rounds=9, also_ours=("channels_last",)
    )


def test_memory_over_depth(benchmark):
    """DenseNet-BC on CIFAR's images, k = 12, batch 8: peak memory of a training step."""
    peaks = {
        name: [_peak_of_step(depth, memory) for depth in DEPTHS]
        for name, memory in (
            ("plain", None),
            ("dlkernels balanced", "balanced"),
            ("dlkernels minimal", "minimal"),
        )
    }
    for name, values in peaks.items():
        exponent, _ = numpy.polyfit(numpy.log(DEPTHS), numpy.log(values), 1)
        columns = {f"L={d} MiB": v for d, v in zip(DEPTHS, values, strict=True)}
        rows.append({"benchmark": f"memory {name}", **columns, "exponent": float(exponent)})
    _draw(peaks)
    benchmark.pedantic(lambda: None)


def _peak_of_step(depth: int, memory: str | None) -> float:
    """Mebibytes; the plain network, of torchvision's blocks, where ``memory`` is None."""
    network = models.densenet_cifar(depth, memory=memory or "balanced")
    if memory is None:
        for name, block in list(network.features.named_children()):
            if isinstance(block, nn.DenseBlock):
                channels = block.denselayer1.norm1.num_features
                plain = torchvision_densenet._DenseBlock(len(block), channels, 4, 12, 0.0)
                setattr(network.features, name, plain)
    x = torch.randn(8, 3, 32, 32)
    return peak_cpu_memory(lambda: network(x).sum().backward()) / 2**20


def _draw(peaks: dict[str, list[float]]) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in peaks.items():
        axes.plot(DEPTHS, values, marker="o", label=name)
    axes.set_xlabel("depth L")
    axes.set_ylabel("peak memory of a training step (MiB)")
    axes.set_title("DenseNet-BC (k = 12), 32 x 32, batch 8")
    axes.legend()
    path = Path(__file__).parents[1] / "docs/figures/dense_block_memory.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
