"""pyramid_pool against eager pools, torch.compile and a plain copy of the bytes that must move."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops
from dlkernels.pyramid_pool import reference

# (N, C, H, W): YOLOv4 at 416 x 416 and at 608 x 608.
SHAPES = [(4, 512, 13, 13), (4, 512, 19, 19)]


def separate(x):
    pooled = [F.max_pool2d(x, size, 1, size // 2) for size in (13, 9, 5)]
    return torch.cat([*pooled, x], 1)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_pyramid_pool(benchmark, shape, training, memory_format):
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)
    # The map is read and four are written; in training five are read and one is written, too.
    moved = (11 if training else 5) * x.nbytes
    half = torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE)
    compare(
        benchmark,
        functions={
            "dlkernels": ops.pyramid_pool,
            "eager cascade": reference.pyramid_pool,
            "eager pools": separate,
            "torch.compile": torch.compile(reference.pyramid_pool),
        },
        inputs=[x],
        training=training,
        floor=half.clone,
    )
