"""What PyTorch needs of the op: opcheck, compile, export, autocast, saved tensors, memory."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.measure import peak_cpu_memory
from dlkernels.ops import NormConv
from tests.dense_block.cases import SMALL, Shape, gradients_of, leaves_of, make_layers, make_maps
from tests.numbers import FORMATS, relative_error

OP = torch.ops.dlkernels.dense_block.default
POOL = torch.ops.dlkernels.norm_relu_pool.default


def arguments(shape, memory_format=torch.contiguous_format, training=True, leaves=True):
    layers = leaves_of(make_layers(shape))
    stages = [stage for layer in layers for stage in layer]
    x = make_maps(shape, memory_format=memory_format).requires_grad_(leaves)
    columns = [[getattr(s, name) for s in stages] for name in stages[0]._fields]
    norm_weights, norm_biases, means, variances, weights = columns
    if not leaves:
        weights, norm_weights, norm_biases = (
            [t.detach() for t in column] for column in (weights, norm_weights, norm_biases)
        )
    running = ([], []) if training else (means, variances)
    return x, weights, norm_weights, norm_biases, *running, None, 0.0, 1e-5


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("saves", [True, False])
def test_opcheck(memory_format, training, saves):
    torch.library.opcheck(OP, (*arguments(SMALL, memory_format, training), saves))


def test_opcheck_without_bottleneck():
    torch.library.opcheck(OP, (*arguments(Shape(2, 6, 5, 4, 2, 4, 0)), True))


@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_backward(training):
    x, *rest = arguments(SMALL, training=training, leaves=False)
    out, bottlenecks, mean, variance = OP(x, *rest, True)
    torch.library.opcheck(
        torch.ops.dlkernels.dense_block_backward.default,
        (torch.ones_like(out), out, bottlenecks, mean, variance, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck_of_pool(memory_format, training):
    x = make_maps(SMALL, memory_format=memory_format).requires_grad_()
    stage = leaves_of(make_layers(SMALL))[0][0]
    running = (None, None) if training else (stage.running_mean, stage.running_var)
    torch.library.opcheck(POOL, (x, stage.norm_weight, stage.norm_bias, *running, 1e-5))


def test_compile_without_graph_breaks():
    layers = make_layers(SMALL)
    x = make_maps(SMALL)

    def step(function):
        leaf, own = x.clone().requires_grad_(), leaves_of(layers)
        out = function(leaf, own)
        out.square().sum().backward()
        return out, {"x": leaf.grad, **gradients_of(own)}, own

    after = NormConv(torch.rand(14), torch.randn(14), None, None, torch.randn(3, 14, 1, 1))

    def function(x, layers):
        y = ops.dense_block(x, layers, training=True)
        return ops.transition(y, after, training=True) * 2

    expected, grads, own = step(function)
    actual, compiled_grads, compiled_own = step(torch.compile(function, fullgraph=True))
    assert relative_error(actual, expected) < 1e-6
    for name, grad in grads.items():
        assert relative_error(compiled_grads[name], grad) < 1e-5, name
    assert relative_error(compiled_own[1][0].running_var, own[1][0].running_var) < 1e-6


def test_export_uses_the_formula():
    layers = make_layers(SMALL)

    class Module(torch.nn.Module):
        def forward(self, x):
            return ops.dense_block(x, layers, training=False)

    x = make_maps(SMALL)
    program = torch.export.export(Module(), (x,))
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(x), Module()(x)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    layers = leaves_of(make_layers(SMALL))
    x = make_maps(SMALL).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = ops.dense_block(x, layers, training=True)
        mixed = ops.dense_block(x.to(dtype), layers, training=True)
    assert out.dtype == dtype
    assert torch.equal(out, mixed)
    out.float().sum().backward()
    assert x.grad.dtype == layers[0][0].weight.grad.dtype == torch.float32
    assert layers[0][0].norm_weight.grad.dtype == torch.float32


@pytest.mark.parametrize("memory", ["balanced", "minimal"])
def test_saved_for_backward(memory):
    shape = Shape(2, 6, 7, 5, 3, 4, 8)
    layers, x = leaves_of(make_layers(shape)), make_maps(shape).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = ops.dense_block(x, layers, training=True, memory=memory)
    parameters = {t.data_ptr() for layer in layers for stage in layer for t in stage}
    kept = [t for t in saved if t.data_ptr() not in parameters]
    assert any(t.data_ptr() == out.data_ptr() for t in kept)
    pixels, statistics = 2 * 7 * 5, shape.channels + 3 * 8
    bottlenecks = 3 * 8 * pixels if memory == "balanced" else 0
    counted = sum(t.numel() * t.element_size() for t in kept)
    assert counted == 4 * (shape.channels * pixels + 2 * statistics + bottlenecks)


def test_nothing_is_kept_without_gradients():
    shape = Shape(2, 16, 16, 16, 4, 8, 32)
    x, layers = make_maps(shape), make_layers(shape)
    ops.dense_block(x, layers, training=False)
    with torch.no_grad():
        held = peak_cpu_memory(lambda: ops.dense_block(x, layers, training=False))
    # The result, one layer's bottleneck, and a thread's scratch memory and weights.
    assert held < 4 * 512 * (shape.channels + shape.width) + 4_000_000


def test_memory_is_linear_in_the_depth():
    def peak(layers):
        shape = Shape(4, 16, 32, 32, layers, 8, 32)
        own, x = leaves_of(make_layers(shape)), make_maps(shape).requires_grad_()

        def step():
            ops.dense_block(x, own, training=True, memory="minimal").sum().backward()

        step()
        return peak_cpu_memory(step)

    short, middle, long = peak(8), peak(16), peak(24)
    assert long - middle <= 1.1 * (middle - short)


def test_in_place_changes_of_the_result_are_caught():
    layers, x = leaves_of(make_layers(SMALL)), make_maps(SMALL).requires_grad_()
    out = ops.dense_block(x, layers, training=True)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_frozen_parameters_get_no_gradient():
    layers, x = leaves_of(make_layers(SMALL)), make_maps(SMALL).requires_grad_()
    for tensor in (layers[0][0].norm_weight, layers[1][1].weight):
        tensor.requires_grad_(False)
    ops.dense_block(x, layers, training=True).sum().backward()
    assert layers[0][0].norm_weight.grad is None
    assert layers[1][1].weight.grad is None
    assert x.grad is not None
    assert layers[0][1].weight.grad is not None


def test_second_derivative_is_refused():
    layers, x = leaves_of(make_layers(SMALL)), make_maps(SMALL).requires_grad_()
    out = ops.dense_block(x, layers, training=True)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="dense_block_backward"):
        first.sum().backward()
    with use_backend("reference"):
        out = ops.dense_block(x, layers, training=True)
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    first.sum().backward()
    assert x.grad.abs().sum() > 0
