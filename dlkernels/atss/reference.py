"""The formula of adaptive training sample selection in plain PyTorch.

Every operation is rounded in the order given here, which the kernels keep, so that their results
are the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlkernels.boxes.reference import is_proper

IGNORED = -2


def atss_assign(
    anchors: Tensor,
    num_level_anchors: Sequence[int],
    gt_boxes: Tensor,
    num_gt: Tensor,
    gt_ignore: Tensor | None,
    valid: Tensor | None,
    k: int,
    ignore_iof_thr: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`dlkernels.ops.atss_assign`; ``k`` is the number of candidates on a level."""
    images, max_boxes = gt_boxes.shape[:2]
    anchors = anchors.expand(images, -1, -1)
    usable = anchors.new_ones(anchors.shape[:2], dtype=torch.bool)
    if valid is not None:
        usable = usable & valid
    ignored = torch.zeros_like(usable)
    if gt_ignore is not None:
        for box in gt_ignore.unbind(1):
            fraction = _intersection(anchors, box[:, None]) / _area(anchors)
            ignored = ignored | (usable & (fraction > ignore_iof_thr))
        usable = usable & ~ignored
    is_box = torch.arange(max_boxes, device=gt_boxes.device) < num_gt[:, None]
    is_box = is_box & is_proper(gt_boxes)

    assigned = torch.full(usable.shape, -1, device=anchors.device)
    iou = anchors.new_zeros(usable.shape)
    for image in range(images):
        assigned[image], iou[image] = _assign_image(
            anchors[image], num_level_anchors, usable[image], gt_boxes[image], is_box[image], k
        )
    return assigned.masked_fill(ignored, IGNORED), iou


def _assign_image(
    anchors: Tensor,
    num_level_anchors: Sequence[int],
    usable: Tensor,
    boxes: Tensor,
    is_box: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    candidates, present = _nearest(anchors, num_level_anchors, usable, boxes, k)
    candidate_boxes = anchors[candidates]
    iou = torch.where(present, _iou(candidate_boxes, boxes[:, None]), 0.0)
    enough = iou.double() >= _threshold(iou, present)[:, None]
    centres = _centres(candidate_boxes)
    margins = torch.cat((centres - boxes[:, None, :2], boxes[:, None, 2:] - centres), -1)
    positive = present & is_box[:, None] & enough & (margins.amin(-1) > 0.01)

    # The largest claim to an anchor has the highest IoU, then the lowest index of a box.
    index = torch.arange(len(boxes), device=boxes.device)[:, None]
    claims = (iou.view(torch.int32).long() << 32) + (2**32 - 1 - index)
    best = torch.zeros_like(usable, dtype=torch.int64).scatter_reduce(
        0, candidates.flatten(), torch.where(positive, claims, 0).flatten(), "amax"
    )
    assigned = torch.where(best > 0, 2**32 - 1 - (best & (2**32 - 1)), -1)
    return assigned, (best >> 32).int().view(torch.float32)


def _nearest(
    anchors: Tensor, num_level_anchors: Sequence[int], usable: Tensor, boxes: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Indices of the nearest anchors of each level, [G, levels x k], and which of them exist."""
    # A distance of NaN puts unusable anchors behind all others.
    centres = _centres(anchors).masked_fill(~usable[:, None], torch.nan)
    box_centres = _centres(boxes)[:, None]
    candidates, present = [], []
    first = 0
    for level in centres.split(list(num_level_anchors)):
        # PyTorch's own root of float32 on the CPU can be off by its last bit.
        distance = (level - box_centres).square().sum(-1).double().sqrt().float()
        distance, order = distance.sort(stable=True)
        candidates.append(order[:, :k] + first)
        present.append(~distance[:, :k].isnan())
        first += len(level)
    return torch.cat(candidates, 1), torch.cat(present, 1)


def _threshold(iou: Tensor, present: Tensor) -> Tensor:
    """Mean plus unbiased standard deviation, summed one after another in float64."""
    count = present.sum(1)
    mean = sum(iou.double().unbind(1)) / count
    deviations = torch.where(present, iou.double() - mean[:, None], 0.0)
    variance = sum(deviations.square().unbind(1)) / (count - 1).clamp(min=1)
    return mean + variance.sqrt()


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _area(boxes: Tensor) -> Tensor:
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return width * height


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    size = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    width, height = size.clamp(min=0).unbind(-1)
    return width * height


def _iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    intersection = _intersection(anchors, boxes)
    union = _area(anchors) + _area(boxes) - intersection
    return torch.where(intersection > 0, intersection / union, 0.0)
