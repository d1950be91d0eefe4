"""Assignments against the published algorithm, bit for bit."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlkernels import ops, use_backend
from dlkernels.boxes.anchors import AnchorGrid
from tests.atss.cases import Case, cases, published, published_batch, random_boxes
from tests.numbers import DEVICES_AND_BACKENDS

SERVED = [pair for pair in DEVICES_AND_BACKENDS if pair[1] != "triton"]
many = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # of a busy machine
)
some = settings(many, max_examples=300)


@pytest.fixture
def one_thread():
    """Starting threads would take most of the time of tiny cases."""
    torch.set_num_threads(1)


def same(actual, expected):
    return all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def by_both_paths(case: Case, boxes, device="cpu", **options):
    """Results for the grid, which equal those for the tensor of its boxes."""
    grid = case.grid.to(device)
    on_grid = ops.atss_assign(grid, None, boxes, topk=case.topk, **options)
    on_boxes = ops.atss_assign(
        *(grid.boxes(), grid.num_level_anchors, boxes),
        topk=case.topk,
        anchors_per_location=grid.anchors_per_location,
        **options,
    )
    assert same(on_grid, [part.cpu() for part in on_boxes])
    return on_grid


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("device", "backend"), [*SERVED, ("cpu", "reference")])
def test_published_algorithm(device, backend):
    @(some if backend == "reference" else many)
    @given(cases())
    def check(case):
        anchors, levels = case.grid.boxes(), case.grid.num_level_anchors
        expected = published_batch(anchors, levels, case.boxes, case.k)
        with use_backend(backend):
            boxes = [image.to(device) for image in case.boxes]
            assert same(by_both_paths(case, boxes, device), expected)

    check()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("device", "backend"), [*SERVED, ("cpu", "reference")])
def test_anchors_outside_and_ignored_are_left_out(device, backend):
    @some
    @given(cases(), st.integers(0, 2**31))
    def check(case, seed):
        anchors, count = case.grid.boxes(), len(case.grid)
        generator = torch.Generator().manual_seed(seed)
        images = len(case.boxes)
        valid = torch.rand(images, count, generator=generator) < 0.7
        regions = [64 * torch.rand(2, 4, generator=generator) for _ in case.boxes]
        for region in regions:
            region[:, 2:] += region[:, :2]
        with use_backend(backend):
            actual = by_both_paths(
                case,
                [image.to(device) for image in case.boxes],
                device,
                valid=valid.to(device),
                gt_ignore=[region.to(device) for region in regions],
                ignore_iof_thr=0.3,
            )
        for image, boxes in enumerate(case.boxes):
            lower = torch.maximum(anchors[:, None, :2], regions[image][:, :2])
            upper = torch.minimum(anchors[:, None, 2:], regions[image][:, 2:])
            covered = (upper - lower).clamp(min=0).prod(-1)
            area = (anchors[:, 2:] - anchors[:, :2]).prod(-1)
            ignored = (covered / area[:, None] > 0.3).any(1) & valid[image]
            kept = valid[image] & ~ignored
            levels = tuple(part.sum().item() for part in kept.split(case.grid.num_level_anchors))
            assigned, iou = torch.full((count,), -1), torch.zeros(count)
            assigned[kept], iou[kept] = published(anchors[kept], levels, boxes, case.k)
            assigned[ignored] = -2
            assert same([part[image] for part in actual], [assigned, iou])

    check()


@pytest.mark.parametrize(("device", "backend"), SERVED)
def test_a_detector_of_usual_size(device, backend):
    grid = AnchorGrid.for_image((800, 1344))
    boxes = random_boxes(4, 40, (800, 1344))
    expected = published_batch(grid.boxes(), grid.num_level_anchors, boxes, 9)
    assert (expected[0] >= 0).sum() > 500
    with use_backend(backend):
        assert same(by_both_paths(Case(grid, [], 9), boxes.to(device), device), expected)


def test_statistics_in_float32_differ_only_at_the_threshold():
    grid = AnchorGrid.for_image((320, 320))
    boxes = random_boxes(40, 5, (320, 320))
    margins = []
    expected = published_batch(
        *(grid.boxes(), grid.num_level_anchors, boxes, 9),
        statistics=torch.float32,
        margins=margins,
    )
    clear = torch.tensor([margin.min() > 1e-6 for margin in margins])
    assert clear.sum() > 35
    actual = ops.atss_assign(grid, None, boxes)
    assert same([part[clear] for part in actual], [part[clear] for part in expected])


@pytest.mark.parametrize("scale", [1e-3, 1e5, 1e9, 1e19, 3e38])
def test_boxes_at_any_distance(scale):
    grid = AnchorGrid.from_scales([(13, 17), (7, 9)], [8, 16], scales=[4, 5], ratios=[0.5, 2])
    corners = torch.rand(2, 40, 2) * scale * 2 - scale
    boxes = torch.cat((corners, corners + torch.rand(2, 40, 2) * 100), -1)
    with use_backend("reference"):
        expected = ops.atss_assign(grid, None, boxes, check_boxes=False)
    assert same(by_both_paths(Case(grid, [], 9), boxes, check_boxes=False), expected)


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.3, -2.7])
def test_base_anchors_anywhere(offset):
    corners = 40 * torch.rand(3, 5, 2) - 20
    base_anchors = torch.cat((corners, corners + 30 * torch.rand(3, 5, 2)), -1)
    grid = AnchorGrid(((20, 31), (9, 1), (1, 4)), (7, 13, 30), tuple(base_anchors), offset)
    boxes = random_boxes(2, 30, (140, 217))
    expected = published_batch(grid.boxes(), grid.num_level_anchors, boxes, 9 * 5)
    assert (expected[0] >= 0).any()
    assert same(by_both_paths(Case(grid, [], 9), boxes), expected)


@pytest.mark.parametrize("topk", [1, 40, 100_000])
def test_any_number_of_candidates(topk):
    grid = AnchorGrid.for_image((160, 192), scales=[8, 10])
    boxes = random_boxes(2, 10, (160, 192))
    expected = published_batch(grid.boxes(), grid.num_level_anchors, boxes, 2 * topk)
    assert same(by_both_paths(Case(grid, [], topk), boxes), expected)


def test_anchors_of_each_image():
    grid = AnchorGrid.for_image((160, 192))
    boxes = random_boxes(3, 10, (160, 192))
    anchors = grid.boxes() + torch.randn(3, len(grid), 4)
    levels = grid.num_level_anchors
    expected = [published(*image, 9) for image in zip(anchors, [levels] * 3, boxes, strict=True)]
    actual = ops.atss_assign(anchors, levels, boxes)
    for image in range(3):
        assert same([part[image] for part in actual], expected[image])


def test_ties_go_to_the_lower_anchor_and_the_lower_box():
    # Four anchors as far from the box as each other, of which two are candidates.
    grid = AnchorGrid.from_scales([(2, 2)], [8], scales=[1])
    box = [2.0, 2.0, 14.0, 14.0]
    assigned, iou = ops.atss_assign(grid, None, torch.tensor([[box, box]]), topk=2)
    assert assigned.tolist() == [[0, 0, -1, -1]]
    assert iou[0, 0] == iou[0, 1] > 0
    assert iou[0, 2:].tolist() == [0, 0]


def test_a_single_candidate_is_its_own_threshold():
    grid = AnchorGrid.from_scales([(1, 1)], [8], scales=[1])
    assigned, iou = ops.atss_assign(grid, None, torch.tensor([[[0.0, 0.0, 8.0, 16.0]]]))
    assert assigned.item() == 0
    assert iou.item() == 0.5


@pytest.mark.parametrize(
    "boxes", [torch.zeros(2, 0, 4), torch.zeros(0, 3, 4), [torch.zeros(0, 4)] * 2]
)
def test_no_boxes(boxes):
    grid = AnchorGrid.from_scales([(3, 4), (0, 2)], [8, 16])
    assigned, iou = by_both_paths(Case(grid, [], 9), boxes)
    assert assigned.shape == iou.shape == (len(boxes), 12)
    assert (assigned == -1).all()
    assert (iou == 0).all()


def test_no_anchors():
    grid = AnchorGrid.from_scales([(0, 4)], [8])
    assigned, iou = by_both_paths(Case(grid, [], 9), random_boxes(2, 3, (32, 32)))
    assert assigned.shape == iou.shape == (2, 0)


def test_padding_changes_nothing():
    grid = AnchorGrid.for_image((160, 192))
    images = [random_boxes(1, count, (160, 192))[0] for count in (3, 0, 7)]
    padded = torch.full((3, 9, 4), torch.nan)
    for image, boxes in enumerate(images):
        padded[image, : len(boxes)] = boxes
    ragged = ops.atss_assign(grid, None, images)
    assert same(ops.atss_assign(grid, None, padded, torch.tensor([3, 0, 7])), ragged)
    assert (ragged[0][1] == -1).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_improper_boxes_get_no_anchors_where_unchecked(backend):
    grid = AnchorGrid.for_image((160, 192))
    boxes = random_boxes(1, 6, (160, 192))
    boxes[0, 1, 2] = torch.nan
    boxes[0, 3] = boxes[0, 3, [2, 3, 0, 1]]
    boxes[0, 4, 0] = -torch.inf
    proper = [0, 2, 5]
    with use_backend(backend):
        assigned, iou = by_both_paths(Case(grid, [], 9), boxes, check_boxes=False)
        expected, expected_iou = ops.atss_assign(grid, None, boxes[:, proper])
    original = torch.tensor([*proper, -1])
    assert torch.equal(assigned, original[expected])
    assert torch.equal(iou, expected_iou)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_anchors_that_are_no_numbers_are_never_assigned(value):
    grid = AnchorGrid.from_scales([(6, 7), (3, 4)], [8, 16], scales=[1, 2])
    for boxes in grid.base_anchors:
        boxes[0, 0] = value
    targets = random_boxes(1, 10, (48, 56))
    on_boxes = ops.atss_assign(grid.boxes(), grid.num_level_anchors, targets, None, 9, 2)
    for assigned, _ in (ops.atss_assign(grid, None, targets), on_boxes):
        assert (assigned[0, ::2] == -1).all()
        assert assigned.max() < 10


def test_same_bits_on_any_number_of_threads():
    grid = AnchorGrid.for_image((480, 640))
    boxes = random_boxes(3, 70, (480, 640))
    expected = by_both_paths(Case(grid, [], 9), boxes)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert same(by_both_paths(Case(grid, [], 9), boxes), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_those_numbers_in_float32(dtype):
    grid = AnchorGrid.for_image((160, 192))
    boxes = random_boxes(2, 10, (160, 192)).to(dtype)
    anchors = (grid.boxes() + torch.randn(len(grid), 4)).to(dtype)
    actual = ops.atss_assign(anchors, grid.num_level_anchors, boxes)
    assert actual[1].dtype == torch.float32
    expected = ops.atss_assign(anchors.float(), grid.num_level_anchors, boxes.float())
    assert same(actual, expected)


def test_other_strides():
    grid = AnchorGrid.for_image((160, 192))
    boxes = random_boxes(2, 10, (160, 192))
    strided = boxes.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    anchors = grid.boxes().t().contiguous().t()
    assert not strided.is_contiguous()
    assert not anchors.is_contiguous()
    expected = ops.atss_assign(grid, None, boxes)
    assert same(ops.atss_assign(anchors, grid.num_level_anchors, strided), expected)
    repeated = boxes[:1].expand(3, -1, -1)
    assert same(
        ops.atss_assign(grid, None, repeated), [part[:1].expand(3, -1) for part in expected]
    )
