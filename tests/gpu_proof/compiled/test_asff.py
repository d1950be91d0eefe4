"""The machine code of asff_fuse's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.asff import triton as kernels
from tests.asff.cases import MODES, make_inputs
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets, compile_ahead
from tests.numbers import FORMATS

SHAPE = 2, 256, 64, 64
CASES = [
    *((mode, torch.float32, arch) for mode in MODES for arch in ARCHITECTURES),
    *(("nearest", dtype, 90) for dtype in (torch.bfloat16, torch.float16)),
    ("bilinear", torch.bfloat16, 90),
]


def launches(
    factors: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, mode: str
) -> list[Launch]:
    *features, logits = make_inputs(SHAPE, factors, dtype, memory_format)
    grad = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    forward = record(kernels.asff_fuse, features, logits, mode)
    backward = record(kernels.asff_fuse_backward, grad, features, logits, mode)
    return forward + [launch for launch in backward if launch.name != "softmax_kernel"]


@pytest.mark.parametrize("mode", MODES)
def test_every_kernel_has_a_budget(mode):
    launched = launches((4, 2, 1), torch.float32, torch.contiguous_format, mode)
    assert {launch.name for launch in launched} == set(kernels.BUDGETS[mode])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("mode", "dtype", "architecture"), CASES)
def test_budget(mode, dtype, architecture, memory_format):
    launched = launches((4, 2, 1), dtype, memory_format, mode)
    assert_within_budgets(launched, architecture, kernels.BUDGETS[mode])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_five_levels_do_not_spill(mode, memory_format):
    for launch in launches((8, 4, 2, 1, 1), torch.float32, memory_format, mode):
        assert compile_ahead(launch, 90).spills == 0, launch.name
