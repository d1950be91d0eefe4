"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import nn, ops
from tests.squeeze_excite.cases import NAMES, make_inputs


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.randn(8, 4, 4), ValueError, r"x must have shape \[N, C, H, W\].*\[8, 4, 4\]"),
        ("x", torch.ones(2, 8, 4, 4, dtype=torch.int64), TypeError, "x must be float32.*int64"),
        ("x", "maps", TypeError, "x must be a tensor, but is str"),
        ("x", torch.ones(2, 8, 4, 4).to_sparse(), TypeError, "x must be a dense .*sparse_coo"),
        ("reduce_weight", torch.randn(2, 9), ValueError, r"reduce_weight .*\[R, 8\].*\[2, 9\]"),
        ("reduce_weight", torch.randn(2, 8, 3, 3), ValueError, r"reduce_weight .*\[2, 8, 3, 3\]"),
        ("reduce_weight", torch.randn(2, 8).bfloat16(), TypeError, "reduce_weight.*bfloat16"),
        ("reduce_weight", None, TypeError, "reduce_weight must be a tensor, but is NoneType"),
        ("expand_weight", torch.randn(8, 3), ValueError, r"expand_weight .*\[8, 2\].*\[8, 3\]"),
        ("expand_weight", torch.randn(8, 2, device="meta"), ValueError, "expand_weight.*meta"),
        ("reduce_bias", torch.randn(3), ValueError, r"reduce_bias .*\[2\].*\[3\]"),
        ("expand_bias", torch.randn(1), ValueError, r"expand_bias .*\[8\].*\[1\]"),
        ("shortcut", torch.randn(2, 8, 4, 5), ValueError, r"shortcut .*\[2, 8, 4, 4\].*4, 5\]"),
        ("shortcut", torch.randn(2, 8, 4, 4).half(), TypeError, "shortcut.*float16"),
    ],
)
def test_tensors(name, value, error, message):
    arguments = dict(zip(NAMES, make_inputs((2, 8, 4, 4, 2)).tensors, strict=True))
    arguments[name] = value
    with pytest.raises(error, match=message):
        ops.squeeze_excite(**arguments)


@pytest.mark.parametrize("name", ["activation", "gate", "output_activation"])
def test_names(name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*'softmax'"):
        ops.squeeze_excite(*make_inputs((2, 8, 4, 4, 2)).tensors, **{name: "softmax"})
    with pytest.raises(ValueError, match=rf"{name} must be one of .*\['relu'\]"):
        ops.squeeze_excite(*make_inputs((2, 8, 4, 4, 2)).tensors, **{name: ["relu"]})


def test_module_style():
    with pytest.raises(ValueError, match=r"style must be one of 'torchvision'.*'keras'"):
        nn.SqueezeExcite(8, 2, style="keras")


def test_the_bare_op_touches_no_memory_of_wrong_shape():
    x, weight, *_ = make_inputs((2, 8, 4, 4, 2)).tensors
    with pytest.raises(RuntimeError, match="expand_weight must have shape"):
        torch.ops.dlkernels.squeeze_excite(
            x, weight, None, weight, None, None, "relu", "sigmoid", "identity"
        )
