"""The machine code of dense_block's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.dense_block import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import assert_within_budgets
from tests.numbers import FORMATS

# The second block of DenseNet-121: a slice of 192 channels of a buffer of 256, to 128 channels.
SHAPE = 2, 256, 28, 28
FIRST, COUNT, OUTPUTS = 64, 192, 128
CONTIGUOUS, CHANNELS_LAST = FORMATS


def launches(dtype: torch.dtype, memory_format: torch.memory_format) -> list[Launch]:
    def maps(channels: int, size: int) -> torch.Tensor:
        shape = SHAPE[0], channels, size, size
        return torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)

    x, grad, pooled = maps(SHAPE[1], 28), maps(OUTPUTS, 28), maps(SHAPE[1], 14)
    weight = torch.empty(OUTPUTS, COUNT, 1, 1, dtype=dtype)
    value, whole = torch.empty(COUNT), torch.empty(SHAPE[1])
    conv = x, weight, value, value, value, value, FIRST, 1e-5
    block = (
        *(maps(COUNT, 28), [weight, weight.new_empty(32, OUTPUTS, 3, 3)]),
        *([value, value[:OUTPUTS]], [value, value[:OUTPUTS]], [], [], None, 0.0, 1e-5),
    )
    launched = [
        *record(kernels.bn_relu_conv1x1, *conv),
        *record(kernels.bn_relu_conv1x1_backward, grad, *conv, True),
        *record(kernels.norm_relu_pool, x, *(whole,) * 4, 1e-5),
        *record(kernels.norm_relu_pool_backward, pooled, x, *(whole,) * 4, 1e-5, True),
        *record(_block_and_its_backward, *block),
    ]
    own = [launch for launch in launched if launch.name in kernels.BUDGETS]
    return list({f"{launch.name} {launch.constants}": launch for launch in own}.values())


def _block_and_its_backward(*block: object) -> None:
    results = kernels.dense_block(*block, True)
    kernels.dense_block_backward(torch.empty_like(results[0]), *results, *block[1:])


def test_every_kernel_has_a_budget():
    launched = [launch.name for launch in launches(torch.float32, CHANNELS_LAST)]
    assert set(launched) == set(kernels.BUDGETS)


@pytest.mark.parametrize(
    ("architecture", "dtype", "memory_format"),
    [
        (80, torch.float32, CHANNELS_LAST),
        (90, torch.float32, CONTIGUOUS),
        (100, torch.float32, CHANNELS_LAST),
        (100, torch.bfloat16, CONTIGUOUS),
    ],
)
def test_machine_code(architecture, dtype, memory_format):
    launched = launches(dtype, memory_format)
    assert_within_budgets(launched, architecture, kernels.BUDGETS)
