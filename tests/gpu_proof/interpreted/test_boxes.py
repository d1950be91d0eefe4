"""The Triton kernels of losses and of the max-IoU assigner, run by the interpreter."""

import math

import pytest
import torch

from dlkernels import ops, use_backend
from dlkernels.backend import availability
from dlkernels.boxes.anchors import AnchorGrid
from tests.boxes.cases import KINDS, make_boxes, make_gt, make_targets
from tests.boxes.test_numbers import leaves, loss_scale, run
from tests.gpu_proof.traffic import count_traffic
from tests.numbers import DTYPES, assert_exact

# The mean is the sum over a number.
REDUCTIONS = ["none", "sum"]

# NumPy, which stands in for the GPU here, warns of what the kernels are to propagate.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_triton_serves():
    table = availability()
    assert table["box_iou_loss"]["triton"] == "available"
    assert table["sigmoid_focal_loss"]["triton"] == "available"
    assert table["max_iou_assign"]["triton"] == "available"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 113)])
def test_box_iou_loss(shape, dtype, kind, reduction):
    boxes = make_boxes(shape, dtype)
    scale = loss_scale(dtype, reduction, math.prod(shape))
    ours, exact = leaves(*boxes), leaves(*boxes, dtype=torch.float64)
    actual = run(ops.box_iou_loss(*ours, kind, reduction), *ours, scale=scale)
    expected = run(ops.box_iou_loss(*exact, kind, reduction), *exact, scale=scale)
    length = 4 if reduction == "none" else 4 * math.prod(shape)
    for name, a, b in zip(("loss", "pred", "target"), actual, expected, strict=True):
        assert_exact(name, a, b, length)


@pytest.mark.parametrize("kind", KINDS)
def test_special_pairs(kind):
    """Equal, apart, touching, inside, empty, flat and inverted boxes."""
    pred = [[10, 20, 30, 50], [0, 0, 5, 5], [0, 0, 10, 10], [12, 14, 15, 19], [3, 3, 3, 3]]
    pred += [[12, 14, 18, 14], [18, 16, 12, 14]]
    target = [[10, 20, 30, 50], *[[10, 10, 20, 20]] * 3, [3, 3, 3, 3], *[[10, 10, 20, 20]] * 2]
    boxes = torch.tensor(pred).float(), torch.tensor(target).float()
    ours, exact = leaves(*boxes), leaves(*boxes, dtype=torch.float64)
    actual = run(ops.box_iou_loss(*ours, kind), *ours)
    expected = run(ops.box_iou_loss(*exact, kind), *exact)
    for name, a, b in zip(("loss", "pred", "target"), actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["labels", "targets"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (70, 20), (3, 5, 3)])
def test_sigmoid_focal_loss(shape, dtype, form, weighted, reduction):
    check_focal_loss(shape, dtype, form, weighted, reduction)


@pytest.mark.parametrize("form", ["labels", "targets"])
def test_rows_of_several_programs(form):
    check_focal_loss((2, 530), torch.float32, form, True, "sum")


