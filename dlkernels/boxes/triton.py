"""Triton kernels of the detection losses and of the max-IoU assigner.

A program of a loss writes the losses of its elements, or their sum (``partial``); the sums are
added up in order, so that results are the same in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlkernels.triton_support import Budget, alignment_of, launch

PAIRS = 256
ANCHORS = 256
TILE = 1024
# Columns of a tile, and at most of a program, where rows have labels or weights.
BLOCK_COLUMNS = 16
STRETCH = 512

BUDGETS = {
    "box_iou_loss_kernel": Budget(registers=56, shared=1024, wide=0.66),
    "box_iou_loss_backward_kernel": Budget(registers=80, shared=4096, wide=0.75),
    "focal_loss_kernel": Budget(registers=64, shared=1024, wide=0.25),
    "focal_loss_backward_kernel": Budget(registers=64, shared=0, wide=0.4),
    "highest_iou_kernel": Budget(registers=48, shared=1024, wide=0.2),
    "max_iou_assign_kernel": Budget(registers=48, shared=2048, wide=0.25),
}


# ---- functions of single values -----------------------------------------------------------------


@triton.jit
def _maximum(a, b):
    # Not tl.maximum: NaN must stay NaN.
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _minimum(a, b):
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def _relu(x):
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _share(a, b):
    """How much of a maximum of a and b moves with a; half where they are equal."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def _atan2(y, x):
    """The angle whose tangent is y / x; 0 where both are 0."""
    height = tl.abs(y)
    width = tl.abs(x)
    low = _minimum(height, width)
    high = _maximum(height, width)
    # Above 22.5 degrees, the angle to the diagonal has the smaller tangent.
    steep = low > 0.414213562 * high
    denominator = tl.where(steep, low + high, high)
    tangent = tl.where(steep, low - high, low) / tl.where(high == 0, 1.0, denominator)
    z = tangent * tangent
    p = -0.0603479
    p = p * z + 0.1057348
    p = p * z - 0.14240083
    p = p * z + 0.19998217
    p = p * z - 0.33333308
    angle = tangent + tangent * z * p
    angle = tl.where(steep, angle + 0.785398163, angle)
    angle = tl.where(height > width, 1.57079633 - angle, angle)
    angle = tl.where(x < 0, 3.14159265 - angle, angle)
    return tl.where(y < 0, -angle, angle)


@triton.jit
def _power(x, EXPONENT: tl.constexpr):
    """x^EXPONENT for 0 <= x <= 1."""
    if EXPONENT == 2.0:
        return x * x
    return tl.exp(EXPONENT * tl.log(_maximum(x, 1.17549435e-38)))


# ---- boxes --------------------------------------------------------------------------------------


