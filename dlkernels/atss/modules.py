"""``ATSSAssigner``, a stand-in for mmdetection's object of that name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels.atss.op import atss_assign

UNASSIGNED = -1e8  # the overlap that mmdetection gives to anchors without a box


class ATSSAssigner:
    """Assigns as an mmdetection ``ATSSAssigner`` does, through :func:`dlkernels.ops.atss_assign`.

    It takes the arguments of the assigner that it stands for, of mmdetection 2 (boxes) or 3
    (instances), and returns what that returns. Where regions are to be ignored, and where one
    anchor alone is a candidate, the two define candidates differently, and it asks the original.
    Every other attribute is the original's.

    Args:
        original: the assigner.
        result: the type of its results.
    """

    def __init__(self, original: Any, result: type):
        self.original = original
        self.result = result
        self.signature = inspect.signature(original.assign)

    def assign(self, *args: Any, **kwargs: Any) -> Any:
        """See the original."""
        given = self.signature.bind(*args, **kwargs).arguments
        if "pred_instances" in given:
            gt = given["gt_instances"]
            anchors, boxes, labels = given["pred_instances"].priors, gt.bboxes, gt.labels
            levels = given["num_level_priors"]
            ignored = getattr(given.get("gt_instances_ignore"), "bboxes", None)
        else:
            anchors, boxes, labels = given["bboxes"], given["gt_bboxes"], given.get("gt_labels")
            levels, ignored = given["num_level_bboxes"], given.get("gt_bboxes_ignore")
        topk = self.original.topk
        candidates = sum(min(topk, level) for level in levels)
        if candidates < 2 or (ignored is not None and len(ignored) > 0):
            return self.original.assign(*args, **kwargs)
        return self._assign(anchors[:, :4], levels, boxes, labels, topk)

    def _assign(
        self,
        anchors: Tensor,
        levels: Sequence[int],
        boxes: Tensor,
        labels: Tensor | None,
        topk: int,
    ) -> Any:
        assigned, iou = atss_assign(
            anchors, list(levels), boxes[None], topk=topk, check_boxes=False
        )
        index, overlap = assigned[0], iou[0]
        if len(boxes) > 0:
            overlap = torch.where(index >= 0, overlap, UNASSIGNED)
        if labels is not None:
            padded = torch.cat([labels, labels.new_full((1,), -1)])
            labels = padded[index]  # -1, no box, is the label behind the last
        return self.result(len(boxes), index + 1, overlap.to(boxes.dtype), labels=labels)

    def __getattr__(self, name: str) -> Any:
        if name == "original":  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.original, name)
