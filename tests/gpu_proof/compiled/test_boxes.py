"""The machine code of the Triton kernels of boxes, held to the budget beside them."""

import pytest
import torch

from dlkernels.boxes import triton as kernels
from tests.gpu_proof.launches import record
from tests.gpu_proof.machine_code import ARCHITECTURES, assert_within_budgets

PAIRS = 1 << 16
ROWS, CLASSES = 4096, 80
# float16 differs from bfloat16 in one conversion.
DTYPES = [torch.float32, torch.bfloat16]


def box_launches(dtype, kind, summed=True):
    boxes = torch.empty(PAIRS, 4, dtype=dtype)
    grad = torch.empty(() if summed else (PAIRS,))
    forward = record(kernels.box_iou_loss, boxes, boxes, kind, summed, 1e-7)
    return forward + record(kernels.box_iou_loss_backward, grad, boxes, boxes, kind, 1e-7)


def focal_launches(dtype, form, gamma=2.0, summed=True):
    logits = torch.empty(ROWS, CLASSES, dtype=dtype)
    targets = torch.empty(ROWS, dtype=torch.int64) if form == "labels" else logits
    weight = torch.empty(ROWS) if form == "labels" else None
    grad = torch.empty(() if summed else (ROWS, CLASSES))
    inputs = logits, targets, weight, 0.75, 0.25, gamma
    forward = record(kernels.sigmoid_focal_loss, *inputs, summed)
    return forward + record(kernels.sigmoid_focal_loss_backward, grad, *inputs)


def assign_launches(masked):
    anchors, boxes = torch.empty(22_400, 4), torch.empty(8, 100, 4)
    valid = torch.empty(22_400, dtype=torch.bool) if masked else None
    counts = torch.empty(8, dtype=torch.int64)
    return record(kernels.max_iou_assign, anchors, boxes, counts, valid, 0.5, 0.4, True)


def test_every_kernel_has_a_budget():
    launches = box_launches(torch.float32, "iou") + focal_launches(torch.float32, "labels")
    launches += assign_launches(False)
    assert {launch.name for launch in launches} == set(kernels.BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["giou", "ciou"])
def test_box_iou_loss(kind, dtype, architecture):
    assert_within_budgets(box_launches(dtype, kind), architecture, kernels.BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["labels", "targets"])
def test_sigmoid_focal_loss(form, dtype, architecture):
    assert_within_budgets(focal_launches(dtype, form), architecture, kernels.BUDGETS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("masked", [False, True])
def test_max_iou_assign(masked, architecture):
    assert_within_budgets(assign_launches(masked), architecture, kernels.BUDGETS)


def test_losses_per_element():
    """The forms that write each loss, and the general exponent."""
    assert_within_budgets(box_launches(torch.float32, "ciou", summed=False), 90, kernels.BUDGETS)
    assert_within_budgets(
        focal_launches(torch.float32, "labels", 1.5, summed=False), 90, kernels.BUDGETS
    )
