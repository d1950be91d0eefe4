"""atss_assign against the published algorithm in plain PyTorch, with the memory that both take."""

from collections.abc import Callable

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
    # Each of its matrices would take 8.5 GB.
    "1 image, 10000 boxes": (1, 10_000, (3200, 3200), 3, False),
}
# Short calls are timed in a row; a single one, right after the published algorithm has emptied
# caches and returned memory to the system, is timed as well.
IN_A_ROW = 10


def published(anchors: Tensor, num_level_anchors: tuple[int, ...], boxes: Tensor) -> Tensor:
    """ATSS of one image, step by step as its authors publish it."""
    count, num_gt = len(anchors), len(boxes)
    overlaps = box_iou(anchors, boxes)
    x = (anchors[:, 2] + anchors[:, 0]) / 2.0
    y = (anchors[:, 3] + anchors[:, 1]) / 2.0
    box_points = torch.stack(
        ((boxes[:, 2] + boxes[:, 0]) / 2.0, (boxes[:, 3] + boxes[:, 1]) / 2.0), 1
    )
    points = torch.stack((x, y), 1)
    distances = (points[:, None, :] - box_points[None, :, :]).pow(2).sum(-1).sqrt()

    chosen, first = [], 0
    for level in num_level_anchors:
        nearest = distances[first : first + level].topk(min(9, level), dim=0, largest=False)
        chosen.append(nearest.indices + first)
        first += level
    candidates = torch.cat(chosen)
    values = overlaps[candidates, torch.arange(num_gt, device=boxes.device)]
    positive = values >= (values.mean(0) + values.std(0))[None, :]

    # One index into the anchors of all boxes, one box after another.
    for box in range(num_gt):
        candidates[:, box] += box * count
    candidates = candidates.view(-1)
    all_x = x.view(1, -1).expand(num_gt, count).contiguous().view(-1)[candidates].view(-1, num_gt)
    all_y = y.view(1, -1).expand(num_gt, count).contiguous().view(-1)[candidates].view(-1, num_gt)
    sides = (all_x - boxes[:, 0], all_y - boxes[:, 1], boxes[:, 2] - all_x, boxes[:, 3] - all_y)
    positive = positive & (torch.stack(sides, 1).min(1).values > 0.01)

    claims = torch.full_like(overlaps, -1e8).t().contiguous().view(-1)
    index = candidates[positive.view(-1)]
    claims[index] = overlaps.t().contiguous().view(-1)[index]
    best, assigned = claims.view(num_gt, -1).t().max(1)
    return torch.where(best > -1e8, assigned, -1)


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

    functions = {
        "grid": lambda: ops.atss_assign(grid, None, boxes),
        "any anchors": lambda: ops.atss_assign(anchors, levels, boxes),
    }
    calls = {name: _in_a_row(function) for name, function in functions.items()}
    if with_peer:
        functions["published"] = lambda: [published(anchors, levels, image) for image in boxes]
        calls = {
            "published": functions["published"],
            "grid, alone": functions["grid"],
            "any anchors, alone": functions["any anchors"],
            **calls,
        }
    medians = interleaved_medians(calls, rounds, warmup=1)
    for name in ("grid", "any anchors"):
        medians[name] /= IN_A_ROW

    row: dict[str, str | float] = {"benchmark": f"atss_assign, {case}, {len(grid)} anchors"}
    row |= {f"{name} ms": 1e3 * medians[name] for name in calls}
    if with_peer:
        row |= {
            f"published / {name}": medians["published"] / medians[name]
            for name in calls
            if name != "published"
        }
    if DEVICE == "cpu":
        row |= {
            f"{name} MiB": peak_cpu_memory(function) / MIB for name, function in functions.items()
        }
    peers.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(functions["grid"], rounds=3, iterations=1)


def _in_a_row(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        for _ in range(IN_A_ROW):
            function()

    return call
