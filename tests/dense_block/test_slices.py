"""channel_statistics and bn_relu_conv1x1 on a slice of a buffer: numbers, contract, bad input."""

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.measure import peak_cpu_memory
from dlkernels.ops import NormConv
from tests.dense_block.cases import Shape, gradients_of, leaves_of, make_layers, make_maps
from tests.dense_block.cases import running_of as running_by_layer
from tests.numbers import DTYPES, FORMATS, assert_exact, relative_error

# Maps [n, c, h, w], the slice's first channel, and its count; products of 9 columns.
CASES = {
    "one pixel": ((5, 3, 1, 1), 1, 2),
    "non-aligned": ((2, 11, 5, 3), 3, 7),
    "several blocks": ((2, 150, 16, 15), 10, 137),
    "whole": ((2, 16, 6, 6), 0, 16),
}


def make_case(case, dtype=torch.float32, memory_format=torch.contiguous_format):
    (n, c, h, w), first, count = CASES[case]
    maps = make_maps(Shape(n, c, h, w, 1, 1, 0), dtype, memory_format)
    shift = 2.0 if dtype == torch.float32 else 6.0
    ((layer, _),) = make_layers(Shape(n, count, h, w, 1, 1, 9), dtype, shift)
    return maps, layer, first, count


def conv(maps, layer, grad, dtype=None, **options):
    leaf = maps.detach().to(dtype or maps.dtype).clone().requires_grad_()
    ((layer,),) = leaves_of([[layer]], dtype)
    out = ops.bn_relu_conv1x1(leaf, layer, **options)
    out.backward(grad.to(out.dtype))
    named = {"maps": leaf.grad, **gradients_of([[layer]]), **running_by_layer([[layer]])}
    return {"out": out, **named}


def statistics(maps, grads, dtype=None, **options):
    leaf = maps.detach().to(dtype or maps.dtype).clone().requires_grad_()
    mean, variance = ops.channel_statistics(leaf, **options)
    torch.autograd.backward((mean, variance), [grad.to(mean.dtype) for grad in grads])
    return {"mean": mean, "variance": variance, "maps": leaf.grad}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_conv(case, dtype, memory_format, training):
    check_conv(*make_case(case, dtype, memory_format), memory_format, training)


