"""The machine code of residual_sum's Triton kernels, held to the budget beside them."""

import itertools

import pytest
import torch

from dlkernels.residual_sum import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets
from tests.numbers import DTYPES, FORMATS

SHAPE = 2, 256, 56, 56


def launches(dtype: torch.dtype, memory_format: torch.memory_format, relu: bool) -> list[Launch]:
    x = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    of_channels, of_samples = torch.empty(SHAPE[1]), torch.empty(SHAPE[:2])
    out = x if relu else None
    return [
        *record(kernels.residual_sum_moments, x),
        *record(kernels.residual_sum, x, x, of_channels, of_samples, of_samples, relu),
        *record(kernels.residual_sum_reduce, x, out, x, of_channels),
        *record(
            kernels.residual_sum_backward,
            *(x, out, x, of_channels, of_samples, of_samples, of_channels, relu),
        ),
    ]


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
