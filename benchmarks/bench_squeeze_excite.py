"""squeeze_excite against eager, torch.compile and a plain copy of the maps."""

import pytest
import torch

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops
from dlkernels.squeeze_excite import reference

# (N, C, H, W, R): the stages of SE-ResNet-50, then of EfficientNet-B0.
SHAPES = [
    (8, 256, 56, 56, 16),
    (8, 512, 28, 28, 32),
    (8, 1024, 14, 14, 64),
    (8, 2048, 7, 7, 128),
    (8, 32, 112, 112, 8),
    (8, 144, 56, 56, 6),
    (8, 240, 28, 28, 10),
    (8, 672, 14, 14, 28),
    (8, 1152, 7, 7, 48),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_squeeze_excite(benchmark, shape, training, memory_format):
    n, c, h, w, r = shape
    x = torch.randn(n, c, h, w, device=DEVICE).contiguous(memory_format=memory_format)
    weights = [torch.randn(shape, device=DEVICE) for shape in ((r, c), (r,), (c, r), (c,))]

    def eager(*tensors):
        return reference.squeeze_excite(*tensors, None, "relu", "sigmoid", "identity")

    compare(
        benchmark,
        functions={
            "dlkernels": ops.squeeze_excite,
            "eager": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, *weights),
        training=training,
        floor=x.clone,
    )
