"""The Triton kernels of depthwise_conv_bn_act, run by the interpreter."""

import pytest
import torch

from dlkernels import ops
from dlkernels.backend import availability
from tests.gpu_proof.traffic import count_traffic
from tests.mbconv.cases import CASES, NAMES, as_leaves, make_leaves, norms_of
from tests.mbconv.test_numbers import grads_like, run
from tests.numbers import DTYPES, FORMATS, assert_exact

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")

SHAPES = {
    "3x3": ((2, 7, 5, 6), 3, 1, 1),
    "5x5 stride 2": ((2, 5, 7, 6), 5, 2, 2),
    "7x7": ((1, 3, 6, 7), 7, 1, 3),
    "same as TensorFlow": ((2, 33, 4, 4), 3, 2, (0, 1, 0, 1)),
    "one output": ((3, 3, 2, 2), 3, 2, (0, 1, 0, 1)),
    "rows that no output reads": CASES["rows that no output reads"],
}


def test_triton_serves():
    for op in ("depthwise_conv_bn_act", "depthwise_conv_bn_act_backward"):
        assert availability()[op]["triton"] == "available"


def check(case, dtype, memory_format, evaluation, input_norm, activation="silu"):
    shape, size, stride, padding = case
    tensors = make_leaves(shape, size, dtype, memory_format)
    grads = grads_like(as_leaves(tensors, double=True), stride, padding, dtype)
    options = (grads, stride, padding, evaluation, input_norm, activation)
    ours, our_grads = run(as_leaves(tensors), *options)
    theirs, their_grads = run(as_leaves(tensors, double=True), *options)
    assert ours.out.dtype == dtype
    assert ours.out.is_contiguous(memory_format=memory_format)
    length = shape[0] * shape[2] * shape[3]
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if b is not None:
            assert_exact(name, a.to(dtype), b, length)
    # See tests/mbconv/test_numbers.py: 16-bit gradients of the input's norm are ill-conditioned.
    ill_conditioned = input_norm and dtype != torch.float32
    for name, a, b in zip(NAMES, our_grads, their_grads, strict=True):
        if b is not None and not (ill_conditioned and name.startswith("input_norm")):
            assert_exact(f"gradient of {name}", a.to(dtype), b, length)


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_shapes(case, memory_format, evaluation):
    check(case, torch.float32, memory_format, evaluation, True)


@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_input(dtype, memory_format, evaluation):
    check(SHAPES["3x3"], dtype, memory_format, evaluation, False)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_16_bit_with_input_norm(dtype, memory_format):
    check(SHAPES["3x3"], dtype, memory_format, True, True)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_inference_stores_no_raw_output(memory_format):
    tensors = make_leaves((2, 9, 6, 5), 3, torch.float32, memory_format)
    norm, before = norms_of(tensors, True)
    ours = ops.depthwise_conv_bn_act(*tensors[:2], norm, before, padding=1, pool=True)
    doubles = [t.double() for t in tensors]
    norm, before = norms_of(doubles, True)
    theirs = ops.depthwise_conv_bn_act(*doubles[:2], norm, before, padding=1, pool=True)
    assert ours.raw is None
    assert_exact("out", ours.out, theirs.out, 30)
    assert_exact("pooled", ours.pooled, theirs.pooled, 30)


def test_empty_batch():
    tensors = make_leaves((0, 6, 5, 4), 3, torch.float32, torch.contiguous_format)
    leaves = as_leaves(tensors)
    norm, before = norms_of(leaves, True)
    out = ops.depthwise_conv_bn_act(*leaves[:2], norm, before, padding=1).out
    out.sum().backward()
    assert out.shape == leaves[0].grad.shape == (0, 6, 5, 4)
    assert leaves[1].grad.abs().sum() == 0


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "inference"])
def test_traffic(memory_format, evaluation):
    """At most 1.1 times what the passes must move, where a program reads a sector once.

    The taps of a pixel read what other pixels of the program read, from its cache.
    """
    tensors = make_leaves((1, 16, 16, 32), 3, torch.float32, memory_format)
    norm, before = norms_of(tensors, evaluation)
    maps = tensors[0].nbytes
    with count_traffic() as forward:
        ops.depthwise_conv_bn_act(*tensors[:2], norm, before, padding=1)
    # Statistics of the input, the convolution, and the pass that normalises its output.
    floor = (2 if evaluation else 5) * maps
    assert floor <= forward.cached <= 1.1 * floor, forward.cached / floor
    assert forward.atomics == 0


def test_same_bits_every_time():
    tensors = make_leaves((2, 5, 7, 6), 5, torch.float32, torch.contiguous_format)
    grads = grads_like(tensors, 2, 2, torch.float32)
    first, first_grads = run(as_leaves(tensors), grads, 2, 2, False)
    again, again_grads = run(as_leaves(tensors), grads, 2, 2, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))
