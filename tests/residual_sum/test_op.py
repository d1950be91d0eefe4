"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import FORMATS, relative_error
from tests.residual_sum.cases import arguments_of, copies, make_leaves
from tests.residual_sum.test_numbers import ours

OPS = torch.ops.dlkernels


@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck_of_the_passes(memory_format):
    x, out = (torch.randn(2, 16, 5, 5).contiguous(memory_format=memory_format) for _ in range(2))
    mean, slope, offset = torch.randn(16), torch.randn(2, 16), torch.randn(2, 16)
    calls = [
        (OPS.residual_sum_moments, (x,)),
        (OPS.residual_sum, (x, out, mean, slope, offset, True)),
        (OPS.residual_sum_reduce, (x, out, x, mean)),
        (OPS.residual_sum_backward, (x, out, x, mean, slope, offset, mean, True)),
        (OPS.residual_sum_backward, (x, None, x, mean, slope, offset, mean, False)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("squeezed", [0, 4])
def test_compile_without_graph_breaks(squeezed):
    leaves = make_leaves((2, 16, 5, 5, squeezed))
    function = lambda *t: ours(*arguments_of(list(t))).out * 2  # noqa: E731
    eager, compiled = copies(leaves), copies(leaves)
    expected = function(*eager)
    actual = torch.compile(function, fullgraph=True)(*compiled)
    expected.sum().backward()
    actual.sum().backward()
    assert relative_error(actual, expected) < 1e-6
    for a, b in zip(eager, compiled, strict=True):
        assert a is None or relative_error(b.grad, a.grad) < 1e-5


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return ours(*arguments_of(list(tensors))).out

    tensors = tuple(make_leaves((2, 16, 5, 5, 4)))
    program = torch.export.export(Module(), tensors)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(*tensors), Module()(*tensors)) < 1e-6


def test_autocast_leaves_dtypes_as_they_are():
    leaves = make_leaves((2, 16, 5, 5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(*arguments_of(leaves)).out
    assert out.dtype == torch.float32
    assert torch.equal(out, ours(*arguments_of(leaves)).out)


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_saved_for_backward(activation):
    leaves = make_leaves((2, 16, 6, 5, 4))
    saved = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t
    )
    with hooks:
        out = ours(*arguments_of(leaves, ("relu", "sigmoid", activation))).out
    parameters = {leaf.data_ptr() for leaf in leaves[2:]}
    maps = {t.data_ptr() for t in saved.values() if t.numel() >= out.numel()}
    assert maps == {leaves[0].data_ptr()} | ({out.data_ptr()} if activation == "relu" else set())
    # mean of each sample, gates and hidden values; mean and variance.
    small = [t for t in saved.values() if t.data_ptr() not in maps | parameters]
    assert sum(t.nbytes for t in small) == 4 * (2 * 16 + 2 * 16 + 2 * 4 + 16 + 16)


def test_frozen_parameters_and_shortcuts_get_no_gradient():
    leaves = make_leaves((2, 16, 5, 5, 4))
    for leaf in leaves[1:]:
        leaf.requires_grad_(False)
    ours(*arguments_of(leaves)).out.sum().backward()
    assert leaves[0].grad is not None
    assert all(leaf.grad is None for leaf in leaves[1:])


def test_second_derivative_is_refused_and_the_reference_has_it():
    def second(leaves):
        out = ours(*arguments_of(leaves)).out
        (first,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        first.square().sum().backward()

    leaves = make_leaves((2, 8, 3, 3, 2))
    with pytest.raises(NotImplementedError, match="residual_sum_backward"):
        second(copies(leaves))
    with use_backend("reference"):
        second(leaves)
    assert leaves[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(8, 4, 4)}, ValueError, r"x must have shape \[N, C, H, W\]"),
        ({"shortcut": torch.randn(2, 8, 4, 5)}, ValueError, r"shortcut .*\[2, 8, 4, 4\]"),
        ({"shortcut": torch.randn(2, 8, 4, 4).half()}, TypeError, "shortcut.*float16"),
        ({"norm": None}, TypeError, "norm must be a Norm, but is NoneType"),
        ({"norm": ops.Norm(torch.ones(7))}, ValueError, r"norm.weight must have shape \[8\]"),
        ({"norm": ops.Norm(activation="relu")}, ValueError, "norm.activation .*'relu'"),
        ({"excitation": 3}, TypeError, "excitation must be an Excitation or None, but is int"),
        ({"activation": "silu"}, ValueError, "activation must be one of .*'silu'"),
    ],
)
def test_bad_arguments(change, error, message):
    x = torch.randn(2, 8, 4, 4)
    arguments = {"x": x, "shortcut": x, "norm": ops.Norm(), **change}
    with pytest.raises(error, match=message):
        ops.residual_sum(**arguments)


def test_batch_statistics_of_one_value():
    x = torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match="more than one value per channel"):
        ops.residual_sum(x, x, ops.Norm())
