"""Bad arguments get a TypeError or ValueError that names the argument, its value and the need."""

import pytest
import torch

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid

BOXES = torch.zeros(5, 4)
LOGITS = torch.zeros(5, 3)
LABELS = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pred": "boxes"}, TypeError, "pred must be a tensor, but is str"),
        ({"pred": torch.zeros(5, 5)}, ValueError, r"pred must have shape \[\.\.\., 4\].*\[5, 5\]"),
        ({"pred": torch.tensor(1.0)}, ValueError, r"pred must have shape \[\.\.\., 4\]"),
        ({"pred": BOXES.long()}, TypeError, "pred must be float32.*int64"),
        ({"target": BOXES[:4]}, ValueError, r"target must have shape \[5, 4\].*\[4, 4\]"),
        ({"target": BOXES.half()}, TypeError, "target must have the dtype of pred.*float16"),
        ({"target": BOXES.to("meta")}, ValueError, "target must be on the device of pred.*meta"),
        ({"kind": "eiou"}, ValueError, "kind must be one of 'iou'.*'eiou'"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'none'.*'max'"),
        ({"eps": None}, TypeError, "eps must be a number, but is NoneType"),
        ({"eps": -1.0}, ValueError, r"eps must be at least 0, but is -1\.0"),
        ({"eps": float("nan")}, ValueError, "eps must be at least 0, but is nan"),
    ],
)
def test_box_iou_loss(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.box_iou_loss(**({"pred": BOXES, "target": BOXES} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": None}, TypeError, "logits must be a tensor, but is NoneType"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[\.\.\., C\]"),
        ({"logits": LOGITS.int()}, TypeError, "logits must be float32.*int32"),
        ({"targets": LABELS.int()}, TypeError, "targets must be int64 labels.*int32"),
        ({"targets": LABELS[:4]}, ValueError, r"targets must have shape \[5\].*\[4\]"),
        ({"targets": LOGITS[:, :2]}, ValueError, r"targets must have shape \[5, 3\].*\[5, 2\]"),
        ({"targets": LOGITS.half()}, TypeError, "targets must have the dtype of logits"),
        ({"targets": [0] * 5}, TypeError, "targets must be a tensor, but is list"),
        ({"targets": LABELS.to("meta")}, ValueError, "targets must be on the device of logits"),
        ({"targets": LOGITS.clone().requires_grad_()}, ValueError, "targets gets no gradient"),
        ({"weight": torch.ones(3)}, ValueError, r"weight must have shape \[5\].*\[3\]"),
        ({"weight": torch.ones(5, requires_grad=True)}, ValueError, "weight gets no gradient"),
        ({"weight": LABELS}, TypeError, "weight must be float32.*int64"),
        ({"alpha": 1.5}, ValueError, r"alpha must be 0 to 1, or -1.*1\.5"),
        ({"gamma": -1.0}, ValueError, r"gamma must be at least 0, but is -1\.0"),
        ({"gamma": float("nan")}, ValueError, "gamma must be at least 0, but is nan"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'none'.*'avg'"),
    ],
)
def test_sigmoid_focal_loss(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.sigmoid_focal_loss(**({"logits": LOGITS, "targets": LABELS} | arguments))


def test_the_bare_ops_touch_no_memory_of_wrong_shape():
    bare = torch.ops.dlkernels
    with pytest.raises(RuntimeError, match="target must have the shape"):
        bare.box_iou_loss(BOXES, BOXES[:2], "iou", False, 0.0)
    with pytest.raises(RuntimeError, match="grad_out must be float32"):
        bare.box_iou_loss_backward(torch.ones(2), BOXES, BOXES, "iou", 0.0)
    with pytest.raises(RuntimeError, match="targets must have one value per row"):
        bare.sigmoid_focal_loss(LOGITS, LABELS[:2], None, 1.0, 1.0, 2.0, False)
    with pytest.raises(RuntimeError, match="weight must be float32"):
        bare.sigmoid_focal_loss(LOGITS, LABELS, LABELS, 1.0, 1.0, 2.0, False)


ANCHORS = torch.rand(6, 4).cumsum(-1)


@pytest.mark.parametrize(
    ("assign", "options", "error", "message"),
    [
        (ops.max_iou_assign, {"pos_iou": "1"}, TypeError, "pos_iou must be a number, but is str"),
        (ops.max_iou_assign, {"neg_iou": None}, TypeError, "neg_iou must be a number"),
        (ops.max_iou_assign, {"low_quality": 1.0}, TypeError, "low_quality must be True or False"),
        (ops.fcos_assign, {"ranges": [None]}, TypeError, r"ranges\[0\] must be a list or tuple"),
        (ops.fcos_assign, {"ranges": [(0, 1, 2)]}, ValueError, r"ranges\[0\] must hold two"),
        (ops.fcos_assign, {"ranges": [("0", 1)]}, TypeError, r"ranges\[0\] must be a number"),
        (
            ops.fcos_assign,
            {"ranges": [(0, 1)], "center_radius": "1"},
            TypeError,
            "center_radius must be a number",
        ),
    ],
)
def test_assigners(assign, options, error, message):
    with pytest.raises(error, match=message):
        assign(ANCHORS, [6], ANCHORS[None, :2], **options)


def test_yolo_assign():
    grid = AnchorGrid.for_image((32, 32))
    with pytest.raises(ValueError, match="ignore_iou must be at least 0, but is nan"):
        ops.yolo_assign(grid, None, ANCHORS[None], ignore_iou=float("nan"))
    assigned, _ = ops.yolo_assign(grid, None, ANCHORS[None], ignore_iou=2**70)
    assert (assigned >= -1).all()
