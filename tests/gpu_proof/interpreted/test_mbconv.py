"""The Triton kernels of depthwise_conv_bn_act, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from dlkernels.mbconv import triton as kernels
from dlkernels.mbconv.op import Norm
from tests.gpu_proof.traffic import count_traffic
from tests.mbconv.cases import CASES, as_leaves, make_leaves, norms_of
from tests.mbconv.test_numbers import check, check_inference, grads_like, run
from tests.numbers import DTYPES, FORMATS, relative_error

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

CONTIGUOUS, CHANNELS_LAST = FORMATS
# (N, C, H, W), K, stride, padding.
SHAPES = {
    "3x3": ((2, 7, 5, 6), 3, 1, 1),
    "5x5": ((1, 5, 6, 5), 5, 1, (1, 2, 2, 0)),
    "5x5 stride 2": ((2, 5, 7, 6), 5, 2, 2),
    "7x7": ((1, 3, 6, 7), 7, 1, 3),
    "7x7 stride 2": ((1, 3, 6, 7), 7, 2, 3),
    "same as TensorFlow": ((2, 33, 4, 4), 3, 2, (0, 1, 0, 1)),
    "one output": ((3, 3, 2, 2), 3, 2, (0, 1, 0, 1)),
    "rows that no output reads": CASES["rows that no output reads"],
}


def test_triton_serves():
    for op in ("depthwise_conv_bn_act", "depthwise_conv_bn_act_backward"):
        assert availability()[op]["triton"] == "available"


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_training(case, memory_format):
    check(case, torch.float32, memory_format, False, True, "cpu", "triton")


@pytest.mark.parametrize("memory_format", FORMATS)
def test_several_programs(memory_format, monkeypatch):
    """Along strips, bands and channels, on small maps, which spares the interpreter work."""
    monkeypatch.setattr(kernels, "THREADS", 8)
    monkeypatch.setattr(kernels, "CHANNELS", 4)
    check(((1, 6, 6, 9), 3, 1, 1), torch.float32, memory_format, False, True, "cpu", "triton")


@pytest.mark.parametrize("input_norm", [False, True], ids=["plain input", "input norm"])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_evaluation(memory_format, input_norm):
    case = SHAPES["same as TensorFlow"]
    check(case, torch.float32, memory_format, True, input_norm, "cpu", "triton")


@pytest.mark.parametrize("input_norm", [False, True], ids=["plain input", "input norm"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_training(dtype, memory_format, input_norm):
    check(SHAPES["3x3"], dtype, memory_format, False, input_norm, "cpu", "triton")


@pytest.mark.parametrize(
    ("case", "dtype", "memory_format", "activation"),
    [
        ("3x3", torch.float32, CONTIGUOUS, "silu"),
        ("3x3", torch.bfloat16, CHANNELS_LAST, "hardswish"),
        ("5x5", torch.float32, CHANNELS_LAST, "relu6"),
        ("5x5 stride 2", torch.float16, CONTIGUOUS, "relu"),
        ("7x7", torch.float16, CHANNELS_LAST, "mish"),
        ("7x7 stride 2", torch.float32, CONTIGUOUS, "identity"),
    ],
)
def test_inference(case, dtype, memory_format, activation):
    check_inference(SHAPES[case], dtype, memory_format, activation, "cpu", "triton")


@pytest.mark.parametrize("memory_format", FORMATS)
def test_mean_far_from_zero(memory_format):
    x = torch.randn(2, 3, 9, 9) + 1e4
    x = x.contiguous(memory_format=memory_format)
    weight = torch.zeros(3, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    result = ops.depthwise_conv_bn_act(x, weight, Norm(), padding=1)
    assert relative_error(result.var, x.double().var((0, 2, 3), correction=0)) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(value):
    tensors = make_leaves((1, 6, 5, 5), 3, torch.float32, CHANNELS_LAST)
    tensors[0][0, 3, 2, 2] = value
    norm, before = norms_of(tensors, True, activation="relu")
    ours = ops.depthwise_conv_bn_act(*tensors[:2], norm, before, stride=2, padding=1).out
    doubles = [t.double() for t in tensors]
    norm, before = norms_of(doubles, True, activation="relu")
    wanted = ops.depthwise_conv_bn_act(*doubles[:2], norm, before, stride=2, padding=1).out
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


def test_empty_batch():
    tensors = make_leaves((0, 6, 5, 4), 3, torch.float32, CONTIGUOUS)
    leaves = as_leaves(tensors)
    norm, before = norms_of(leaves, True)
    out = ops.depthwise_conv_bn_act(*leaves[:2], norm, before, padding=1).out
    out.sum().backward()
    assert out.shape == leaves[0].grad.shape == (0, 6, 5, 4)
    assert leaves[1].grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("stride", "dtype", "evaluation"),
    [(1, torch.float32, True), (1, torch.float32, False), (2, torch.bfloat16, False)],
    ids=["evaluation", "training", "training, stride 2"],
)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_traffic(memory_format, stride, dtype, evaluation):
    """At most 1.1 times what the passes must move, each byte of the maps once a pass.

    ``memory`` counts what a launch moves between the L2 cache and memory: neighbouring strips and
    bands read the rows and columns between them again, as do the columns of a strip of contiguous
    maps their sectors, out of the caches. What programs ask for is at most 1.7 times the floor, of
    bands as low as on these small maps.
    """
    leaves = as_leaves(make_leaves((stride, 32, 16, 16), 3, dtype, memory_format))
    norm, before = norms_of(leaves, evaluation)
    with count_traffic() as forward:
        out = ops.depthwise_conv_bn_act(*leaves[:2], norm, before, stride=stride, padding=1).out
    # The convolution reads x and writes raw; then the norm reads raw and writes out. In evaluation
    # both are written at once. The input's statistics read x before.
    x, raw = leaves[0].nbytes, out.nbytes
    floor = x + 2 * raw if evaluation else 2 * x + 3 * raw
    assert floor <= forward.memory <= 1.1 * floor, forward.memory / floor
    assert forward.moved <= 1.7 * floor, forward.moved / floor

    with count_traffic() as backward:
        out.backward(torch.randn_like(out))
    # The sums read raw and grad_out; then both and x are read for the gradient of x. The input's
    # statistics need x and that gradient once more.
    floor = 4 * raw + (2 if evaluation else 5) * x
    assert floor <= backward.memory <= 1.1 * floor, backward.memory / floor
    assert backward.moved <= 1.7 * floor, backward.moved / floor
    assert forward.atomics == backward.atomics == 0


def test_same_bits_every_time():
    tensors = make_leaves((2, 3, 4, 5), 3, torch.float32, CONTIGUOUS)
    grads = grads_like(as_leaves(tensors, double=True), 2, 1, torch.float32)
    first, first_grads = run(as_leaves(tensors), grads, 2, 1, False)
    again, again_grads = run(as_leaves(tensors), grads, 2, 1, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))
