"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.conv3x3.cases import make_tensors


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": "maps"}, TypeError, "x must be a tensor, but is str"),
        ({"x": torch.randn(8, 5, 5)}, ValueError, r"x must have shape \[N, C, H, W\].*\[8, 5, 5\]"),
        ({"x": torch.ones(2, 8, 5, 5).long()}, TypeError, "x must be float32.*int64"),
        ({"x": torch.randn(2, 8, 5, 5).to_sparse()}, TypeError, "x must be a dense tensor"),
        ({"x": torch.randn(2, 8, 0, 5)}, ValueError, r"x must have maps of at least 1 x 1.*0, 5\]"),
        ({"x": torch.randn(2, 9, 5, 5)}, ValueError, r"weight must have shape \[O, 9, 3, 3\]"),
        ({"weight": None}, TypeError, "weight must be a tensor, but is NoneType"),
        ({"weight": torch.randn(6, 8, 5, 5)}, ValueError, r"weight must .*\[6, 8, 5, 5\]"),
        ({"weight": torch.randn(6, 8, 9)}, ValueError, r"weight must .*\[6, 8, 9\]"),
        ({"weight": torch.randn(0, 8, 3, 3)}, ValueError, r"weight must .*\[0, 8, 3, 3\]"),
        ({"weight": torch.randn(6, 8, 3, 3).half()}, TypeError, "weight must have .*float16"),
        ({"weight": torch.randn(6, 8, 3, 3, device="meta")}, ValueError, "weight .*cpu.*meta"),
        ({"bias": torch.randn(7)}, ValueError, r"bias must have shape \[6\].*\[7\]"),
        ({"bias": torch.randn(6).bfloat16()}, TypeError, "bias must have .*bfloat16"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, but is float"),
        ({"padding": 3}, ValueError, "padding must be 0, 1 or 2, but is 3"),
        ({"padding": -1}, ValueError, "padding must be 0, 1 or 2, but is -1"),
        ({"padding": True}, TypeError, "padding must be an integer, but is bool"),
        ({"padding": (1, 1)}, TypeError, "padding must be an integer, but is tuple"),
        ({"x": torch.randn(2, 8, 2, 5), "padding": 0}, ValueError, r"x must .* padding 0 .*2, 5\]"),
    ],
)
def test_arguments(arguments, error, message, backend):
    x, weight, bias = make_tensors((2, 8, 5, 5), 6)
    usual = {"x": x, "weight": weight, "bias": bias}
    with use_backend(backend), pytest.raises(error, match=message):
        ops.conv3x3(**{**usual, **arguments})


def test_zero_channels():
    with pytest.raises(ValueError, match=r"weight must have shape .*\[6, 0, 3, 3\]"):
        ops.conv3x3(torch.randn(2, 0, 5, 5), torch.randn(6, 0, 3, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.randn(2, 9, 5, 5)}, "weight must have shape"),
        ({0: torch.randn(2, 8, 5, 5).double()}, "weight must .* the dtype of x"),
        ({1: torch.randn(6, 8, 3)}, "weight must have shape"),
        ({2: torch.randn(7)}, "bias must have one value per output channel"),
        ({2: torch.randn(6).half()}, "bias must .* the dtype of x"),
        ({3: 3}, "padding must be 0, 1 or 2"),
        ({0: torch.randn(2, 8, 2, 5), 3: 0}, "must not be larger"),
    ],
)
def test_the_bare_op_touches_no_memory_of_wrong_shape(changes, message):
    arguments = [*make_tensors((2, 8, 5, 5), 6), 1]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.conv3x3(*arguments)


@pytest.mark.parametrize(
    ("grad", "needs", "message"),
    [
        (torch.randn(2, 6, 5, 4), [True, True], "grad_out must have the shape"),
        (torch.randn(2, 6, 5, 5).half(), [True, True], "grad_out must .* dtype"),
        (torch.randn(2, 6, 5, 5), [True], "needs must be two flags"),
    ],
)
def test_the_bare_backward_op(grad, needs, message):
    x, weight, _ = make_tensors((2, 8, 5, 5), 6)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.conv3x3_backward(grad, x, weight, 1, needs)
