"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops, use_backend


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ("maps", TypeError, "x must be a tensor, but is str"),
        (torch.randn(8, 5, 5), ValueError, r"x must have shape \[N, C, H, W\].*\[8, 5, 5\]"),
        (torch.ones(2, 8, 5, 5).long(), TypeError, "x must be float32.*int64"),
        (torch.randn(2, 8, 5, 5).to_sparse(), TypeError, "x must be a dense tensor"),
        (torch.randn(2, 8, 0, 5), ValueError, r"x must have maps of at least 1 x 1.*8, 0, 5\]"),
        (torch.randn(2, 8, 5, 0), ValueError, r"x must have maps of at least 1 x 1.*8, 5, 0\]"),
        (torch.randn(2, 0, 5, 5), ValueError, r"x must .*one channel or more.*\[2, 0, 5, 5\]"),
    ],
)
def test_maps(x, error, message, backend):
    with use_backend(backend), pytest.raises(error, match=message):
        ops.pyramid_pool(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(8, 5, 5), "x must have shape"),
        (torch.randn(2, 8, 0, 5), "x must .*at least one channel and pixel"),
        (torch.randn(2, 8, 5, 5).double(), "x must be float32"),
    ],
)
def test_the_bare_op_touches_no_memory_of_wrong_shape(x, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.pyramid_pool(x)


@pytest.mark.parametrize(
    "grad",
    [torch.randn(2, 8, 5, 5), torch.randn(2, 32, 5, 4), torch.randn(2, 32, 5, 5).half()],
)
def test_the_bare_backward_op(grad):
    with pytest.raises(RuntimeError, match="grad_out must have the shape and dtype"):
        torch.ops.dlkernels.pyramid_pool_backward(grad, torch.randn(2, 8, 5, 5))
