"""The numeric watch (DLKERNELS_CHECK=1) lets every op pass and stops broken ones."""

import os
import subprocess
import sys

import pytest
import torch

from dlkernels import ops
from dlkernels.squeeze_excite import op as squeeze_excite
from dlkernels.watch import relative_error, watch
from tests.asff import cases as asff
from tests.batch_norm_act import cases as batch_norm_act
from tests.boxes import cases as boxes
from tests.conv3x3 import cases as conv3x3
from tests.dense_block import cases as dense_block
from tests.mbconv import cases as mbconv
from tests.numbers import DTYPES
from tests.pointwise_conv import cases as pointwise
from tests.pyramid_pool import cases as pyramid
from tests.residual_sum import cases as residual_sum
from tests.squeeze_excite import cases as excite


def run_squeeze_excite(dtype):
    return watch(ops.squeeze_excite)(*excite.make_inputs((2, 7, 5, 3, 2), dtype).leaves())


def run_asff_fuse(dtype):
    *features, logits = asff.leaves_of(asff.make_inputs((2, 5, 8, 8), (1, 2), dtype))
    return watch(ops.asff_fuse)(features, logits)


def run_batch_norm_act(dtype):
    leaves = batch_norm_act.make_inputs((2, 7, 5, 3), dtype).leaves()
    return watch(ops.batch_norm_act)(*leaves, activation="silu", pool=True)


def run_conv3x3(dtype):
    leaves = conv3x3.as_leaves(conv3x3.make_tensors((2, 9, 7, 6), 5, dtype))
    return watch(ops.conv3x3)(*leaves, padding=2)


def run_pointwise_conv(dtype):
    raw, weight, gate = pointwise.make_tensors((2, 9, 7, 6), 5, dtype)
    source, x = pointwise.make_source(raw)
    return watch(ops.pointwise_conv)(*pointwise.as_leaves([x, weight, gate]), source)


def run_pyramid_pool(dtype):
    return watch(ops.pyramid_pool)(pyramid.make_maps((2, 9, 7, 6), dtype).requires_grad_())


def run_depthwise_conv_bn_act(dtype):
    tensors = mbconv.make_leaves((2, 9, 9, 11), 3, dtype, torch.contiguous_format)
    leaves = mbconv.as_leaves(tensors)
    norms = mbconv.norms_of(leaves, evaluation=False)
    return watch(ops.depthwise_conv_bn_act)(*leaves[:2], *norms, padding=1, pool=True)


def run_mbconv_block(dtype):
    block = mbconv.BLOCKS["residual"]
    arguments = mbconv.block_arguments(block, dtype, torch.contiguous_format)
    return watch(ops.mbconv_block)(**arguments)


def run_residual_sum(dtype):
    leaves = residual_sum.make_leaves((2, 7, 5, 3, 2), dtype)
    return watch(ops.residual_sum)(*residual_sum.arguments_of(leaves)[:4])


def run_dense_block(dtype):
    # A shift that keeps all values away from the ReLU's kink.
    layers = dense_block.leaves_of(dense_block.make_layers(dense_block.SMALL, dtype, 4.0))
    x = dense_block.make_maps(dense_block.SMALL, dtype).requires_grad_()
    return watch(ops.dense_block)(x, layers, training=True, dropout=0.3)


def run_transition(dtype):
    layers = dense_block.leaves_of(dense_block.make_layers(dense_block.SMALL, dtype, 4.0))
    layer = layers[0][0]
    x = dense_block.make_maps(dense_block.SMALL, dtype).requires_grad_()
    return watch(ops.transition)(x, layer, training=True)


def run_bn_relu_conv1x1(dtype):
    layers = dense_block.leaves_of(dense_block.make_layers(dense_block.SMALL, dtype, 4.0))
    maps = torch.randn(2, 9, 5, 4).to(dtype).requires_grad_()
    return watch(ops.bn_relu_conv1x1)(maps, layers[0][0], first=2, training=True)


def run_channel_statistics(dtype):
    maps = torch.randn(2, 9, 5, 4) + 0.5
    return watch(ops.channel_statistics)(maps.to(dtype).requires_grad_(), 2, 5)


def run_box_iou_loss(dtype):
    pred, target = boxes.make_boxes((50,), dtype)
    return watch(ops.box_iou_loss)(pred.requires_grad_(), target, "ciou")


def run_sigmoid_focal_loss(dtype):
    logits = torch.randn(30, 7).to(dtype).requires_grad_()
    return watch(ops.sigmoid_focal_loss)(logits, boxes.make_labels((30, 7)), reduction="sum")


def run_max_iou_assign(dtype):
    return watch(ops.max_iou_assign)(boxes.make_grid(), None, [boxes.make_gt(9).to(dtype)])


