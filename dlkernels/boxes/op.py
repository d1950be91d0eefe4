"""The losses' ops: public functions, fake kernels, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkernels import backend
from dlkernels.boxes import reference
from dlkernels.checks import (
    check_choice,
    check_constant,
    check_dense,
    check_device,
    check_like,
    check_number,
    check_shape,
    check_tensor,
    describe,
)
from dlkernels.watch import watched

_TRITON = "dlkernels.boxes.triton"


# ---- IoU losses ---------------------------------------------------------------------------------


@watched
def box_iou_loss(
    pred: Tensor,
    target: Tensor,
    kind: str = "iou",
    reduction: str = "none",
    eps: float = 1e-7,
) -> Tensor:
    r"""One minus the overlap of boxes with their targets, pair by pair.

    .. code-block:: text

        IoU    I / (U + eps)                    I, U: areas of intersection and union
        GIoU   IoU - (H - U) / (H + eps)        H: area of the smallest box around both
        DIoU   IoU - d^2 / (c^2 + eps)          d: distance of the centres, c: diagonal of that box
        CIoU   DIoU - a v,                      v = 4 / pi^2 (angle(target) - angle(pred))^2
                                                a = v / (1 - IoU + v + eps)

    ``angle`` is atan(width / height). GIoU: Rezatofighi et al., "Generalized Intersection over
    Union" (2019), algorithm 1; DIoU and CIoU: Zheng et al., "Distance-IoU Loss" (2020), equations
    7 and 10, with ``a`` a constant in backward. Where coordinates of a pair coincide, the gradient
    is the mean of the gradients on both sides.

    All arithmetic is in float32 (float64 boxes: the reference formula), and so is the result.
    Under autocast boxes of different dtypes are promoted to the wider one. Boxes are read in place
    where they are contiguous, else copied. No tensor per pair is stored unless ``reduction`` is
    ``"none"``. Sums are in an order that depends on nothing but the number of boxes.

    Saved for backward: ``pred`` and ``target``. Each of them that requires a gradient costs one
    pass over both.

    Args:
        pred: boxes [..., 4] as x1, y1, x2, y2; float32, bfloat16, float16 or float64.
        target: boxes of the same shape and dtype.
        kind: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"``.
        reduction: ``"none"``, ``"sum"``, or ``"mean"``, which of no boxes is 0.
        eps: added to denominators; in squares of the boxes' unit, at least 0.

    Returns:
        The loss in float32 (float64 for float64 boxes): [...] for ``"none"``, else a scalar.

    Raises:
        TypeError: an argument is no tensor, or not of a floating-point dtype, or dtypes differ.
        ValueError: shapes or devices do not fit, a name is unknown, or eps is negative.
    """
    check_tensor("pred", pred)
    if pred.dim() == 0 or pred.shape[-1] != 4:
        raise ValueError(f"pred must have shape [..., 4], but is {describe(pred)}")
    check_like("target", target, "pred", pred)
    check_shape("target", target, pred.shape, "the shape of pred")
    check_choice("kind", kind, reference.KINDS)
    check_choice("reduction", reduction, reference.REDUCTIONS)
    check_number("eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be at least 0, but is {eps}")

    pred, target = _promoted(pred, target)
    arguments = pred, target, kind, reduction != "none", float(eps)
    if backend.select("box_iou_loss", pred) == "reference":
        loss = reference.box_iou_loss(*arguments)
    else:
        loss = _BOX_OP(*arguments)
    return loss / max(1, pred.numel() // 4) if reduction == "mean" else loss


def _box_fake(pred: Tensor, target: Tensor, kind: str, summed: bool, eps: float) -> Tensor:
    return pred.new_empty(() if summed else pred.shape[:-1], dtype=torch.float32)


def _box_fake_backward(
    grad_out: Tensor, pred: Tensor, target: Tensor, kind: str, eps: float
) -> Tensor:
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _box_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pred, target, ctx.kind, _, ctx.eps = inputs
    ctx.save_for_backward(pred, target)


def _box_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    pred, target = ctx.saved_tensors

    def gradient(of: Tensor, other: Tensor) -> Tensor:
        return _BOX_BACKWARD_OP(grad_out, of, other, ctx.kind, ctx.eps)

    # The losses are symmetric in their boxes.
    wants_pred, wants_target = ctx.needs_input_grad[:2]
    return (
        gradient(pred, target) if wants_pred else None,
        gradient(target, pred) if wants_target else None,
        None,
        None,
        None,
    )


_BOX_OP = backend.define(
    "box_iou_loss",
    "(Tensor pred, Tensor target, str kind, bool summed, float eps) -> Tensor",
    _box_fake,
    _TRITON,
)
_BOX_BACKWARD_OP = backend.define(
    "box_iou_loss_backward",
    "(Tensor grad_out, Tensor pred, Tensor target, str kind, float eps) -> Tensor",
    _box_fake_backward,
    _TRITON,
)
backend.register_autograd("box_iou_loss", _box_backward, _box_setup_context)
backend.refuse_double_backward("box_iou_loss_backward")


# ---- focal loss ---------------------------------------------------------------------------------


@watched
def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    *,
    weight: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    r"""The focal loss of independent classes.

    .. code-block:: text

        p    = sigmoid(logits)
        loss = -alpha (1 - p)^gamma log(p)            for positives
        loss = -(1 - alpha) p^gamma log(1 - p)        for negatives

    Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 5. Soft targets t mix the
    factors as torchvision does: (alpha t + (1 - alpha)(1 - t)) (1 - p_t)^gamma times the binary
    cross entropy, with p_t = p t + (1 - p)(1 - t).

    Logits of any size give exact, finite losses: nothing is computed as the logarithm of a rounded
    probability. All arithmetic is in float32 (float64 logits: the reference formula), and so is
    the result. Under autocast logits and soft targets of different dtypes are promoted to the
    wider one. Tensors are read in place where they are contiguous, else copied; no one-hot targets
    are ever stored, and no tensor per logit unless ``reduction`` is ``"none"``. Sums are in an
    order that depends on nothing but the number of logits.

    Saved for backward: ``logits``, ``targets`` and ``weight``.

    Args:
        logits: [..., C]; float32, bfloat16, float16 or float64.
        targets: class labels [...] in int64, where every label outside 0 to C - 1 is background,
            positive for no class; or the probability of each class, [..., C] in the dtype of
            ``logits``.
        alpha: the weight of positives, 0 to 1; or -1 for no weights of positives and negatives.
        gamma: the exponent that mutes easy logits, at least 0.
        weight: [...], multiplies the loss of a row of C logits (0 for anchors to be ignored), of a
            floating-point dtype, or None.
        reduction: ``"none"``, ``"sum"``, or ``"mean"`` over the logits, which of none is 0.

    Returns:
        The loss in float32 (float64 for float64 logits): [..., C] for ``"none"``, else a scalar.

    Raises:
        TypeError: an argument is no tensor, or of a wrong dtype.
        ValueError: shapes or devices do not fit, targets or weight require a gradient, which they
            never get, or a number or name is out of range.
    """
    check_tensor("logits", logits)
    if logits.dim() == 0:
        raise ValueError(f"logits must have shape [..., C], but is {describe(logits)}")
    _check_targets(targets, logits)
    if weight is not None:
        _check_weight(weight, logits)
        weight = weight.to(torch.promote_types(logits.dtype, torch.float32))
    check_choice("reduction", reduction, reference.REDUCTIONS)
    check_number("alpha", alpha)
    check_number("gamma", gamma)
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"alpha must be 0 to 1, or -1 for no weights, but is {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be at least 0, but is {gamma}")

    if targets.is_floating_point():
        logits, targets = _promoted(logits, targets)
    negative, positive = (1.0, 1.0) if alpha == -1 else (1.0 - alpha, float(alpha))
    arguments = logits, targets, weight, negative, positive, float(gamma), reduction != "none"
    if backend.select("sigmoid_focal_loss", logits) == "reference":
        loss = reference.sigmoid_focal_loss(*arguments)
    else:
        loss = _FOCAL_OP(*arguments)
    return loss / max(1, logits.numel()) if reduction == "mean" else loss


def _check_targets(targets: Any, logits: Tensor) -> None:
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        if targets.dtype != torch.int64:
            raise TypeError(
                f"targets must be int64 labels or of the dtype of logits, {logits.dtype}, "
                f"but is {targets.dtype}"
            )
        check_dense("targets", targets)
        check_device("targets", targets, "logits", logits)
        check_shape("targets", targets, logits.shape[:-1], "one label per row of logits")
    else:
        check_like("targets", targets, "logits", logits)
        check_shape("targets", targets, logits.shape, "the shape of logits")
        check_constant("targets", targets)


def _check_weight(weight: Any, logits: Tensor) -> None:
    check_tensor("weight", weight)
    check_device("weight", weight, "logits", logits)
    check_shape("weight", weight, logits.shape[:-1], "one value per row of logits")
    check_constant("weight", weight)


def _promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype; they differ under autocast only."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _focal_fake(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    negative: float,
    positive: float,
    gamma: float,
    summed: bool,
) -> Tensor:
    return logits.new_empty(() if summed else logits.shape, dtype=torch.float32)


def _focal_fake_backward(
    grad_out: Tensor,
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None,
    negative: float,
    positive: float,
    gamma: float,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _focal_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, weight, *ctx.factors, _ = inputs
    ctx.save_for_backward(logits, targets, weight)


def _focal_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad = _FOCAL_BACKWARD_OP(grad_out, *ctx.saved_tensors, *ctx.factors)
    return grad, *(None,) * 6


_FOCAL_OP = backend.define(
    "sigmoid_focal_loss",
    "(Tensor logits, Tensor targets, Tensor? weight, float negative, float positive, "
    "float gamma, bool summed) -> Tensor",
    _focal_fake,
    _TRITON,
)
_FOCAL_BACKWARD_OP = backend.define(
    "sigmoid_focal_loss_backward",
    "(Tensor grad_out, Tensor logits, Tensor targets, Tensor? weight, float negative, "
    "float positive, float gamma) -> Tensor",
    _focal_fake_backward,
    _TRITON,
)
backend.register_autograd("sigmoid_focal_loss", _focal_backward, _focal_setup_context)
backend.refuse_double_backward("sigmoid_focal_loss_backward")
