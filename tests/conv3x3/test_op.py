"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dlkernels import ops
from tests.conv3x3.cases import as_leaves, make_tensors
from tests.numbers import FORMATS, assert_exact, relative_error

OP = torch.ops.dlkernels.conv3x3.default
BACKWARD_OP = torch.ops.dlkernels.conv3x3_backward.default
SHAPE, OUT = (2, 18, 6, 5), 20


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_opcheck(padding, memory_format):
    leaves = as_leaves(make_tensors(SHAPE, OUT, memory_format=memory_format))
    torch.library.opcheck(OP, (*leaves, padding))


def test_opcheck_without_bias_and_of_other_strides():
    x, weight, _ = make_tensors((2, 18, 6, 6), OUT)
    x, weight = as_leaves([x.transpose(2, 3), weight.flip(0).transpose(2, 3)])
    torch.library.opcheck(OP, (x, weight, None, 1))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_opcheck_of_backward(needs, memory_format):
    x, weight, bias = make_tensors(SHAPE, OUT, memory_format=memory_format)
    grad = torch.randn_like(OP(x, weight, bias, 1))
    torch.library.opcheck(
        BACKWARD_OP,
        (grad, x, weight, 1, list(needs)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_layouts_of_gradients(memory_format):
    x, weight, bias = make_tensors(SHAPE, OUT, memory_format=memory_format)
    weight = weight.contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(OP(x, weight, bias, 1))
    grad_x, grad_weight = BACKWARD_OP(grad, x, weight, 1, [True, True])
    assert grad_x.is_contiguous(memory_format=memory_format)
    assert grad_weight.is_contiguous()


def test_compile_without_graph_breaks():
    def function(*leaves):
        return ops.conv3x3(*leaves, padding=2) * 2

    tensors = make_tensors(SHAPE, OUT)
    ours, compiled = as_leaves(tensors), as_leaves(tensors)
    expected = function(*ours)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert torch.equal(actual, expected)
    for a, b in zip(ours, compiled, strict=True):
        assert relative_error(b.grad, a.grad) < 1e-6


def test_compile_for_any_size():
    compiled = torch.compile(ops.conv3x3, fullgraph=True, dynamic=True)
    for size in (5, 8, 13):
        tensors = make_tensors((2, 18, size, size + 2), OUT)
        assert torch.equal(compiled(*tensors), ops.conv3x3(*tensors))


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return ops.conv3x3(*tensors)

    tensors = tuple(make_tensors(SHAPE, OUT))
    program = torch.export.export(Module(), tensors)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*tensors), Module()(*tensors)) < 1e-6


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight", "bias")])
def test_gradients_of_gradients(wanted):
    """As a gradient penalty takes them."""

    def penalty_gradients(tensors):
        leaves = dict(zip(("x", "weight", "bias"), as_leaves(tensors), strict=True))
        out = ops.conv3x3(*leaves.values())
        grads = torch.autograd.grad(
            out.square().sum(), [leaves[name] for name in wanted], create_graph=True
        )
        sum(grad.square().sum() for grad in grads).backward()
        return [leaf.grad for leaf in leaves.values()]

    tensors = [tensor / 4 for tensor in make_tensors(SHAPE, OUT)]
    expected = penalty_gradients([tensor.double() for tensor in tensors])
    for actual, wanted_grad in zip(penalty_gradients(tensors), expected, strict=True):
        assert relative_error(actual, wanted_grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    leaves = as_leaves(make_tensors(SHAPE, OUT))
    with torch.autocast("cpu", dtype):
        out = ops.conv3x3(*leaves)
        mixed = ops.conv3x3(leaves[0].to(dtype), *leaves[1:])
    assert out.dtype == mixed.dtype == dtype
    assert torch.equal(out, mixed)
    assert_exact("out", out, F.conv2d(*(t.to(dtype).double() for t in leaves), padding=1), 1)
    out.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_saved_for_backward():
    """The maps and the weight themselves, and nothing else."""
    leaves = as_leaves(make_tensors(SHAPE, OUT))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.conv3x3(*leaves)
    assert sorted(t.numel() for t in saved) == sorted(t.numel() for t in leaves[:2])
    assert {t.data_ptr() for t in saved} == {leaf.data_ptr() for leaf in leaves[:2]}


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_what_requires_a_gradient_gets_one(frozen):
    tensors = make_tensors(SHAPE, OUT)
    whole, leaves = as_leaves(tensors), as_leaves(tensors)
    for place in frozen:
        leaves[place].requires_grad_(False)
    for each in (whole, leaves):
        ops.conv3x3(*each).square().sum().backward()
    for place, (leaf, expected) in enumerate(zip(leaves, whole, strict=True)):
        if place in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected.grad)


def test_backward_computes_no_more_than_is_needed():
    x, weight, bias = make_tensors(SHAPE, OUT)
    grad = torch.randn_like(OP(x, weight, bias, 1))
    both = BACKWARD_OP(grad, x, weight, 1, [True, True])
    for place in (0, 1):
        needs = [place == 0, place == 1]
        grads = BACKWARD_OP(grad, x, weight, 1, needs)
        assert torch.equal(grads[place], both[place])
        assert grads[1 - place].numel() == 0
