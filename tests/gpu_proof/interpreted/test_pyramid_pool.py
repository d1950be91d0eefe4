"""The Triton kernels of pyramid_pool, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, assert_exact
from tests.pyramid_pool.cases import SHAPES as ALL_SHAPES
from tests.pyramid_pool.cases import cascade, make_grad, make_maps, make_ties, run
from tests.pyramid_pool.test_numbers import TERMS

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

# The interpreter is slow: fewer channels.
SHAPES = {**ALL_SHAPES, "larger than all windows": (1, 2, 40, 40)}

# Maps of several tiles.
LARGE = {"wide": (1, 2, 5, 140), "tall": (1, 1, 107, 66)}


def test_triton_serves():
    assert availability()["pyramid_pool"]["triton"] == "available"


CASES = [(name, torch.float32) for name in SHAPES] + [
    ("SPP of YOLOv4", dtype) for dtype in DTYPES[1:]
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_outputs_and_gradients(name, dtype, memory_format):
    shape = SHAPES[name]
    x = make_maps(shape, dtype, memory_format)
    grad = torch.randn(shape[0], 4 * shape[1], *shape[2:]).to(dtype)
    out, grad_x = run(ops.pyramid_pool, x, grad)
    assert out.dtype == grad_x.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    expected, expected_grad = run(cascade, x.double(), grad)
    assert torch.equal(out.double(), expected)
    assert_exact("gradient", grad_x, expected_grad, TERMS)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES.values(), *LARGE.values()], ids=[*SHAPES, *LARGE])
def test_of_equal_pixels_the_first_gets_the_gradient(shape, memory_format):
    x = make_ties(shape, memory_format)
    grad = make_grad(x)
    for ours, theirs in zip(run(ops.pyramid_pool, x, grad), run(cascade, x, grad), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_nan_and_infinity(memory_format, value):
    x = make_maps((2, 5, 15, 17), memory_format=memory_format)
    x[0, :2, 3, 4] = value
    x[1, 1, 5:9, 6:8] = value
    x[1, 2] = value
    grad = make_grad(x)
    ours, theirs = run(ops.pyramid_pool, x, grad), run(cascade, x, grad)
    assert torch.equal(ours[0].nan_to_num(123.0), theirs[0].nan_to_num(123.0))
    assert torch.equal(ours[1], theirs[1])


def test_no_samples():
    out, grad_x = run(ops.pyramid_pool, make_maps((0, 6, 4, 5)), None)
    assert out.shape == (0, 24, 4, 5)
    assert grad_x.shape == (0, 6, 4, 5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("channels", "size"), [(64, 13), (8, 19)])
def test_traffic(channels, size, memory_format):
    """At most 1.1 times what must move, forward and backward: every map moves once.

    Counted between the memory and the L2 cache: where a program's planes or channels end within a
    sector of 32 bytes, its neighbour moves the same sector.
    """
    x = make_maps((2, channels, size, size), memory_format=memory_format).requires_grad_()
    with count_traffic() as forward:
        out = ops.pyramid_pool(x)
    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    assert forward.atomics == backward.atomics == 0
    for traffic, floor in ((forward, x.nbytes + out.nbytes), (backward, 2 * x.nbytes + out.nbytes)):
        assert floor == traffic.moved
        assert floor <= traffic.memory <= 1.1 * floor, traffic.memory / floor
