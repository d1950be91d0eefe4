"""The assigners against torchvision's matcher, against loops over the published rules, by count."""

import math

import pytest
import torch
import torchvision.ops as vision
from torchvision.models.detection._utils import Matcher

from dlkernels import ops, use_backend
from dlkernels.boxes import reference
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.measure import peak_cpu_memory
from tests.boxes.cases import make_grid, make_gt
from tests.numbers import DEVICES_AND_BACKENDS


def naive_iou(a, b):
    """With the roundings of the contract's formula: equal thresholds, equal ties."""
    return reference.box_iou(torch.as_tensor(a), torch.as_tensor(b)).item()


# ---- max IoU ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_max_iou_is_torchvisions_matcher(count, rounded, low_quality, device, backend):
    anchors = make_grid().boxes().to(device)
    for _ in range(10):
        boxes = make_gt(count, rounded).to(device)
        iou = vision.box_iou(boxes, anchors)
        # Torchvision gives a box that overlaps nothing to every anchor.
        boxes, iou = boxes[iou.amax(1) > 0], iou[iou.amax(1) > 0]
        expected = Matcher(0.5, 0.4, low_quality)(iou) if len(boxes) else None
        with use_backend(backend):
            (assigned,), (ious,) = ops.max_iou_assign(
                anchors, None, [boxes], low_quality=low_quality
            )
        if expected is None:
            assert (assigned == -1).all()
            continue
        assert torch.equal(assigned, expected)
        positive = assigned >= 0
        torch.testing.assert_close(ious[positive], iou.amax(0)[positive])
        assert (ious[~positive] == 0).all()


def test_max_iou_opcheck():
    arguments = make_grid().boxes(), make_gt(12).view(2, 6, 4), torch.tensor([6, 2])
    valid = torch.rand(len(arguments[0])) < 0.5
    op = torch.ops.dlkernels.max_iou_assign.default
    for mask in (None, valid):
        torch.library.opcheck(op, (*arguments, mask, 0.5, 0.4, True))


