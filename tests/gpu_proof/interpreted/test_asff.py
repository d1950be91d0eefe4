"""The Triton kernels of asff_fuse, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.asff import reference
from dlkernels.backend import availability
from tests.asff.cases import MODES, leaves_of, make_inputs, names_of
from tests.asff.test_numbers import run
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, assert_exact

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")

PYRAMIDS = {
    "minimal": ((1, 1, 1, 1), (1, 1)),
    "non-aligned": ((2, 7, 6, 10), (2, 1)),
    "several tiles": ((1, 66, 8, 68), (2, 1)),
    "every factor": ((1, 3, 8, 16), (8, 4, 1, 2)),
}


def test_triton_serves():
    assert availability()["asff_fuse"]["triton"] == "available"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "factors"), PYRAMIDS.values(), ids=PYRAMIDS)
def test_outputs_and_gradients(shape, factors, dtype, memory_format, mode):
    inputs = make_inputs(shape, factors, dtype, memory_format)
    grad = torch.randn(shape).to(dtype)
    out, grads = run(ops.asff_fuse, leaves_of(inputs), grad, mode)
    doubles = leaves_of(inputs, torch.float64)
    expected, expected_grads = run(reference.asff_fuse, doubles, grad, mode)

    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    length = max(len(factors), shape[1], 4 * max(factors) ** 2)
    assert_exact("out", out, expected, len(factors))
    for name, actual, wanted in zip(names_of(inputs), grads, expected_grads, strict=True):
        assert_exact(f"gradient of {name}", actual, wanted, length)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_propagate(mode, value, index):
    inputs = make_inputs((2, 5, 8, 8), (4, 1))
    inputs[index][1, 1, 1, 1] = value
    ours = ops.asff_fuse(inputs[:-1], inputs[-1], mode)
    wanted = reference.asff_fuse([t.double() for t in inputs[:-1]], inputs[-1].double(), mode)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 0, 4, 4)])
def test_nothing_to_fuse(shape):
    inputs = make_inputs(shape, (2, 1))
    out, grads = run(ops.asff_fuse, leaves_of(inputs), torch.zeros(shape), "bilinear")
    assert out.shape == shape
    assert all(grad.abs().sum() == 0 for grad in grads)


SHAPES = pytest.mark.parametrize(
    "shape", [(1, 128, 52, 52), (1, 128, 16, 64)], ids=["ASFF", "aligned"]
)


def traffic_of(shape, memory_format, mode):
    """Traffic and floor, forward and backward: every input and every result moves once."""
    inputs = leaves_of(make_inputs(shape, (4, 2, 1), memory_format=memory_format))
    read = sum(t.nbytes for t in inputs)
    with count_traffic() as forward:
        out = ops.asff_fuse(inputs[:-1], inputs[-1], mode)
    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    assert forward.atomics == backward.atomics == 0
    return (forward, read + out.nbytes), (backward, 2 * read + out.nbytes)


@SHAPES
@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic_of_nearest(memory_format, shape):
    """At most 1.1 times what must move, with no help of caches.

    Counted in sectors of 32 bytes: several lanes of one access read the same cell of a smaller
    level, whose bytes move once.
    """
    for traffic, floor in traffic_of(shape, memory_format, "nearest"):
        assert floor <= traffic.sectors <= 1.1 * floor, traffic.sectors / floor


@SHAPES
@pytest.mark.parametrize(
    ("memory_format", "l2"), zip(FORMATS, [(1.15, 1.3), (1.4, 1.8)], strict=True)
)
def test_traffic_of_bilinear(memory_format, l2, shape):
    """At most 1.1 times what must move between memory and the L2 cache, which programs share.

    A program reads the cells and pixels around its tile, too, and several times what it has read,
    then out of the L1 cache. Its neighbours read them as well: just before or after, or a row of
    tiles earlier or later, of which the L2 cache holds many. What that cache moves has bounds of
    its own: channels_last tiles are smaller, so that rows of channels are whole sectors.
    """
    for (traffic, floor), bound in zip(
        traffic_of(shape, memory_format, "bilinear"), l2, strict=True
    ):
        assert floor <= traffic.memory <= 1.1 * floor, traffic.memory / floor
        assert traffic.l2 <= bound * floor, traffic.l2 / floor
