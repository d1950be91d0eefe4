"""batch_norm_act against eager, torch.compile and a plain copy of the maps."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import DEVICE, FORMATS, compare
from dlkernels import ops

# (N, C, H, W): expansions of EfficientNet-B0, a stage of DenseNet-121, of CSPDarknet-53.
SHAPES = [
    (8, 96, 112, 112),
    (8, 144, 56, 56),
    (8, 672, 14, 14),
    (8, 1152, 7, 7),
    (8, 256, 28, 28),
    (2, 64, 208, 208),
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_batch_norm_act(benchmark, shape, activation, training, memory_format):
    x = torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format)
    weight, bias, mean = torch.randn(3, shape[1], device=DEVICE)
    var = torch.rand(shape[1], device=DEVICE) + 0.5

    def fused(x, weight, bias):
        statistics = (None, None) if training else (mean, var)
        return ops.batch_norm_act(x, weight, bias, *statistics, activation=activation).out

    def eager(x, weight, bias):
        norm = F.batch_norm(x, mean, var, weight, bias, training)
        return getattr(F, activation)(norm)

    compare(
        benchmark,
        functions={
            "dlkernels": fused,
            "eager": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, weight, bias),
        training=training,
        floor=x.clone,
    )
