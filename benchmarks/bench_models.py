"""Models of torchvision and timm before and after accelerate()."""

import pytest
import torch

from benchmarks.peers import DEVICE, add_row
from dlkernels import model_bench

MODELS = ["torchvision/efficientnet_b0", "torchvision/densenet121", "timm/seresnet50"]


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_model(benchmark, model, training, memory_format, request):
    torch.set_num_threads(2)
    batch, size, eager_only = (
        request.config.getoption(name) for name in ("--batch", "--size", "--eager-only")
    )
    last = memory_format == "channels_last"
    calls, weighed = model_bench.steps(model, batch, size, training, not eager_only, last, DEVICE)
    add_row(benchmark, calls, weighed=weighed if DEVICE == "cpu" else (), rounds=5)
