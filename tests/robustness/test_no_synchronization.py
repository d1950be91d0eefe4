"""No op waits for its device, so that CUDA graphs can hold it.

Statically: launchers and CUDA sources name nothing that waits, and under fake CUDA tensors, which
have no values, no op asks for any (backward passes cannot run without a device). Where there is a
GPU, by capture.
The assigners beside ``atss_assign`` check their boxes' values, as their docstrings say.
"""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dlkernels import backend, ops
from dlkernels.boxes.anchors import AnchorGrid
from tests.robustness.calls import CHANNELS, MODULES, make_module
from tests.robustness.fuzzing import ARGUMENTS, Call, valid_calls

ROOT = Path(__file__).parent.parent.parent
WAITING_METHODS = {"item", "tolist", "cpu", "numpy", "nonzero", "synchronize", "is_nonzero"}
WAITING_CALLS = ("Synchronize", "cudaMemcpy(", "cudaMalloc(", "cudaFree(", "cudaMemset(")
ASSIGNERS_THAT_CHECK = {"max_iou_assign", "fcos_assign", "yolo_assign"}


LAUNCHERS = [
    path
    for name in ("triton", "op", "slices", "transition")
    for path in sorted(ROOT.glob(f"dlkernels/*/{name}.py"))
]
# What runs on GPUs in place of kernels.
LAUNCHERS.append(ROOT / "dlkernels" / "pointwise_conv" / "reference.py")


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_launchers_and_gradients(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute)}
    assert not names & WAITING_METHODS


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/cuda/**/*.[ch]*")), ids=lambda p: p.name)
def test_cuda_sources(path):
    text = path.read_text()
    assert not [name for name in WAITING_CALLS if name in text]


def on_fake_cuda(value):
    """The same without values; within FakeTensorMode."""
    if isinstance(value, AnchorGrid):
        base_anchors = tuple(map(on_fake_cuda, value.base_anchors))
        return dataclasses.replace(value, base_anchors=base_anchors)
    if not isinstance(value, Tensor):
        return value
    fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return fake.requires_grad_(value.requires_grad)


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() - ASSIGNERS_THAT_CHECK))
def test_values_are_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(backend, "_select", lambda name, device: "cuda")

    @settings(
        max_examples=4,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(valid_calls(name))
    def run(call):
        call.arguments.pop("check_boxes", None)
        with FakeTensorMode(allow_non_fake_inputs=False):
            arguments = pytree.tree_map(on_fake_cuda, call.arguments)
            for out in pytree.tree_leaves(Call(name, arguments)()):
                assert not isinstance(out, Tensor) or out.device.type == "cuda"

    run()


@pytest.mark.parametrize("name", sorted(ASSIGNERS_THAT_CHECK))
def test_who_waits_says_so(name):
    assert "waits for the device" in " ".join(getattr(ops, name).__doc__.split())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MODULES)
def test_capture(name):
    """A training step replayed from a CUDA graph gives the bits of the same step outside."""
    module: nn.Module = make_module(name).cuda()
    x = torch.randn(2, CHANNELS, 12, 12, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            module(x).square().sum().backward()
    stream.synchronize()
    leaves = [x, *module.parameters()]
    expected = torch.autograd.grad(module(x).square().sum(), leaves)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = torch.autograd.grad(module(x).square().sum(), leaves)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))
