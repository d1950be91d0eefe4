"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import FORMATS
from tests.pyramid_pool.cases import cascade, make_grad, make_maps

OP = torch.ops.dlkernels.pyramid_pool.default
BACKWARD_OP = torch.ops.dlkernels.pyramid_pool_backward.default
SHAPE = (2, 18, 7, 9)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format):
    torch.library.opcheck(OP, (make_maps(SHAPE, memory_format=memory_format).requires_grad_(),))


def test_opcheck_of_other_strides():
    torch.library.opcheck(OP, (make_maps(SHAPE).transpose(2, 3).requires_grad_(),))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_of_backward(memory_format):
    x = make_maps(SHAPE, memory_format=memory_format)
    torch.library.opcheck(
        BACKWARD_OP, (make_grad(x), x), test_utils=("test_schema", "test_faketensor")
    )


def test_compile_without_graph_breaks():
    def function(x):
        return ops.pyramid_pool(x) * 2

    ours, compiled = make_maps(SHAPE).requires_grad_(), make_maps(SHAPE).requires_grad_()
    compiled.data.copy_(ours.data)
    expected = function(ours)
    actual = torch.compile(function, fullgraph=True)(compiled)
    expected.sum().backward()
    actual.sum().backward()
    assert torch.equal(actual, expected)
    assert torch.equal(compiled.grad, ours.grad)


def test_compile_for_any_size():
    compiled = torch.compile(ops.pyramid_pool, fullgraph=True, dynamic=True)
    for size in (5, 8, 13):
        x = make_maps((2, 18, size, size + 2))
        assert torch.equal(compiled(x), ops.pyramid_pool(x))


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.pyramid_pool(x)

    x = make_maps(SHAPE)
    program = torch.export.export(Module(), (x,))
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), ops.pyramid_pool(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_dtype(dtype):
    x = make_maps(SHAPE, dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.pyramid_pool(x)
    assert out.dtype == dtype
    assert torch.equal(out, cascade(x))
    out.float().sum().backward()
    assert x.grad.dtype == dtype


def test_saved_for_backward():
    """The maps themselves, and nothing else: no index of a maximum."""
    x = make_maps(SHAPE).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.pyramid_pool(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]
    assert sum(t.nbytes for t in saved) == x.nbytes


def test_second_derivative_is_refused_and_the_reference_has_it():
    x = make_maps(SHAPE)

    def second():
        leaf = x.clone().requires_grad_()
        out = ops.pyramid_pool(leaf)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        return leaf.grad

    with pytest.raises(NotImplementedError, match="pyramid_pool_backward"):
        second()
    with use_backend("reference"):
        assert second().abs().sum() > 0
