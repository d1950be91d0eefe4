"""The ops ``dlkernels::atss_assign`` and ``atss_assign_grid``: public function, fake kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.atss import reference
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.boxes.targets import (
    check_counts,
    check_grid,
    check_levels,
    check_proper,
    check_valid,
    counts_of,
    padded_boxes,
    prepared,
)
from dlkernels.checks import (
    check_device,
    check_flag,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
    describe,
)
from dlkernels.watch import watched

MAX_LEVELS = 16


@watched
def atss_assign(
    anchors: Tensor | AnchorGrid,
    num_level_anchors: Sequence[int] | None,
    gt_boxes: Tensor | Sequence[Tensor],
    num_gt: Tensor | None = None,
    topk: int = 9,
    anchors_per_location: int | None = None,
    gt_ignore: Tensor | Sequence[Tensor] | None = None,
    *,
    valid: Tensor | None = None,
    ignore_iof_thr: float = 0.5,
    check_boxes: bool | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Assigns anchors to the boxes of a batch by adaptive training sample selection (ATSS).

    For each box:

    1. on each level the ``k = topk * anchors_per_location`` anchors whose centres are nearest to
       the box's centre are candidates (ties: the lower index; all where a level has fewer);
    2. the threshold is the mean plus the unbiased standard deviation of all candidates' IoUs with
       the box (a single candidate deviates by 0, where published code has NaN);
    3. candidates at or above the threshold are positive if their centre lies inside the box, more
       than 0.01 from each side.

    An anchor that is positive for several boxes goes to the one with the highest IoU (ties: the
    lower index). Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via
    Adaptive Training Sample Selection" (2020), algorithm 1.

    No anchors x boxes matrix is made: beyond inputs and results the kernels hold O(B A) for masks
    and centres, and the candidates of the boxes at work. An :class:`AnchorGrid` takes time
    O(G levels k); a tensor of anchors is scanned once for each box.

    Centres, distances and IoUs are float32 (the IoU of boxes that do not overlap is 0, whatever
    their areas), means and deviations float64, each rounded in a fixed order: every backend,
    instruction set and thread count, and a grid and the tensor of its boxes, give the same bits.
    Other dtypes are converted to float32 first, also under autocast. The results have no gradient.

    Args:
        anchors: an :class:`AnchorGrid` (``grid.to(device)`` saves copying its base anchors at each
            call), or boxes x1 y1 x2 y2, [A, 4] or [B, A, 4] for a set per image; any
            floating-point dtype, finite.
        num_level_anchors: anchors of each of at most 16 levels, in order; None for a grid.
        gt_boxes: boxes x1 y1 x2 y2 of each image, [B, G, 4] with padding behind the first
            ``num_gt``, or a list of B tensors [G_i, 4], whose lengths are copied to the device.
        num_gt: number of boxes in each image, int64 [B]; None where there is no padding, and for
            lists.
        topk: candidates on a level per anchor at a location.
        anchors_per_location: 1 by default; None for a grid, which knows.
        gt_ignore: regions to ignore, [B, I, 4] (padded with zeros) or a list of B tensors. Valid
            anchors of which more than ``ignore_iof_thr`` lies inside one of them are no candidates
            and get -2.
        valid: bool [A] or [B, A]: where false, an anchor is no candidate, as if it were not there;
            for example ``grid.inside(image_size)``.
        ignore_iof_thr: intersection over the anchor's area above which it is ignored.
        check_boxes: whether improper boxes raise. By default on the CPU, outside tracing; on
            other devices the check waits for the device. Unchecked, improper boxes get no anchors.

    Returns:
        assigned: int64 [B, A], index of the anchor's box, -1 for none or -2 for ignored.
        iou: float32 [B, A], its IoU with that box, 0 for none.

    Raises:
        TypeError: an argument is no tensor or of a wrong dtype.
        ValueError: shapes or devices do not fit, a number is out of range, or a box is NaN,
            infinite or inverted (x2 < x1 or y2 < y1); the message names the image and the box.
    """
    check_integer("topk", topk)
    check_number("ignore_iof_thr", ignore_iof_thr)
    if not ignore_iof_thr >= 0:
        raise ValueError(f"ignore_iof_thr must be at least 0, but is {ignore_iof_thr}")
    if check_boxes is not None:
        check_flag("check_boxes", check_boxes)
    if topk < 1:
        raise ValueError(f"topk must be at least 1, but is {topk}")
    boxes = padded_boxes("gt_boxes", gt_boxes)
    device = boxes.device
    counts = counts_of(gt_boxes, num_gt, boxes)
    ignored = None if gt_ignore is None else padded_boxes("gt_ignore", gt_ignore)
    if ignored is not None:
        check_shape("gt_ignore", ignored, [len(boxes), ignored.shape[1], 4], "B of gt_boxes")
        check_device("gt_ignore", ignored, "gt_boxes", boxes)

    if isinstance(anchors, AnchorGrid):
        check_grid(anchors, boxes)
        levels, per_location = _layout_of(anchors, num_level_anchors, anchors_per_location)
    else:
        levels = _levels(anchors, num_level_anchors, boxes)
        per_location = 1 if anchors_per_location is None else anchors_per_location
    check_integer("anchors_per_location", per_location)
    if per_location < 1:
        raise ValueError(f"anchors_per_location must be at least 1, but is {per_location}")
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise ValueError(
            f"num_level_anchors must have 1 to {MAX_LEVELS} levels, but has {len(levels)}"
        )
    if valid is not None:
        check_valid(valid, boxes, sum(levels))
        valid = valid.contiguous()
    if check_boxes or (check_boxes is None and device.type == "cpu" and not _is_tracing()):
        if num_gt is not None:
            check_counts(counts, boxes.shape[1])
        check_proper(boxes, counts)

    # A level has no more candidates than anchors.
    k = min(topk * per_location, max(1, *levels))
    targets = (boxes, counts, ignored, valid, k, float(ignore_iof_thr))
    if backend.select("atss_assign", boxes) == "reference":
        if isinstance(anchors, AnchorGrid):
            anchors = anchors.boxes(device)
        return reference.atss_assign(prepared(anchors), levels, *targets)
    if not isinstance(anchors, AnchorGrid):
        return _OP(prepared(anchors), levels, *targets)
    sizes = [cells for size in anchors.sizes for cells in size]
    base_anchors = torch.stack(anchors.base_anchors).to(device)
    return _GRID_OP(base_anchors, sizes, list(anchors.strides), anchors.offset, *targets)


