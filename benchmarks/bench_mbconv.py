"""Depthwise convolution, batch norm and SiLU, and EfficientNet, against their peers."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision

from benchmarks.peers import DEVICE, FORMATS, compare, onnxruntime_call, row_of, rows
from dlkernels import models, ops
from dlkernels.measure import interleaved_timings, peak_cpu_memory

# (C, H, K, stride): every distinct depthwise convolution of EfficientNet-B0 at 224 px, then of B4
# at 380 px.
B0 = [
    (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1),
    (240, 28, 3, 2), (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1), (672, 14, 5, 2),
    (1152, 7, 5, 1), (1152, 7, 3, 1),
]  # fmt: skip
B4 = [
    (48, 190, 3, 1), (24, 190, 3, 1), (144, 190, 3, 2), (192, 95, 3, 1), (192, 95, 5, 2),
    (336, 48, 5, 1), (336, 48, 3, 2), (672, 24, 3, 1), (672, 24, 5, 1), (960, 24, 5, 1),
    (960, 24, 5, 2), (1632, 12, 5, 1), (1632, 12, 3, 1), (2688, 12, 3, 1),
]  # fmt: skip
SHAPES = {
    **{f"B0-{'x'.join(map(str, shape))}": (8, *shape) for shape in B0},
    **{f"B4-{'x'.join(map(str, shape))}": (2, *shape) for shape in B4},
}


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_depthwise_conv_bn_act(benchmark, shape, training, memory_format):
    n, c, h, size, stride = shape
    x = torch.randn(n, c, h, h, device=DEVICE).contiguous(memory_format=memory_format)
    kernel = torch.randn(c, 1, size, size, device=DEVICE)
    weight, bias, mean = torch.randn(3, c, device=DEVICE)
    var = torch.rand(c, device=DEVICE) + 0.5

    def fused(x, kernel, weight, bias):
        statistics = (None, None) if training else (mean, var)
        norm = ops.Norm(weight, bias, *statistics, 1e-5, "silu")
        return ops.depthwise_conv_bn_act(x, kernel, norm, stride=stride, padding=size // 2).out

    def eager(x, kernel, weight, bias):
        raw = F.conv2d(x, kernel, None, stride, size // 2, 1, c)
        return F.silu(F.batch_norm(raw, mean, var, weight, bias, training))

    compare(
        benchmark,
        functions={
            "dlkernels": fused,
            "eager": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(x, kernel, weight, bias),
        training=training,
        floor=x.clone,
    )


NETWORKS = {"b0": 224, "b4": 380}


def step(model, x):
    """Forward and, in training, backward."""
    if not model.training:
        with torch.no_grad():
            return model(x)
    model(x).sum().backward()
    for parameter in model.parameters():
        parameter.grad = None
    return None


@pytest.mark.parametrize("mode", ["inference-1", "inference-8", "training-8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_efficientnet(benchmark, name, mode):
    """Times, and the memory that a forward pass holds at its peak."""
    torch.set_num_threads(2)
    torch._dynamo.reset()
    kind, batch = mode.split("-")
    x = torch.randn(int(batch), 3, NETWORKS[name], NETWORKS[name])
    theirs = getattr(torchvision.models, f"efficientnet_{name}")()
    ours = getattr(models, f"efficientnet_{name}")()
    ours.load_state_dict(theirs.state_dict())
    theirs.train(kind == "training")
    ours.train(kind == "training")

    def other(model):
        return copy.deepcopy(model).to(memory_format=torch.channels_last)

    last = x.contiguous(memory_format=torch.channels_last)
    calls = {
        "dlkernels": partial(step, ours, x),
        "dlkernels, channels_last": partial(step, other(ours), last),
        "eager": partial(step, theirs, x),
        "eager, channels_last": partial(step, other(theirs), last),
        "torch.compile": partial(step, torch.compile(other(theirs)), last),
    }
    if kind == "inference":
        calls["onnxruntime"] = onnxruntime_call(theirs, x)
    present = {k: c for k, c in calls.items() if c is not None}
    timings = interleaved_timings(present, rounds=5 if kind == "training" else 15)
    with torch.set_grad_enabled(kind == "training"):
        memory = {
            label: peak_cpu_memory(lambda model=model: model(x).sum()) / 2**20
            for label, model in {"dlkernels": ours, "eager": theirs}.items()
        }
    name = benchmark.name.removeprefix("test_")
    rows.append(row_of(name, calls, timings, memory, ("dlkernels, channels_last",)))
    benchmark.pedantic(calls["dlkernels"], rounds=1, iterations=1)
