"""asff_fuse against eager, torch.compile and a plain copy of the bytes that must move."""

import pytest
import torch

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops
from dlkernels.asff import reference

# (N, C, H, W) of the output and the factors: YOLOv3-ASFF at 416x416, its levels 2 and 1 (the
# finest and the middle one), its finest level at 608x608, and one image at 800x1344.
PYRAMIDS = [
    ((8, 256, 52, 52), (4, 2, 1)),
    ((8, 256, 26, 26), (2, 1, 1)),
    ((2, 256, 76, 76), (4, 2, 1)),
    ((1, 256, 100, 168), (4, 2, 1)),
]


def bytes_moved(features, logits, out, training):
    """Inputs read, the output written; in training all again, and the gradients written."""
    read = sum(t.nbytes for t in (*features, logits))
    return read + out.nbytes + (2 * read + out.nbytes if training else 0)


@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("shape", "factors"), PYRAMIDS, ids=lambda v: "x".join(map(str, v)))
def test_asff_fuse(benchmark, shape, factors, training, memory_format, mode):
    samples, _, h, w = shape
    sizes = [(*shape[:2], h // s, w // s) for s in factors] + [(samples, len(factors), h, w)]
    tensors = [
        torch.randn(size, device=DEVICE).contiguous(memory_format=memory_format) for size in sizes
    ]

    def eager(*tensors):
        return reference.asff_fuse(tensors[:-1], tensors[-1], mode)

    def fused(*tensors):
        return ops.asff_fuse(tensors[:-1], tensors[-1], mode)

    moved = bytes_moved(tensors[:-1], tensors[-1], eager(*tensors), training)
    half = torch.ones(moved // 2, dtype=torch.uint8, device=DEVICE)
    compare(
        benchmark,
        functions={"dlkernels": fused, "eager": eager, "torch.compile": torch.compile(eager)},
        inputs=tensors,
        training=training,
        floor=half.clone,
    )
