"""The assigners that ATSS is compared with, under the interface of ``ops.atss_assign``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.boxes import reference
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.boxes.targets import BoxBatch, anchor_boxes, check_valid
from dlkernels.checks import check_flag, check_number, check_sequence
from dlkernels.watch import watched

FCOS_RANGES = ((0.0, 64.0), (64.0, 128.0), (128.0, 256.0), (256.0, 512.0), (512.0, math.inf))


@watched
def max_iou_assign(
    anchors: Tensor | AnchorGrid,
    num_level_anchors: Sequence[int] | None,
    gt_boxes: Tensor | Sequence[Tensor],
    num_gt: Tensor | None = None,
    pos_iou: float = 0.5,
    neg_iou: float = 0.4,
    low_quality: bool = False,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns each anchor to the box that it overlaps most.

    An anchor whose highest IoU reaches ``pos_iou`` gets that box (ties: the lower index), one below
    ``neg_iou`` none, one between the two is ignored. Lin et al., "Focal Loss for Dense Object
    Detection" (2017), section 4. With ``low_quality``, the anchors that overlap some box more than
    all other anchors do (more than 0, ties: all) get the box that they overlap most, however
    little: Ren et al., "Faster R-CNN" (2015), section 3.1.2, as torchvision's matcher does it.

    No anchors x boxes matrix is made. All is computed in float32. The results have no gradient.
    That the boxes are proper is checked on every device, which waits for the device.

    Args:
        anchors: an :class:`AnchorGrid`, or boxes x1 y1 x2 y2, [A, 4] or [B, A, 4] for a set per
            image; any floating-point dtype.
        num_level_anchors: may be None; checked where given.
        gt_boxes: boxes x1 y1 x2 y2 of each image, [B, G, 4] with padding behind the first
            ``num_gt``, or a list of B tensors [G_i, 4].
        num_gt: number of boxes in each image, int64 [B]; None where there is no padding, and for
            lists.
        pos_iou: the least IoU of a positive anchor.
        neg_iou: the least IoU of an ignored anchor, at most ``pos_iou``.
        low_quality: whether every overlapped box gets an anchor.
        valid: bool [A] or [B, A]: where false, an anchor is negative, as if it were not there; for
            example ``grid.inside(image_size)``.

    Returns:
        assigned: int64 [B, A], index of the anchor's box, -1 for none or -2 for ignored.
        iou: float32 [B, A], its IoU with that box, 0 for none.

    Raises:
        TypeError: an argument is no tensor or of a wrong dtype.
        ValueError: shapes or devices do not fit, a threshold is out of range, or a box is NaN,
            infinite or inverted; the message names the image and the box.
    """
    batch = BoxBatch.of(gt_boxes, num_gt)
    boxes, _ = anchor_boxes(anchors, num_level_anchors, batch)
    check_number("pos_iou", pos_iou)
    check_number("neg_iou", neg_iou)
    check_flag("low_quality", low_quality)
    if not 0 < neg_iou <= pos_iou:
        raise ValueError(
            f"neg_iou must lie above 0 and not above pos_iou, {pos_iou}, but is {neg_iou}"
        )
    if valid is not None:
        check_valid(valid, batch.boxes, boxes.shape[-2])
    arguments = boxes, batch.boxes, batch.counts, valid, pos_iou, neg_iou, low_quality
    if backend.select("max_iou_assign", boxes) == "reference":
        return reference.max_iou_assign(*arguments)
    return _MAX_IOU_OP(*arguments)


def _max_iou_fake(
    anchors: Tensor,
    boxes: Tensor,
    counts: Tensor,
    valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    shape = len(boxes), anchors.shape[-2]
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape)


_MAX_IOU_OP = backend.define(
    "max_iou_assign",
    "(Tensor anchors, Tensor boxes, Tensor counts, Tensor? valid, float pos_iou, float neg_iou, "
    "bool low_quality) -> (Tensor assigned, Tensor iou)",
    _max_iou_fake,
    "dlkernels.boxes.triton",
)


