"""The formulas of the detection losses in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("iou", "giou", "diou", "ciou")
REDUCTIONS = ("none", "mean", "sum")


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
