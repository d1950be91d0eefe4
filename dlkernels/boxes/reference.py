"""The formulas of the detection losses and of the max-IoU assigner in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("iou", "giou", "diou", "ciou")
REDUCTIONS = ("none", "mean", "sum")

# Boxes x anchors that are compared at a time.
CHUNK = 1 << 20


def box_iou_loss(pred: Tensor, target: Tensor, kind: str, summed: bool, eps: float) -> Tensor:
    """See :func:`dlkernels.ops.box_iou_loss`."""
    pred, target = _accumulating(pred), _accumulating(target)
    low, high = torch.maximum(pred, target), torch.minimum(pred, target)
    # Corners of the intersection and of the smallest box around both.
    inner = torch.relu(high[..., 2:] - low[..., :2])
    outer = low[..., 2:] - high[..., :2]
    size, target_size = pred[..., 2:] - pred[..., :2], target[..., 2:] - target[..., :2]
    intersection = inner.prod(-1)
    union = size.prod(-1) + target_size.prod(-1) - intersection
    iou = intersection / (union + eps)
    loss = 1 - iou
    if kind == "giou":
        hull = outer.prod(-1)
        loss = loss + (hull - union) / (hull + eps)
    elif kind in ("diou", "ciou"):
        shift = pred - target
        centers = (shift[..., :2] + shift[..., 2:]) / 2
        loss = loss + centers.square().sum(-1) / (outer.square().sum(-1) + eps)
    if kind == "ciou":
        angle, target_angle = (torch.atan2(wh[..., 0], wh[..., 1]) for wh in (size, target_size))
        aspect = 4 / math.pi**2 * (target_angle - angle).square()
        with torch.no_grad():
            alpha = aspect / (1 - iou + aspect + eps)
        loss = loss + alpha * aspect
    return loss.sum() if summed else loss


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    negative: float,
    positive: float,
    gamma: float,
    summed: bool,
) -> Tensor:
    """See :func:`dlkernels.ops.sigmoid_focal_loss`; its alpha is two factors here."""
    logits = _accumulating(logits)
    if targets.is_floating_point():
        targets = _accumulating(targets)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        miss = torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
        factor = positive * targets + negative * (1 - targets)
    else:
        hit = targets[..., None] == torch.arange(logits.shape[-1], device=logits.device)
        wrong = torch.where(hit, -logits, logits)
        cross_entropy = -F.logsigmoid(-wrong)
        miss = torch.sigmoid(wrong)
        factor = torch.where(hit, positive, negative).to(logits.dtype)
    loss = factor * miss**gamma * cross_entropy
    if weight is not None:
        loss = loss * weight[..., None]
    return loss.sum() if summed else loss


def _accumulating(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# ---- assignment ---------------------------------------------------------------------------------


def is_proper(boxes: Tensor) -> Tensor:
    """Which boxes [..., 4] are neither NaN nor infinite nor inverted, [...]."""
    size = boxes[..., 2:] - boxes[..., :2]
    return ((size >= 0) & (size < torch.inf)).all(-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes [..., 4] of shapes that broadcast; 0 where they do not overlap."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = torch.relu(torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1))
    height = torch.relu(torch.minimum(ay2, by2) - torch.maximum(ay1, by1))
    overlap = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    return torch.where(overlap > 0, overlap / union, 0)


def best_box(
    score: Callable[[Tensor], Tensor], boxes: Tensor, anchors: int
) -> tuple[Tensor, Tensor]:
    """The highest score of each anchor over the boxes, and the box's index (ties: the lower).

    Args:
        score: gives [g, anchors] for some of the boxes, [g, 4].
        boxes: [G, 4], compared a few at a time.
        anchors: how many there are.

    Returns:
        Scores, ``-inf`` where there are no boxes, and indices, -1 where no score is above that.
    """
    best = boxes.new_full((anchors,), -math.inf)
    index = torch.full_like(best, -1, dtype=torch.int64)
    step = max(1, CHUNK // max(1, anchors))
    for first in range(0, len(boxes), step):
        highest, box = score(boxes[first : first + step]).max(0)
        better = highest > best
        best = torch.where(better, highest, best)
        index = torch.where(better, box + first, index)
    return best, index


def max_iou_assign(
    anchors: Tensor,
    boxes: Tensor,
    counts: Tensor,
    valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`dlkernels.ops.max_iou_assign`."""
    results = []
    for image, count in enumerate(counts.tolist()):
        results.append(
            _max_iou_assign(
                anchors if anchors.dim() == 2 else anchors[image],
                boxes[image, :count],
                valid[image] if valid is not None and valid.dim() == 2 else valid,
                pos_iou,
                neg_iou,
                low_quality,
            )
        )
    assigned, iou = zip(*results, strict=True)
    return torch.stack(assigned), torch.stack(iou)


def _max_iou_assign(
    anchors: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    def score(some: Tensor) -> Tensor:
        iou = box_iou(some[:, None], anchors)
        return iou if valid is None else torch.where(valid, iou, -1)

    best, index = best_box(score, boxes, len(anchors))
    positive = best >= pos_iou
    if low_quality:
        step = max(1, CHUNK // max(1, len(anchors)))
        for some in boxes.split(step) if len(anchors) else ():
            iou = score(some)
            highest = iou.amax(1, keepdim=True)
            positive |= ((iou == highest) & (highest > 0)).any(0)
    negative = torch.where(best >= neg_iou, -2, -1)
    return torch.where(positive, index, negative), torch.where(positive, best, 0)
