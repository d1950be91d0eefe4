"""residual_sum against eager, torch.compile and a plain copy of the maps."""

import pytest
import torch

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops
from dlkernels.residual_sum import reference

# (N, C, H, W, S): the stages of SE-ResNet-50, S channels squeezed.
SHAPES = [
    (8, 256, 56, 56, 16),
    (8, 512, 28, 28, 32),
    (8, 1024, 14, 14, 64),
    (8, 2048, 7, 7, 128),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("excites", [False, True], ids=["plain", "squeeze-excite"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_residual_sum(benchmark, shape, excites, training, memory_format):
    n, c, h, w, s = shape
    x = torch.randn(n, c, h, w, device=DEVICE).contiguous(memory_format=memory_format)
    shortcut = torch.randn_like(x)
    shapes = ((c,), (c,), (s, c), (s,), (c, s), (c,))
    tensors = [torch.randn(size, device=DEVICE) for size in shapes]
    mean, var = (None, None) if training else (torch.zeros(c, device=DEVICE), tensors[0].abs())

    def arguments(weight, bias, *layers):
        excitation = ops.Excitation(*layers, "relu", "sigmoid") if excites else None
        return ops.Norm(weight, bias, mean, var), excitation

    def fused(x, shortcut, *tensors):
        return ops.residual_sum(x, shortcut, *arguments(*tensors)).out

    def eager(x, shortcut, *tensors):
        return reference.residual_sum(x, shortcut, *arguments(*tensors), "relu")[0]

    compare(
        benchmark,
        functions={
            "dlkernels": fused,
            "eager": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, shortcut, *tensors),
        training=training,
        floor=x.clone,
    )
