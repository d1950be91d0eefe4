"""Arguments that share memory: with themselves, with each other, with results of other ops."""

import pytest
import torch
from torch import Tensor

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from tests.numbers import assert_exact
from tests.robustness.calls import random_boxes

SIZE = 16
Leaves = list[Tensor]  # maps [3, 16, 6, 6], a matrix [16, 16], values [16]


def stage(matrix, values, kernel=1):
    weight = matrix[:, :, None, None].expand(-1, -1, kernel, kernel)
    running = values.detach().square() + 1
    return ops.NormConv(values, values, running, running, weight)


def bottleneck(x, matrix, values):
    layer = [stage(matrix, values), stage(matrix, values, 3)]
    return ops.dense_block(x, [layer], training=True)


def depthwise(x, matrix, values, **options):
    norm = ops.Norm(values, values, None, None, 1e-3, "silu")
    weight = matrix.flatten()[: 9 * SIZE].view(SIZE, 1, 3, 3)
    return ops.depthwise_conv_bn_act(x, weight, norm, norm, padding=1, **options)


def neighbours_loss(x):
    boxes = x.flatten().unflatten(0, (-1, 4)).abs().cumsum(-1)
    return ops.box_iou_loss(boxes[1:], boxes[:-1], "giou")


def chain(x, matrix, values):
    """Every result is read by the next op and by the one after it."""
    y = ops.batch_norm_act(x, values, values, residual=x, activation="silu").out
    z = ops.squeeze_excite(y, matrix, values, matrix.t(), values, y)
    u = depthwise(z, matrix, values).out
    fused = ops.asff_fuse([u, z], torch.stack([u[:, 0], z[:, 1]], 1))
    return ops.transition(fused, stage(matrix, values), training=True)


CALLS = {
    "squeeze_excite, shortcut is x": lambda x, m, v: ops.squeeze_excite(x, m, v, m, v, x),
    "squeeze_excite, weights overlap": lambda x, m, v: ops.squeeze_excite(
        x, m[:8], m[0, :8], m[4:12].t(), m[:, 3], output_activation="relu"
    ),
    "batch_norm_act, residual is x": lambda x, m, v: (
        ops.batch_norm_act(x, v, v, residual=x, activation="mish").out
    ),
    "batch_norm_act, mean is var": lambda x, m, v: (
        ops.batch_norm_act(x, v, v, v.detach().abs(), v.detach().abs(), activation="silu").out
    ),
    "conv3x3, one weight for all taps": lambda x, m, v: ops.conv3x3(
        x, m[:, :, None, None].expand(-1, -1, 3, 3), v
    ),
    "conv3x3, weight is x": lambda x, m, v: ops.conv3x3(x, x[..., 1:4, 2:5], padding=2),
    "pointwise_conv, gate is of the weight": lambda x, m, v: ops.pointwise_conv(
        x, m, m[: len(x)].sigmoid()
    ),
    "pointwise_conv, one row for all outputs": lambda x, m, v: ops.pointwise_conv(
        x, m[:1].expand(40, -1), x[:, :, 0, 0]
    ),
    "pointwise_conv, x and raw are one": lambda x, m, v: ops.pointwise_conv(
        x, m, None, ops.Source(x, ops.Norm(mean=torch.zeros(SIZE), var=torch.ones(SIZE), eps=0))
    ),
    "depthwise_conv_bn_act, one norm": lambda x, m, v: depthwise(x, m, v).out,
    "depthwise_conv_bn_act, both results": lambda x, m, v: torch.cat(
        [part.flatten() for part in depthwise(x, m, v, pool=True)[:2]]
    ),
    "dense_block, one weight": bottleneck,
    "dense_block of its own result": lambda x, m, v: bottleneck(bottleneck(x, m, v)[:, 8:24], m, v),
    "transition": lambda x, m, v: ops.transition(x, stage(m, v), training=True),
    "bn_relu_conv1x1": lambda x, m, v: ops.bn_relu_conv1x1(x, stage(m, v), training=True),
    "channel_statistics": lambda x, m, v: torch.cat(ops.channel_statistics(x, 2, 9)),
    "asff_fuse, one map": lambda x, m, v: ops.asff_fuse([x, x, x], x[:, :3]),
    "asff_fuse, weighted by itself": lambda x, m, v: ops.asff_fuse(
        [x[:, :2], x[:, 1:3]], x[:, 1:3]
    ),
    "pyramid_pool": lambda x, m, v: ops.pyramid_pool(x),
    "pyramid_pool of its own result": lambda x, m, v: ops.pyramid_pool(
        ops.pyramid_pool(x)[:, 8:24]
    ),
    "box_iou_loss of a box with the next": lambda x, m, v: neighbours_loss(x),
    "sigmoid_focal_loss, targets of logits": lambda x, m, v: ops.sigmoid_focal_loss(
        x, x.detach().clamp(0, 1), weight=x.detach()[..., 0].abs()
    ),
    "a chain of ops": chain,
}
VIEWS = {
    "itself": lambda x: x,
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "overlapping windows": lambda x: x.as_strided((3, SIZE, 6, 6), (40, 36, 6, 1)),
    "overlapping windows, channels last": lambda x: x.as_strided((2, SIZE, 6, 6), (9, 1, 40, 16)),
}


def run(call, view, leaves: Leaves) -> list[Tensor]:
    """The result, and the gradients of the leaves."""
    x, *others = leaves
    out = call(view(x), *others)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CALLS)
def test_shared_memory(name, view):
    maps = torch.randn(3, SIZE, 6, 6) + 0.5
    tensors = [maps, torch.randn(SIZE, SIZE) / 4, torch.rand(SIZE) + 0.5]
    actual, expected = (
        run(CALLS[name], VIEWS[view], [t.to(dtype, copy=True).requires_grad_() for t in tensors])
        for dtype in (torch.float32, torch.float64)
    )
    for index, pair in enumerate(zip(actual, expected, strict=True)):
        assert_exact(f"{index}", *pair, reduction_length=3 * SIZE * 6 * 6)


@pytest.mark.parametrize("assign", [ops.atss_assign, ops.max_iou_assign])
def test_boxes_that_are_the_anchors(assign):
    """Boxes, anchors and what is to be ignored are one tensor, expanded over the images."""
    boxes = random_boxes(12, generator=torch.default_generator)
    images = boxes.expand(3, -1, -1)
    assigned, iou = assign(boxes, (7, 5), images, torch.tensor(12).expand(3))
    copies = assign(boxes.clone(), (7, 5), images.clone(), torch.tensor([12, 12, 12]))
    assert torch.equal(assigned, copies[0])
    assert torch.equal(iou, copies[1])


def test_a_mask_of_overlapping_rows():
    grid = AnchorGrid.for_image((64, 64))
    boxes = random_boxes(2, 4, generator=torch.default_generator)
    buffer = torch.rand(len(grid) + 1) < 0.7
    valid = buffer.as_strided((2, len(grid)), (1, 1))
    for actual, copy in zip(
        ops.atss_assign(grid, None, boxes, valid=valid),
        ops.atss_assign(grid, None, boxes, valid=valid.clone()),
        strict=True,
    ):
        assert torch.equal(actual, copy)
