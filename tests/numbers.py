"""How exact a kernel must be, in one place."""

import math

import torch
from torch import Tensor

# The kernels that serve each device; on the CPU alone, the Triton interpreter has a process of its
# own (tests/gpu_proof).
DEVICES_AND_BACKENDS = [
    ("cpu", "cpp"),
    *([("cuda", "cuda"), ("cuda", "triton")] if torch.cuda.is_available() else []),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected values, in float64."""
    expected = expected.double()
    difference = (actual.double() - expected).norm()
    return (difference / expected.norm().clamp_min(1e-30)).item()


def tolerance(dtype: torch.dtype, reduction_length: int) -> float:
    if dtype == torch.float32:
        return 1e-6 * math.sqrt(max(1, reduction_length))
    return {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def assert_exact(name: str, actual: Tensor, expected: Tensor, reduction_length: int) -> None:
    """``actual`` is within the contract of the float64 ``expected``."""
    assert actual.shape == expected.shape, name
    error = relative_error(actual, expected)
    limit = tolerance(actual.dtype, reduction_length)
    assert error <= limit, f"{name}: relative error {error:.2e}, limit {limit:.2e}"
