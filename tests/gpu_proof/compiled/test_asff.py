"""The machine code of asff_fuse's Triton kernels, held to the budget beside them."""

import pytest
import torch

from dlkernels.asff import triton as kernels
from tests.asff.cases import MODES, make_inputs
from tests.gpu_proof.launches import Launch, record
from tests.gpu_proof.machine_code import ARCHITECTURES, compile_ahead
from tests.numbers import DTYPES, FORMATS

SHAPE = 2, 256, 64, 64
FACTORS = {"ASFF": (4, 2, 1), "five levels": (8, 4, 2, 1, 1)}


def launches(
    dtype: torch.dtype, memory_format: torch.memory_format, factors: tuple[int, ...], mode: str
) -> list[Launch]:
    *features, logits = make_inputs(SHAPE, factors, dtype, memory_format)
    grad = torch.empty(SHAPE, dtype=dtype).contiguous(memory_format=memory_format)
    forward = record(kernels.asff_fuse, features, logits, mode)
    backward = record(kernels.asff_fuse_backward, grad, features, logits, mode)
    return forward + [launch for launch in backward if launch.name != "softmax_kernel"]


def test_every_kernel_has_a_budget():
    launched = launches(torch.float32, torch.contiguous_format, (4, 2, 1), "bilinear")
    assert {launch.name for launch in launched} == set(kernels.BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_budget(factors, dtype, memory_format, mode, architecture):
    for launch in launches(dtype, memory_format, factors, mode):
        code = compile_ahead(launch, architecture)
        budget = kernels.BUDGETS[launch.name]
        found = f"{launch.name}: {code}"
        assert code.spills == 0, found
        assert code.registers <= budget.registers, found
        assert code.shared <= budget.shared, found
        assert code.wide >= budget.wide, found
