"""The Triton kernels of dense_block and its pieces, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from dlkernels.dense_block import triton as kernels
from tests.dense_block.cases import Shape, leaves_of, make_layers, make_maps
from tests.dense_block.test_numbers import reduction_length, run, run_transition
from tests.dense_block.test_slices import check_conv, check_statistics, conv
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, assert_exact, relative_error, tolerance

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide):RuntimeWarning")

# Maps [n, c, h, w]; the slice's first channel and count; outputs of the convolution.
SLICES = {
    "one pixel": ((5, 3, 1, 1), 1, 2, 3),
    "non-aligned": ((2, 11, 5, 3), 3, 7, 9),
    "several blocks": ((2, 44, 5, 4), 4, 36, 34),
}
BLOCKS = {
    "bottlenecks": Shape(2, 6, 5, 4, 2, 4, 8),
    "no bottlenecks": Shape(2, 6, 5, 4, 2, 4, 0),
}


def make_slice(case, dtype=torch.float32, memory_format=torch.contiguous_format):
    (n, c, h, w), first, count, outputs = SLICES[case]
    maps = make_maps(Shape(n, c, h, w, 1, 1, 0), dtype, memory_format)
    # Few pixels of a channel can all but vanish under its ReLU, and with them all digits.
    shift = 2.0 if dtype == torch.float32 and n * h * w > 5 else 6.0
    ((layer, _),) = make_layers(Shape(n, count, h, w, 1, 1, outputs), dtype, shift)
    return maps, layer, first, count


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles on small maps, which spares the interpreter work."""
    for name, size in {"BLOCK_A": 16, "BLOCK_SUM": 16, "WIDEST": 32, "WEIGHT_STEPS": 1}.items():
        monkeypatch.setattr(kernels, name, size)


def test_triton_serves():
    for op in ("dense_block", "channel_statistics", "bn_relu_conv1x1", "norm_relu_pool"):
        for name in (op, f"{op}_backward"):
            assert availability()[name]["triton"] == "available"


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in SLICES),
        ("non-aligned", torch.bfloat16),
        ("non-aligned", torch.float16),
    ],
)
def test_conv(case, dtype, memory_format, training, small_tiles):
    check_conv(*make_slice(case, dtype, memory_format), memory_format, training)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SLICES)
def test_statistics(case, dtype, memory_format):
    check_statistics(*make_slice(case, dtype, memory_format))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((2, 2), torch.float32),
        ((6, 40), torch.float32),
        *(((7, 5), dtype) for dtype in DTYPES),
    ],
)
def test_transition(size, dtype, memory_format, training):
    shape = Shape(2, 40, *size, 1, 1, 8)
    ours, wanted = run_transition(shape, dtype, memory_format, training)
    assert ours["out"].is_contiguous(memory_format=memory_format)
    limit = tolerance(dtype, 2 * size[0] * size[1] + 40)
    for name, value in ours.items():
        assert relative_error(value, wanted[name]) <= limit, name


