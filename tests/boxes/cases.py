"""Inputs of losses and assigners that the tests share."""

import torch
from torch import Tensor

from dlkernels.boxes.anchors import AnchorGrid

KINDS = ["iou", "giou", "diou", "ciou"]
REDUCTIONS = ["none", "mean", "sum"]
# Of pairs of boxes, and the reason why the number is here.
BOX_SHAPES = {
    "one": (1,),
    "below a vector": (3,),
    "no multiple of a vector": (37,),
    "batch": (2, 3, 50),
    "several blocks": (9001,),
}
# Of logits.
LOGIT_SHAPES = {
    "one": (1, 1),
    "one class": (37, 1),
    "non-aligned": (5, 7, 3),
    "vectors": (6, 80),
    "rows across blocks": (130, 91),
    "no row": (33,),
}


def make_boxes(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Boxes and targets, most of which overlap; some are apart, one inside the other."""
    corners = torch.rand(*shape, 2, device=device) * 300
    sizes = 4 + 120 * torch.rand(*shape, 2, device=device)
    target = torch.cat([corners, corners + sizes], -1)
    shift = torch.randn(*shape, 4, device=device) * 0.4 * sizes.repeat(*([1] * len(shape)), 2)
    moved = target + shift
    low = torch.minimum(moved[..., :2], moved[..., 2:] - 1)
    pred = torch.cat([low, torch.maximum(low + 1, moved[..., 2:])], -1)
    return pred.to(dtype), target.to(dtype)


def make_labels(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """Class labels of logits of the shape: a third background, -1, or out of range."""
    classes = shape[-1]
    labels = torch.randint(0, classes, shape[:-1], device=device)
    background = torch.rand(shape[:-1], device=device)
    labels = torch.where(background < 0.2, -1, labels)
    return torch.where(background > 0.9, classes, labels)


def make_targets(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> Tensor:
    if form == "labels":
        return make_labels(shape)
    soft = torch.rand(shape)
    hard = soft.round()
    return torch.where(torch.rand(shape) < 0.5, soft, hard).to(dtype)


IMAGE = 160, 192
RATIOS = (0.5, 1.0, 2.0)


def make_grid(offset=0.5):
    return AnchorGrid.for_image(IMAGE, (8, 16, 32), (2, 4), RATIOS, offset)


def make_gt(count, rounded=False):
    """Boxes that mostly overlap some anchor, some beyond the image; rounded ones often tie."""
    centers = torch.rand(count, 2) * torch.tensor([210.0, 180.0]) - 10
    sizes = 4 + 90 * torch.rand(count, 2) ** 2
    boxes = torch.cat([centers - sizes / 2, centers + sizes / 2], -1)
    return (boxes / 8).round() * 8 if rounded else boxes