def run_atss_assign(dtype):
    return watch(ops.atss_assign)(boxes.make_grid(), None, [boxes.make_gt(9).to(dtype)])


RUNS = {name.removeprefix("run_"): run for name, run in globals().items() if "run_" in name}


def test_every_op_with_kernels_is_here():
    tuples = {"Norm", "NormConv", "ConvNorm", "Excitation", "Source"}
    assert set(RUNS) == set(ops.__all__) - tuples - {"yolo_assign", "fcos_assign"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RUNS)
def test_ops_pass(name, dtype):
    torch.manual_seed(0)
    result = RUNS[name](dtype)
    tensors = [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]
    outputs = [tensor for tensor in tensors if tensor.requires_grad]
    assert outputs or name.endswith("assign") or name == "mbconv_block"
    if outputs:
        grads = [torch.randn_like(out) for out in outputs]
        torch.autograd.backward(outputs, grads, retain_graph=True)
        torch.autograd.backward(outputs[0], grads[0])


def break_op(monkeypatch, name, place):
    original = getattr(squeeze_excite, name)

    def broken(*args):
        results = list(original(*args))
        results[place] = results[place].clone()
        results[place].view(-1)[0] += 0.5
        return tuple(results)

    monkeypatch.setattr(squeeze_excite, name, broken)


def test_a_broken_kernel_raises_in_forward(monkeypatch):
    break_op(monkeypatch, "_OP", 0)
    message = (
        r"squeeze_excite: output differs .* relative error \d.*, limit .* x \[2, 7, 5, 3\] \(fl"
    )
    with pytest.raises(RuntimeError, match=message):
        run_squeeze_excite(torch.float32)


def test_a_broken_kernel_raises_in_backward(monkeypatch):
    out = run_squeeze_excite(torch.float32)
    break_op(monkeypatch, "_BACKWARD_OP", 1)
    message = r"squeeze_excite: gradient of reduce_weight differs .* relative error \d"
    with pytest.raises(RuntimeError, match=message):
        out.backward(torch.randn_like(out))


def test_a_wrong_index_raises(monkeypatch):
    from dlkernels.boxes import reference

    original = reference.max_iou_assign

    def broken(*args):
        assigned, iou = original(*args)
        assigned[0, 5] += 1
        return assigned, iou

    monkeypatch.setattr(reference, "max_iou_assign", broken)
    with pytest.raises(RuntimeError, match=r"max_iou_assign: output\[0\] .* 1 of \d+ values"):
        run_max_iou_assign(torch.float32)


def test_running_statistics_move_once():
    layers = dense_block.make_layers(dense_block.SMALL)
    x = dense_block.make_maps(dense_block.SMALL)
    expected = dense_block.leaves_of(layers)
    ops.dense_block(x, expected, training=True)
    watch(ops.dense_block)(x, layers, training=True)
    for name, value in dense_block.running_of(expected).items():
        assert torch.equal(value, dense_block.running_of(layers)[name]), name


def test_random_numbers_are_those_of_an_unwatched_call():
    layers = dense_block.make_layers(dense_block.SMALL)
    x = dense_block.make_maps(dense_block.SMALL)
    results = []
    for function in (ops.dense_block, watch(ops.dense_block)):
        torch.manual_seed(1)
        results.append((function(x, layers, training=True, dropout=0.5), torch.rand(3)))
    assert all(map(torch.equal, *results))


def test_nan_and_infinity_in_the_same_places_are_equal():
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert relative_error(x, x.double()) == 0
    assert not relative_error(x, torch.tensor([1.0, 2.0, float("inf")])) <= 1


def test_bad_arguments_get_the_message_of_the_op():
    with pytest.raises(ValueError, match=r"logits must .*float32"):
        watch(ops.asff_fuse)([torch.ones(1, 1, 2, 2)] * 2, torch.ones(1, 3, 2, 2))


def test_compiled_calls_are_not_watched():
    x, *weights = excite.make_inputs((2, 7, 5, 3, 2)).tensors
    compiled = torch.compile(watch(ops.squeeze_excite), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, *weights), ops.squeeze_excite(x, *weights))


def test_under_autocast_the_autocast_dtype_counts():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = run_squeeze_excite(torch.float32)
    out.backward(torch.randn_like(out))


def test_the_variable_turns_it_on():
    code = "from dlkernels import ops; print(hasattr(ops.squeeze_excite, '__wrapped__'))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DLKERNELS_CHECK": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "True"
    assert hasattr(ops.squeeze_excite, "__wrapped__") == (os.environ.get("DLKERNELS_CHECK") == "1")
