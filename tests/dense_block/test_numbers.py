"""Outputs, gradients and running statistics against the float64 formula and eager PyTorch."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.dense_block.cases import (
    SHAPES,
    SMALL,
    Shape,
    gradients_of,
    leaves_of,
    make_layers,
    make_maps,
    running_of,
)
from tests.numbers import DTYPES, FORMATS, assert_exact, relative_error, tolerance


def run(x, layers, grad, dtype=None, **options):
    """Forward and backward: (out, gradients by name, running statistics by name)."""
    x = x.detach().to(dtype or x.dtype).clone().requires_grad_()
    layers = leaves_of(layers, dtype)
    out = ops.dense_block(x, layers, **{"training": True, **options})
    out.backward(grad.to(out.dtype))
    return out, {"x": x.grad, **gradients_of(layers)}, running_of(layers)


def reduction_length(shape: Shape) -> int:
    """The longest sum: over the batch's pixels, or of a convolution, once per layer."""
    pixels = shape.n * shape.h * shape.w
    return shape.layers * max(pixels, 9 * max(shape.width, shape.channels))


@pytest.mark.parametrize("memory", ["balanced", "minimal"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_outputs_and_gradients(shape, memory_format, training, memory):
    x, layers = make_maps(shape, memory_format=memory_format), make_layers(shape)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w)
    out, grads, running = run(x, layers, grad, training=training, memory=memory)
    wanted, wanted_grads, wanted_running = run(x, layers, grad, torch.float64, training=training)

    assert out.is_contiguous(memory_format=memory_format)
    length = reduction_length(shape)
    assert_exact("out", out, wanted, length)
    for name, actual in grads.items():
        assert_exact(f"gradient of {name}", actual, wanted_grads[name], length)
    for name, actual in running.items():
        assert_exact(name, actual, wanted_running[name], length)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", list(SHAPES.values())[1:], ids=list(SHAPES)[1:])
def test_sixteen_bits(shape, dtype, memory_format):
    # All ReLUs are open: the gradient is smooth. On maps of one pixel it would vanish for every
    # bias, which the next norm then takes away whole.
    layers = make_layers(shape, dtype, shift=6.0)
    x = make_maps(shape, dtype, memory_format)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w).to(dtype)
    out, grads, _ = run(x, layers, grad)
    wanted, wanted_grads, _ = run(x, layers, grad, torch.float64)
    with use_backend("reference"):
        eager, eager_grads, _ = run(x, layers, grad)

    assert out.dtype == dtype
    assert_exact("out", out, wanted, 1)
    assert relative_error(out, wanted) <= 2 * relative_error(eager, wanted)

    def errors(grads):
        return torch.tensor([relative_error(grads[name], wanted_grads[name]) for name in grads])

    ratios = errors(grads) / errors(eager_grads).clamp_min(1e-6)
    assert ratios.median() <= 1.2
    assert ratios.max() <= 2


@pytest.mark.parametrize("memory_format", FORMATS)
def test_as_exact_as_eager(memory_format):
    shape = Shape(2, 64, 28, 28, 3, 32, 128)
    x, layers = make_maps(shape, memory_format=memory_format), make_layers(shape)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w)
    exact, exact_grads, _ = run(x, layers, grad, torch.float64)
    ours, our_grads, _ = run(x, layers, grad)
    with use_backend("reference"):
        eager, eager_grads, _ = run(x, layers, grad)
    rounding = torch.finfo(torch.float32).eps
    pairs = {"out": (ours, eager, exact)}
    pairs |= {name: (our_grads[name], eager_grads[name], exact_grads[name]) for name in our_grads}
    for name, (a, b, c) in pairs.items():
        error, eager_error = relative_error(a, c), relative_error(b, c)
        assert error <= 2 * max(eager_error, rounding), f"{name}: {error}, eager {eager_error}"


