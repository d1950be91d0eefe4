"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops, use_backend
from tests.pointwise_conv.cases import make_source, make_tensors

SHAPE, OUT = (2, 8, 5, 5), 6


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": "maps"}, TypeError, "x must be a tensor, but is str"),
        ({"x": torch.randn(8, 5, 5)}, ValueError, r"x must have shape \[N, C, H, W\].*\[8, 5, 5\]"),
        ({"x": torch.ones(SHAPE).long()}, TypeError, "x must be float32.*int64"),
        ({"x": torch.randn(SHAPE).to_sparse()}, TypeError, "x must be a dense tensor"),
        (
            {"x": torch.randn(2, 9, 5, 5)},
            ValueError,
            r"weight must have shape \[O, 9\] or \[O, 9, 1, 1\] for x with 9 channels.*\[6, 8\]",
        ),
        ({"weight": None}, TypeError, "weight must be a tensor, but is NoneType"),
        ({"weight": torch.randn(8)}, ValueError, r"weight must have shape .*but is \[8\]"),
        ({"weight": torch.randn(6, 8, 1)}, ValueError, r"weight must .*\[6, 8, 1\]"),
        ({"weight": torch.randn(6, 8, 3, 3)}, ValueError, r"weight must .*\[6, 8, 3, 3\]"),
        ({"weight": torch.randn(6, 8, 1, 3)}, ValueError, r"weight must .*\[6, 8, 1, 3\]"),
        ({"weight": torch.randn(0, 8)}, ValueError, r"weight must .*at least one.*\[0, 8\]"),
        ({"weight": torch.randn(6, 8).half()}, TypeError, "weight must have .*float16"),
        ({"weight": torch.randn(6, 8, device="meta")}, ValueError, "weight .*cpu.*meta"),
        ({"gate": 0.5}, TypeError, "gate must be a tensor, but is float"),
        ({"gate": torch.rand(2, 7)}, ValueError, r"gate must have shape \[2, 8\].*\[2, 7\]"),
        ({"gate": torch.rand(2, 8, 1, 1)}, ValueError, r"gate must have shape .*\[2, 8, 1, 1\]"),
        ({"gate": torch.rand(2, 8).bfloat16()}, TypeError, "gate must be float32 or.*bfloat16"),
        ({"gate": torch.rand(2, 8).double()}, TypeError, "gate must be float32 or.*float64"),
        ({"gate": torch.rand(2, 8, device="meta")}, ValueError, "gate .*cpu.*meta"),
        ({"source": torch.randn(SHAPE)}, TypeError, "source must be a Source, but is Tensor"),
    ],
)
def test_arguments(arguments, error, message, backend):
    x, weight, gate = make_tensors(SHAPE, OUT)
    usual = {"x": x, "weight": weight, "gate": gate}
    if "x" in arguments:
        usual["gate"] = None
    with use_backend(backend), pytest.raises(error, match=message):
        ops.pointwise_conv(**{**usual, **arguments})


