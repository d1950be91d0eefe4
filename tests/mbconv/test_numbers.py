"""Outputs and gradients against the float64 formula."""

import pytest
import torch
from torch.utils._pytree import tree_map_only

from dlkernels import ops, use_backend
from tests.mbconv.cases import (
    BLOCKS,
    CASES,
    NAMES,
    as_leaves,
    block_arguments,
    make_leaves,
    norms_of,
)
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, FORMATS, assert_exact, relative_error

DEVICES_AND_BACKENDS = [pair for pair in DEVICES_AND_BACKENDS if pair[1] != "cuda"]


def run(leaves, grads, stride, padding, evaluation, input_norm=True, activation="silu"):
    norm, before = norms_of(leaves, evaluation, input_norm, activation)
    result = ops.depthwise_conv_bn_act(
        *leaves[:2], norm, before, stride=stride, padding=padding, pool=True
    )
    outputs = [result.out, result.pooled]
    torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return result, [leaf.grad for leaf in leaves[:6]]


def grads_like(leaves, stride, padding, dtype):
    norm, _ = norms_of(leaves, True)
    with torch.no_grad():
        result = ops.depthwise_conv_bn_act(
            *leaves[:2], norm, stride=stride, padding=padding, pool=True
        )
    return [torch.randn(t.shape).to(t.device, dtype) for t in (result.out, result.pooled)]


def check(case, dtype, memory_format, evaluation, input_norm, device, backend):
    """Within the contract; 16-bit gradients of the input's norm within twice eager's error.

    The batch norm behind makes the result almost independent of the scale before it, whose
    gradient is then a small difference of large numbers: it is as exact as rounding the
    convolution's output to 16 bits allows, whoever computes it.
    """
    shape, size, stride, padding = case
    tensors = make_leaves(shape, size, dtype, memory_format, device)
    grads = grads_like(as_leaves(tensors, double=True), stride, padding, dtype)
    with use_backend(backend):
        ours, our_grads = run(as_leaves(tensors), grads, stride, padding, evaluation, input_norm)
    theirs, their_grads = run(
        as_leaves(tensors, double=True), grads, stride, padding, evaluation, input_norm
    )
    assert ours.out.dtype == dtype
    assert ours.out.is_contiguous(memory_format=memory_format)
    length = shape[0] * shape[2] * shape[3]
    # Statistics and gradients of weights are float32, of values rounded to the maps' dtype.
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if b is not None:
            assert_exact(name, a.to(dtype), b, length)
    ill_conditioned = input_norm and dtype != torch.float32
    for name, a, b in zip(NAMES, our_grads, their_grads, strict=True):
        if b is not None and not (ill_conditioned and name.startswith("input_norm")):
            assert_exact(f"gradient of {name}", a.to(dtype), b, length)
    if ill_conditioned:
        with use_backend("reference"):
            _, eager_grads = run(as_leaves(tensors), grads, stride, padding, evaluation)
        for a, b, exact in zip(our_grads[4:], eager_grads[4:], their_grads[4:], strict=True):
            assert relative_error(a, exact) <= 2 * relative_error(b, exact)


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("input_norm", [False, True], ids=["plain input", "input norm"])
@pytest.mark.parametrize("evaluation", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_outputs_and_gradients(case, dtype, memory_format, evaluation, input_norm, device, backend):
    check(case, dtype, memory_format, evaluation, input_norm, device, backend)


def check_inference(case, dtype, memory_format, activation, device, backend):
    shape, size, stride, padding = case
    tensors = make_leaves(shape, size, dtype, memory_format, device)
    results = []
    for leaves, served in ((tensors, backend), ([t.double() for t in tensors], "reference")):
        norm, before = norms_of(leaves, True, activation=activation)
        with use_backend(served):
            results.append(
                ops.depthwise_conv_bn_act(
                    *leaves[:2], norm, before, stride=stride, padding=padding, pool=True
                )
            )
    ours, theirs = results
    assert ours.raw is None
    assert ours.out.is_contiguous(memory_format=memory_format)
    assert_exact("out", ours.out, theirs.out, shape[2] * shape[3])
    assert_exact("pooled", ours.pooled, theirs.pooled, shape[2] * shape[3])


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu", "hardswish", "mish"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference(dtype, memory_format, activation, device, backend):
    """Without gradients and with given statistics the raw output is never stored."""
    for case in CASES.values():
        check_inference(case, dtype, memory_format, activation, device, backend)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(value, memory_format):
    tensors = make_leaves((2, 18, 9, 9), 3, torch.float32, memory_format)
    tensors[0][1, 3, 2, 2] = value
    norm, before = norms_of(tensors, True, activation="relu")
    ours = ops.depthwise_conv_bn_act(*tensors[:2], norm, before, stride=2, padding=1).out
    norm, before = norms_of([t.double() for t in tensors], True, activation="relu")
    x, weight = tensors[0].double(), tensors[1].double()
    wanted = ops.depthwise_conv_bn_act(x, weight, norm, before, stride=2, padding=1).out
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.isinf(), wanted.isinf())


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_every_time(memory_format):
    tensors = make_leaves((3, 50, 15, 13), 5, torch.float32, memory_format)
    grads = grads_like(tensors, 2, 2, torch.float32)
    first, first_grads = run(as_leaves(tensors), grads, 2, 2, False)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        again, again_grads = run(as_leaves(tensors), grads, 2, 2, False)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first_grads, again_grads, strict=True))


