"""pointwise_conv against PyTorch's convolution and products, torch.compile and a plain copy."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops
from dlkernels.pointwise_conv import reference

SAMPLES = 8
# Inputs, outputs and the side of the maps: EfficientNet-B0's expansions, then its projections.
SHAPES = [
    (16, 96, 112),
    (24, 144, 56),
    (40, 240, 28),
    (80, 480, 14),
    (112, 672, 14),
    (192, 1152, 7),
    (32, 16, 112),
    (96, 24, 56),
    (144, 40, 28),
    (240, 80, 14),
    (480, 112, 14),
    (672, 192, 7),
    (1152, 320, 7),
]


def name_of(value):
    return "{}-to-{}-at-{}".format(*value) if isinstance(value, tuple) else None


def eager(x, weight):
    return F.conv2d(x, weight[:, :, None, None])


def product(x, weight):
    return reference.pointwise_conv(x, weight, None)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_pointwise_conv(benchmark, shape, training, memory_format):
    channels, out, side = shape
    x = torch.randn(SAMPLES, channels, side, side, device=DEVICE)
    x = x.contiguous(memory_format=memory_format)
    weight = torch.randn(out, channels, device=DEVICE) / channels**0.5
    compare(
        benchmark,
        functions={
            "dlkernels": ops.pointwise_conv,
            "eager": eager,
            "product": product,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, weight),
        training=training,
        floor=x.clone,
    )
