"""The Triton kernels of batch_norm_act, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from tests.batch_norm_act.cases import ACTIVATIONS, make_inputs
from tests.batch_norm_act.test_numbers import check, plain, run
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, relative_error

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

SHAPES = {
    "non-aligned": (2, 7, 5, 3),
    "one pixel": (5, 33, 1, 1),
    "several blocks of channels": (3, 130, 7, 7),
    "several stretches": (2, 3, 97, 91),
}


def test_triton_serves():
    for op in ("batch_norm_act", "batch_norm_act_backward"):
        assert availability()[op]["triton"] == "available"


@pytest.mark.parametrize("statistics", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_and_pool(shape, memory_format, statistics):
    present = {"pool": True, "statistics": statistics}
    check(shape, torch.float32, memory_format, "silu", "cpu", "triton", **present)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, memory_format):
    check((2, 9, 6, 5), torch.float32, memory_format, activation, "cpu", "triton")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_and_sample_scale_without_affine(dtype, memory_format):
    present = {"affine": False, "residual": True, "sample_scale": True}
    check((3, 20, 5, 7), dtype, memory_format, "mish", "cpu", "triton", **present)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mean_far_from_zero(memory_format):
    x = torch.randn(4, 10, 60, 30) + 1e4 * torch.randn(10, 1, 1)
    x = x.contiguous(memory_format=memory_format)
    result = ops.batch_norm_act(x)
    assert relative_error(result.var, x.double().var((0, 2, 3), correction=0)) < 1e-6
    assert relative_error(result.mean, x.double().mean((0, 2, 3))) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(value, activation):
    inputs = make_inputs((2, 18, 5, 5), statistics=True)
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


@pytest.mark.parametrize("statistics", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traffic(dtype, memory_format, statistics):
    """At most 1.1 times what the passes must move, each byte of the maps once a pass."""
    inputs = make_inputs((2, 32, 16, 32), dtype, memory_format, statistics=statistics)
    leaves = inputs.leaves()
    maps = leaves[0].nbytes

    with count_traffic() as forward:
        out = ops.batch_norm_act(*leaves, activation="silu").out
    # The batch's statistics read x before it is normalised.
    floor = (2 if statistics else 3) * maps
    assert floor <= forward.moved <= 1.1 * floor, forward.moved / floor
    assert forward.sectors <= 1.1 * floor, forward.sectors / floor

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # The sums read x and grad_out; through the batch's statistics both are read again.
    floor = (3 if statistics else 5) * maps
    assert floor <= backward.moved <= 1.1 * floor, backward.moved / floor
    assert backward.sectors <= 1.1 * floor, backward.sectors / floor
    assert forward.atomics == backward.atomics == 0


def test_same_bits_every_time():
    inputs = make_inputs((3, 20, 9, 11))
    grads = [torch.randn(3, 20, 9, 11), torch.randn(3, 20)]
    first, again = (
        run(ops.batch_norm_act, inputs.leaves(), grads, activation="silu", pool=True)
        for _ in range(2)
    )
    for a, b in zip((*first[0], *first[1][:3]), (*again[0], *again[1][:3]), strict=True):
        assert torch.equal(a, b)
