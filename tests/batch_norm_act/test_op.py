"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.batch_norm_act.cases import make_inputs
from tests.numbers import FORMATS, relative_error

OP = torch.ops.dlkernels.batch_norm_act.default


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("statistics", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_opcheck(memory_format, statistics, pool):
    inputs = make_inputs(
        (2, 16, 5, 5), memory_format=memory_format, statistics=statistics, residual=not pool
    )
    torch.library.opcheck(OP, (*inputs.leaves(), 1e-5, "silu", 0.0, pool))


def test_opcheck_of_other_strides():
    inputs = make_inputs((2, 16, 5, 7), affine=False, sample_scale=True)
    inputs.tensors[0] = inputs.tensors[0].transpose(2, 3)
    torch.library.opcheck(OP, (*inputs.tensors, 1e-5, "leaky_relu", 0.1, False))


def test_opcheck_of_backward():
    x, weight, bias, *_ = make_inputs((2, 16, 5, 5)).tensors
    out, pooled, mean, var = OP(x, weight, bias, *[None] * 4, 1e-5, "mish", 0.0, True)
    torch.library.opcheck(
        torch.ops.dlkernels.batch_norm_act_backward.default,
        (out, pooled, x, weight, bias, mean, var, None, True, 1e-5, "mish", 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_without_graph_breaks():
    inputs = make_inputs((2, 16, 5, 5), residual=True)
    function = lambda *t: ops.batch_norm_act(*t, activation="silu").out * 2  # noqa: E731
    ours, compiled = inputs.leaves(), inputs.leaves()
    expected = function(*ours)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.sum().backward()
    actual.sum().backward()
    assert torch.equal(actual, expected)
    for a, b in zip(ours, compiled, strict=True):
        if a is not None:
            assert relative_error(b.grad, a.grad) < 1e-6


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return ops.batch_norm_act(*tensors, activation="silu").out

    tensors = tuple(make_inputs((2, 16, 5, 5), statistics=True).tensors[:5])
    program = torch.export.export(Module(), tensors)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*tensors), Module()(*tensors)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype_of_the_maps(dtype):
    leaves = make_inputs((2, 16, 5, 5)).leaves()
    with torch.autocast("cpu", dtype):
        whole = ops.batch_norm_act(*leaves).out
        mixed = ops.batch_norm_act(leaves[0].to(dtype), *leaves[1:]).out
    assert whole.dtype == torch.float32
    assert mixed.dtype == dtype
    mixed.float().sum().backward()
    assert leaves[1].grad.dtype == torch.float32


def test_saved_for_backward():
    """The maps once, whatever the activation; the rest is of the size of the channels."""
    leaves = make_inputs((2, 16, 6, 5), residual=True).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.batch_norm_act(*leaves, activation="silu")
    assert sorted(t.numel() for t in saved) == [16, 16, 16, 16, 2 * 16 * 6 * 5]
    assert {leaf.data_ptr() for leaf in leaves[:3]} <= {t.data_ptr() for t in saved}


def test_only_the_pooled_values_get_a_gradient():
    leaves = make_inputs((2, 16, 5, 5)).leaves()
    expected = make_inputs((2, 16, 5, 5)).leaves()
    for leaf, value in zip(expected, leaves, strict=True):
        if leaf is not None:
            leaf.data.copy_(value)
    weights = torch.randn(2, 16)
    (ops.batch_norm_act(*leaves, activation="silu", pool=True).pooled * weights).sum().backward()
    with use_backend("reference"):
        pooled = ops.batch_norm_act(*expected, activation="silu", pool=True).pooled
    (pooled * weights).sum().backward()
    for a, b in zip(leaves[:3], expected[:3], strict=True):
        assert relative_error(a.grad, b.grad) < 1e-5


def test_frozen_weights_get_no_gradient():
    leaves = make_inputs((2, 16, 5, 5)).leaves()
    for leaf in leaves[1:3]:
        leaf.requires_grad_(False)
    ops.batch_norm_act(*leaves).out.square().sum().backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is leaves[2].grad is None


def test_second_derivative_is_refused_and_the_reference_has_it():
    def second(x):
        out = ops.batch_norm_act(x, activation="silu").out
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        first.square().sum().backward()

    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="batch_norm_act_backward"):
        second(x)
    with use_backend("reference"):
        second(x)
    assert x.grad.abs().sum() > 0