@pytest.mark.parametrize("form", ["labels", "targets"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_exponents(gamma, form):
    check_focal_loss((40, 7), torch.float32, form, False, "none", gamma)


def check_focal_loss(shape, dtype, form, weighted, reduction, gamma=2.0):
    logits = 3 * torch.randn(shape, dtype=dtype)
    targets = make_targets(shape, dtype, form)
    options = {
        "gamma": gamma,
        "reduction": reduction,
        "weight": torch.rand(shape[:-1]) if weighted else None,
    }
    scale = loss_scale(dtype, reduction, logits.numel())
    (ours,), (exact,) = leaves(logits), leaves(logits, dtype=torch.float64)
    actual = run(ops.sigmoid_focal_loss(ours, targets, **options), ours, scale=scale)
    if form == "targets":
        targets = targets.double()
    expected = run(ops.sigmoid_focal_loss(exact, targets, **options), exact, scale=scale)
    length = 9 if reduction == "none" else 9 * logits.numel()
    assert_exact("loss", actual[0], expected[0], length)
    assert_exact("gradient", actual[1], expected[1], length)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_propagate(value):
    logits, labels = torch.randn(20, 17), make_targets((20, 17), torch.float32, "labels")
    logits.view(-1)[::3] = value
    pred, target = make_boxes((64,))
    pred.view(-1)[::13] = value
    pairs = [
        (ops.sigmoid_focal_loss(logits, labels), ops.sigmoid_focal_loss(logits.double(), labels)),
        *(
            (ops.box_iou_loss(pred, target, kind), ops.box_iou_loss(*exact, kind))
            for exact in [(pred.double(), target.double())]
            for kind in KINDS
        ),
    ]
    for actual, expected in pairs:
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing(reduction):
    boxes = torch.zeros(0, 4, requires_grad=True)
    logits = torch.zeros(0, 80, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    for leaf, loss in (
        (boxes, ops.box_iou_loss(boxes, torch.zeros(0, 4), reduction=reduction)),
        (logits, ops.sigmoid_focal_loss(logits, labels, reduction=reduction)),
    ):
        loss.sum().backward()
        assert loss.sum() == 0
        assert leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_of_box_iou_loss(kind):
    """Both boxes are read once, and the gradient written once; a sum costs a float per program."""
    pred, target = make_boxes((2048,))
    pred.requires_grad_()
    with count_traffic() as forward:
        loss = ops.box_iou_loss(pred, target, kind, "sum")
    boxes = 4 * pred.numel()
    assert 2 * boxes <= forward.moved <= 1.01 * 2 * boxes
    with count_traffic() as backward:
        loss.backward()
    assert 3 * boxes <= backward.moved <= 1.01 * 3 * boxes
    for traffic in (forward, backward):
        assert traffic.sectors <= 1.1 * traffic.moved
        assert traffic.atomics == 0


@pytest.mark.parametrize("form", ["labels", "targets"])
def test_traffic_of_sigmoid_focal_loss(form):
    """Logits and targets are read once, and the gradient is written once."""
    logits, targets = torch.randn(128, 80), make_targets((128, 80), torch.float32, form)
    logits.requires_grad_()
    read = logits.nbytes + targets.nbytes
    with count_traffic() as forward:
        loss = ops.sigmoid_focal_loss(logits, targets, reduction="sum")
    assert read <= forward.moved <= 1.01 * read
    with count_traffic() as backward:
        loss.backward()
    moved = read + logits.nbytes
    assert moved <= backward.moved <= 1.02 * moved
    for traffic in (forward, backward):
        assert traffic.sectors <= 1.1 * traffic.moved
        assert traffic.atomics == 0


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
def test_max_iou_assign_is_the_formula_bit_for_bit(rounded, low_quality):
    grid = AnchorGrid.for_image((72, 96), (8, 16), (2, 4))
    anchors = grid.boxes()
    assert len(anchors) > 256
    gt = [0.4 * make_gt(count, rounded) for count in (0, 3, 12)]
    own = torch.stack([anchors.roll(shift, 0) for shift in range(3)])
    mask = torch.rand(3, len(anchors)) < 0.7
    for boxes, valid in ((anchors, None), (anchors[:7], None), (own, mask[0]), (own, mask)):
        ours = ops.max_iou_assign(boxes, None, gt, low_quality=low_quality, valid=valid)
        with use_backend("reference"):
            wanted = ops.max_iou_assign(boxes, None, gt, low_quality=low_quality, valid=valid)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_traffic_of_max_iou_assign():
    """Anchors are read once, results written once, and every program reads the boxes."""
    anchors = AnchorGrid.for_image((64, 128), (8,), (2, 4)).boxes()
    gt = make_gt(16)[None]
    programs = len(anchors) // 256
    with count_traffic() as traffic:
        ops.max_iou_assign(anchors, None, gt)
    floor = anchors.nbytes + 12 * len(anchors) + programs * (gt.nbytes + 8)
    assert traffic.moved == floor
    assert traffic.atomics == 0
