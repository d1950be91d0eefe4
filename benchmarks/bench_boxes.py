"""Losses and the max-IoU assigner against torchvision's, and a plain copy of their inputs."""

import pytest
import torch
import torchvision.ops as vision
from torchvision.models.detection._utils import Matcher

from benchmarks.peers import DEVICE, compare
from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid

PAIRS = 100_000
# The anchors of 8 images of 800x1344, and the classes of COCO.
ANCHORS, CLASSES = 8 * 22_400, 80

VISION_LOSSES = {
    "giou": vision.generalized_box_iou_loss,
    "diou": vision.distance_box_iou_loss,
    "ciou": vision.complete_box_iou_loss,
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", VISION_LOSSES)
def test_box_iou_loss(benchmark, kind, training):
    corners = torch.rand(PAIRS, 2, device=DEVICE) * 1000
    target = torch.cat([corners, corners + 10 + 200 * torch.rand_like(corners)], -1)
    pred = target + torch.randn_like(target)

    def eager(pred):
        return VISION_LOSSES[kind](pred, target, reduction="sum")

    compare(
        benchmark,
        functions={
            "dlkernels": lambda pred: ops.box_iou_loss(pred, target, kind, "sum"),
            "torchvision": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(pred,),
        training=training,
        floor=pred.clone,
    )


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["labels", "targets"])
def test_sigmoid_focal_loss(benchmark, form, training):
    """The peers get the one-hot targets made beforehand, as they have no other form."""
    logits = torch.randn(ANCHORS, CLASSES, device=DEVICE) - 4
    labels = torch.randint(-50 * CLASSES, CLASSES, (ANCHORS,), device=DEVICE)
    one_hot = (labels[:, None] == torch.arange(CLASSES, device=DEVICE)).to(logits)
    targets = labels if form == "labels" else one_hot

    def eager(logits):
        return vision.sigmoid_focal_loss(logits, one_hot, reduction="sum")

    compare(
        benchmark,
        functions={
            "dlkernels": lambda x: ops.sigmoid_focal_loss(x, targets, reduction="sum"),
            "torchvision": eager,
            "torch.compile": torch.compile(eager),
        },
        inputs=(logits,),
        training=training,
        floor=logits.clone,
    )


@pytest.mark.parametrize("low_quality", [False, True], ids=["thresholds", "low-quality"])
def test_max_iou_assign(benchmark, low_quality):
    """8 images of 800x1344 with 100 boxes each.

    The peer makes the matrix of all IoUs, an image at a time.
    """
    anchors = AnchorGrid.for_image((800, 1344)).boxes(DEVICE)
    corners = torch.rand(8, 100, 2, device=DEVICE) * torch.tensor([1200.0, 700], device=DEVICE)
    gt = torch.cat([corners, corners + 10 + 200 * torch.rand_like(corners)], -1)
    matcher = Matcher(0.5, 0.4, low_quality)

    def eager(anchors):
        return torch.stack([matcher(vision.box_iou(own, anchors)) for own in gt])

    compare(
        benchmark,
        functions={
            "dlkernels": lambda x: ops.max_iou_assign(x, None, gt, low_quality=low_quality)[0],
            "torchvision": eager,
        },
        inputs=(anchors,),
        training=False,
        floor=lambda: anchors.expand(8, -1, -1).contiguous(),
    )
