"""What PyTorch needs of the ops: opcheck, compile, export, autocast; and the memory they take."""

import pytest
import torch

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.measure import peak_cpu_memory
from tests.atss.cases import random_boxes

GRID = AnchorGrid.for_image((160, 192), scales=[4, 8])
MIB = 2**20


def masks(images):
    valid = GRID.inside((160, 192), border=16)
    return random_boxes(images, 2, (160, 192)), valid


def targets(images=2):
    boxes = random_boxes(images, 5, (160, 192))
    ignored, valid = masks(images)
    return boxes, torch.tensor([5, 3]), ignored, valid, 18, 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    boxes, counts, ignored, valid, *options = targets()
    arguments = (boxes, counts, *((ignored, valid) if masked else (None, None)), *options)
    torch.library.opcheck(
        torch.ops.dlkernels.atss_assign.default,
        (GRID.boxes(), list(GRID.num_level_anchors), *arguments),
    )
    sizes = [cells for size in GRID.sizes for cells in size]
    torch.library.opcheck(
        torch.ops.dlkernels.atss_assign_grid.default,
        (torch.stack(GRID.base_anchors), sizes, list(GRID.strides), 0.5, *arguments),
    )


@pytest.mark.parametrize("on_grid", [False, True])
def test_compile_without_graph_breaks(on_grid):
    anchors = GRID if on_grid else GRID.boxes()
    levels = None if on_grid else GRID.num_level_anchors
    per_location = None if on_grid else 2

    def function(boxes, counts, ignored, valid):
        assigned, iou = ops.atss_assign(
            anchors, levels, boxes, counts, 9, per_location, ignored, valid=valid
        )
        return assigned + 1, iou * 2

    arguments = targets()[:4]
    expected = function(*arguments)
    actual = torch.compile(function, fullgraph=True)(*arguments)
    assert (expected[0] > 0).any()
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_export_uses_the_formula():
    class Module(torch.nn.Module):
        def forward(self, boxes, counts):
            return ops.atss_assign(GRID, None, boxes, counts)

    arguments = targets()[:2]
    program = torch.export.export(Module(), arguments)
    assert not any("dlkernels" in str(node.target) for node in program.graph.nodes)
    for actual, expected in zip(program.module()(*arguments), Module()(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_autocast_keeps_float32():
    boxes = targets()[0]
    expected = ops.atss_assign(GRID, None, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.atss_assign(GRID, None, boxes)
        on_boxes = ops.atss_assign(GRID.boxes(), GRID.num_level_anchors, boxes, None, 9, 2)
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(on_boxes[1], expected[1])


def test_results_have_no_gradient():
    boxes = targets()[0].requires_grad_()
    anchors = GRID.boxes().requires_grad_()
    _, iou = ops.atss_assign(anchors, GRID.num_level_anchors, boxes, None, 9, 2)
    assert not iou.requires_grad


@pytest.mark.parametrize("on_grid", [False, True])
def test_memory_of_many_boxes(on_grid):
    grid = AnchorGrid.for_image((3200, 3200))
    assert len(grid) > 200_000
    anchors = grid if on_grid else grid.boxes()
    levels = None if on_grid else grid.num_level_anchors
    boxes = random_boxes(1, 10_000, (3200, 3200))
    ignored, valid = random_boxes(1, 2, (3200, 3200)), grid.inside((3200, 3200))
    results = []
    peak = peak_cpu_memory(
        lambda: results.extend(
            ops.atss_assign(anchors, levels, boxes, gt_ignore=ignored, valid=valid)
        )
    )
    result_bytes = sum(result.nbytes for result in results)
    assert (results[0] >= 0).sum() > 10_000
    assert result_bytes <= peak <= result_bytes + 4 * MIB