def test_zero_channels():
    with pytest.raises(ValueError, match=r"weight must have shape .*\[6, 0\]"):
        ops.pointwise_conv(torch.randn(2, 0, 5, 5), torch.randn(6, 0))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"raw": "maps"}, TypeError, r"source\.raw must be a tensor, but is str"),
        ({"raw": torch.randn(2, 8, 5, 4)}, ValueError, r"source\.raw must have shape .*5, 4\]"),
        ({"raw": torch.randn(SHAPE).half()}, TypeError, r"source\.raw must have .*float16"),
        ({"raw": torch.randn(SHAPE, device="meta")}, ValueError, r"source\.raw .*cpu.*meta"),
        ({"norm": None}, TypeError, r"source\.norm must be a Norm, but is NoneType"),
        ({"weight": torch.rand(7)}, ValueError, r"source\.norm\.weight must have shape \[8\].*7"),
        ({"bias": 0.0}, TypeError, r"source\.norm\.bias must be a tensor, but is float"),
        ({"mean": torch.rand(8).half()}, TypeError, r"source\.norm\.mean must be .*float16"),
        ({"mean": None}, ValueError, r"source\.norm\.mean and source\.norm\.var must be given bo"),
        (
            {"mean": None, "var": None},
            ValueError,
            r"source\.norm must have a mean and a var, but has None",
        ),
        ({"var": torch.rand(8, requires_grad=True)}, ValueError, r"source\.norm\.var gets no grad"),
        ({"eps": -1.0}, ValueError, r"source\.norm\.eps must be finite and at least 0.*-1\.0"),
        ({"activation": "leaky_relu"}, ValueError, r"source\.norm\.activation must be .*leaky"),
    ],
)
def test_sources(changes, error, message, backend):
    raw, weight, _ = make_tensors(SHAPE, OUT)
    source, x = make_source(raw)
    of_source = {key: value for key, value in changes.items() if key in ("raw", "norm")}
    of_norm = {key: value for key, value in changes.items() if key not in of_source}
    source = source._replace(norm=source.norm._replace(**of_norm))._replace(**of_source)
    with use_backend(backend), pytest.raises(error, match=message):
        ops.pointwise_conv(x, weight, source=source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.randn(2, 9, 5, 5)}, "weight must have shape"),
        ({0: torch.randn(8, 5, 5)}, "weight must have shape"),
        ({0: torch.randn(SHAPE).double()}, "weight must .* the dtype of x"),
        ({0: torch.randn(SHAPE).double(), 1: torch.randn(6, 8).double()}, "must be float32"),
        ({0: torch.randn(2, 0, 5, 5), 1: torch.randn(6, 0), 2: None}, "at least one of each"),
        ({1: torch.randn(0, 8)}, "at least one of each"),
        ({1: torch.randn(6, 8, 1, 1)}, "weight must have shape"),
        ({2: torch.rand(8)}, "gate must be float32 of shape"),
        ({2: torch.rand(2, 7)}, "gate must be float32 of shape"),
        ({2: torch.rand(1, 8)}, "gate must be float32 of shape"),
        ({2: torch.rand(2, 8).half()}, "gate must be float32 of shape"),
    ],
)
def test_the_bare_op_touches_no_memory_of_wrong_shape(changes, message):
    arguments = make_tensors(SHAPE, OUT)
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.pointwise_conv(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: torch.randn(2, 6, 5, 4)}, "grad_out must have the shape"),
        ({0: torch.randn(2, 5, 5, 5)}, "grad_out must have the shape"),
        ({0: torch.randn(6, 5, 5)}, "grad_out must have the shape"),
        ({0: torch.randn(2, 6, 5, 5).half()}, "grad_out must .* dtype"),
        ({1: torch.randn(2, 9, 5, 5)}, "weight must have shape"),
        ({2: torch.randn(0, 8), 0: torch.randn(2, 0, 5, 5)}, "at least one of each"),
        ({3: torch.rand(2, 9)}, "gate must be float32 of shape"),
        ({4: torch.rand(7)}, "norms must have one float32 value per channel"),
        ({5: torch.rand(9)}, "norms must have one float32 value per channel"),
        ({6: torch.rand(8).half()}, "norms must have one float32 value per channel"),
        ({7: torch.rand(0)}, "norms must have one float32 value per channel"),
        ({6: None}, "mean and var belong together"),
        ({9: "softmax"}, "softmax"),
        ({10: [True, True]}, "needs must be three flags"),
    ],
)
def test_the_bare_backward_op(changes, message):
    x, weight, gate = make_tensors(SHAPE, OUT)
    source, _ = make_source(x)
    arguments = [torch.randn(2, 6, 5, 5), x, weight, gate, *source.norm, [True] * 3]
    torch.ops.dlkernels.pointwise_conv_backward(*arguments)
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.dlkernels.pointwise_conv_backward(*arguments)
