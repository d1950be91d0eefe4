"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import itertools

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import FORMATS, assert_exact, relative_error
from tests.pointwise_conv.cases import apply_norm, as_leaves, make_source, make_tensors, plain

OP = torch.ops.dlkernels.pointwise_conv.default
BACKWARD_OP = torch.ops.dlkernels.pointwise_conv_backward.default
SHAPE, OUT = (2, 18, 6, 5), 20
NO_NORM = (None, None, None, None, 1e-5, "identity")


def make(with_source=True, dtype=torch.float32):
    """x, weight and gate, and the source of x or None."""
    raw, weight, gate = make_tensors(SHAPE, OUT, dtype)
    source, x = make_source(raw) if with_source else (None, raw)
    return [x, weight, gate], source


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format, with_gate):
    x, weight, gate = as_leaves(make_tensors(SHAPE, OUT, memory_format=memory_format))
    torch.library.opcheck(OP, (x, weight, gate if with_gate else None))


def test_opcheck_of_other_strides():
    x, weight, gate = make_tensors(SHAPE, OUT)
    strided = as_leaves([x.transpose(2, 3), weight.t().contiguous().t(), gate.t().contiguous().t()])
    torch.library.opcheck(OP, tuple(strided))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_opcheck_of_backward(needs, memory_format):
    x, weight, gate = make_tensors(SHAPE, OUT, memory_format=memory_format)
    source, _ = make_source(x)
    grad = torch.randn_like(OP(x, weight, gate))
    for factors, norm in ((gate, source.norm), (gate, NO_NORM), (None, source.norm)):
        torch.library.opcheck(
            BACKWARD_OP,
            (grad, x, weight, factors, *norm, list(needs)),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("with_source", [False, True])
def test_compile_without_graph_breaks(with_source):
    def function(x, weight, gate):
        return ops.pointwise_conv(x, weight, gate, source) * 2

    tensors, source = make(with_source)
    ours, compiled = as_leaves(tensors), as_leaves(tensors)
    expected = function(*ours)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.square().sum().backward()
    actual.square().sum().backward()
    assert torch.equal(actual, expected)
    for a, b in zip(ours, compiled, strict=True):
        assert relative_error(b.grad, a.grad) < 1e-6


@pytest.mark.parametrize("with_gate", [False, True])
def test_compile_for_any_size(with_gate):
    compiled = torch.compile(ops.pointwise_conv, fullgraph=True, dynamic=True)
    for size in (5, 8, 13):
        x, weight, gate = make_tensors((2, 18, size, size + 2), OUT)
        arguments = (x, weight, gate if with_gate else None)
        assert torch.equal(compiled(*arguments), ops.pointwise_conv(*arguments))


@pytest.mark.parametrize("with_source", [False, True])
def test_export_uses_the_formula(with_source):
    class Module(torch.nn.Module):
        def forward(self, x, weight, gate, raw):
            result = source._replace(raw=raw) if with_source else None
            return ops.pointwise_conv(x, weight, gate, result)

    raw, weight, gate = make_tensors(SHAPE, OUT)
    source, x = make_source(raw)
    inputs = (x, weight, gate, raw)
    program = torch.export.export(Module(), inputs)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*inputs), Module()(*inputs)) < 1e-6


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, with_source):
    """Maps and weights are cast, gates are not; gradients come in the dtypes of the leaves."""
    tensors, source = make(with_source)
    leaves = as_leaves(tensors)
    narrow = [t.to(dtype) for t in tensors[:2]]
    with torch.autocast("cpu", dtype):
        out = ops.pointwise_conv(*leaves, source)
        mixed = ops.pointwise_conv(narrow[0], *leaves[1:], source)
    assert out.dtype == mixed.dtype == dtype
    assert torch.equal(out, mixed)
    exact = as_leaves([*narrow, tensors[2]], torch.float64)
    expected = plain(*exact)
    assert_exact("out", out, expected, 1)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, other.grad) < 2e-2


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


@pytest.mark.parametrize("with_gate", [False, True])
def test_saved_for_backward(with_gate):
    """The arguments themselves, and nothing else."""
    x, weight, gate = as_leaves(make_tensors(SHAPE, OUT))
    leaves = [x, weight, gate] if with_gate else [x, weight]
    saved = saved_by(lambda: ops.pointwise_conv(*leaves))
    assert {t.data_ptr() for t in saved} == {leaf.data_ptr() for leaf in leaves}
    assert sum(t.nbytes for t in saved) == sum(leaf.nbytes for leaf in leaves)


