"""The machine code of depthwise_conv_bn_act's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.mbconv import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import assert_within_budgets, compile_ahead
from tests.numbers import FORMATS

SHAPE = 8, 96, 56, 56
CONTIGUOUS, CHANNELS_LAST = FORMATS


def launches(
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    size: int,
    stride: int,
    training: bool,
    shape: tuple[int, ...] = SHAPE,
) -> list[Launch]:
    """Those of the kernels that stand in this family."""
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    raw = x[:, :, ::stride, ::stride].contiguous(memory_format=memory_format)
    value, weight = torch.empty(shape[1]), torch.empty(shape[1], 1, size, size)
    given = None if training else value
    padding = [size // 2] * 4
    forward = record(
        kernels.depthwise_conv_bn_act,
        *(x, weight, value, value, given, given, 1e-5, "silu", True, value, value, value, value),
        *(1e-5, "silu", stride, padding, True, training),
    )
    backward = record(
        kernels.depthwise_conv_bn_act_backward,
        *(raw, torch.empty(shape[:2]), x, weight, raw, *[value] * 4, training, 1e-5, "silu"),
        *(True, *[value] * 4, training, 1e-5, "silu", stride, padding),
    )
    return [launch for launch in forward + backward if launch.name in kernels.BUDGETS]


def test_every_kernel_has_a_budget():
    launched = launches(torch.float32, CONTIGUOUS, 3, 1, True)
    assert {launch.name for launch in launched} == set(kernels.BUDGETS)


@pytest.mark.parametrize(
    ("architecture", "dtype", "memory_format", "size", "stride", "training"),
    [
        (80, torch.float32, CONTIGUOUS, 3, 1, True),
        (90, torch.float32, CHANNELS_LAST, 5, 1, True),
        (100, torch.bfloat16, CHANNELS_LAST, 3, 2, False),
        (90, torch.float32, CONTIGUOUS, 7, 2, True),
    ],
)
def test_machine_code(architecture, dtype, memory_format, size, stride, training):
    launched = launches(dtype, memory_format, size, stride, training)
    assert_within_budgets(launched, architecture, kernels.BUDGETS)


def test_sizes_of_one():
    """Triton makes compile-time values of them."""
    launched = launches(torch.float32, CONTIGUOUS, 3, 1, False, (1, 1, 1, 1))
    assert_within_budgets(launched, 90, kernels.BUDGETS)


def test_wide_accesses():
    """Forward, channels_last maps of the commonest kernels stream in accesses of 128 bits."""
    launch, _ = launches(torch.float32, CHANNELS_LAST, 3, 1, False)
    assert compile_ahead(launch, 80).wide >= 0.85