@triton.jit
def _load_boxes(boxes, count, BLOCK: tl.constexpr):
    """Corners of the program's boxes, read as one row, so that accesses are wide."""
    offsets = tl.program_id(0).to(tl.int64) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    value = tl.load(boxes + offsets, offsets < 4 * count, other=0).to(tl.float32)
    x, y = tl.split(tl.reshape(value, (BLOCK, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def _sides(low, high, target_low, target_high):
    """Widths (or heights) of a box, its target, their intersection and the box around both."""
    inner = _relu(_minimum(high, target_high) - _maximum(low, target_low))
    hull = _maximum(high, target_high) - _minimum(low, target_low)
    return high - low, target_high - target_low, inner, hull


@triton.jit
def box_iou_loss_kernel(
    pred,
    target,
    loss,
    partial,
    count,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One minus the overlap of each pair; of the block's pairs the sum, if partial is given."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    x1, y1, x2, y2 = _load_boxes(pred, count, BLOCK)
    tx1, ty1, tx2, ty2 = _load_boxes(target, count, BLOCK)
    width, target_width, inner_width, hull_width = _sides(x1, x2, tx1, tx2)
    height, target_height, inner_height, hull_height = _sides(y1, y2, ty1, ty2)
    overlap = inner_width * inner_height
    union = width * height + target_width * target_height - overlap
    iou = overlap / (union + EPS)
    value = 1 - iou
    if KIND == "giou":
        hull = hull_width * hull_height
        value += (hull - union) / (hull + EPS)
    if KIND == "diou" or KIND == "ciou":
        x = ((x1 - tx1) + (x2 - tx2)) / 2
        y = ((y1 - ty1) + (y2 - ty2)) / 2
        value += (x * x + y * y) / (hull_width * hull_width + hull_height * hull_height + EPS)
    if KIND == "ciou":
        angle = _atan2(width, height) - _atan2(target_width, target_height)
        aspect = 0.405284735 * angle * angle
        value += aspect / (1 - iou + aspect + EPS) * aspect
    if partial is None:
        tl.store(loss + i, value, i < count)
    else:
        tl.store(partial + program, tl.sum(tl.where(i < count, value, 0.0), 0))


@triton.jit
def box_iou_loss_backward_kernel(
    grad_out,
    pred,
    target,
    grad_pred,
    count,
    SHARED: tl.constexpr,
    KIND: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient by pred; grad_out is one value for all pairs if SHARED."""
    program = tl.program_id(0).to(tl.int64)
    i = program * BLOCK + tl.arange(0, BLOCK)
    x1, y1, x2, y2 = _load_boxes(pred, count, BLOCK)
    tx1, ty1, tx2, ty2 = _load_boxes(target, count, BLOCK)
    width, target_width, inner_width, hull_width = _sides(x1, x2, tx1, tx2)
    height, target_height, inner_height, hull_height = _sides(y1, y2, ty1, ty2)
    overlap = inner_width * inner_height
    union = width * height + target_width * target_height - overlap
    iou = overlap / (union + EPS)

    # Slopes of the loss by what it is a function of.
    by_overlap = -(1 + iou) / (union + EPS)
    by_area = iou / (union + EPS)
    by_hull_width = tl.zeros_like(iou)
    by_hull_height = tl.zeros_like(iou)
    by_x = tl.zeros_like(iou)
    by_y = tl.zeros_like(iou)
    if KIND == "giou":
        hull = hull_width * hull_height
        inverse = 1 / (hull + EPS)
        by_hull = (1 - (hull - union) * inverse) * inverse
        by_hull_width = by_hull * hull_height
        by_hull_height = by_hull * hull_width
        by_overlap += inverse
        by_area -= inverse
    by_width = by_area * height
    by_height = by_area * width
    if KIND == "diou" or KIND == "ciou":
        x = ((x1 - tx1) + (x2 - tx2)) / 2
        y = ((y1 - ty1) + (y2 - ty2)) / 2
        inverse = 1 / (hull_width * hull_width + hull_height * hull_height + EPS)
        by_diagonal = -2 * (x * x + y * y) * inverse * inverse
        by_hull_width = by_diagonal * hull_width
        by_hull_height = by_diagonal * hull_height
        by_x = x * inverse
        by_y = y * inverse
    if KIND == "ciou":
        angle = _atan2(width, height) - _atan2(target_width, target_height)
        aspect = 0.405284735 * angle * angle
        alpha = aspect / (1 - iou + aspect + EPS)
        square = width * width + height * height
        by_angle = 0.81056947 * alpha * angle / tl.where(square > 0, square, 1.0)
        by_width += by_angle * height
        by_height -= by_angle * width

    g = tl.load(grad_out) if SHARED else tl.load(grad_out + i, i < count, other=0)
    by_inner_width = tl.where(inner_width > 0, by_overlap * inner_height, 0.0)
    by_inner_height = tl.where(inner_height > 0, by_overlap * inner_width, 0.0)
    # A side that does not bound the intersection bounds the hull.
    left = _share(x1, tx1)
    top = _share(y1, ty1)
    right = _share(tx2, x2)
    bottom = _share(ty2, y2)
    grad_x1 = g * (by_x - by_width - by_inner_width * left - by_hull_width * (1 - left))
    grad_y1 = g * (by_y - by_height - by_inner_height * top - by_hull_height * (1 - top))
    grad_x2 = g * (by_x + by_width + by_inner_width * right + by_hull_width * (1 - right))
    grad_y2 = g * (by_y + by_height + by_inner_height * bottom + by_hull_height * (1 - bottom))
    grads = tl.join(tl.join(grad_x1, grad_x2), tl.join(grad_y1, grad_y2))
    offsets = program * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    tl.store(grad_pred + offsets, tl.reshape(grads, (4 * BLOCK,)), offsets < 4 * count)


# ---- focal loss ---------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    """sigmoid(x), sigmoid(-x), and ln(1 + exp(-|x|)), exact where that is tiny, too."""
    e = tl.exp(-tl.abs(x))
    near = 1 / (1 + e)
    far = e * near
    s = e / (2 + e)
    square = s * s
    p = 0.14089168 * square + 0.13980301
    p = p * square + 0.20012455
    p = p * square + 0.33333157
    p = p * square + 1.0
    return tl.where(x > 0, near, far), tl.where(x > 0, far, near), 2 * s * p


@triton.jit
def _hard_loss(x, hit, NEGATIVE: tl.constexpr, POSITIVE: tl.constexpr, GAMMA: tl.constexpr):
    """Loss and slope where `hit` says which class is right."""
    sign = tl.where(hit, -1.0, 1.0)
    wrong = sign * x
    p, q, log1p_exp = _sigmoid(wrong)
    cross_entropy = _relu(wrong) + log1p_exp
    factor = tl.where(hit, POSITIVE, NEGATIVE) * _power(p, GAMMA)
    return factor * cross_entropy, sign * factor * (GAMMA * q * cross_entropy + p)


@triton.jit
def _soft_loss(x, t, NEGATIVE: tl.constexpr, POSITIVE: tl.constexpr, GAMMA: tl.constexpr):
    """Loss and slope for the probability t."""
    p, q, log1p_exp = _sigmoid(x)
    cross_entropy = ((1 - t) * x + _relu(-x)) + log1p_exp
    miss = p * (1 - t) + q * t
    factor = (POSITIVE * t + NEGATIVE * (1 - t)) * _power(miss, GAMMA)
    by_miss = GAMMA * p * q * (1 - 2 * t) * cross_entropy / tl.where(miss == 0, 1.0, miss)
    return factor * cross_entropy, factor * (p * (1 - t) - q * t + by_miss)


@triton.jit
def _tile(rows, classes, stretch, BLOCK_R: tl.constexpr, ALIGNMENT: tl.constexpr):
    """The rows and the first column of a program, and the classes, known to be aligned."""
    splits = tl.cdiv(classes, stretch)
    program = tl.program_id(0).to(tl.int64)
    row = program // splits * BLOCK_R + tl.arange(0, BLOCK_R)
    return row, program % splits * stretch, classes // ALIGNMENT * ALIGNMENT


@triton.jit
def focal_loss_kernel(
    logits,
    labels,
    targets,
    weight,
    loss,
    partial,
    rows,
    classes,
    stretch,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    GAMMA: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The loss of each logit; of the program's logits the sum, if partial is given."""
    row, first, classes = _tile(rows, classes, stretch, BLOCK_R, ALIGNMENT)
    if labels is not None:
        label = tl.load(labels + row, row < rows, other=-1)
    if weight is not None:
        w = tl.load(weight + row, row < rows, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for step in range(0, stretch, BLOCK_C):
        column = first + step + tl.arange(0, BLOCK_C)
        mask = (row < rows)[:, None] & (column < classes)[None, :]
        offsets = row[:, None] * classes + column[None, :]
        x = tl.load(logits + offsets, mask, other=0).to(tl.float32)
        if labels is not None:
            hit = label[:, None] == column[None, :]
            value, _ = _hard_loss(x, hit, NEGATIVE, POSITIVE, GAMMA)
        else:
            t = tl.load(targets + offsets, mask, other=0).to(tl.float32)
            value, _ = _soft_loss(x, t, NEGATIVE, POSITIVE, GAMMA)
        if weight is not None:
            value *= w[:, None]
        if partial is None:
            tl.store(loss + offsets, value, mask)
        else:
            total += tl.where(mask, value, 0.0)
    if partial is not None:
        tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def focal_loss_backward_kernel(
    grad_out,
    logits,
    labels,
    targets,
    weight,
    grad_logits,
    rows,
    classes,
    stretch,
    SHARED: tl.constexpr,
    NEGATIVE: tl.constexpr,
    POSITIVE: tl.constexpr,
    GAMMA: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient by the logits; grad_out is one value for all of them if SHARED."""
    row, first, classes = _tile(rows, classes, stretch, BLOCK_R, ALIGNMENT)
    if labels is not None:
        label = tl.load(labels + row, row < rows, other=-1)
    if weight is not None:
        w = tl.load(weight + row, row < rows, other=0)
    for step in range(0, stretch, BLOCK_C):
        column = first + step + tl.arange(0, BLOCK_C)
        mask = (row < rows)[:, None] & (column < classes)[None, :]
        offsets = row[:, None] * classes + column[None, :]
        x = tl.load(logits + offsets, mask, other=0).to(tl.float32)
        if labels is not None:
            hit = label[:, None] == column[None, :]
            _, slope = _hard_loss(x, hit, NEGATIVE, POSITIVE, GAMMA)
        else:
            t = tl.load(targets + offsets, mask, other=0).to(tl.float32)
            _, slope = _soft_loss(x, t, NEGATIVE, POSITIVE, GAMMA)
        if weight is not None:
            slope *= w[:, None]
        g = tl.load(grad_out) if SHARED else tl.load(grad_out + offsets, mask, other=0)
        tl.store(grad_logits + offsets, g * slope, mask)


# ---- assignment ---------------------------------------------------------------------------------


@triton.jit
def _load_anchors(anchors, valid, a, size, BLOCK: tl.constexpr):
    """Corners of the anchors a of one image; those that are not valid overlap nothing."""
    offsets = 4 * a[:, None] + tl.arange(0, 4)[None, :]
    value = tl.load(anchors + offsets, (a < size)[:, None], other=0)
    x, y = tl.split(tl.reshape(value, (BLOCK, 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    if valid is not None:
        is_valid = tl.load(valid + a, a < size, other=0) != 0
        x1 = tl.where(is_valid, x1, float("inf"))
        x2 = tl.where(is_valid, x2, -float("inf"))
    return x1, y1, x2, y2


@triton.jit
def _iou(x1, y1, x2, y2, box):
    """IoU of anchors with one box, rounded as in the reference formula."""
    bx1 = tl.load(box)
    by1 = tl.load(box + 1)
    bx2 = tl.load(box + 2)
    by2 = tl.load(box + 3)
    overlap = _relu(_minimum(x2, bx2) - _maximum(x1, bx1))
    overlap *= _relu(_minimum(y2, by2) - _maximum(y1, by1))
    union = (bx2 - bx1) * (by2 - by1) + (x2 - x1) * (y2 - y1) - overlap
    return tl.where(overlap > 0, tl.div_rn(overlap, tl.where(overlap > 0, union, 1.0)), 0.0)


@triton.jit
def highest_iou_kernel(
    anchors,
    valid,
    boxes,
    counts,
    partial,
    size,
    most,
    anchor_step,
    valid_step,
    BLOCK: tl.constexpr,
):
    """partial[image, block, g] = the highest IoU of box g with an anchor of the block."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    a = program % blocks * BLOCK + tl.arange(0, BLOCK)
    if valid is not None:
        valid += image * valid_step
    x1, y1, x2, y2 = _load_anchors(anchors + image * anchor_step, valid, a, size, BLOCK)
    for g in range(tl.load(counts + image)):
        iou = _iou(x1, y1, x2, y2, boxes + 4 * (image * most + g))
        tl.store(partial + program * most + g, tl.max(tl.where(a < size, iou, 0.0), 0))


@triton.jit
def max_iou_assign_kernel(
    anchors,
    valid,
    boxes,
    counts,
    highest,
    assigned,
    iou,
    size,
    most,
    anchor_step,
    valid_step,
    POSITIVE: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best box of each anchor; an anchor that reaches the highest IoU of a box is positive."""
    blocks = tl.cdiv(size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    image = program // blocks
    a = program % blocks * BLOCK + tl.arange(0, BLOCK)
    if valid is not None:
        valid += image * valid_step
    x1, y1, x2, y2 = _load_anchors(anchors + image * anchor_step, valid, a, size, BLOCK)
    best = tl.zeros((BLOCK,), tl.float32)
    index = tl.full((BLOCK,), -1, tl.int64)
    reached = tl.zeros((BLOCK,), tl.int1)
    for g in range(tl.load(counts + image)):
        value = _iou(x1, y1, x2, y2, boxes + 4 * (image * most + g))
        index = tl.where(value > best, g, index)
        best = tl.where(value > best, value, best)
        if highest is not None:
            reached |= (value == tl.load(highest + image * most + g)) & (value > 0)
    positive = (best >= POSITIVE) | reached
    negative = tl.where(best >= NEGATIVE, -2, -1)
    tl.store(assigned + image * size + a, tl.where(positive, index, negative), a < size)
    tl.store(iou + image * size + a, tl.where(positive, best, 0.0), a < size)


# ---- launchers ----------------------------------------------------------------------------------


def box_iou_loss(pred: Tensor, target: Tensor, kind: str, summed: bool, eps: float) -> Tensor:
    """Launches ``dlkernels::box_iou_loss``."""
    pred, target = pred.contiguous(), target.contiguous()
    count = pred.numel() // 4
    programs = triton.cdiv(count, PAIRS)
    loss = None if summed else pred.new_empty(pred.shape[:-1], dtype=torch.float32)
    partial = pred.new_empty(programs, dtype=torch.float32) if summed else None
    launch(
        box_iou_loss_kernel,
        programs,
        *(pred, target, loss, partial, count),
        KIND=kind,
        EPS=eps,
        BLOCK=PAIRS,
    )
    return _total(loss, partial)


def box_iou_loss_backward(
    grad_out: Tensor, pred: Tensor, target: Tensor, kind: str, eps: float
) -> Tensor:
    """Launches ``dlkernels::box_iou_loss_backward``."""
    pred, target = pred.contiguous(), target.contiguous()
    grad_pred = torch.empty_like(pred)
    count = pred.numel() // 4
    launch(
        box_iou_loss_backward_kernel,
        triton.cdiv(count, PAIRS),
        *(grad_out.contiguous(), pred, target, grad_pred, count),
        SHARED=grad_out.dim() == 0,
        KIND=kind,
        EPS=eps,
        BLOCK=PAIRS,
    )
    return grad_pred


class _Focal:
    """Contiguous inputs of a focal loss, and how its logits are cut into tiles."""

    def __init__(
        self,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor | None,
        negative: float,
        positive: float,
        gamma: float,
    ):
        self.logits, targets = logits.contiguous(), targets.contiguous()
        labels = None if targets.is_floating_point() else targets
        weight = None if weight is None else weight.contiguous()
        self.inputs = self.logits, labels, targets if labels is None else None, weight
        whole = labels is None and weight is None
        classes = logits.numel() if whole else logits.shape[-1]
        rows = logits.numel() // max(1, classes)
        widest = TILE if whole else BLOCK_COLUMNS
        block_c = min(triton.next_power_of_2(max(1, classes)), widest)
        block_r = 1 if whole else TILE // block_c
        stretch = block_c if whole else min(triton.cdiv(classes, block_c) * block_c, STRETCH)
        self.extents = rows, classes, stretch
        self.programs = triton.cdiv(rows, block_r) * triton.cdiv(classes, max(1, stretch))
        self.options: dict[str, Any] = {
            "NEGATIVE": negative,
            "POSITIVE": positive,
            "GAMMA": gamma,
            "ALIGNMENT": alignment_of(classes),
            "BLOCK_R": block_r,
            "BLOCK_C": block_c,
        }


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    negative: float,
    positive: float,
    gamma: float,
    summed: bool,
) -> Tensor:
    """Launches ``dlkernels::sigmoid_focal_loss``."""
    focal = _Focal(logits, targets, weight, negative, positive, gamma)
    loss = None if summed else torch.empty_like(focal.logits, dtype=torch.float32)
    partial = logits.new_empty(focal.programs, dtype=torch.float32) if summed else None
    launch(
        focal_loss_kernel,
        focal.programs,
        *(*focal.inputs, loss, partial, *focal.extents),
        **focal.options,
    )
    return _total(loss, partial)


def sigmoid_focal_loss_backward(
    grad_out: Tensor,
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    negative: float,
    positive: float,
    gamma: float,
) -> Tensor:
    """Launches ``dlkernels::sigmoid_focal_loss_backward``."""
    focal = _Focal(logits, targets, weight, negative, positive, gamma)
    grad_logits = torch.empty_like(focal.logits)
    launch(
        focal_loss_backward_kernel,
        focal.programs,
        *(grad_out.contiguous(), *focal.inputs, grad_logits, *focal.extents),
        SHARED=grad_out.dim() == 0,
        **focal.options,
    )
    return grad_logits


def _total(loss: Tensor | None, partial: Tensor | None) -> Tensor:
    if loss is not None:
        return loss
    assert partial is not None
    return partial.sum()


def max_iou_assign(
    anchors: Tensor,
    boxes: Tensor,
    counts: Tensor,
    valid: Tensor | None,
    pos_iou: float,
    neg_iou: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """Launches ``dlkernels::max_iou_assign``."""
    images, most = boxes.shape[:2]
    size = anchors.shape[-2]
    blocks = triton.cdiv(size, ANCHORS)
    inputs = (
        anchors.contiguous(),
        None if valid is None else valid.contiguous(),
        boxes.contiguous(),
        counts.contiguous(),
    )
    extents = (
        size,
        most,
        4 * size if anchors.dim() == 3 else 0,
        size if valid is not None and valid.dim() == 2 else 0,
    )
    # Fused multiply-adds would round otherwise than the reference formula.
    options: dict[str, Any] = {"BLOCK": ANCHORS, "enable_fp_fusion": False}
    highest = None
    if low_quality and size > 0:
        partial = boxes.new_zeros((images, blocks, most))
        launch(highest_iou_kernel, images * blocks, *inputs, partial, *extents, **options)
        highest = partial.amax(1)
    assigned = boxes.new_empty((images, size), dtype=torch.int64)
    iou = boxes.new_empty((images, size))
    launch(
        max_iou_assign_kernel,
        images * blocks,
        *(*inputs, highest, assigned, iou, *extents),
        POSITIVE=pos_iou,
        NEGATIVE=neg_iou,
        **options,
    )
    return assigned, iou
