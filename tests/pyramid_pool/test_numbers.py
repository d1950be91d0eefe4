"""Outputs bit for bit and gradients to the pixel, against eager PyTorch."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact
from tests.pyramid_pool.cases import (
    SHAPES,
    cascade,
    make_grad,
    make_maps,
    make_ties,
    run,
    separate,
)

# Windows of 13 pixels, and in a cascade more windows than one lead to a pixel.
TERMS = 13 * 13


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, memory_format, device, backend):
    x = make_maps(shape, dtype, memory_format).to(device)
    grad = torch.randn(shape[0], 4 * shape[1], *shape[2:], device=device).to(dtype)
    with use_backend(backend):
        out, grad_x = run(ops.pyramid_pool, x, grad)
    assert out.dtype == grad_x.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    assert grad_x.is_contiguous(memory_format=memory_format)
    assert torch.equal(out, separate(x))
    expected, expected_grad = run(cascade, x.double(), grad)
    assert torch.equal(out.double(), expected)
    assert_exact("gradient", grad_x, expected_grad, TERMS)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_of_equal_pixels_the_first_gets_the_gradient(shape, memory_format):
    x = make_ties(shape, memory_format)
    grad = make_grad(x)
    for ours, theirs in zip(run(ops.pyramid_pool, x, grad), run(cascade, x, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_where_maxima_are_unique_gradients_are_those_of_separate_windows(memory_format):
    numbers = torch.randperm(2 * 18 * 13 * 17).view(2, 18, 13, 17).float()
    x = numbers.contiguous(memory_format=memory_format)
    grad = make_grad(x)
    for ours, theirs in zip(run(ops.pyramid_pool, x, grad), run(separate, x, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_all_small_sizes(memory_format):
    """Every way in which windows and maps end."""
    for height in range(1, 8):
        for width in range(1, 8):
            x = make_ties((1, 5, height, width), memory_format)
            grad = make_grad(x)
            ours, theirs = run(ops.pyramid_pool, x, grad), run(cascade, x, grad)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 130])
def test_channels_that_divide_nothing(channels, memory_format):
    x = make_maps((3, channels, 6, 7), memory_format=memory_format)
    grad = make_grad(x)
    for ours, theirs in zip(run(ops.pyramid_pool, x, grad), run(cascade, x, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_and_infinity(memory_format, value):
    """NaN is a maximum, and gets the gradient; so do infinities, several of which are equal."""
    x = make_maps((2, 18, 15, 17), memory_format=memory_format)
    x[0, :2, 3, 4] = value
    x[1, 1, 5:9, 6:8] = value
    x[1, 2] = value
    grad = make_grad(x)
    ours, theirs = run(ops.pyramid_pool, x, grad), run(cascade, x, grad)
    assert torch.equal(ours[0].nan_to_num(123.0), theirs[0].nan_to_num(123.0))
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_that_are_not_finite_reach_their_pixels_alone(memory_format, value):
    x = make_maps((1, 18, 15, 17), memory_format=memory_format)
    grad = make_grad(x)
    grad[0, 3, 6, 7] = grad[0, 50, 2, 3] = value
    ours, theirs = run(ops.pyramid_pool, x, grad), run(cascade, x, grad)
    assert torch.equal(ours[1].nan_to_num(123.0), theirs[1].nan_to_num(123.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_no_samples(memory_format, dtype):
    x = make_maps((0, 6, 4, 5), dtype, memory_format)
    out, grad_x = run(ops.pyramid_pool, x, None)
    assert out.shape == (0, 24, 4, 5)
    assert grad_x.shape == x.shape


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
    x = view(make_maps((3, 12, 13, 16)))
    assert torch.equal(ops.pyramid_pool(x), cascade(x))


@pytest.mark.parametrize("format_of_grad", FORMATS)
@pytest.mark.parametrize("format_of_x", FORMATS)
def test_mixed_memory_formats(format_of_x, format_of_grad):
    x = make_maps((2, 20, 9, 8), memory_format=format_of_x)
    grad = make_grad(x).contiguous(memory_format=format_of_grad)
    assert torch.equal(run(ops.pyramid_pool, x, grad)[1], run(cascade, x, grad)[1])


def test_gradient_of_any_strides():
    x, y = (make_ties((2, 8, 9, 8)).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    ops.pyramid_pool(x).sum().backward()
    cascade(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format, threads):
    torch.set_num_threads(threads)
    x = make_maps((3, 70, 24, 20), memory_format=memory_format)
    grad = torch.randn(3, 280, 24, 20)
    first = run(ops.pyramid_pool, x, grad)
    for _ in range(5):
        for ours, again in zip(first, run(ops.pyramid_pool, x, grad), strict=True):
            assert torch.equal(ours, again)


def test_gradcheck_of_float64():
    x = torch.randperm(2 * 3 * 6 * 7).view(2, 3, 6, 7).double().requires_grad_()
    assert torch.autograd.gradcheck(ops.pyramid_pool, x)


def test_reference_backend_is_the_formula():
    x = make_maps((2, 8, 13, 13))
    with use_backend("reference"):
        assert torch.equal(ops.pyramid_pool(x), cascade(x))
