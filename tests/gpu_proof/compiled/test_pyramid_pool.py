"""The machine code of pyramid_pool's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.pyramid_pool import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets, compile_ahead
from tests.numbers import FORMATS

SHAPE = 4, 512, 13, 13
CASES = [
    *((torch.float32, architecture) for architecture in ARCHITECTURES),
    *((dtype, 90) for dtype in (torch.bfloat16, torch.float16)),
]


def launches(
    shape: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> list[Launch]:
    samples, channels, height, width = shape
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    grad = torch.empty(samples, 4 * channels, height, width, dtype=dtype)
    grad = grad.contiguous(memory_format=memory_format)
    return record(kernels.pyramid_pool, x) + record(kernels.pyramid_pool_backward, grad, x)


def test_every_kernel_has_a_budget():
    launched = launches(SHAPE, torch.float32, torch.contiguous_format)
    assert {launch.name for launch in launched} == set(kernels.BUDGETS)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("dtype", "architecture"), CASES)
def test_budget(dtype, architecture, memory_format):
    assert_within_budgets(launches(SHAPE, dtype, memory_format), architecture, kernels.BUDGETS)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [1, 19, 40, 100])
def test_other_sizes_do_not_spill(size, memory_format):
    for launch in launches((4, 512, size, size), torch.float32, memory_format):
        assert compile_ahead(launch, 90).spills == 0, launch.name
