"""Losses and gradients against the float64 formulas, torchvision, and eager PyTorch."""

import math

import pytest
import torch
import torchvision.ops as vision

from dlkernels import ops, use_backend
from dlkernels.boxes import reference
from tests.boxes.cases import (
    BOX_SHAPES,
    IMAGE,
    KINDS,
    LOGIT_SHAPES,
    REDUCTIONS,
    make_boxes,
    make_grid,
    make_gt,
    make_labels,
    make_targets,
)
from tests.numbers import DEVICES_AND_BACKENDS, DTYPES, assert_exact, relative_error

VISION_LOSSES = {
    "giou": vision.generalized_box_iou_loss,
    "diou": vision.distance_box_iou_loss,
    "ciou": vision.complete_box_iou_loss,
}


def leaves(*tensors, dtype=None):
    return [t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]


def run(loss, *inputs, scale=1.0):
    """The loss and its gradients by the inputs, every element weighted differently."""
    weights = scale * torch.linspace(0.5, 1.5, loss.numel()).to(loss).reshape(loss.shape)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, weights)]


def loss_scale(dtype, reduction, count):
    """Keeps gradients away from the small numbers that float16 lacks."""
    scale = 256.0 if dtype == torch.float16 else 1.0
    return scale * count if reduction == "mean" else scale


# ---- IoU losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BOX_SHAPES.values(), ids=BOX_SHAPES)
def test_box_iou_loss(shape, dtype, kind, reduction, device, backend):
    boxes = make_boxes(shape, dtype, device)
    scale = loss_scale(dtype, reduction, math.prod(shape))
    ours, exact = leaves(*boxes), leaves(*boxes, dtype=torch.float64)
    with use_backend(backend):
        actual = run(ops.box_iou_loss(*ours, kind, reduction), *ours, scale=scale)
    expected = run(ops.box_iou_loss(*exact, kind, reduction), *exact, scale=scale)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == actual[2].dtype == dtype
    length = 4 if reduction == "none" else 4 * math.prod(shape)
    for name, a, b in zip(("loss", "pred", "target"), actual, expected, strict=True):
        assert_exact(name, a, b, length)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", VISION_LOSSES)
def test_box_iou_loss_is_torchvisions(kind, reduction):
    boxes = make_boxes((500,))
    ours, theirs = leaves(*boxes), leaves(*boxes, dtype=torch.float64)
    actual = run(ops.box_iou_loss(*ours, kind, reduction), *ours)
    expected = run(VISION_LOSSES[kind](*theirs, reduction), *theirs)
    for name, a, b in zip(("loss", "pred", "target"), actual, expected, strict=True):
        assert_exact(name, a, b, 500)


def test_plain_iou_is_torchvisions():
    pred, target = make_boxes((200,))
    expected = 1 - vision.box_iou(pred.double(), target.double()).diagonal()
    assert_exact("loss", ops.box_iou_loss(pred, target), expected, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_box_iou_loss_is_as_exact_as_eager(kind):
    boxes = make_boxes((20000,))
    results = {}
    for name, dtype, backend in (
        ("exact", torch.float64, "reference"),
        ("eager", torch.float32, "reference"),
        ("ours", torch.float32, "cpp"),
    ):
        inputs = leaves(*boxes, dtype=dtype)
        with use_backend(backend):
            results[name] = run(ops.box_iou_loss(*inputs, kind, "none"), *inputs)
    assert_no_worse(results)


def assert_no_worse(results):
    rounding = torch.finfo(torch.float32).eps
    for ours, eager, exact in zip(results["ours"], results["eager"], results["exact"], strict=True):
        error, eager_error = relative_error(ours, exact), relative_error(eager, exact)
        assert error <= 2 * max(eager_error, rounding), f"{error}, eager {eager_error}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pair",
    {
        "equal": ([10, 20, 30, 50], [10, 20, 30, 50]),
        "apart": ([0, 0, 10, 10], [20, 30, 40, 60]),
        "touching": ([0, 0, 10, 10], [10, 0, 20, 10]),
        "corner to corner": ([0, 0, 10, 10], [10, 10, 20, 20]),
        "inside": ([12, 14, 15, 19], [10, 10, 20, 20]),
        "shared side": ([10, 10, 20, 30], [10, 10, 25, 25]),
        "empty prediction": ([12, 14, 12, 14], [10, 10, 20, 20]),
        "flat prediction": ([12, 14, 18, 14], [10, 10, 20, 20]),
        "inverted prediction": ([18, 16, 12, 14], [10, 10, 20, 20]),
        "both empty": ([3, 3, 3, 3], [3, 3, 3, 3]),
    }.items(),
    ids=lambda item: item[0],
)
def test_special_pairs(pair, kind):
    boxes = [torch.tensor([box], dtype=torch.float32) for box in pair[1]]
    ours, exact = leaves(*boxes), leaves(*boxes, dtype=torch.float64)
    actual = run(ops.box_iou_loss(*ours, kind), *ours)
    expected = run(ops.box_iou_loss(*exact, kind), *exact)
    for name, a, b in zip(("loss", "pred", "target"), actual, expected, strict=True):
        assert a.isfinite().all(), name
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_box_iou_loss_propagates_nan_and_infinity(value, kind):
    pred, target = make_boxes((64,))
    rows = torch.arange(0, 64, 3)
    pred[rows, rows % 4] = value
    actual = ops.box_iou_loss(pred, target, kind)
    expected = ops.box_iou_loss(pred.double(), target.double(), kind)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("kind", ["iou", "giou", "diou"])