# ---- arguments ----------------------------------------------------------------------------------


def _levels(anchors: Tensor, num_level_anchors: Sequence[int] | None, boxes: Tensor) -> list[int]:
    check_tensor("anchors", anchors)
    images = len(boxes)
    fits = anchors.dim() in (2, 3) and anchors.shape[-1] == 4
    if not fits or (anchors.dim() == 3 and len(anchors) != images):
        raise ValueError(
            f"anchors must have shape [A, 4] or [{images}, A, 4], but is {describe(anchors)}"
        )
    check_device("anchors", anchors, "gt_boxes", boxes)
    if num_level_anchors is None:
        raise ValueError(
            "num_level_anchors must be the number of anchors of each level where anchors is a "
            "tensor, but is None"
        )
    check_levels(num_level_anchors)
    if sum(num_level_anchors) != anchors.shape[-2]:
        raise ValueError(
            f"num_level_anchors must add up to the {anchors.shape[-2]} anchors, but is "
            f"{list(num_level_anchors)}"
        )
    return list(num_level_anchors)


def _layout_of(
    grid: AnchorGrid, num_level_anchors: Sequence[int] | None, anchors_per_location: int | None
) -> tuple[list[int], int]:
    levels, per_location = list(grid.num_level_anchors), grid.anchors_per_location
    if num_level_anchors is not None:
        check_levels(num_level_anchors)
    if num_level_anchors is not None and list(num_level_anchors) != levels:
        raise ValueError(
            f"num_level_anchors must be None or that of the grid, {levels}, but is "
            f"{list(num_level_anchors)}"
        )
    if anchors_per_location is not None:
        check_integer("anchors_per_location", anchors_per_location)
    if anchors_per_location not in (None, per_location):
        raise ValueError(
            f"anchors_per_location must be None or that of the grid, {per_location}, but is "
            f"{anchors_per_location}"
        )
    return levels, per_location


def _is_tracing() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


# ---- registration -------------------------------------------------------------------------------


def _fake_results(boxes: Tensor, anchors: int) -> tuple[Tensor, Tensor]:
    shape = (boxes.shape[0], anchors)
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape)


def _fake(anchors: Tensor, num_level_anchors: list[int], boxes: Tensor, *_: Any) -> Any:
    return _fake_results(boxes, sum(num_level_anchors))


def _fake_grid(
    base_anchors: Tensor,
    sizes: list[int],
    strides: list[int],
    offset: float,
    boxes: Tensor,
    *_: Any,
) -> Any:
    cells = sum(height * width for height, width in zip(sizes[::2], sizes[1::2], strict=True))
    return _fake_results(boxes, cells * base_anchors.shape[1])


_TARGETS = (
    "Tensor gt_boxes, Tensor num_gt, Tensor? gt_ignore, Tensor? valid, int k, "
    "float ignore_iof_thr) -> (Tensor assigned, Tensor iou)"
)
_OP = backend.define("atss_assign", f"(Tensor anchors, int[] num_level_anchors, {_TARGETS}", _fake)
_GRID_OP = backend.define(
    "atss_assign_grid",
    f"(Tensor base_anchors, int[] sizes, int[] strides, float offset, {_TARGETS}",
    _fake_grid,
)