def test_the_bare_op_touches_no_memory_of_wrong_shape():
    op = torch.ops.dlkernels.max_iou_assign
    anchors, boxes = make_grid().boxes(), make_gt(6).view(1, 6, 4)
    for arguments, message in (
        ((anchors[:, :3], boxes, torch.tensor([6]), None), "anchors must be float32 of shape"),
        ((anchors, boxes[0], torch.tensor([6]), None), "boxes must be float32 of shape"),
        ((anchors, boxes, torch.tensor([7]), None), "counts must lie between 0 and G"),
        ((anchors, boxes, torch.tensor([6, 1]), None), "counts must be int64 of shape"),
        ((anchors, boxes, torch.tensor([6]), torch.ones(3).bool()), "valid must be bool of shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 0.5, 0.4, False)


def test_max_iou_gives_a_box_that_overlaps_nothing_to_no_anchor():
    gt = [torch.tensor([[1e4, 1e4, 2e4, 2e4], [5.0, 5.0, 5.0, 5.0]])]
    assigned, iou = ops.max_iou_assign(make_grid(), None, gt, low_quality=True)
    assert (assigned == -1).all()
    assert (iou == 0).all()


def test_max_iou_of_chosen_overlaps():
    """Thresholds are inclusive; between them is ignored; of equal boxes the first wins."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4], [0, 0, 10, 3]])
    gt = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10]]])
    assigned, iou = ops.max_iou_assign(anchors, None, gt)
    assert assigned.tolist() == [[0, 0, -2, -1]]
    assert iou.tolist() == [[1.0, 0.5, 0.0, 0.0]]


# ---- FCOS ---------------------------------------------------------------------------------------

RANGES = (0, 24), (24, 48), (48, math.inf)


@pytest.mark.parametrize("center_radius", [None, 1.5])
@pytest.mark.parametrize("rounded", [False, True])
def test_fcos_is_the_published_rule(rounded, center_radius):
    grid = AnchorGrid.for_image((96, 112), (8, 16, 32))
    boxes = make_gt(12, rounded) * 0.6
    (assigned,), (ious,) = ops.fcos_assign(grid, None, [boxes], None, RANGES, center_radius)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
    levels = [level for level, n in enumerate(grid.num_level_anchors) for _ in range(n)]
    for anchor, level, index, iou in zip(
        grid.boxes(), levels, assigned.tolist(), ious.tolist(), strict=True
    ):
        x, y = ((anchor[:2] + anchor[2:]) / 2).tolist()
        candidates = []
        for number, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            distances = x - x1, y - y1, x2 - x, y2 - y
            low, high = RANGES[level]
            fits = min(distances) > 0 and low <= max(distances) <= high
            if center_radius is not None:
                away = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
                fits = fits and away < center_radius * grid.strides[level]
            if fits:
                candidates.append((areas[number], number))
        assert index == (min(candidates)[1] if candidates else -1)
        assert iou == (naive_iou(anchor, boxes[index]) if candidates else 0)


def test_fcos_of_points_without_a_grid():
    grid = make_grid()
    gt = [make_gt(9), make_gt(0), make_gt(4)]
    expected = ops.fcos_assign(grid, None, gt, None, RANGES, 1.5)
    levels = grid.num_level_anchors
    for anchors in (grid.boxes(), grid.boxes().expand(3, -1, -1)):
        actual = ops.fcos_assign(anchors, levels, gt, None, RANGES, 1.5, grid.strides)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


# ---- YOLO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape_iou", [1.0, 0.3])
@pytest.mark.parametrize("offset", [0.5, 0.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_yolo_is_the_published_rule(rounded, offset, shape_iou):
    grid = AnchorGrid.for_image((96, 112), (8, 16, 32), (1, 3), (0.5, 2.0), offset)
    boxes = make_gt(12, rounded) * 0.6
    (assigned,), (ious,) = ops.yolo_assign(grid, None, [boxes], None, 0.4, shape_iou)
    anchors = grid.boxes()
    claims = {}
    for number, box in enumerate(boxes):
        for iou, anchor in yolo_claims(grid, box, shape_iou):
            claims.setdefault(anchor, []).append((-iou, number))
    overlap = vision.box_iou(anchors, boxes).amax(1)
    for anchor in range(len(anchors)):
        if anchor in claims:
            assert assigned[anchor] == min(claims[anchor])[1]
            assert ious[anchor] == naive_iou(anchors[anchor], boxes[assigned[anchor]])
        else:
            assert assigned[anchor] == (-2 if overlap[anchor] > 0.4 else -1)
            assert ious[anchor] == 0


def yolo_claims(grid, box, shape_iou):
    """(IoU of shapes, anchor) of every anchor that the box claims."""
    size = box[2:] - box[:2]
    at_origin = torch.cat([torch.zeros(2), size])
    shapes = []
    for level, base in enumerate(grid.base_anchors):
        for number, prior in enumerate(base):
            prior_size = prior[2:] - prior[:2]
            iou = naive_iou(at_origin, torch.cat([torch.zeros(2), prior_size]))
            shapes.append((iou, level, number))
    best = max(shapes, key=lambda shape: shape[0])
    start = 0
    for level, (height, width) in enumerate(grid.sizes):
        x, y = ((box[:2] + box[2:]) / 2 / grid.strides[level] + 0.5 - grid.offset).tolist()
        column, row = math.floor(x), math.floor(y)
        inside = 0 <= column < width and 0 <= row < height
        for shape in shapes:
            iou, of_level, number = shape
            if inside and of_level == level and (shape is best or iou > shape_iou):
                cell = row * width + column
                yield iou, start + cell * grid.anchors_per_location + number
        start += grid.num_level_anchors[level]


def test_yolo_claims_the_cell_of_the_center():
    """One box of the shape of the second prior of level 1, its centre in column 3, row 2."""
    base = tuple(
        torch.tensor([[-w / 2, -h / 2, w / 2, h / 2] for w, h in sizes])
        for sizes in (((10.0, 13.0), (16.0, 30.0)), ((33.0, 23.0), (30.0, 61.0)))
    )
    grid = AnchorGrid(((8, 8), (4, 4)), (8, 16), base)
    box = torch.tensor([[55.0 - 15, 40 - 30, 55 + 15, 40 + 31]])
    assigned, _ = ops.yolo_assign(grid, None, [box], ignore_iou=1.0)
    assert (assigned[0] >= 0).nonzero().tolist() == [[2 * 64 + 2 * (2 * 4 + 3) + 1]]


# ---- all ----------------------------------------------------------------------------------------


def assigners():
    return {
        "max_iou": lambda *a, **k: ops.max_iou_assign(*a, low_quality=True, **k),
        "yolo": lambda *a, **k: ops.yolo_assign(*a, shape_iou=0.3, **k),
        "fcos": lambda *a, **k: ops.fcos_assign(*a, ranges=RANGES, center_radius=1.5, **k),
    }


every_assigner = pytest.mark.parametrize("assign", assigners().values(), ids=assigners())


@every_assigner
def test_batch_is_its_images(assign):
    grid = make_grid()
    gt = [make_gt(7), make_gt(0), make_gt(1), make_gt(20)]
    valid = torch.rand(4, len(grid)) < 0.8
    assigned, iou = assign(grid, None, gt, valid=valid)
    assert assigned.dtype == torch.int64
    assert iou.dtype == torch.float32
    assert assigned.shape == iou.shape == (4, len(grid))
    padded = torch.full((4, 20, 4), math.nan)
    for image, boxes in enumerate(gt):
        padded[image, : len(boxes)] = boxes
    counts = torch.tensor([7, 0, 1, 20])
    for again in (
        assign(grid, None, padded, counts, valid=valid),
        assign(grid, grid.num_level_anchors, padded, counts.int(), valid=valid),
    ):
        assert torch.equal(again[0], assigned)
        assert torch.equal(again[1], iou)
    for image, boxes in enumerate(gt):
        alone = assign(grid, None, [boxes.double()], valid=valid[image])
        assert torch.equal(alone[0][0], assigned[image])
        assert torch.equal(alone[1][0], iou[image])
    assert (assigned[1] == -1).all()
    assert (assigned[~valid] == -1).all()


@every_assigner
def test_few_boxes_at_a_time_give_the_same(assign, monkeypatch):
    gt = [make_gt(30, rounded=True)]
    with use_backend("reference"):
        expected = assign(make_grid(), None, gt)
        monkeypatch.setattr(reference, "CHUNK", 1)
        actual = assign(make_grid(), None, gt)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@every_assigner
def test_no_matrix_of_anchors_and_boxes(assign):
    grid = AnchorGrid.for_image((800, 1344), (8, 16, 32))
    gt = [make_gt(1000) * 5]
    matrix = 4 * len(grid) * 1000
    with use_backend("reference"):
        assert peak_cpu_memory(lambda: assign(grid, None, gt)) < 64 << 20 < matrix


def test_memory_of_the_max_iou_kernel():
    """10,000 boxes on 22,400 anchors: nothing but the results, and the planes of the anchors."""
    grid = AnchorGrid.for_image((800, 1344))
    gt = make_gt(10_000)[None] * 5
    anchors = grid.boxes()
    ops.max_iou_assign(anchors, None, gt)
    results, planes, checks_of_boxes = 12 * len(grid), 16 * len(grid), 2 * gt.nbytes
    peak = peak_cpu_memory(lambda: ops.max_iou_assign(anchors, None, gt, low_quality=True))
    assert results + planes <= peak <= results + planes + checks_of_boxes


@every_assigner
def test_no_gradient(assign):
    boxes = make_gt(5).requires_grad_()
    assert not assign(make_grid(), None, [boxes])[1].requires_grad


@every_assigner
@pytest.mark.parametrize(
    ("gt", "num_gt", "error", "message"),
    [
        (None, None, TypeError, "gt_boxes must be a tensor or a list, but is NoneType"),
        ([], None, ValueError, "gt_boxes must have at least one image"),
        ([torch.zeros(0, 4, device="meta")], None, ValueError, "gt_boxes must hold values"),
        ([torch.zeros(3, 5)], None, ValueError, r"gt_boxes\[0\] must have shape \[boxes, 4\]"),
        ([torch.zeros(3, 4).long()], None, TypeError, r"gt_boxes\[0\] must be float32.*int64"),
        (torch.zeros(2, 4), None, ValueError, r"gt_boxes must have shape \[B, boxes, 4\]"),
        ([torch.zeros(1, 4)], torch.ones(1).long(), ValueError, "num_gt must be None where"),
        (torch.zeros(2, 3, 4), torch.ones(2), TypeError, "num_gt must be an int64.*float32"),
        (torch.zeros(2, 3, 4), torch.ones(3).long(), ValueError, r"num_gt must have shape \[2\]"),
        (torch.zeros(2, 3, 4), torch.tensor([1, 4]), ValueError, "num_gt .*is 4 for image 1"),
        (
            [torch.zeros(1, 4), torch.tensor([[0, 0, 1, 1.0], [5, 0, 2, 9]])],
            None,
            ValueError,
            "gt_boxes must be finite.*box 1 of image 1",
        ),
        (
            torch.tensor([[[0, 0, 1, math.nan]]]),
            None,
            ValueError,
            r"gt_boxes must be finite.*box 0 of image 0 is \[0.0, 0.0, 1.0, nan\]",
        ),
    ],
)
def test_bad_boxes(assign, gt, num_gt, error, message):
    with pytest.raises(error, match=message):
        assign(make_grid(), None, gt, num_gt)


def test_bad_arguments():
    grid, gt = make_grid(), [make_gt(2)]
    anchors = grid.boxes()
    cases = [
        (lambda: ops.max_iou_assign("grid", None, gt), TypeError, "anchors must be a tensor"),
        (lambda: ops.max_iou_assign(anchors[:, :3], None, gt), ValueError, "anchors must have"),
        (
            lambda: ops.max_iou_assign(anchors.expand(2, -1, -1), None, gt),
            ValueError,
            r"anchors must have shape \[A, 4\] or \[1, A, 4\]",
        ),
        (lambda: ops.max_iou_assign(anchors, [5], gt), ValueError, "num_level_anchors must add up"),
        (lambda: ops.max_iou_assign(grid, [5], gt), ValueError, "num_level_anchors must be None"),
        (lambda: ops.max_iou_assign(grid, None, gt, neg_iou=0.6), ValueError, "neg_iou must lie"),
        (
            lambda: ops.max_iou_assign(grid, None, gt, valid=torch.ones(3)),
            TypeError,
            "valid must be a bool tensor, but is torch.float32",
        ),
        (
            lambda: ops.fcos_assign(grid, None, gt, None, RANGES, valid=torch.ones(3).bool()),
            ValueError,
            r"valid must have shape .*\[3\]",
        ),
        (lambda: ops.yolo_assign(anchors, None, gt), TypeError, "anchors must be an AnchorGrid"),
        (lambda: ops.fcos_assign(grid, None, gt), ValueError, "ranges must have one entry for"),
        (lambda: ops.fcos_assign(anchors, None, gt), ValueError, "num_level_anchors must be given"),
        (
            lambda: ops.fcos_assign(anchors, grid.num_level_anchors, gt, None, RANGES, 1.5),
            ValueError,
            "strides must have one entry for each of the 3 levels, but has 0",
        ),
        (
            lambda: ops.fcos_assign(grid, None, gt, None, RANGES, -1.0),
            ValueError,
            r"center_radius must be above 0, but is -1\.0",
        ),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
