"""The machine code of batch_norm_act's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.batch_norm_act import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets
from tests.numbers import FORMATS

SHAPE = 4, 96, 56, 56


def launches(
    dtype: torch.dtype, memory_format: torch.memory_format, activation: str, training: bool
) -> list[Launch]:
    x = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    value, scale, pooled = torch.empty(SHAPE[1]), torch.empty(SHAPE[0]), torch.empty(SHAPE[:2])
    given = None if training else value
    forward = record(
        kernels.batch_norm_act,
        *(x, value, value, given, given, x if training else None, scale if training else None),
        *(1e-5, activation, 0.1, not training),
    )
    backward = record(
        kernels.batch_norm_act_backward,
        *(x, None if training else pooled, x, value, value, value, value),
        *(scale if training else None, training, 1e-5, activation, 0.1),
    )
    return forward + backward


def test_every_kernel_has_a_budget():
    launched = [
        launch.name
        for training in (False, True)
        for launch in launches(torch.float32, torch.contiguous_format, "silu", training)
    ]
    assert set(launched) == set(kernels.BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_training(memory_format, architecture):
    launched = launches(torch.float32, memory_format, "mish", True)
    assert_within_budgets(launched, architecture, kernels.BUDGETS)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_evaluation_and_16_bit(memory_format):
    assert_within_budgets(
        launches(torch.bfloat16, memory_format, "silu", False), 90, kernels.BUDGETS
    )
