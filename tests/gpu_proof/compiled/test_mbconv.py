"""The machine code of depthwise_conv_bn_act's Triton kernels, held to the budget beside them."""

import torch

from dlkernels.mbconv import triton as kernels
from tests.gpu_proof.launches import Launch, record
from tests.numbers import FORMATS

SHAPE = 8, 96, 56, 56
CONTIGUOUS, CHANNELS_LAST = FORMATS


def launches(
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    size: int,
    stride: int,
    training: bool,
) -> list[Launch]:
    """Those of the kernels that stand in this family."""
    x = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    raw = x[:, :, ::stride, ::stride].contiguous(memory_format=memory_format)
    value, weight = torch.empty(SHAPE[1]), torch.empty(SHAPE[1], 1, size, size)
    given = None if training else value
    padding = [size // 2] * 4
    forward = record(
        kernels.depthwise_conv_bn_act,
        *(x, weight, value, value, given, given, 1e-5, "silu", True, value, value, value, value),
        *(1e-5, "silu", stride, padding, True, training),
    )
    backward = record(
        kernels.depthwise_conv_bn_act_backward,
        *(raw, torch.empty(SHAPE[:2]), x, weight, raw, *[value] * 4, training, 1e-5, "silu"),
        *(True, *[value] * 4, training, 1e-5, "silu", stride, padding),
    )
    return [launch for launch in forward + backward if launch.name in kernels.BUDGETS]
