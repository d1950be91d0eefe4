"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops
from tests.asff.cases import make_inputs


@pytest.mark.parametrize(
    ("index", "value", "error", "message"),
    [
        (0, torch.randn(2, 8, 4), ValueError, r"features\[0\] must have shape .*\[2, 8, 4\]"),
        (1, torch.randn(2, 8, 3, 4), ValueError, r"features\[1\] .*\[2, 8, 8 / s, 8 / s\]"),
        (1, torch.randn(2, 8, 2, 4), ValueError, r"features\[1\] .* 1, 2, 4 or 8.*2, 4\]"),
        (1, torch.randn(2, 8, 16, 16), ValueError, r"features\[1\] .*\[2, 8, 16, 16\]"),
        (1, torch.randn(2, 7, 4, 4), ValueError, r"features\[1\] .*\[2, 8, .*\[2, 7, 4, 4\]"),
        (1, torch.randn(3, 8, 4, 4), ValueError, r"features\[1\] .*\[2, 8, .*\[3, 8, 4, 4\]"),
        (1, torch.randn(2, 8, 4, 4).half(), TypeError, r"features\[1\] .*float32.*float16"),
        (1, torch.ones(2, 8, 4, 4).int(), TypeError, r"features\[1\] must be float32.*int32"),
        (1, torch.randn(2, 8, 4, 4, device="meta"), ValueError, r"features\[1\] .*cpu.*meta"),
        (0, None, TypeError, r"features\[0\] must be a tensor, but is NoneType"),
        (2, torch.randn(2, 3, 8, 8), ValueError, r"logits must .*\[N, 2, H, W\].*\[2, 3, 8, 8\]"),
        (2, torch.randn(2, 2, 0, 8), ValueError, r"logits must .*one pixel.*\[2, 2, 0, 8\]"),
        (2, torch.randn(2, 2, 8), ValueError, r"logits must have shape \[N, C, H, W\]"),
    ],
)
def test_tensors(index, value, error, message):
    tensors = make_inputs((2, 8, 8, 8), (1, 2))
    tensors[index] = value
    with pytest.raises(error, match=message):
        ops.asff_fuse(tensors[:-1], tensors[-1])


@pytest.mark.parametrize("count", [0, 1, 6])
def test_number_of_features(count):
    features = [torch.randn(1, 2, 4, 4)] * count
    with pytest.raises(ValueError, match=f"features must hold 2 to 5 maps, but holds {count}"):
        ops.asff_fuse(features, torch.randn(1, count, 4, 4))


def test_features_as_one_tensor():
    with pytest.raises(TypeError, match=r"features must be a list or tuple .* but is Tensor"):
        ops.asff_fuse(torch.randn(2, 1, 2, 4, 4), torch.randn(1, 2, 4, 4))


def test_mode():
    *features, logits = make_inputs((1, 2, 4, 4), (1, 2))
    with pytest.raises(ValueError, match=r"mode must be one of 'nearest', 'bilinear'.*'bicubic'"):
        ops.asff_fuse(features, logits, "bicubic")


@pytest.mark.parametrize(
    ("size", "message"),
    [((3, 3), "times 1, 2, 4 or 8"), ((0, 0), "every feature must have shape")],
)
def test_the_bare_op_touches_no_memory_of_wrong_shape(size, message):
    *features, logits = make_inputs((2, 8, 8, 8), (1, 2))
    features[1] = torch.randn(2, 8, *size)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.asff_fuse(features, logits, "nearest")