def test_gradcheck_of_float64(kind):
    boxes = leaves(*make_boxes((6,)), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, t: ops.box_iou_loss(p, t, kind), boxes)


# ---- focal loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "backend"), DEVICES_AND_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("form", ["labels", "targets"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LOGIT_SHAPES.values(), ids=LOGIT_SHAPES)
def test_sigmoid_focal_loss(shape, dtype, form, reduction, device, backend):
    logits = 3 * torch.randn(shape, device=device, dtype=dtype)
    targets = make_targets(shape, dtype, form).to(device)
    weight = torch.rand(shape[:-1], device=device) if form == "labels" else None
    check_focal_loss(logits, targets, weight, reduction, backend)


@pytest.mark.parametrize("form", ["labels", "targets"])
@pytest.mark.parametrize(
    ("alpha", "gamma"), [(-1, 2.0), (0.25, 0.0), (0.5, 1.0), (0.25, 0.5), (0.75, 1.5), (0.1, 5)]
)
def test_factors_and_exponents(alpha, gamma, form):
    shape = 40, 33
    logits, targets = 3 * torch.randn(shape), make_targets(shape, torch.float32, form)
    check_focal_loss(logits, targets, torch.rand(40), "none", "cpp", alpha, gamma)


def check_focal_loss(logits, targets, weight, reduction, backend, alpha=0.25, gamma=2.0):
    options = {"alpha": alpha, "gamma": gamma, "reduction": reduction}
    scale = loss_scale(logits.dtype, reduction, logits.numel())
    (ours,) = leaves(logits)
    (exact,) = leaves(logits, dtype=torch.float64)
    with use_backend(backend):
        loss = ops.sigmoid_focal_loss(ours, targets, weight=weight, **options)
        actual = run(loss, ours, scale=scale)
    if targets.is_floating_point():
        targets = targets.double()
    loss = ops.sigmoid_focal_loss(exact, targets, weight=weight, **options)
    expected = run(loss, exact, scale=scale)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == logits.dtype
    # A logit's loss takes about nine roundings.
    length = 9 if reduction == "none" else 9 * logits.numel()
    assert_exact("loss", actual[0], expected[0], length)
    assert_exact("gradient", actual[1], expected[1], length)


@pytest.mark.parametrize("alpha", [0.25, -1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sigmoid_focal_loss_is_torchvisions(reduction, alpha):
    logits, labels = 3 * torch.randn(100, 20), make_labels((100, 20))
    one_hot = (labels[:, None] == torch.arange(20)).double()
    ours, dense = leaves(logits, logits)
    (theirs,) = leaves(logits, dtype=torch.float64)
    expected = run(vision.sigmoid_focal_loss(theirs, one_hot, alpha, 2, reduction), theirs)
    options = {"alpha": alpha, "reduction": reduction}
    for actual in (
        run(ops.sigmoid_focal_loss(ours, labels, **options), ours),
        run(ops.sigmoid_focal_loss(dense, one_hot.float(), **options), dense),
    ):
        assert_exact("loss", actual[0], expected[0], 2000)
        assert_exact("gradient", actual[1], expected[1], 2000)


@pytest.mark.parametrize("form", ["labels", "targets"])
def test_sigmoid_focal_loss_is_as_exact_as_eager(form):
    logits, targets = 4 * torch.randn(500, 80), make_targets((500, 80), torch.float32, form)
    results = {}
    for name, dtype, backend in (
        ("exact", torch.float64, "reference"),
        ("eager", torch.float32, "reference"),
        ("ours", torch.float32, "cpp"),
    ):
        (x,) = leaves(logits, dtype=dtype)
        wanted = targets.to(dtype) if form == "targets" else targets
        with use_backend(backend):
            results[name] = run(ops.sigmoid_focal_loss(x, wanted), x)
    assert_no_worse(results)


@pytest.mark.parametrize("form", ["labels", "targets"])
@pytest.mark.parametrize("size", [12.0, 30.0, 80.0, 1000.0])
def test_sure_logits(size, form):
    """Neither the loss of a sure hit, nor that of a sure miss, is rounded away."""
    logits = torch.tensor([[size, -size], [size, -size]])
    labels = torch.tensor([0, 1])
    targets = labels if form == "labels" else torch.eye(2)
    (ours,), (exact,) = leaves(logits), leaves(logits, dtype=torch.float64)
    actual = run(ops.sigmoid_focal_loss(ours, targets, gamma=0.0), ours)
    expected = run(ops.sigmoid_focal_loss(exact, labels, gamma=0.0), exact)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=1e-37)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", ["labels", "targets"])
def test_sigmoid_focal_loss_propagates_nan_and_infinity(value, form):
    logits, targets = torch.randn(20, 17), make_targets((20, 17), torch.float32, form).round()
    logits.view(-1)[::3] = value
    actual = ops.sigmoid_focal_loss(logits, targets)
    wanted = targets if form == "labels" else targets.double()
    expected = ops.sigmoid_focal_loss(logits.double(), wanted)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())


