"""Encodings invert each other, agree with torchvision, and keep their published formulas."""

import math

import torch
from torchvision.models.detection._utils import BoxCoder

from dlkernels.boxes import coding
from dlkernels.boxes.anchors import AnchorGrid
from tests.boxes.cases import make_boxes

MEANS, STDS = (0.1, -0.2, 0.05, 0.0), (0.1, 0.1, 0.2, 0.2)


def test_deltas_invert():
    boxes, anchors = (t.double() for t in make_boxes((3, 50)))
    deltas = coding.encode_deltas(anchors, boxes, MEANS, STDS)
    torch.testing.assert_close(coding.decode_deltas(anchors, deltas, MEANS, STDS), boxes)


def test_deltas_are_torchvisions():
    boxes, anchors = make_boxes((200,))
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = coding.encode_deltas(anchors, boxes, stds=STDS)
    torch.testing.assert_close(deltas, coder.encode_single(boxes, anchors), rtol=1e-4, atol=1e-4)
    wild = 30 * torch.randn(200, 4)
    torch.testing.assert_close(
        coding.decode_deltas(anchors, wild, stds=STDS),
        coder.decode_single(wild, anchors),
        rtol=1e-5,
        atol=1e-4,
    )


def test_sizes_are_clamped_in_every_dtype():
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        wild = torch.full((1, 4), 100.0, dtype=dtype)
        wild[:, :2] = 0
        for boxes in (
            coding.decode_deltas(anchors.to(dtype), wild),
            coding.decode_yolo(anchors.to(dtype), 8, wild),
        ):
            size = (boxes[:, 2:] - boxes[:, :2]).float()
            torch.testing.assert_close(
                size, torch.tensor([[625.0, 1250.0]]), rtol=2e-2, atol=0, check_dtype=False
            )


def test_distances_invert_and_clip():
    points = torch.rand(40, 2, dtype=torch.float64) * 100
    boxes = make_boxes((40,))[1].double()
    distances = coding.encode_distances(points, boxes)
    torch.testing.assert_close(coding.decode_distances(points, distances), boxes)
    clipped = coding.decode_distances(points, distances, (80, 120))
    limit = torch.tensor([120.0, 80.0, 120.0, 80.0], dtype=torch.float64)
    torch.testing.assert_close(clipped, torch.minimum(boxes.clamp(min=0), limit))


def test_centerness():
    distances = torch.tensor(
        [[1.0, 1, 1, 1], [1, 2, 3, 2], [1, 2, 4, 8], [0, 1, 2, 1], [-1, 1, 3, 1], [0, 0, 0, 0]]
    )
    expected = torch.tensor([1.0, math.sqrt(1 / 3), math.sqrt(1 / 16), 0, 0, 0])
    torch.testing.assert_close(coding.centerness_targets(distances), expected)


def test_yolo_inverts():
    grid = AnchorGrid.for_image((64, 96), (8, 16), (2,), (0.5, 2.0))
    anchors = grid.boxes().double()
    strides = torch.tensor(grid.strides).repeat_interleave(torch.tensor(grid.num_level_anchors))
    strides = strides[:, None].double()
    predictions = 8 * torch.rand(len(anchors), 4, dtype=torch.float64) - 4
    for scale in (1.0, 1.1):
        boxes = coding.decode_yolo(anchors, strides, predictions, scale)
        again = coding.encode_yolo(anchors, strides, boxes, scale)
        torch.testing.assert_close(again, predictions)


def test_yolo_formula():
    """Cell (row 2, column 3) of stride 16, prior 30 x 60."""
    anchor = torch.tensor([56.0 - 15, 40 - 30, 56 + 15, 40 + 30])
    t = torch.tensor([0.3, -1.2, 0.5, -0.25])
    sigmoid = t[:2].sigmoid()
    for scale in (1.0, 1.2):
        center = 16 * (scale * sigmoid - (scale - 1) / 2 + torch.tensor([3.0, 2.0]))
        size = torch.tensor([30.0, 60.0]) * t[2:].exp()
        expected = torch.cat([center - size / 2, center + size / 2])
        torch.testing.assert_close(coding.decode_yolo(anchor, 16, t, scale), expected)


def test_compile_without_graph_breaks():
    boxes, anchors = make_boxes((10,))

    def round_trip(anchors, boxes):
        points = (anchors[:, :2] + anchors[:, 2:]) / 2
        deltas = coding.decode_deltas(anchors, coding.encode_deltas(anchors, boxes))
        distances = coding.encode_distances(points, deltas)
        boxes = coding.decode_distances(points, distances, (300, 400))
        yolo = coding.decode_yolo(anchors, 8, coding.encode_yolo(anchors, 8, boxes))
        return yolo.sum(-1) + coding.centerness_targets(distances)

    actual = torch.compile(round_trip, fullgraph=True)(anchors, boxes)
    torch.testing.assert_close(actual, round_trip(anchors, boxes), rtol=1e-4, atol=1e-3)