@pytest.mark.parametrize("memory_format", FORMATS)
def test_statistics_of_maps_far_from_zero(memory_format):
    shape = Shape(2, 4, 40, 30, 1, 3, 0)
    x = make_maps(shape, memory_format=memory_format) + 1e3
    layers = make_layers(shape)
    _, _, running = run(x, layers, torch.zeros(2, 7, 40, 30), momentum=1.0)
    variance = x.double().var((0, 2, 3))
    assert_exact("running_var", running["layers[0][0].running_var"], variance, 2 * 40 * 30)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value):
    """To all that the formula gives them to; 3x3 convolutions give NaN for both, to whole tiles."""
    shape = Shape(2, 12, 12, 12, 1, 4, 8)
    x, layers = make_maps(shape), make_layers(shape)
    x[1, 3, 6, 6] = value
    ours = ops.dense_block(x, layers, training=False)
    doubled = leaves_of(layers, torch.float64)
    wanted = ops.dense_block(x.double(), doubled, training=False)
    assert not (ours.isfinite() & ~wanted.isfinite()).any()
    far = torch.ones(12, 12, dtype=torch.bool)
    far[4:8, 4:8] = False
    assert ours[..., far].isfinite().all()
    assert ours[0].isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    shape = Shape(0, 6, 4, 5, 2, 4, 8)
    out, grads, _ = run(
        make_maps(shape), make_layers(shape), torch.zeros(0, 14, 4, 5), training=training
    )
    assert out.shape == (0, 14, 4, 5)
    assert grads["x"].shape == (0, 6, 4, 5)
    assert all(grad.abs().sum() == 0 for grad in grads.values())


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2, 1:-1],
        lambda x: x[:1].expand(3, -1, -1, -1),
    ],
)
def test_other_strides(view):
    x = view(torch.randn(3, 12, 8, 6))
    shape = Shape(*x.shape, 2, 4, 8)
    layers = make_layers(shape)
    wanted = ops.dense_block(x.double(), leaves_of(layers, torch.float64), training=True)
    assert_exact("out", ops.dense_block(x, layers, training=True), wanted, 1000)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_same_bits_every_time(memory_format, memory):
    shape = SHAPES["several tiles"]
    x, layers = make_maps(shape, memory_format=memory_format), make_layers(shape)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w)
    first, first_grads, _ = run(x, layers, grad, memory=memory)
    for _ in range(3):
        again, grads, _ = run(x, layers, grad, memory=memory)
        assert torch.equal(again, first)
        assert all(torch.equal(grads[name], first_grads[name]) for name in grads)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("width", [0, 8])
def test_dropout(width, memory_format):
    shape = Shape(2, 6, 9, 8, 2, 4, width)
    x, layers = make_maps(shape, memory_format=memory_format), make_layers(shape)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w)
    torch.manual_seed(3)
    out, grads, _ = run(x, layers, grad, dropout=0.4)
    torch.manual_seed(3)
    wanted, wanted_grads, _ = run(x, layers, grad, torch.float64, dropout=0.4)
    zeros = (out[:, 6:] == 0).double().mean().item()
    assert 0.3 < zeros < 0.5
    assert_exact("out", out, wanted, reduction_length(shape))
    for name, actual in grads.items():
        assert_exact(f"gradient of {name}", actual, wanted_grads[name], reduction_length(shape))


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_float64(training):
    shape = Shape(2, 3, 3, 2, 2, 2, 4)
    layers = leaves_of(make_layers(shape), torch.float64)
    x = make_maps(shape, torch.float64).requires_grad_()
    leaves = [t for layer in layers for stage in layer for t in stage if t.requires_grad]

    def block(x, *_):
        return ops.dense_block(x, layers, training=training, momentum=0.0)

    assert torch.autograd.gradcheck(block, (x, *leaves))


def run_transition(shape, dtype, memory_format, training):
    """Results by name of a transition to ``shape.width`` channels, ours and in float64."""
    x = make_maps(shape, dtype, memory_format)
    ((stage, _),) = make_layers(shape, dtype, shift=2.0 if dtype == torch.float32 else 6.0)
    grad = torch.randn(shape.n, shape.width, shape.h // 2, shape.w // 2).to(dtype)

    def transition(leaf_dtype, norm_dtype):
        leaf = x.detach().to(leaf_dtype).clone().requires_grad_()
        ((layer,),) = leaves_of([[stage]], norm_dtype)
        out = ops.transition(leaf, layer, training=training)
        out.backward(grad.to(out.dtype))
        running = running_of([[layer]])
        return {"out": out, "x": leaf.grad, **gradients_of([[layer]]), **running}

    return transition(dtype, None), transition(torch.float64, torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 2), (7, 5), (12, 14), (3, 150)])
def test_transition(size, dtype, memory_format, training):
    ours, wanted = run_transition(Shape(2, 140, *size, 1, 20, 8), dtype, memory_format, training)
    assert ours["out"].is_contiguous(memory_format=memory_format)
    limit = tolerance(dtype, 2 * size[0] * size[1] + 140)
    for name, value in ours.items():
        assert relative_error(value, wanted[name]) <= limit, name


def test_an_empty_batch_changes_no_statistics():
    layers = make_layers(SMALL)
    before = {name: value.clone() for name, value in running_of(layers).items()}
    ops.dense_block(torch.randn(0, SMALL.c, 4, 4), layers, training=True)
    for name, value in running_of(layers).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("training", [True, False])
def test_norms_of_other_strides(training):
    """Every other value of a buffer."""

    def spread(tensor):
        return torch.stack([tensor, tensor], -1)[..., 0]

    layers = make_layers(SMALL)
    strided = [[stage._make(map(spread, stage)) for stage in layer] for layer in layers]
    x = make_maps(SMALL)
    ours = ops.dense_block(x, strided, training=training)
    assert torch.equal(ours, ops.dense_block(x, layers, training=training))
    for name, value in running_of(strided).items():
        assert torch.equal(value, running_of(layers)[name]), name