def test_other_strides():
    tensors = make_leaves((3, 12, 8, 6), 3, torch.float32, torch.contiguous_format)
    norm, before = norms_of(tensors, True)
    for view in (tensors[0].transpose(2, 3), tensors[0][:, :, 1:-1], tensors[0].flip(3)):
        out = ops.depthwise_conv_bn_act(view, tensors[1], norm, before, padding=1).out
        copy = ops.depthwise_conv_bn_act(view.contiguous(), tensors[1], norm, before, padding=1)
        assert relative_error(out, copy.out) < 1e-6


def test_gradcheck_of_float64():
    tensors = make_leaves((2, 3, 5, 5), 3, torch.float32, torch.contiguous_format)
    leaves = as_leaves(tensors, double=True)

    def function(*leaves):
        norm, before = norms_of(leaves, False)
        return ops.depthwise_conv_bn_act(*leaves[:2], norm, before, stride=2, padding=1).out

    assert torch.autograd.gradcheck(function, leaves)


def in_float64(arguments):
    return tree_map_only(torch.Tensor, lambda tensor: tensor.double(), arguments)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_block(block, dtype, memory_format):
    arguments = block_arguments(block, dtype, memory_format)
    out = ops.mbconv_block(**arguments)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    expected = ops.mbconv_block(**in_float64(arguments))
    assert_exact("out", out, expected, block.hidden * block.kernel**2)


@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "silu", "hardswish", "mish"])
def test_activations_of_block(activation, gate):
    block = BLOCKS["residual"]
    arguments = block_arguments(block, torch.float32, torch.channels_last, activation, gate)
    expected = ops.mbconv_block(**in_float64(arguments))
    assert_exact("out", ops.mbconv_block(**arguments), expected, block.hidden)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_block_propagates_nan_and_infinity(value):
    """To the outputs near it without squeeze-and-excitation, to all of its sample with it."""
    for name in ("7x7", "residual"):
        arguments = block_arguments(BLOCKS[name], torch.float32, torch.channels_last, "relu")
        arguments["x"][0, 1, 0, 2] = value
        expected = ops.mbconv_block(**in_float64(arguments))
        out = ops.mbconv_block(**arguments)
        assert torch.equal(out.isfinite(), expected.isfinite())
        assert not out.isfinite().all()


@pytest.mark.parametrize("name", ["samples apart", "bands of rows", "small maps"])
def test_block_has_the_same_bits_every_time(name):
    arguments = block_arguments(BLOCKS[name], torch.float32, torch.contiguous_format)
    first = ops.mbconv_block(**arguments)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(ops.mbconv_block(**arguments), first)


def test_block_of_no_samples():
    arguments = block_arguments(BLOCKS["residual"], torch.float32, torch.contiguous_format)
    arguments["x"] = arguments["x"][:0]
    assert ops.mbconv_block(**arguments).shape == (0, 24, 13, 17)
