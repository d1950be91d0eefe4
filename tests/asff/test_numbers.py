"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.asff import reference
from tests.asff.cases import MODES, PYRAMIDS, leaves_of, make_inputs, names_of
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact, relative_error


def run(function, leaves, grad, mode):
    out = function(leaves[:-1], leaves[-1], mode)
    out.backward(grad.to(out.dtype))
    return out, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "factors"), PYRAMIDS.values(), ids=PYRAMIDS)
def test_outputs_and_gradients(shape, factors, dtype, memory_format, mode, device, backend):
    inputs = make_inputs(shape, factors, dtype, memory_format, device)
    grad = torch.randn(shape, device=device).to(dtype)
    with use_backend(backend):
        out, grads = run(ops.asff_fuse, leaves_of(inputs), grad, mode)
    doubles = leaves_of(inputs, torch.float64)
    expected, expected_grads = run(reference.asff_fuse, doubles, grad, mode)

    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    length = max(len(factors), shape[1], 4 * max(factors) ** 2)
    assert_exact("out", out, expected, len(factors))
    for name, actual, wanted in zip(names_of(inputs), grads, expected_grads, strict=True):
        assert actual.dtype == dtype
        assert_exact(f"gradient of {name}", actual, wanted, length)


def test_nearest_is_repetition():
    """An oracle that shares nothing with interpolate: the weights of one level are all."""
    small, large = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 8, 10)
    logits = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).expand(2, 2, 8, 10)
    out = ops.asff_fuse([small, large], logits)
    assert torch.equal(out, small.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(ops.asff_fuse([small, large], -logits), large)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_as_exact_as_eager(memory_format, mode):
    inputs = make_inputs((2, 256, 52, 52), (4, 2, 1), memory_format=memory_format)
    grad = torch.randn(2, 256, 52, 52)
    exact, exact_grads = run(reference.asff_fuse, leaves_of(inputs, torch.float64), grad, mode)
    ours, our_grads = run(ops.asff_fuse, leaves_of(inputs), grad, mode)
    eager, eager_grads = run(reference.asff_fuse, leaves_of(inputs), grad, mode)
    rounding = torch.finfo(torch.float32).eps
    for name, a, b, c in zip(
        ("out", *names_of(inputs)),
        (ours, *our_grads),
        (eager, *eager_grads),
        (exact, *exact_grads),
        strict=True,
    ):
        error, eager_error = relative_error(a, c), relative_error(b, c)
        assert error <= 2 * max(eager_error, rounding), f"{name}: {error}, eager {eager_error}"


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_and_infinity_propagate(memory_format, mode, value, index):
    inputs = make_inputs((2, 18, 8, 8), (4, 2, 1), memory_format=memory_format)
    inputs[index][1, 1, 1, 1] = value
    ours = ops.asff_fuse(inputs[:-1], inputs[-1], mode)
    wanted = reference.asff_fuse([t.double() for t in inputs[:-1]], inputs[-1].double(), mode)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 0, 4, 4)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nothing_to_fuse(shape, mode, memory_format):
    inputs = make_inputs(shape, (2, 1), memory_format=memory_format)
    out, grads = run(ops.asff_fuse, leaves_of(inputs), torch.zeros(shape), mode)
    assert out.shape == shape
    assert [grad.shape for grad in grads] == [t.shape for t in inputs]
    assert all(grad.abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: torch.cat([x, x], 3)[1:, ..., : x.shape[3]],
        lambda x: x.flip(1),
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
)
def test_other_strides_and_views(view):
    inputs = [view(t) for t in make_inputs((3, 12, 16, 16), (4, 1, 2))]
    out = ops.asff_fuse(inputs[:-1], inputs[-1])
    doubles = [t.double() for t in inputs]
    assert_exact("out", out, reference.asff_fuse(doubles[:-1], doubles[-1], "nearest"), 3)


@pytest.mark.parametrize("format_of_logits", FORMATS)
@pytest.mark.parametrize("format_of_largest", FORMATS)
def test_mixed_memory_formats(format_of_largest, format_of_logits):
    small, large, logits = make_inputs((2, 12, 8, 8), (2, 1))
    small = small.contiguous(memory_format=torch.channels_last)
    large = large.contiguous(memory_format=format_of_largest)
    logits = logits.contiguous(memory_format=format_of_logits)
    inputs = [small, large, logits]
    out, grads = run(ops.asff_fuse, leaves_of(inputs), torch.ones(2, 12, 8, 8), "nearest")
    assert out.is_contiguous(memory_format=format_of_largest)
    doubles = leaves_of(inputs, torch.float64)
    wanted, wanted_grads = run(reference.asff_fuse, doubles, out.new_ones(out.shape), "nearest")
    assert_exact("out", out, wanted, 2)
    for name, a, b in zip(names_of(inputs), grads, wanted_grads, strict=True):
        assert_exact(name, a, b, 12)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_of_any_strides(mode):
    inputs = make_inputs((2, 8, 8, 8), (2, 1))
    x, y = leaves_of(inputs), leaves_of(inputs, torch.float64)
    ops.asff_fuse(x[:-1], x[-1], mode).sum().backward()
    reference.asff_fuse(y[:-1], y[-1], mode).sum().backward()
    for name, a, b in zip(names_of(inputs), x, y, strict=True):
        assert_exact(name, a.grad, b.grad, 16)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format, mode, threads):
    torch.set_num_threads(threads)
    inputs = make_inputs((3, 70, 24, 40), (4, 1, 2), memory_format=memory_format)
    grad = torch.randn(3, 70, 24, 40)
    first = run(ops.asff_fuse, leaves_of(inputs), grad, mode)
    for _ in range(5):
        again = run(ops.asff_fuse, leaves_of(inputs), grad, mode)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_float64(mode):
    leaves = leaves_of(make_inputs((2, 3, 4, 8), (4, 2, 1)), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.asff_fuse(t[:-1], t[-1], mode), leaves)


def test_reference_backend_is_the_formula():
    *features, logits = make_inputs((2, 8, 4, 4), (2, 1))
    with use_backend("reference"):
        out = ops.asff_fuse(features, logits)
    assert torch.equal(out, reference.asff_fuse(features, logits, "nearest"))
