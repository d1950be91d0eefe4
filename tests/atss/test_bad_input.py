"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from tests.atss.cases import random_boxes

GRID = AnchorGrid.from_scales([(4, 6), (2, 3)], [8, 16])
BOXES = random_boxes(2, 3, (32, 48))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("anchors", torch.rand(30, 5), ValueError, r"anchors must have.*\[2, A, 4\].*\[30, 5\]"),
        ("anchors", torch.rand(3, 30, 4), ValueError, r"\[A, 4\] or \[2, A, 4\].*\[3, 30, 4\]"),
        ("anchors", torch.ones(30, 4).long(), TypeError, "anchors must be float32.*int64"),
        ("anchors", torch.rand(30, 4, device="meta"), ValueError, "anchors .* device.*meta"),
        ("anchors", None, TypeError, "anchors must be a tensor, but is NoneType"),
        ("num_level_anchors", None, ValueError, "num_level_anchors must be .*None"),
        ("num_level_anchors", (24, 5), ValueError, r"add up to the 30 anchors.*\[24, 5\]"),
        ("num_level_anchors", (31, -1), ValueError, r"num_level_anchors .*\(31, -1\)"),
        ("num_level_anchors", (30, *[0] * 16), ValueError, "1 to 16 levels, but has 17"),
        (
            "gt_boxes",
            torch.rand(3, 4),
            ValueError,
            r"gt_boxes .*\[B, boxes, 4\].*\[3, 4\]",
        ),
        ("gt_boxes", torch.ones(2, 3, 4).int(), TypeError, "gt_boxes must be float32.*int32"),
        ("gt_boxes", [], ValueError, "gt_boxes must have at least one image"),
        ("gt_boxes", [BOXES[0], None], TypeError, r"gt_boxes\[1\] must be a tensor"),
        ("gt_boxes", [BOXES[0], BOXES], ValueError, r"gt_boxes\[1\] must have shape \[boxes, 4\]"),
        ("gt_boxes", [BOXES[0], BOXES[1].to("meta")], ValueError, r"gt_boxes\[1\] .*device"),
        ("num_gt", torch.tensor([1, 2, 3]), ValueError, r"num_gt must have shape \[2\].*\[3\]"),
        ("num_gt", torch.tensor([1.0, 2.0]), TypeError, "num_gt must be .*float32"),
        ("num_gt", [1, 2], TypeError, "num_gt must be an int64 tensor, but is list"),
        ("num_gt", torch.tensor([3, 4]), ValueError, "between 0 and the 3 .* is 4 for image 1"),
        ("num_gt", torch.tensor([-1, 3]), ValueError, "num_gt .* is -1 for image 0"),
        ("topk", None, TypeError, "topk must be an integer, but is NoneType"),
        ("anchors_per_location", 1.5, TypeError, "anchors_per_location must be an integer"),
        ("ignore_iof_thr", None, TypeError, "ignore_iof_thr must be a number, but is NoneType"),
        ("ignore_iof_thr", torch.nan, ValueError, "ignore_iof_thr must be at least 0, but is nan"),
        ("check_boxes", 2.5, TypeError, r"check_boxes must be True or False, but is 2\.5"),
        ("num_level_anchors", 30, TypeError, "num_level_anchors must be a list or tuple"),
        ("num_level_anchors", (24, 6.0), TypeError, r"num_level_anchors\[1\] must be an integer"),
        ("topk", 0, ValueError, "topk must be at least 1, but is 0"),
        ("anchors_per_location", 0, ValueError, "anchors_per_location must be at least 1"),
        ("gt_ignore", torch.rand(1, 3, 4), ValueError, r"gt_ignore .*\[2, 3, 4\].*\[1, 3, 4\]"),
        ("gt_ignore", torch.rand(2, 4), ValueError, r"gt_ignore must have shape \[B, boxes, 4\]"),
        ("valid", torch.ones(30).bool().to_sparse(), TypeError, "valid must be a dense .*sparse"),
        ("valid", torch.ones(29).bool(), ValueError, r"\[30\] or \[2, 30\], but is \[29\]"),
        ("valid", torch.ones(30), TypeError, "valid must be a bool tensor, but is torch.float32"),
    ],
)
def test_arguments(name, value, error, message):
    arguments = {
        "anchors": GRID.boxes(),
        "num_level_anchors": GRID.num_level_anchors,
        "gt_boxes": BOXES,
    }
    with pytest.raises(error, match=message):
        ops.atss_assign(**{**arguments, name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_level_anchors": (30,)}, r"that of the grid, \[24, 6\], but is \[30\]"),
        ({"num_level_anchors": None, "anchors_per_location": 3}, "that of the grid, 1, but is 3"),
    ],
)
def test_what_a_grid_knows(options, message):
    with pytest.raises(ValueError, match=message):
        ops.atss_assign(GRID, gt_boxes=BOXES, **options)


def test_a_list_tells_its_numbers():
    with pytest.raises(ValueError, match="num_gt must be None where gt_boxes is a list"):
        ops.atss_assign(GRID, None, list(BOXES), torch.tensor([3, 3]))


@pytest.mark.parametrize(
    ("coordinate", "value", "shown"),
    [(2, torch.nan, "nan"), (1, torch.inf, "inf"), (3, -999, "-999")],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_improper_boxes(coordinate, value, shown, as_list):
    boxes = BOXES.clone()
    boxes[1, 2, coordinate] = value
    with pytest.raises(ValueError, match=rf"gt_boxes must be .* box 2 of image 1 is \[.*{shown}"):
        ops.atss_assign(GRID, None, list(boxes) if as_list else boxes)


def test_padding_may_be_improper():
    boxes = BOXES.clone()
    boxes[1, 2] = torch.nan
    assigned, _ = ops.atss_assign(GRID, None, boxes, torch.tensor([3, 2]))
    assert assigned[1].max() < 2


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.rand(30, 3), "anchors must have shape"),
        (1, [24, 5], "num_level_anchors must add up"),
        (1, [24, 7, -1], "num_level_anchors must lie between"),
        (2, torch.rand(2, 3, 4).half(), "gt_boxes must be contiguous and float32"),
        (3, torch.tensor([3, 3], dtype=torch.int32), "num_gt must have shape"),
        (4, torch.rand(2, 4), "gt_ignore must have shape"),
        (5, torch.ones(2, 29).bool(), "valid must have shape"),
        (6, 0, "k must be positive"),
    ],
)
def test_the_bare_op_touches_no_memory_of_wrong_shape(position, value, message):
    arguments = [GRID.boxes(), [24, 6], BOXES, torch.tensor([3, 3]), None, None, 9, 0.5]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dlkernels.atss_assign(*arguments)


def test_more_candidates_than_an_integer_can_count():
    assigned, _ = ops.atss_assign(GRID, None, BOXES, topk=2**70)
    assert torch.equal(assigned, ops.atss_assign(GRID, None, BOXES, topk=24)[0])


def test_a_grid_without_values():
    with pytest.raises(ValueError, match=r"anchors must hold values.* on the device meta"):
        ops.atss_assign(GRID.to("meta"), None, BOXES)
