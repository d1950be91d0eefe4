"""atss_assign against the published algorithm in plain PyTorch, with the memory that both take."""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks import peers
from benchmarks.peers import DEVICE
from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.measure import interleaved_medians, peak_cpu_memory

MIB = 2**20

# (images, boxes in each, image size, rounds, whether the published algorithm is run, too)
CASES = {
    "8 images, 100 boxes": (8, 100, (800, 1344), 5, True),
    "8 images, 1000 boxes": (8, 1000, (800, 1344), 1, True),
    # Its matrices would take 8.5 GB each.
    "1 image, 10000 boxes": (1, 10_000, (3200, 3200), 3, False),
}


def published(anchors: Tensor, num_level_anchors: tuple[int, ...], boxes: Tensor) -> Tensor:
    """ATSS of one image as its authors publish it."""
    overlaps = box_iou(anchors, boxes)
    points = (anchors[:, :2] + anchors[:, 2:]) / 2
    box_points = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (points[:, None, :] - box_points[None, :, :]).pow(2).sum(-1).sqrt()

    chosen, first = [], 0
    for count in num_level_anchors:
        level = distances[first : first + count]
        chosen.append(level.topk(min(9, count), dim=0, largest=False).indices + first)
        first += count
    candidates = torch.cat(chosen)
    values = overlaps.gather(0, candidates)
    positive = values >= values.mean(0) + values.std(0)
    sides = torch.cat((points[candidates] - boxes[:, :2], boxes[:, 2:] - points[candidates]), -1)
    positive &= sides.amin(-1) > 0.01

    claims = torch.full_like(overlaps, -1.0)
    claims.scatter_(0, candidates, torch.where(positive, values, -1.0))
    best, assigned = claims.max(1)
    return torch.where(best >= 0, assigned, -1)


def random_boxes(images: int, boxes: int, image_size: tuple[int, int]) -> Tensor:
    """Boxes of 8 to 500 pixels a side, [images, boxes, 4]."""
    height, width = image_size
    centres = torch.rand(images, boxes, 2) * torch.tensor([width, height])
    sizes = 8 * torch.exp(torch.rand(images, boxes, 2) * 4.1)
    return torch.cat((centres - sizes / 2, centres + sizes / 2), -1).to(DEVICE)


@pytest.mark.parametrize("case", CASES)
def test_atss_assign(benchmark, case):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    images, count, image_size, rounds, with_peer = CASES[case]
    grid = AnchorGrid.for_image(image_size).to(DEVICE)
    anchors, levels = grid.boxes(), grid.num_level_anchors
    boxes = random_boxes(images, count, image_size)

    calls = {
        "grid": lambda: ops.atss_assign(grid, None, boxes),
        "any anchors": lambda: ops.atss_assign(anchors, levels, boxes),
    }
    if with_peer:
        calls["published"] = lambda: [published(anchors, levels, image) for image in boxes]
    medians = interleaved_medians(calls, rounds, warmup=1)

    row: dict[str, str | float] = {"benchmark": f"atss_assign, {case}, {len(grid)} anchors"}
    for name, call in calls.items():
        row[f"{name} ms"] = 1e3 * medians[name]
        if DEVICE == "cpu":
            row[f"{name} MiB"] = peak_cpu_memory(call) / MIB
    if with_peer:
        for name in ("grid", "any anchors"):
            row[f"published / {name}"] = medians["published"] / medians[name]
    peers.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(calls["grid"], rounds=3, iterations=1)
