"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors, memory."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.measure import peak_cpu_memory
from tests.asff.cases import MODES, leaves_of, make_inputs
from tests.numbers import FORMATS, relative_error

OP = torch.ops.dlkernels.asff_fuse.default
BACKWARD_OP = torch.ops.dlkernels.asff_fuse_backward.default


def fuse(*tensors, mode="nearest"):
    return ops.asff_fuse(tensors[:-1], tensors[-1], mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, mode):
    *features, logits = leaves_of(make_inputs((2, 6, 8, 8), (4, 1, 2), memory_format=memory_format))
    torch.library.opcheck(OP, (features, logits, mode))


def test_opcheck_of_other_strides():
    *features, logits = [t.transpose(2, 3) for t in make_inputs((2, 6, 8, 4), (2, 1))]
    torch.library.opcheck(OP, (features, logits, "nearest"))


def test_opcheck_of_backward():
    *features, logits = make_inputs((2, 6, 8, 8), (4, 1, 2))
    torch.library.opcheck(
        BACKWARD_OP,
        (torch.ones(2, 6, 8, 8), features, logits, "bilinear"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_without_graph_breaks():
    inputs = make_inputs((2, 6, 8, 8), (4, 1, 2))
    ours, compiled = leaves_of(inputs), leaves_of(inputs)
    function = lambda *t: fuse(*t) * 2  # noqa: E731
    expected = function(*ours)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.sum().backward()
    actual.sum().backward()
    assert torch.equal(actual, expected)
    for a, b in zip(ours, compiled, strict=True):
        assert relative_error(b.grad, a.grad) < 1e-6


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return fuse(*tensors)

    tensors = tuple(make_inputs((2, 6, 8, 8), (4, 1, 2)))
    program = torch.export.export(Module(), tensors)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*tensors), fuse(*tensors)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    leaves = leaves_of(make_inputs((2, 6, 8, 8), (2, 1)))
    with torch.autocast("cpu", dtype):
        out = fuse(*leaves)
        mixed = fuse(leaves[0].to(dtype), *leaves[1:])
    assert out.dtype == mixed.dtype == dtype
    assert torch.equal(out, mixed)
    out.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


@pytest.mark.parametrize("mode", MODES)
def test_saved_for_backward(mode):
    leaves = leaves_of(make_inputs((2, 6, 8, 8), (4, 1, 2)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fuse(*leaves, mode=mode)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in leaves}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_enlarged_map_is_stored(memory_format, mode):
    """Beyond its results a training step holds the weights and their gradients alone."""
    shape = (2, 64, 32, 32)
    leaves = leaves_of(make_inputs(shape, (4, 2, 1), memory_format=memory_format))
    grad = torch.randn(shape).contiguous(memory_format=memory_format)
    results = grad.nbytes + sum(leaf.nbytes for leaf in leaves)
    weights = leaves[-1].nbytes
    peak = peak_cpu_memory(lambda: fuse(*leaves, mode=mode).backward(grad))
    assert results <= peak <= results + 2 * weights


def test_frozen_levels_get_no_gradient():
    leaves = leaves_of(make_inputs((2, 6, 8, 8), (4, 1, 2)))
    leaves[1].requires_grad_(False)
    fuse(*leaves).sum().backward()
    assert leaves[1].grad is None
    assert all(leaves[i].grad is not None for i in (0, 2, 3))


def test_second_derivative_is_refused_and_the_reference_has_it():
    def second(leaves):
        (first,) = torch.autograd.grad(fuse(*leaves).square().sum(), leaves[0], create_graph=True)
        first.square().sum().backward()

    inputs = make_inputs((2, 4, 4, 4), (2, 1))
    with pytest.raises(NotImplementedError, match="asff_fuse_backward"):
        second(leaves_of(inputs))
    leaves = leaves_of(inputs)
    with use_backend("reference"):
        second(leaves)
    assert leaves[0].grad.abs().sum() > 0
