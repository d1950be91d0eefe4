"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import math

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import FORMATS, relative_error
from tests.squeeze_excite.cases import make_inputs

OP = torch.ops.dlkernels.squeeze_excite.default


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    "options", [("silu", "sigmoid", "relu"), ("relu", "hard_sigmoid", "identity")]
)
def test_opcheck(memory_format, options):
    inputs = make_inputs((2, 16, 5, 5, 4), memory_format=memory_format, shortcut=True)
    torch.library.opcheck(OP, (*inputs.leaves(), *options))


def test_opcheck_of_other_strides():
    inputs = make_inputs((2, 16, 5, 7, 4), bias=False)
    inputs.tensors[0] = inputs.tensors[0].transpose(2, 3)
    torch.library.opcheck(OP, (*inputs.tensors, "relu", "sigmoid", "identity"))


def test_opcheck_of_backward():
    tensors = make_inputs((2, 16, 5, 5, 4)).tensors
    out, *saved = OP(*tensors, "relu", "sigmoid", "relu")
    options = ("relu", "sigmoid", True)
    torch.library.opcheck(
        torch.ops.dlkernels.squeeze_excite_backward.default,
        (torch.ones_like(out), *(tensors[i] for i in (0, 1, 3)), out, *saved, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_without_graph_breaks():
    inputs = make_inputs((2, 16, 5, 5, 4), shortcut=True)
    function = lambda *t: ops.squeeze_excite(*t, output_activation="relu") * 2  # noqa: E731
    ours, compiled = inputs.leaves(), inputs.leaves()
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
            return ops.squeeze_excite(*tensors)

    tensors = tuple(t for t in make_inputs((2, 16, 5, 5, 4)).tensors if t is not None)
    program = torch.export.export(Module(), tensors)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*tensors), Module()(*tensors)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    leaves = make_inputs((2, 16, 5, 5, 4)).leaves()
    with torch.autocast("cpu", dtype):
        out = ops.squeeze_excite(*leaves)
        mixed = ops.squeeze_excite(leaves[0].to(dtype), *leaves[1:])
    assert out.dtype == mixed.dtype == dtype
    assert torch.equal(out, mixed)
    out.float().sum().backward()
    assert leaves[0].grad.dtype == leaves[1].grad.dtype == torch.float32


@pytest.mark.parametrize("output_activation", ["identity", "relu"])
def test_saved_for_backward(output_activation):
    n, c, h, w, r = shape = (2, 16, 6, 5, 4)
    leaves = make_inputs(shape, shortcut=True).leaves()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.squeeze_excite(*leaves, output_activation=output_activation)
    weights = {leaves[1].data_ptr(), leaves[3].data_ptr()}
    activations = [t for t in saved if t.data_ptr() not in weights]
    expected = [(n, c, h, w), (n, c), (n, r), (n, c)]
    if output_activation == "relu":
        assert any(t.data_ptr() == out.data_ptr() for t in activations)
        expected.append((n, c, h, w))
    assert sorted(tuple(t.shape) for t in activations) == sorted(expected)
    assert sum(t.nbytes for t in activations) == 4 * sum(map(math.prod, expected))
    assert any(t.data_ptr() == leaves[0].data_ptr() for t in activations)


def test_frozen_weights_get_no_gradient():
    leaves = make_inputs((2, 16, 5, 5, 4)).leaves()
    for leaf in leaves[1:5]:
        leaf.requires_grad_(False)
    ops.squeeze_excite(*leaves).sum().backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:5])


def test_second_derivative_is_refused_and_the_reference_has_it():
    def second(leaves):
        (first,) = torch.autograd.grad(
            ops.squeeze_excite(*leaves).square().sum(), leaves[0], create_graph=True
        )
        first.square().sum().backward()

    inputs = make_inputs((2, 8, 3, 3, 2))
    with pytest.raises(NotImplementedError, match="squeeze_excite_backward"):
        second(inputs.leaves())
    leaves = inputs.leaves()
    with use_backend("reference"):
        second(leaves)
    assert leaves[0].grad.abs().sum() > 0
