"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import nn, ops
from tests.batch_norm_act.cases import NAMES, make_inputs


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("x", torch.randn(8, 4, 4), ValueError, r"x must have shape \[N, C, H, W\].*\[8, 4, 4\]"),
        ("x", torch.ones(2, 8, 4, 4, dtype=torch.int64), TypeError, "x must be float32.*int64"),
        ("weight", torch.randn(9), ValueError, r"weight must have shape \[8\].*\[9\]"),
        ("weight", torch.randn(8).half(), TypeError, "weight must be float32 .*float16"),
        ("bias", "ones", TypeError, "bias must be a tensor, but is str"),
        ("bias", torch.randn(8, device="meta"), ValueError, "bias must be on .*cpu.*meta"),
        ("mean", None, ValueError, "mean and var must be given both or neither"),
        ("var", torch.randn(7), ValueError, r"var must have shape \[8\].*\[7\]"),
        ("residual", torch.randn(2, 8, 4, 5), ValueError, r"residual .*\[2, 8, 4, 4\].*4, 5\]"),
        ("residual", torch.randn(2, 8, 4, 4).half(), TypeError, "residual.*float16"),
        ("sample_scale", torch.ones(2, device="meta"), ValueError, "sample_scale .*cpu.*meta"),
        ("sample_scale", torch.ones(3), ValueError, r"sample_scale must have shape \[2\].*\[3\]"),
    ],
)
def test_tensors(name, value, error, message):
    inputs = make_inputs((2, 8, 4, 4), statistics=True)
    arguments = dict(zip(NAMES, inputs.tensors, strict=True))
    arguments[name] = value
    with pytest.raises(error, match=message):
        ops.batch_norm_act(**arguments)


def test_options():
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(ValueError, match=r"activation must be one of .*'softmax'"):
        ops.batch_norm_act(x, activation="softmax")
    with pytest.raises(ValueError, match=r"activation must be one of .*'tanh'"):
        nn.BatchNormAct2d(8, activation="tanh")
    with pytest.raises(ValueError, match="pool must be False"):
        ops.batch_norm_act(x, residual=x, pool=True)


def test_batch_statistics_of_a_single_value():
    x = torch.randn(1, 8, 1, 1)
    with pytest.raises(ValueError, match=r"more than one value per channel.*\[1, 8, 1, 1\]"):
        ops.batch_norm_act(x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.BatchNormAct2d(8)(x)
    assert nn.BatchNormAct2d(8).eval()(x).shape == x.shape


def test_the_bare_op_touches_no_memory_of_wrong_shape():
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(RuntimeError, match="weight must be float32 and have one element"):
        torch.ops.dlkernels.batch_norm_act(
            x, torch.ones(4), *[None] * 5, 1e-5, "identity", 0.0, False
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": None}, TypeError, "eps must be a number, but is NoneType"),
        ({"eps": 0}, ValueError, "eps must be finite and above 0 with batch statistics, but is 0"),
        ({"eps": float("nan")}, ValueError, "eps must be finite .*nan"),
        ({"eps": float("inf")}, ValueError, "eps must be finite .*inf"),
        ({"negative_slope": "0.1"}, TypeError, "negative_slope must be a number, but is str"),
        ({"pool": None}, TypeError, "pool must be True or False, but is None"),
    ],
)
def test_numbers(options, error, message):
    with pytest.raises(error, match=message):
        ops.batch_norm_act(torch.randn(2, 8, 4, 4), **options)


@pytest.mark.parametrize("name", ["mean", "var", "sample_scale"])
def test_gradients_that_nothing_would_get(name):
    inputs = make_inputs((2, 8, 4, 4), statistics=True, sample_scale=True)
    arguments = dict(zip(NAMES, inputs.tensors, strict=True))
    arguments[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} gets no gradient and must not require one"):
        ops.batch_norm_act(**arguments)
