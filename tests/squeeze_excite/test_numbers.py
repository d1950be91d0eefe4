"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.squeeze_excite import reference
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact, relative_error
from tests.squeeze_excite.cases import NAMES, OPTIONS, SHAPES, make_inputs


def run(function, leaves, grad, **options):
    out = function(*leaves, **options)
    out.backward(grad.to(out.dtype))
    return out, [None if leaf is None else leaf.grad for leaf in leaves]


def plain(*tensors, activation, gate, output_activation):
    return reference.squeeze_excite(*tensors, activation, gate, output_activation)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, dtype, memory_format, options, device, backend):
    shortcut = options["output_activation"] == "relu"
    bias = options["activation"] == "relu"
    inputs = make_inputs(shape, dtype, memory_format, bias, shortcut, device)
    grad = torch.randn(shape[:4], device=device).to(dtype)
    with use_backend(backend):
        out, grads = run(ops.squeeze_excite, inputs.leaves(), grad, **options)
    expected, expected_grads = run(plain, inputs.leaves(torch.float64), grad, **options)

    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    length = max(shape[1], shape[2] * shape[3])
    assert_exact("out", out, expected, length)
    for name, actual, wanted in zip(NAMES, grads, expected_grads, strict=True):
        if wanted is not None:
            assert actual.dtype == dtype
            assert_exact(f"gradient of {name}", actual, wanted, length)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_as_exact_as_eager(memory_format):
    options = OPTIONS["efficientnet"]
    inputs = make_inputs((4, 96, 56, 56, 8), memory_format=memory_format)
    grad = torch.randn(4, 96, 56, 56)
    exact, exact_grads = run(plain, inputs.leaves(torch.float64), grad, **options)
    ours, our_grads = run(ops.squeeze_excite, inputs.leaves(), grad, **options)
    eager, eager_grads = run(plain, inputs.leaves(), grad, **options)
    rounding = torch.finfo(torch.float32).eps
    for name, a, b, c in zip(
        ("out", *NAMES[:5]),
        (ours, *our_grads),
        (eager, *eager_grads),
        (exact, *exact_grads),
        strict=False,
    ):
        error, eager_error = relative_error(a, c), relative_error(b, c)
        assert error <= 2 * max(eager_error, rounding), f"{name}: {error}, eager {eager_error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nan_and_infinity_propagate(value, dtype, options):
    inputs = make_inputs((2, 18, 5, 5, 4), dtype)
    inputs.tensors[0][1, 3, 2, 2] = value
    tensors = inputs.tensors
    ours = ops.squeeze_excite(*tensors, **options)
    wanted = plain(*[None if t is None else t.double() for t in tensors], **options)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("shape", [(0, 6, 4, 4, 2), (2, 6, 0, 4, 2)])
def test_empty_maps(shape):
    inputs = make_inputs(shape)
    out, grads = run(
        ops.squeeze_excite, inputs.leaves(), torch.zeros(shape[:4]), **OPTIONS["plain"]
    )
    assert out.shape == shape[:4]
    assert grads[0].shape == shape[:4]
    if shape[0] == 0:
        assert all(grad.abs().sum() == 0 for grad in grads[1:5])


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
    n, c, h, w = x.shape
    tensors = make_inputs((n, c, h, w, 3)).tensors
    tensors[0] = x
    out = ops.squeeze_excite(*tensors)
    wanted = plain(*[None if t is None else t.double() for t in tensors], **OPTIONS["plain"])
    assert_exact("out", out, wanted, h * w)


def test_gradient_of_any_strides():
    inputs = make_inputs((2, 8, 4, 4, 2))
    x = inputs.leaves()
    ops.squeeze_excite(*x).sum().backward()
    y = inputs.leaves(torch.float64)
    plain(*y, **OPTIONS["plain"]).sum().backward()
    assert_exact("gradient of x", x[0].grad, y[0].grad, 16)


# One sample more than two threads. No plane is aligned; pixels are, since only such are streamed.
@pytest.mark.parametrize(
    ("channels", "memory_format"), [(57, torch.contiguous_format), (64, torch.channels_last)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_too_large_for_the_caches(dtype, channels, memory_format):
    shape = (3, channels, 233, 211, 5)
    inputs = make_inputs(shape, dtype, memory_format=memory_format, shortcut=True)
    grad = torch.randn(shape[:4]).to(dtype)
    out, grads = run(ops.squeeze_excite, inputs.leaves(), grad, **OPTIONS["se-resnet"])
    wanted, wanted_grads = run(
        plain, inputs.leaves(torch.float64), grad.double(), **OPTIONS["se-resnet"]
    )
    assert_exact("out", out, wanted, 233 * 211)
    for name, ours, exact in zip(NAMES, grads, wanted_grads, strict=True):
        assert_exact(name, ours, exact, 3 * 233 * 211)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format):
    inputs = make_inputs((5, 70, 19, 17, 9), memory_format=memory_format)
    grad = torch.randn(5, 70, 19, 17)
    first = run(ops.squeeze_excite, inputs.leaves(), grad)
    for _ in range(5):
        again = run(ops.squeeze_excite, inputs.leaves(), grad)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1][:5], again[1][:5], strict=True))


def test_gradcheck_of_float64():
    leaves = make_inputs((2, 5, 3, 3, 2), shortcut=True).leaves(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: ops.squeeze_excite(*t, activation="silu", output_activation="relu"), leaves
    )


def test_reference_backend_is_the_formula():
    tensors = make_inputs((2, 8, 4, 4, 2)).tensors
    with use_backend("reference"):
        out = ops.squeeze_excite(*tensors)
    assert torch.equal(out, plain(*tensors, **OPTIONS["plain"]))
