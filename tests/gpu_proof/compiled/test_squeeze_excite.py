"""The machine code of squeeze_excite's Triton kernels, held to the budget beside them."""

import itertools

import pytest
import torch

from dlkernels.squeeze_excite import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets
from tests.numbers import DTYPES, FORMATS

SHAPE = 2, 256, 56, 56
SQUEEZED = 16


def launches(dtype: torch.dtype, memory_format: torch.memory_format, relu: bool) -> list[Launch]:
    x = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    n, c = SHAPE[:2]
    reduce, expand = x.new_empty(SQUEEZED, c), x.new_empty(c, SQUEEZED)
    biases = x.new_empty(SQUEEZED), x.new_empty(c)
    names = ("relu", "sigmoid") if relu else ("silu", "hard_sigmoid")
    pooled, hidden = torch.empty(n, c), torch.empty(n, SQUEEZED)
    other = x if relu else None
    forward = record(
        kernels.squeeze_excite,
        *(x, reduce, biases[0], expand, biases[1], other, *names),
        "relu" if relu else "identity",
    )
    backward = record(
        kernels.squeeze_excite_backward,
        *(x, x, reduce, expand, other, pooled, hidden, pooled, *names, relu),
    )
    return forward + backward


def test_every_kernel_has_a_budget():
    launched = {launch.name for launch in launches(torch.float32, torch.contiguous_format, True)}
    assert launched == set(kernels.BUDGETS)


# Each case for one architecture: every dtype, and every variant, meets them all.
CASES = [
    (*case, ARCHITECTURES[index % len(ARCHITECTURES)])
    for index, case in enumerate(itertools.product(DTYPES, FORMATS, (False, True)))
]


@pytest.mark.parametrize(("dtype", "memory_format", "relu", "architecture"), CASES)
def test_budget(dtype, memory_format, relu, architecture):
    launched = launches(dtype, memory_format, relu)
    assert_within_budgets(launched, architecture, kernels.BUDGETS)