def check_conv(maps, layer, first, count, memory_format, training):
    """Output, gradients and running statistics against the float64 formula."""
    grad = torch.randn(maps.shape[0], layer.weight.shape[0], *maps.shape[2:]).to(maps.dtype)
    options = {"first": first, "training": training}
    ours = conv(maps, layer, grad, **options)
    wanted = conv(maps, layer, grad, torch.float64, **options)
    assert ours["out"].dtype == maps.dtype
    assert ours["out"].is_contiguous(memory_format=memory_format)
    length = max(count, maps.numel() // maps.shape[1])
    for name, value in ours.items():
        assert_exact(name, value, wanted[name], length)
    outside = torch.cat([ours["maps"][:, :first], ours["maps"][:, first + count :]], 1)
    assert not outside.any()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_statistics(case, dtype, memory_format):
    check_statistics(*make_case(case, dtype, memory_format))


def check_statistics(maps, _, first, count):
    """The statistics of a slice and their gradients against the float64 formula."""
    grads = torch.randn(count), torch.randn(count)
    options = {"first": first, "count": count}
    ours = statistics(maps, grads, **options)
    wanted = statistics(maps, grads, torch.float64, **options)
    assert ours["mean"].dtype == torch.float32
    for name, value in ours.items():
        assert_exact(name, value, wanted[name], maps.numel() // maps.shape[1])


def test_no_copy_of_the_slice():
    maps, layer, *_ = make_case("several blocks")
    maps = torch.randn(8, 150, 64, 64)

    def evaluate():
        ops.bn_relu_conv1x1(maps, layer, first=10, training=False)

    evaluate()
    # The result, and tiles in the scratch memory of two threads, far less than the slice's 18 MB.
    assert peak_cpu_memory(evaluate) < 4 * 8 * 9 * 64 * 64 + 4_000_000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(value):
    maps, layer, first, count = make_case("non-aligned")
    maps[1, first + 1, 2, 2] = value
    ours = ops.bn_relu_conv1x1(maps, layer, first=first, training=False)
    ((doubled,),) = leaves_of([[layer]], torch.float64)
    wanted = ops.bn_relu_conv1x1(maps.double(), doubled, first=first, training=False)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())
    mean, _ = ops.channel_statistics(maps, first, count)
    assert not mean[1].isfinite()
    assert mean[0].isfinite()


def test_empty_batch():
    maps, layer, first, _ = make_case("non-aligned")
    results = conv(maps[:0], layer, torch.zeros(0, 9, 5, 3), first=first, training=False)
    assert results["out"].shape == (0, 9, 5, 3)
    assert not results["layers[0][0].weight"].any()


@pytest.mark.parametrize("view", [lambda x: x.transpose(2, 3), lambda x: x[:, 1:, 1:]])
def test_other_strides(view):
    maps, layer, first, _ = make_case("several blocks")
    maps = view(torch.cat([maps, maps[:, :1]], 1))
    grad = torch.randn(maps.shape[0], 9, *maps.shape[2:])
    ours = conv(maps, layer, grad, first=first, training=True)
    wanted = conv(maps, layer, grad, torch.float64, first=first, training=True)
    for name, value in ours.items():
        assert_exact(name, value, wanted[name], 1000)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(memory_format, training):
    maps, layer, first, count = make_case("non-aligned", memory_format=memory_format)
    ((layer,),) = leaves_of([[layer]])
    running = (None, None) if training else (layer.running_mean, layer.running_var)
    tensors = layer.weight, layer.norm_weight, layer.norm_bias
    maps.requires_grad_()
    namespace = torch.ops.dlkernels
    torch.library.opcheck(
        namespace.bn_relu_conv1x1.default, (maps, *tensors, *running, first, 1e-5)
    )
    torch.library.opcheck(namespace.channel_statistics.default, (maps, first, count))


def test_compile_without_graph_breaks():
    maps, layer, first, count = make_case("non-aligned")

    def function(maps, layer):
        out = ops.bn_relu_conv1x1(maps, layer, first=first, training=True)
        mean, variance = ops.channel_statistics(maps, first, count)
        return out.sum() + (mean * variance).sum()

    def step(function):
        leaf = maps.clone().requires_grad_()
        ((own,),) = leaves_of([[layer]])
        function(leaf, own).backward()
        return {"maps": leaf.grad, **gradients_of([[own]])}

    expected, compiled = step(function), step(torch.compile(function, fullgraph=True))
    for name, grad in expected.items():
        assert relative_error(compiled[name], grad) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    maps, layer, first, _ = make_case("non-aligned")
    ((layer,),) = leaves_of([[layer]])
    with torch.autocast("cpu", dtype):
        out = ops.bn_relu_conv1x1(maps.requires_grad_(), layer, first=first, training=True)
        with use_backend("reference"):
            plain = ops.bn_relu_conv1x1(maps, layer, first=first, training=True)
    assert out.dtype == plain.dtype == dtype
    out.float().sum().backward()
    gradients = maps.grad, layer.weight.grad, layer.norm_weight.grad
    assert all(grad.dtype == torch.float32 for grad in gradients)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck_of_float64(training):
    maps = make_maps(Shape(2, 5, 3, 2, 1, 1, 0), torch.float64).requires_grad_()
    ((layer, _),) = leaves_of(make_layers(Shape(2, 3, 3, 2, 1, 2, 4)), torch.float64)

    def function(maps, *_):
        return ops.bn_relu_conv1x1(maps, layer, first=1, training=training, momentum=0.0)

    leaves = [t for t in layer if t.requires_grad]
    assert torch.autograd.gradcheck(function, (maps, *leaves))
    assert torch.autograd.gradcheck(lambda maps: ops.channel_statistics(maps, 1, 3), (maps,))


@pytest.mark.parametrize("first", [-1, 5, 11, 2**62])
def test_slices_out_of_range(first):
    maps, layer, *_ = make_case("non-aligned")
    wanted = rf"slice must lie within the 11 channels of maps, but is \[{first}, {first + 7}\)"
    with pytest.raises(ValueError, match=wanted):
        ops.bn_relu_conv1x1(maps, layer, first=first, training=True)
    with pytest.raises(ValueError, match=wanted):
        ops.channel_statistics(maps, first, 7)
    # The bare ops check for themselves.
    with pytest.raises(RuntimeError, match="channels of the slice must be among"):
        torch.ops.dlkernels.channel_statistics(maps, first, 7)
    tensors = layer.weight, layer.norm_weight, layer.norm_bias
    with pytest.raises(RuntimeError, match="channels of the slice must be among"):
        torch.ops.dlkernels.bn_relu_conv1x1(maps, *tensors, None, None, first, 1e-5)


@pytest.mark.parametrize(
    ("changes", "training", "error", "message"),
    [
        ({"weight": torch.randn(9, 7, 3, 3)}, True, ValueError, r"layer.weight .*\[9, 7, 1, 1\]"),
        ({"weight": torch.randn(9, 7)}, True, ValueError, r"layer.weight .*\[9, 7\]"),
        ({"weight": None}, True, TypeError, "layer.weight must be a tensor, but is NoneType"),
        ({"norm_bias": torch.randn(8)}, True, ValueError, r"layer.norm_bias .*\[7\].*\[8\]"),
        ({"running_var": None}, False, ValueError, "running_var must be given outside training"),
    ],
)
def test_bad_layers(changes, training, error, message):
    maps, layer, first, _ = make_case("non-aligned")
    layer = NormConv(**(layer._asdict() | changes))
    with pytest.raises(error, match=message):
        ops.bn_relu_conv1x1(maps, layer, first=first, training=training)


def test_one_value_per_channel():
    _, layer, *_ = make_case("non-aligned")
    with pytest.raises(ValueError, match="maps must have more than one value per channel"):
        ops.bn_relu_conv1x1(torch.randn(1, 7, 1, 1), layer, training=True)


def test_in_place_changes_of_the_buffer_are_caught():
    maps, layer, first, _ = make_case("non-aligned")
    buffer = maps.requires_grad_() * 1
    out = ops.bn_relu_conv1x1(buffer, layer, first=first, training=True)
    buffer.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
