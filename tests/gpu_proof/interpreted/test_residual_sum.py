"""The Triton kernels of residual_sum, run by the interpreter."""

import pytest
import torch

from dlkernels.backend import availability
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, FORMATS, relative_error
from tests.residual_sum.cases import CHOICES, arguments_of, copies, make_leaves
from tests.residual_sum.test_numbers import check, ours, reference, run

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

SHAPES = {
    "minimal": (2, 1, 3, 1, 0),
    "non-aligned": (2, 7, 5, 3, 2),
    "no excitation": (3, 33, 5, 5, 0),
    "several blocks": (2, 130, 7, 5, 20),
    "several stretches": (2, 3, 131, 129, 2),
}


def test_triton_serves():
    for op in ("moments", "reduce", "backward"):
        assert availability()[f"residual_sum_{op}"]["triton"] == "available"
    assert availability()["residual_sum"]["triton"] == "available"


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, memory_format, choices, evaluation):
    check(shape, torch.float32, memory_format, choices, evaluation)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, memory_format):
    check((3, 20, 5, 7, 4), dtype, memory_format, CHOICES["SE-ResNet"], False)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_mean_far_from_zero_costs_no_digits(memory_format):
    leaves = make_leaves((3, 8, 60, 30, 2), memory_format=memory_format)
    leaves[0].data += 1000
    *_, var, _ = run(ours, leaves, torch.ones(3, 8, 60, 30))
    exact = leaves[0].detach().double().var((0, 2, 3), correction=0)
    assert relative_error(var, exact) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(value):
    leaves = make_leaves((2, 18, 5, 5, 0))
    leaves[0].data[1, 3, 2, 2] = value
    out = ours(*arguments_of(leaves, evaluation=True)).out
    exact = copies(leaves, torch.float64)
    wanted, _, _ = reference.residual_sum(*arguments_of(exact, evaluation=True))
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.isinf(), wanted.isinf())


@pytest.mark.parametrize("shape", [(0, 6, 4, 4, 2), (2, 6, 0, 4, 2)])
def test_empty_maps(shape):
    out, _, _, grads = run(ours, make_leaves(shape), torch.zeros(shape[:4]))
    assert out.shape == grads[0].shape == shape[:4]
    if shape[0] == 0:
        assert all(grad.abs().sum() == 0 for grad in grads)


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic(memory_format, activation):
    """At most 1.1 times what the passes must move, each byte of the maps once a pass."""
    leaves = make_leaves((2, 64, 48, 40, 0), memory_format=memory_format)
    maps = 4 * leaves[0].numel()
    with count_traffic() as forward:
        out = ours(*arguments_of(leaves, ("relu", "sigmoid", activation))).out
    # One pass reads x for the statistics, one x and the shortcut to write the sum.
    assert 4 * maps <= forward.moved <= 1.1 * 4 * maps
    assert forward.sectors <= 1.1 * forward.moved

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # Both passes read x and the gradient, the last writes that of x; under a ReLU both read its
    # mask, and the gradient of the shortcut is written.
    moved = maps * (5 + 3 * (activation == "relu"))
    assert moved <= backward.moved <= 1.1 * moved
    assert backward.sectors <= 1.1 * backward.moved
    assert forward.atomics == backward.atomics == 0