@pytest.mark.parametrize(
    ("shape", "training", "memory", "memory_format"),
    [
        *(("bottlenecks", True, "balanced", memory_format) for memory_format in FORMATS),
        ("bottlenecks", True, "minimal", torch.channels_last),
        ("bottlenecks", False, "minimal", torch.contiguous_format),
        *(("no bottlenecks", True, "balanced", memory_format) for memory_format in FORMATS),
    ],
)
def test_block(shape, training, memory, memory_format, small_tiles):
    shape = BLOCKS[shape]
    x, layers = make_maps(shape, memory_format=memory_format), make_layers(shape)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w)
    options = {"training": training, "memory": memory, "dropout": 0.4}
    torch.manual_seed(3)
    out, grads, running = run(x, layers, grad, **options)
    torch.manual_seed(3)
    wanted, wanted_grads, wanted_running = run(x, layers, grad, torch.float64, **options)
    assert out.is_contiguous(memory_format=memory_format)
    length = reduction_length(shape)
    assert_exact("out", out, wanted, length)
    for name, actual in grads.items():
        assert_exact(f"gradient of {name}", actual, wanted_grads[name], length)
    for name, actual in running.items():
        assert_exact(name, actual, wanted_running[name], length)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_of_sixteen_bits(dtype):
    shape = BLOCKS["bottlenecks"]
    x, layers = make_maps(shape, dtype), make_layers(shape, dtype, shift=6.0)
    grad = torch.randn(shape.n, shape.channels, shape.h, shape.w).to(dtype)
    out, grads, _ = run(x, layers, grad)
    wanted, wanted_grads, _ = run(x, layers, grad, torch.float64)
    assert_exact("out", out, wanted, 1)
    assert_exact("gradient of x", grads["x"], wanted_grads["x"], 1)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_empty_batch(memory_format):
    shape = Shape(0, 6, 4, 5, 2, 4, 8)
    x = make_maps(shape, memory_format=memory_format)
    out, grads, _ = run(x, make_layers(shape), torch.zeros(0, 14, 4, 5), training=False)
    assert out.shape == (0, 14, 4, 5)
    assert all(grad.abs().sum() == 0 for grad in grads.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value):
    maps, layer, first, _ = make_slice("non-aligned")
    maps[1, first + 1, 2, 2] = value
    ours = ops.bn_relu_conv1x1(maps, layer, first=first, training=False)
    ((doubled,),) = leaves_of([[layer]], torch.float64)
    wanted = ops.bn_relu_conv1x1(maps.double(), doubled, first=first, training=False)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format, small_tiles):
    maps, layer, first, _ = make_slice("several blocks", memory_format=memory_format)
    grad = torch.randn(2, 34, 5, 4)
    one, other = (conv(maps, layer, grad, first=first, training=True) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_tiles_of_full_size(memory_format):
    shape = (1, 150, 9, 8)
    maps = torch.randn(shape).contiguous(memory_format=memory_format)
    ((layer, _),) = make_layers(Shape(1, 140, 9, 8, 1, 1, 132))
    grad = torch.randn(1, 132, 9, 8)
    ours = conv(maps, layer, grad, first=8, training=True)
    wanted = conv(maps, layer, grad, torch.float64, first=8, training=True)
    for name, value in ours.items():
        assert_exact(name, value, wanted[name], 140)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic(memory_format):
    """At most 1.1 times what the passes must move, each byte of the maps once a pass.

    Tiles of one product read the weight, and the maps of the other side of the product, again: out
    of the L2 cache, which holds a layer's weight and the few tiles in flight. ``memory`` counts
    what a launch moves between that cache and memory.
    """
    pixels, first, count, outputs = 2 * 16 * 16, 16, 80, 64
    maps = make_maps(Shape(2, 96, 16, 16, 1, 1, 0), memory_format=memory_format).requires_grad_()
    ((layer, _),) = leaves_of(make_layers(Shape(2, count, 16, 16, 1, 1, outputs)))
    source, result = 4 * pixels * count, 4 * pixels * outputs

    with count_traffic() as forward:
        out = ops.bn_relu_conv1x1(maps, layer, first=first, training=True)
    # The batch's statistics read the slice before it is normalised.
    floor = 2 * source + result + layer.weight.nbytes
    assert floor <= forward.memory <= 1.1 * floor, forward.memory / floor

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # The weight's gradient; that of the normalised slice; and the share of the statistics.
    floor = (source + result) + (2 * source + result) + 3 * source + 3 * layer.weight.nbytes
    assert floor <= backward.memory <= 1.1 * floor, backward.memory / floor
    assert forward.atomics == backward.atomics == 0


@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic_of_the_transition(memory_format):
    x = make_maps(Shape(2, 32, 16, 32, 1, 1, 0), memory_format=memory_format).requires_grad_()
    ((layer, _),) = leaves_of(make_layers(Shape(2, 32, 16, 32, 1, 1, 8)))

    with count_traffic() as forward:
        out = ops.transition(x, layer, training=True)
    floor = 2.25 * x.nbytes
    assert floor <= forward.moved <= 1.1 * floor, forward.moved / floor
    assert forward.sectors <= 1.1 * floor, forward.sectors / floor

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # The sums read x and the pooled gradient; through the statistics both are read again.
    floor = 3.5 * x.nbytes
    assert floor <= backward.moved <= 1.1 * floor, backward.moved / floor
    assert backward.sectors <= 1.1 * floor, backward.sectors / floor
