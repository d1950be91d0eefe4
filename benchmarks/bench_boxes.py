"""The detection losses against torchvision's, eager and compiled, and a plain copy."""

import pytest
import torch
import torchvision.ops as vision

from benchmarks.peers import DEVICE, compare
from dlkernels import ops

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
