"""conv3x3 against PyTorch's convolution, torch.compile and a plain copy of the maps."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops

# (N, C, H, W) and output channels: YOLOv4 at 416 x 416, then SE-ResNet-50.
SHAPES = [
    ((4, 64, 104, 104), 64),
    ((4, 128, 52, 52), 128),
    ((4, 256, 26, 26), 256),
    ((4, 512, 13, 13), 512),
    ((4, 128, 52, 52), 256),
    ((4, 256, 26, 26), 512),
    ((8, 64, 56, 56), 64),
    ((8, 128, 28, 28), 128),
    ((8, 256, 14, 14), 256),
    ((8, 512, 7, 7), 512),
]


def name_of(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"to {value}"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("shape", "out"), SHAPES, ids=name_of)
def test_conv3x3(benchmark, shape, out, training, memory_format):
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)
    weight = torch.randn(out, shape[1], 3, 3, device=DEVICE) / (9 * shape[1]) ** 0.5

    def eager(x, weight):
        return F.conv2d(x, weight, padding=1)

    compare(
        benchmark,
        functions={
            "dlkernels": ops.conv3x3,
            "eager": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, weight),
        training=training,
        floor=x.clone,
    )
