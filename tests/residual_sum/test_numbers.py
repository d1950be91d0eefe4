"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.residual_sum import reference
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact, relative_error
from tests.residual_sum.cases import CHOICES, NAMES, SHAPES, arguments_of, copies, make_leaves


def ours(*arguments):
    *arguments, activation = arguments
    return ops.residual_sum(*arguments, activation=activation)


def run(function, leaves, grad, *options):
    out, mean, var = function(*arguments_of(leaves, *options))
    out.backward(grad.to(out))
    return out, mean, var, [None if leaf is None else leaf.grad for leaf in leaves]


def near_kink(leaves, choices, evaluation):
    """Where rounding decides whether a ReLU passes a gradient."""
    options = (*choices[:2], "identity")
    return reference.residual_sum(*arguments_of(leaves, options, evaluation))[0].abs() < 1e-5


def check(shape, dtype, memory_format, choices, evaluation):
    leaves = make_leaves(shape, dtype, memory_format, biases=choices[2] == "relu")
    exact = copies(leaves, torch.float64)
    grad = torch.randn(shape[:4]).to(dtype)
    grad[near_kink(exact, choices, evaluation)] = 0
    out, mean, var, grads = run(ours, leaves, grad, choices, evaluation)
    wanted, wanted_mean, wanted_var, wanted_grads = run(
        reference.residual_sum, exact, grad, choices, evaluation
    )
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert mean.dtype == var.dtype == torch.float32
    length = shape[0] * shape[2] * shape[3]
    assert_exact("out", out, wanted, length)
    assert_exact("mean", mean, wanted_mean, length)
    assert_exact("var", var, wanted_var, length)
    for name, actual, expected in zip(NAMES, grads, wanted_grads, strict=True):
        if expected is not None:
            assert actual.dtype == dtype
            assert_exact(name, actual, expected, max(length, shape[1]))


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, memory_format, choices, evaluation):
    check(shape, dtype, memory_format, choices, evaluation)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_as_exact_as_eager(memory_format, device, backend):
    leaves = make_leaves((4, 96, 28, 28, 8), memory_format=memory_format)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
    grad = torch.randn(4, 96, 28, 28)
    with use_backend(backend):
        out, _, _, grads = run(ours, copies(leaves), grad)
    eager, _, _, eager_grads = run(reference.residual_sum, copies(leaves), grad)
    exact, _, _, exact_grads = run(reference.residual_sum, copies(leaves, torch.float64), grad)
    rounding = torch.finfo(torch.float32).eps
    for name, a, b, c in zip(
        ("out", *NAMES), (out, *grads), (eager, *eager_grads), (exact, *exact_grads), strict=True
    ):
        error, eager_error = relative_error(a, c), relative_error(b, c)
        assert error <= 2 * max(eager_error, 4 * rounding), f"{name}: {error}, {eager_error}"


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_mean_far_from_zero_costs_no_digits(memory_format):
    leaves = make_leaves((3, 8, 30, 30, 2), memory_format=memory_format)
    leaves[0].data += 1000
    *_, var, _ = run(ours, leaves, torch.ones(3, 8, 30, 30))
    exact = leaves[0].detach().double().var((0, 2, 3), correction=0)
    assert relative_error(var, exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("evaluation", [False, True])
def test_nan_and_infinity_propagate(value, dtype, evaluation):
    leaves = make_leaves((2, 18, 5, 5, 0), dtype)
    leaves[0].data[1, 3, 2, 2] = value
    out = ours(*arguments_of(leaves, evaluation=evaluation)).out
    wanted, _, _ = reference.residual_sum(
        *arguments_of(copies(leaves, torch.float64), evaluation=evaluation)
    )
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4, 2), (2, 6, 0, 4, 2), (0, 6, 4, 4, 0)])
def test_empty_maps(shape, memory_format):
    leaves = make_leaves(shape, memory_format=memory_format)
    out, mean, var, grads = run(ours, leaves, torch.zeros(shape[:4]))
    assert out.shape == grads[0].shape == shape[:4]
    if shape[0] == 0:
        assert mean.abs().sum() == var.abs().sum() == 0
        assert all(grad.abs().sum() == 0 for grad in grads if grad is not None)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2, 1:-1],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.flip(1)[..., 1:],
    ],
)
def test_other_strides_and_views(view):
    x = view(torch.randn(3, 12, 8, 6))
    leaves = make_leaves((*x.shape, 3))
    leaves[0] = x
    grad = torch.randn(x.shape)
    out = ours(*arguments_of(leaves)).out
    out.backward(grad.flip(0).flip(0).transpose(2, 3).contiguous().transpose(2, 3))
    exact = copies(leaves, torch.float64)
    wanted, _, _ = reference.residual_sum(*arguments_of(exact))
    wanted.backward(grad.double())
    assert_exact("out", out, wanted, x.numel())
    assert_exact("gradient", leaves[1].grad, exact[1].grad, x.numel())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format):
    leaves = make_leaves((5, 70, 19, 17, 9), memory_format=memory_format)
    grad = torch.randn(5, 70, 19, 17)
    first = run(ours, copies(leaves), grad)
    for _ in range(5):
        again = run(ours, copies(leaves), grad)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[3], again[3], strict=True))


def test_gradcheck_of_float64():
    leaves = make_leaves((2, 5, 3, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: ours(*arguments_of(list(t), CHOICES["others"])).out, leaves
    )