def yolo_assign(
    anchors: AnchorGrid,
    num_level_anchors: Sequence[int] | None,
    gt_boxes: Tensor | Sequence[Tensor],
    num_gt: Tensor | None = None,
    ignore_iou: float = 0.5,
    shape_iou: float = 1.0,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns each box to the anchor of the best shape in the cell that holds the box's centre.

    The best anchor of a box has the highest IoU with it when both share their centre, over all
    levels and base anchors (ties: the lower). Other anchors that overlap some box by more than
    ``ignore_iou`` are ignored: Redmon and Farhadi, "YOLOv3" (2018), section 2.1. Every other anchor
    in the cells of the box's centre whose shape has an IoU above ``shape_iou`` is positive as well,
    as in Bochkovskiy et al., "YOLOv4" (2020), section 3.4 (its configurations use 0.213).

    An anchor that is positive for several boxes goes to the one with the highest IoU of shapes
    (ties: the lower index). A box whose centre lies outside a level's grid gets no anchor there.

    No anchors x boxes matrix is made. All is computed in float32. The results have no gradient.
    That the boxes are proper is checked on every device, which waits for the device.

    Args:
        anchors: the grid; its base anchors are the priors of each level.
        num_level_anchors: None, or that of the grid.
        gt_boxes: as in :func:`max_iou_assign`.
        num_gt: as in :func:`max_iou_assign`.
        ignore_iou: IoU with a box, at its place, above which a negative anchor is ignored.
        shape_iou: IoU of shapes above which an anchor is positive beside the best one; 1 for none.
        valid: as in :func:`max_iou_assign`.

    Returns:
        assigned: int64 [B, A], index of the anchor's box, -1 for none or -2 for ignored.
        iou: float32 [B, A], its IoU with that box, 0 for none.

    Raises:
        TypeError: ``anchors`` is no grid, or an argument is no tensor or of a wrong dtype.
        ValueError: see :func:`max_iou_assign`.
    """
    if not isinstance(anchors, AnchorGrid):
        raise TypeError(f"anchors must be an AnchorGrid, but is {type(anchors).__name__}")
    for name, value in (("ignore_iou", ignore_iou), ("shape_iou", shape_iou)):
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, but is {value}")
    batch = BoxBatch.of(gt_boxes, num_gt)
    all_anchors, _ = anchor_boxes(anchors, num_level_anchors, batch)
    if valid is not None:
        check_valid(valid, batch.boxes, len(all_anchors))
    priors = _Priors(anchors, batch.boxes.device)
    assigned, ious = [], []
    for image, boxes in enumerate(batch.images()):
        index = priors.claims(boxes, float(shape_iou))
        overlap, _ = reference.best_box(_iou_with(all_anchors), boxes, len(all_anchors))
        index = torch.where((index < 0) & (overlap > float(ignore_iou)), -2, index)
        if valid is not None:
            index = torch.where(_of_image(valid, image, 1), index, -1)
        assigned.append(index)
        ious.append(_assigned_iou(all_anchors, boxes, index))
    return torch.stack(assigned), torch.stack(ious)


class _Priors:
    """The base anchors of all levels, and where the anchors of a cell begin."""

    def __init__(self, grid: AnchorGrid, device: torch.device):
        self.total = len(grid)
        self.offset = grid.offset
        per_cell = grid.anchors_per_location
        base = torch.cat(grid.base_anchors).to(device)
        self.size = base[:, 2:] - base[:, :2]

        def of_levels(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=device).repeat_interleave(per_cell)

        self.stride = of_levels(grid.strides)
        self.height, self.width = (of_levels(sizes) for sizes in zip(*grid.sizes, strict=True))
        levels = grid.num_level_anchors
        starts = [sum(levels[:level]) for level in range(len(levels))]
        number = torch.arange(per_cell, device=device).repeat(len(levels))
        self.start = of_levels(starts) + number
        self.per_cell = per_cell

    def claims(self, boxes: Tensor, shape_iou: float) -> Tensor:
        """The box that claims each anchor, or -1; int64 [A]."""
        size = boxes[:, None, 2:] - boxes[:, None, :2]
        overlap = torch.minimum(size, self.size).prod(-1)
        iou = overlap / (size.prod(-1) + self.size.prod(-1) - overlap)  # [G, priors]
        claimed = iou > shape_iou
        claimed |= torch.arange(len(self.size), device=boxes.device) == iou.argmax(1, keepdim=True)

        center = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        column, row = (center / self.stride[:, None] + (0.5 - self.offset)).floor().unbind(-1)
        claimed &= (column >= 0) & (column < self.width) & (row >= 0) & (row < self.height)
        cell = row.long() * self.width + column.long()
        anchor = (self.start + cell * self.per_cell)[claimed]

        # The highest IoU wins, then the lowest box: both in one integer, whose maximum does not
        # depend on the order.
        box = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(iou)[claimed]
        key = (iou[claimed].view(torch.int32).long() << 32) | (len(boxes) - box)
        best = torch.zeros(self.total, dtype=torch.int64, device=boxes.device)
        best.scatter_reduce_(0, anchor, key, "amax")
        return torch.where(best > 0, len(boxes) - (best & 0xFFFFFFFF), -1)


def fcos_assign(
    anchors: Tensor | AnchorGrid,
    num_level_anchors: Sequence[int] | None,
    gt_boxes: Tensor | Sequence[Tensor],
    num_gt: Tensor | None = None,
    ranges: Sequence[tuple[float, float]] = FCOS_RANGES,
    center_radius: float | None = None,
    strides: Sequence[int] | None = None,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assigns each location to the smallest box that holds it and fits its level.

    A location (the centre of an anchor) is positive for a box if it lies inside it (all four
    distances to its sides above 0) and the longest of these distances is in the range of its
    level; of several boxes it goes to the one of the least area (ties: the lower index). Tian et
    al., "FCOS" (2019), section 3.2. With ``center_radius`` it must lie within that many strides of
    the box's centre, in x and in y, as well: Tian et al., "FCOS: A Simple and Strong Anchor-Free
    Object Detector" (2020), section 3.1. No location is ignored.

    No anchors x boxes matrix is made. All is computed in float32. The results have no gradient.
    That the boxes are proper is checked on every device, which waits for the device.

    Args:
        anchors: as in :func:`max_iou_assign`; their centres are the locations.
        num_level_anchors: anchors of each level, in order; None for a grid.
        gt_boxes: as in :func:`max_iou_assign`.
        num_gt: as in :func:`max_iou_assign`.
        ranges: (least, most) distance in pixels for each level, both included.
        center_radius: in strides of the level, above 0; or None.
        strides: pixels a cell, for each level; needed for ``center_radius``, None for a grid.
        valid: as in :func:`max_iou_assign`.

    Returns:
        assigned: int64 [B, A], index of the location's box or -1 for none.
        iou: float32 [B, A], the IoU of the anchor with that box, 0 for none.

    Raises:
        TypeError: an argument is no tensor or of a wrong dtype.
        ValueError: see :func:`max_iou_assign`; or ``ranges`` or ``strides`` do not fit the levels.
    """
    batch = BoxBatch.of(gt_boxes, num_gt)
    all_anchors, levels = anchor_boxes(anchors, num_level_anchors, batch)
    if levels is None:
        raise ValueError("num_level_anchors must be given where anchors is a tensor")
    if isinstance(anchors, AnchorGrid):
        strides = anchors.strides
    if valid is not None:
        check_valid(valid, batch.boxes, all_anchors.shape[-2])
    lowest, highest = _ranges(levels, ranges, all_anchors)
    radius = None
    if center_radius is not None:
        check_number("center_radius", center_radius)
        if not center_radius > 0:
            raise ValueError(f"center_radius must be above 0, but is {center_radius}")
        radius = float(center_radius) * _of_level(levels, "strides", strides or (), all_anchors)

    assigned, ious = [], []
    for image, boxes in enumerate(batch.images()):
        own = _of_image(all_anchors, image, 2)
        point = (own[:, :2] + own[:, 2:]) / 2

        def score(some: Tensor, point: Tensor = point) -> Tensor:
            low, high = point - some[:, None, :2], some[:, None, 2:] - point
            nearest = torch.minimum(low, high).amin(-1)
            farthest = torch.maximum(low, high).amax(-1)
            fits = (nearest > 0) & (farthest >= lowest) & (farthest <= highest)
            if radius is not None:
                fits &= ((low - high) / 2).abs().amax(-1) < radius
            area = (some[:, 2:] - some[:, :2]).prod(-1, keepdim=True)
            return torch.where(fits, -area, -math.inf)

        _, index = reference.best_box(score, boxes, len(own))
        if valid is not None:
            index = torch.where(_of_image(valid, image, 1), index, -1)
        assigned.append(index)
        ious.append(_assigned_iou(own, boxes, index))
    return torch.stack(assigned), torch.stack(ious)


def _ranges(levels: Sequence[int], ranges: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest distance for each anchor."""
    check_sequence("ranges", ranges, "pairs")
    for level, pair in enumerate(ranges):
        check_sequence(f"ranges[{level}]", pair, "two numbers")
        if len(pair) != 2:
            raise ValueError(f"ranges[{level}] must hold two numbers, but holds {len(pair)}")
    least, greatest = zip(*ranges, strict=True) if ranges else ((), ())
    return _of_level(levels, "ranges", least, like), _of_level(levels, "ranges", greatest, like)


def _of_level(levels: Sequence[int], name: str, values: Any, like: Tensor) -> Tensor:
    """Numbers of the levels, repeated for each anchor of theirs."""
    check_sequence(name, values, "one entry for each level")
    if len(values) != len(levels):
        raise ValueError(
            f"{name} must have one entry for each of the {len(levels)} levels, but has "
            f"{len(values)}"
        )
    for level, value in enumerate(values):
        check_number(f"{name}[{level}]", value)
    counts = torch.tensor(levels, device=like.device)
    return torch.tensor([float(value) for value in values]).to(like).repeat_interleave(counts)


def _of_image(tensor: Tensor, image: int, shared_dim: int) -> Tensor:
    return tensor if tensor.dim() == shared_dim else tensor[image]


def _iou_with(anchors: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda boxes: reference.box_iou(boxes[:, None], anchors)


def _assigned_iou(anchors: Tensor, boxes: Tensor, assigned: Tensor) -> Tensor:
    """IoU of each anchor with its box, 0 where it has none."""
    iou = anchors.new_zeros(len(anchors))
    positive = assigned >= 0
    iou[positive] = reference.box_iou(anchors[positive], boxes[assigned[positive]])
    return iou
