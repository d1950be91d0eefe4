"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops

NORM = ops.Norm()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm": None}, TypeError, "norm must be a Norm, but is NoneType"),
        ({"input_norm": (None, None)}, TypeError, "input_norm must be a Norm, but is tuple"),
        ({"norm": ops.Norm(eps="0.1")}, TypeError, r"norm\.eps must be a number, but is str"),
        ({"norm": ops.Norm(eps=0)}, ValueError, r"norm\.eps must be finite and above 0"),
        (
            {"norm": ops.Norm(mean=torch.ones(8), var=torch.ones(8, requires_grad=True))},
            ValueError,
            r"norm\.var gets no gradient",
        ),
        ({"stride": None}, TypeError, "stride must be an integer, but is NoneType"),
        ({"stride": True}, TypeError, "stride must be an integer, but is bool"),
        ({"padding": None}, TypeError, "padding must be an integer, but is NoneType"),
        ({"padding": (1, 1, "1", 1)}, TypeError, r"padding\[2\] must be an integer, but is str"),
        ({"pool": "yes"}, TypeError, "pool must be True or False, but is 'yes'"),
    ],
)
def test_arguments(arguments, error, message):
    usual = {"x": torch.randn(2, 8, 5, 5), "weight": torch.randn(8, 1, 3, 3), "norm": NORM}
    with pytest.raises(error, match=message):
        ops.depthwise_conv_bn_act(**{**usual, **arguments})
