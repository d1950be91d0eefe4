"""The CUDA kernels of ATSS assignment, run on the CPU block by block, against the formula."""

import struct

import numpy as np
import pytest
import torch

from dlkernels.atss import reference
from dlkernels.boxes.anchors import AnchorGrid
from tests.atss.cases import random_boxes
from tests.gpu_proof.cuda_on_cpu.emulator import (
    COUNTED,
    compile_program,
    run_program,
    traffic_of,
)

MAX_LEVELS = 16
GRIDS = {
    "one anchor": AnchorGrid.from_scales([(1, 1)], [8]),
    "small": AnchorGrid.from_scales([(5, 7), (3, 4), (1, 2)], [8, 16, 32]),
    "several at a location": AnchorGrid.from_scales(
        [(9, 6), (4, 3)], [8, 16], scales=[4], ratios=[0.5, 1, 2]
    ),
    "an empty level": AnchorGrid.from_scales([(4, 4), (0, 3), (12, 1)], [8, 4, 16], offset=0.0),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compile_program("atss", tmp_path_factory.mktemp("atss"))


def as_bytes(tensor):
    if tensor is None:
        return b""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return compile_program("atss", tmp_path_factory.mktemp("counted"), COUNTED)


def launch_on_cpu(program, grid, anchors, boxes, counts, gt_ignore, valid, k, ignore_iof_thr):
    """The finished process: for the grid where anchors is None."""
    levels = [
        (*size, stride) if anchors is None else (1, count, 0)
        for size, stride, count in zip(
            grid.sizes, grid.strides, grid.num_level_anchors, strict=True
        )
    ]
    padding = [(0, 0, 0)] * (MAX_LEVELS - len(levels))
    header = struct.pack(
        f"10q2d{3 * MAX_LEVELS}q",
        anchors is None,
        *boxes.shape[:2],
        k,
        len(levels),
        grid.anchors_per_location if anchors is None else 1,
        len(grid),
        anchors is not None and anchors.dim() == 3,
        valid is not None,
        0 if gt_ignore is None else gt_ignore.shape[1],
        grid.offset,
        ignore_iof_thr,
        *(number for level in levels + padding for number in level),
    )
    coordinates = torch.stack(grid.base_anchors) if anchors is None else anchors
    tensors = (coordinates, boxes, counts, valid, gt_ignore)
    result = run_program(program, given=header + b"".join(map(as_bytes, tensors)))
    assert result.returncode == 0, result.stderr.decode()
    return result


def run_on_cpu(program, grid, anchors, boxes, *targets):
    """Results as the CUDA kernels compute them."""
    result = launch_on_cpu(program, grid, anchors, boxes, *targets)
    shape = len(boxes), len(grid)
    size = 8 * shape[0] * shape[1]
    assert len(result.stdout) == size + size // 2
    assigned = np.frombuffer(result.stdout[:size], np.int64).reshape(shape)
    iou = np.frombuffer(result.stdout[size:], np.float32).reshape(shape)
    return torch.from_numpy(assigned.copy()), torch.from_numpy(iou.copy())


@pytest.mark.parametrize(("topk", "masked"), [(9, False), (9, True), (1, True)])
@pytest.mark.parametrize("path", ["grid", "shared anchors", "own anchors"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_same_bits_as_the_formula(program, grid, path, topk, masked):
    boxes = random_boxes(2, 4, (60, 60)).round()
    boxes[0, 1] = boxes[0, 0]
    boxes[0, 2, 2:] = boxes[0, 2, :2]
    boxes[0, 3] = boxes[0, 3, [2, 3, 0, 1]]
    boxes[1, 1] = torch.nan
    counts = torch.tensor([4, 3])
    anchors = grid.boxes()
    if path == "own anchors":
        anchors = anchors + torch.randn(2, len(grid), 4)
    corners = 60 * torch.rand(2, 2, 2)
    gt_ignore = torch.cat((corners, corners + 20), -1) if masked else None
    valid = torch.rand(2, len(grid)) < 0.7 if masked else None
    targets = (boxes, counts, gt_ignore, valid, topk * grid.anchors_per_location, 0.05)
    expected = reference.atss_assign(anchors, grid.num_level_anchors, *targets)
    actual = run_on_cpu(program, grid, None if path == "grid" else anchors, *targets)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_no_boxes(program, shape):
    boxes, counts = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    grid = GRIDS["small"]
    assigned, iou = run_on_cpu(program, grid, None, boxes, counts, None, None, 9, 0.5)
    assert (assigned == -1).all()
    assert (iou == 0).all()


@pytest.mark.parametrize("path", ["grid", "any anchors"])
def test_traffic(counted, path):
    """At most 1.1 times what must move: no IoU of anchors and boxes but the candidates'."""
    grid = AnchorGrid.from_scales([(40, 48), (20, 24), (10, 12)], [8, 16, 32])
    images, boxes_each, k = 2, 5, 9
    boxes = random_boxes(images, boxes_each, (320, 384))
    counts = torch.full((images,), boxes_each)
    anchors = None if path == "grid" else grid.boxes()
    result = launch_on_cpu(counted, grid, anchors, boxes, counts, None, None, k, 0.5)
    candidate = 16
    slots = k * len(grid.sizes)
    floor = images * boxes_each * 2 * slots * candidate  # written, and read for the threshold
    floor += images * len(grid) * (8 + 8 + 4)  # claims, assigned boxes, IoUs
    if anchors is not None:
        floor += images * boxes_each * anchors.nbytes
    moved = sum(loaded + stored for loaded, stored in traffic_of(result))
    assert floor <= moved <= 1.1 * floor, moved / floor