def test_saved_for_backward_with_a_source():
    """Of maps only the raw ones."""
    tensors, source = make()
    leaves = as_leaves(tensors)
    saved = saved_by(lambda: ops.pointwise_conv(*leaves, source))
    expected = [*leaves[1:], source.raw, *source.norm[:4]]
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in expected}
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in expected)


@pytest.mark.parametrize("with_source", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_what_requires_a_gradient_gets_one(frozen, with_source):
    tensors, source = make(with_source)
    whole, leaves = as_leaves(tensors), as_leaves(tensors)
    for place in frozen:
        leaves[place].requires_grad_(False)
    for each in (whole, leaves):
        ops.pointwise_conv(*each, source).square().sum().backward()
    for place, (leaf, expected) in enumerate(zip(leaves, whole, strict=True)):
        if place in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected.grad)


def test_a_source_gets_no_gradient():
    tensors, source = make()
    raw, *values = as_leaves([source.raw, *source.norm[:2]])
    leaves = as_leaves(tensors)
    recipe = ops.Source(raw, source.norm._replace(weight=values[0], bias=values[1]))
    ops.pointwise_conv(*leaves, recipe).sum().backward()
    assert raw.grad is values[0].grad is values[1].grad is None
    assert all(leaf.grad is not None for leaf in leaves)
    assert not ops.pointwise_conv(*tensors, recipe).requires_grad


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("out", [OUT, 150])
@pytest.mark.parametrize("channels", [18, 150])
@pytest.mark.parametrize("with_gate", [False, True])
def test_backward_computes_no_more_than_is_needed(with_gate, channels, out, memory_format):
    x, weight, gate = make_tensors((2, channels, 6, 5), out, memory_format=memory_format)
    gate = gate if with_gate else None
    grad = torch.randn_like(OP(x, weight, gate))
    arguments = (grad, x, weight, gate, *NO_NORM)
    everything = BACKWARD_OP(*arguments, [True] * 3)
    assert everything[0].is_contiguous(memory_format=memory_format)
    assert everything[2].shape == ((2, channels) if with_gate else (0, channels))
    for needs in itertools.product([False, True], repeat=3):
        grads = BACKWARD_OP(*arguments, list(needs))
        for need, actual, expected in zip(needs, grads, everything, strict=True):
            assert torch.equal(actual, expected) if need else actual.numel() == 0


def second_derivatives(tensors, source):
    """As a gradient penalty takes them."""
    leaves = as_leaves(tensors)
    out = ops.pointwise_conv(*leaves, source)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()
    return [leaf.grad for leaf in leaves]


def test_second_derivatives_are_refused_and_the_reference_has_them():
    tensors, source = make()
    with pytest.raises(NotImplementedError, match=r"pointwise_conv_backward .*use_backend"):
        second_derivatives(tensors, None)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second_derivatives(tensors, source)
    exact = [tensor.double() for tensor in tensors]
    expected = second_derivatives(exact, None)
    # A source does not cut the graph of x off.
    precise = ops.Source(source.raw.double(), source.norm)
    for a, b in zip(second_derivatives(exact, precise), expected, strict=True):
        assert torch.equal(a, b)
    with use_backend("reference"):
        for a, b in zip(second_derivatives(tensors, source), expected, strict=True):
            assert relative_error(a, b) < 1e-5


def test_where_only_the_norm_has_a_kernel(monkeypatch):
    """As on GPUs: PyTorch's products, of an input that is computed again."""
    from dlkernels.pointwise_conv import op

    tensors, source = make()
    has_kernel = op.backend.has_kernel
    monkeypatch.setattr(
        op.backend,
        "has_kernel",
        lambda name, x: name != "pointwise_conv" and has_kernel(name, x),
    )
    leaves, exact = as_leaves(tensors), as_leaves(tensors, torch.float64)
    exact[0] = apply_norm(*source).requires_grad_()
    saved = saved_by(lambda: ops.pointwise_conv(*leaves, source))
    assert {t.data_ptr() for t in saved if t.dim() == 4} == {source.raw.data_ptr()}
    out, expected = ops.pointwise_conv(*leaves, source), plain(*exact)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for leaf, other in zip(leaves, exact, strict=True):
        assert relative_error(leaf.grad, other.grad) < 1e-5
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second_derivatives(tensors, source)
