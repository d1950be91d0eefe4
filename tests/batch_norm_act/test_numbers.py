"""Outputs and gradients against the float64 formula and against eager PyTorch."""

import pytest
import torch

from dlkernels import nn, ops, use_backend
from dlkernels.batch_norm_act import reference
from tests.batch_norm_act.cases import ACTIVATIONS, NAMES, SHAPES, make_inputs
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact, relative_error

DEVICES_AND_BACKENDS = [pair for pair in DEVICES_AND_BACKENDS if pair[1] != "cuda"]


def plain(*tensors, eps=1e-5, activation="identity", negative_slope=0.01, pool=False):
    return reference.batch_norm_act(*tensors, eps, activation, negative_slope, pool)


def run(function, leaves, grads, **options):
    """The four outputs, and the gradients of the leaves; ``grads`` is of out and pooled."""
    outputs = function(*leaves, **options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=False) if o is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return outputs, [None if leaf is None else leaf.grad for leaf in leaves]


def near_kink(inputs):
    """Where rounding decides which of two slopes an activation has."""
    norm = plain(*inputs.leaves(torch.float64))[0]
    return torch.stack([(norm - kink).abs() < 1e-5 for kink in (-3, 0, 3, 6)]).any(0)


def check(shape, dtype, memory_format, activation, device, backend, pool=False, **present):
    inputs = make_inputs(shape, dtype, memory_format, device=device, **present)
    grads = [torch.randn(size, device=device).to(dtype) for size in (shape, shape[:2])]
    grads[0][near_kink(inputs)] = 0
    options = {"activation": activation, "negative_slope": 0.1, "pool": pool}
    with use_backend(backend):
        outputs, ours = run(ops.batch_norm_act, inputs.leaves(), grads, **options)
    expected, theirs = run(plain, inputs.leaves(torch.float64), grads, **options)

    assert outputs[0].dtype == dtype
    assert outputs[0].is_contiguous(memory_format=memory_format)
    length = shape[0] * shape[2] * shape[3]
    for name, a, b in zip(("out", "pooled", "mean", "var"), outputs, expected, strict=True):
        if b is not None:
            assert_exact(name, a, b, length)
    for name, leaf, a, b in zip(NAMES, inputs.tensors, ours, theirs, strict=True):
        if b is not None:
            assert a.dtype == leaf.dtype
            assert_exact(f"gradient of {name}", a, b, length)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("statistics", [False, True], ids=["training", "evaluation"])
def test_activations(statistics, dtype, memory_format, activation, device, backend):
    shape = SHAPES["several blocks of rows"]
    check(shape, dtype, memory_format, activation, device, backend, statistics=statistics)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", list(SHAPES.values())[1:], ids=list(SHAPES)[1:])
def test_shapes_and_pool(shape, dtype, memory_format, device, backend):
    check(shape, dtype, memory_format, "silu", device, backend, pool=True)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_and_sample_scale_without_affine(dtype, memory_format, device, backend):
    check(
        (3, 40, 9, 7),
        dtype,
        memory_format,
        "mish",
        device,
        backend,
        affine=False,
        residual=True,
        sample_scale=True,
    )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mean_far_from_zero(memory_format):
    """A sum of squares minus a squared sum would lose every digit here."""
    x = torch.randn(4, 40, 30, 30) + 1e4 * torch.randn(40, 1, 1)
    x = x.contiguous(memory_format=memory_format)
    var = ops.batch_norm_act(x).var
    assert relative_error(var, x.double().var((0, 2, 3), correction=0)) < 1e-6


@pytest.mark.parametrize("memory_format", FORMATS)
def test_as_exact_as_eager(memory_format):
    inputs = make_inputs((4, 96, 56, 56), memory_format=memory_format)
    grads = [torch.randn(4, 96, 56, 56)]
    exact, exact_grads = run(plain, inputs.leaves(torch.float64), grads, activation="silu")
    ours, our_grads = run(ops.batch_norm_act, inputs.leaves(), grads, activation="silu")
    eager, eager_grads = run(plain, inputs.leaves(), grads, activation="silu")
    rounding = torch.finfo(torch.float32).eps
    for name, a, b, c in zip(
        ("out", *NAMES[:3]),
        (ours[0], *our_grads[:3]),
        (eager[0], *eager_grads[:3]),
        (exact[0], *exact_grads[:3]),
        strict=True,
    ):
        error, eager_error = relative_error(a, c), relative_error(b, c)
        assert error <= 2 * max(eager_error, rounding), f"{name}: {error}, eager {eager_error}"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value, activation, memory_format):
    inputs = make_inputs((2, 18, 5, 5), memory_format=memory_format, statistics=True)
    inputs.tensors[0][1, 3, 2, 2] = value
    inputs.tensors[1].abs_()
    ours = ops.batch_norm_act(*inputs.tensors, activation=activation).out
    wanted = plain(*inputs.tensors, activation=activation)[0]
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty_maps(shape, memory_format):
    inputs = make_inputs(shape, memory_format=memory_format, statistics=True)
    outputs, grads = run(ops.batch_norm_act, inputs.leaves(), [torch.zeros(shape)])
    assert outputs[0].shape == grads[0].shape == shape
    assert all(grad.abs().sum() == 0 for grad in grads[1:3])


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
    out = ops.batch_norm_act(x, activation="silu").out
    wanted = plain(x.double(), *[None] * 6, activation="silu")[0]
    assert_exact("out", out, wanted, x.numel() // x.shape[1])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time_and_for_every_thread_count(memory_format):
    inputs = make_inputs((5, 70, 19, 17), memory_format=memory_format)
    grads = [torch.randn(5, 70, 19, 17), torch.randn(5, 70)]
    options = {"activation": "silu", "pool": True}
    first = run(ops.batch_norm_act, inputs.leaves(), grads, **options)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        again = run(ops.batch_norm_act, inputs.leaves(), grads, **options)
        assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first[1][:3], again[1][:3], strict=True))


@pytest.mark.parametrize("statistics", [False, True], ids=["training", "evaluation"])
def test_gradcheck_of_float64(statistics):
    leaves = make_inputs((2, 3, 3, 3), residual=True, statistics=statistics).leaves(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: ops.batch_norm_act(*t, activation="silu").out, leaves
    )


def test_reference_backend_is_the_formula():
    tensors = make_inputs((2, 8, 4, 4)).tensors
    with use_backend("reference"):
        outputs = ops.batch_norm_act(*tensors, activation="silu")
    assert torch.equal(outputs.out, plain(*tensors, activation="silu")[0])


def test_an_empty_batch_changes_no_statistics():
    """As in nn.BatchNorm2d; the gradients of weight and bias are 0."""
    module, usual = nn.BatchNormAct2d(6), torch.nn.BatchNorm2d(6)
    for norm in (module, usual):
        norm(torch.randn(0, 6, 4, 4)).sum().backward()
        assert norm.weight.grad.abs().sum() == 0
    for (name, ours), wanted in zip(module.named_buffers(), usual.buffers(), strict=True):
        assert torch.equal(ours, wanted), name


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_values_of_channels_in_either_dtype(backend):
    x = torch.randn(2, 6, 4, 4)
    weight, bias, mean, var = torch.rand(4, 6).bfloat16().float()
    mixed = (weight.bfloat16(), bias, mean, var.bfloat16())
    with use_backend(backend):
        out = ops.batch_norm_act(x.bfloat16(), *mixed).out
    wanted = plain(x.bfloat16().double(), *(v.double() for v in mixed), None, None)[0]
    assert_exact("out", out, wanted, 1)