def test_focal_gradcheck_of_float64():
    (logits,) = leaves(torch.randn(4, 3), dtype=torch.float64)
    labels, targets = torch.tensor([0, 2, -1, 7]), torch.rand(4, 3).double()
    weight = torch.rand(4).double()
    for wanted in (labels, targets):
        assert torch.autograd.gradcheck(
            lambda x, wanted=wanted: ops.sigmoid_focal_loss(x, wanted, weight=weight), logits
        )


# ---- assignment ---------------------------------------------------------------------------------


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_max_iou_is_the_formula_bit_for_bit(rounded, low_quality):
    grid = make_grid()
    anchors = grid.boxes()
    gt = [make_gt(count, rounded) for count in (0, 1, 17, 60)]
    own = torch.stack([anchors.roll(shift, 0) for shift in range(4)])
    masks = grid.inside(IMAGE), torch.rand(4, len(grid)) < 0.7
    for boxes, valid in ((anchors, None), (anchors[:37], None), (own, masks[0]), (grid, masks[1])):
        ours = ops.max_iou_assign(boxes, None, gt, low_quality=low_quality, valid=valid)
        with use_backend("reference"):
            wanted = ops.max_iou_assign(boxes, None, gt, low_quality=low_quality, valid=valid)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


# ---- both losses --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing(reduction):
    boxes = torch.zeros(0, 4, requires_grad=True)
    logits = torch.zeros(0, 80, requires_grad=True)
    for leaf, loss in (
        (boxes, ops.box_iou_loss(boxes, torch.zeros(0, 4), reduction=reduction)),
        (logits, ops.sigmoid_focal_loss(logits, torch.zeros(0).long(), reduction=reduction)),
    ):
        assert loss.sum() == 0
        assert loss.dim() == (0 if reduction != "none" else leaf.dim() - (leaf is boxes))
        loss.sum().backward()
        assert leaf.grad.shape == leaf.shape


def test_other_strides():
    pred, target = make_boxes((50, 4))
    expected = ops.box_iou_loss(pred[::3], target[::3], "giou")
    views = (t.transpose(0, 1).contiguous().transpose(0, 1)[::3] for t in (pred, target))
    assert torch.equal(ops.box_iou_loss(*views, "giou"), expected)
    assert torch.equal(
        ops.box_iou_loss(pred, target[0].expand_as(pred)),
        ops.box_iou_loss(pred, target[0].repeat(50, 1, 1)),
    )
    logits, labels = torch.randn(2, 6, 5, 7), torch.randint(-1, 6, (2, 5, 7))
    last = logits.permute(0, 2, 3, 1)
    for weight in (None, torch.rand(2, 7, 5).transpose(1, 2)):
        assert torch.equal(
            ops.sigmoid_focal_loss(last, labels, weight=weight),
            ops.sigmoid_focal_loss(last.contiguous(), labels, weight=weight),
        )


def test_sums_do_not_depend_on_threads():
    boxes, logits = make_boxes((30000,)), torch.randn(3000, 80)
    labels = make_labels((3000, 80))
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        pred, x = leaves(boxes[0], logits)
        losses = (
            ops.box_iou_loss(pred, boxes[1], "ciou", "sum"),
            ops.sigmoid_focal_loss(x, labels, reduction="mean"),
        )
        sum(losses).backward()
        results.append([*losses, pred.grad, x.grad])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_reference_backend_is_the_formula():
    pred, target = make_boxes((20,))
    logits, labels = torch.randn(20, 5), make_labels((20, 5))
    with use_backend("reference"):
        box, focal = ops.box_iou_loss(pred, target), ops.sigmoid_focal_loss(logits, labels)
    assert torch.equal(box, reference.box_iou_loss(pred, target, "iou", False, 1e-7))
    formula = reference.sigmoid_focal_loss(logits, labels, None, 0.75, 0.25, 2.0, False)
    assert torch.equal(focal, formula)
