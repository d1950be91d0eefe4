"""The published algorithm in plain PyTorch, and random cases for it."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from dlkernels.boxes.anchors import AnchorGrid


def published(
    anchors: Tensor,
    num_level_anchors: tuple[int, ...],
    boxes: Tensor,
    k: int,
    statistics: torch.dtype = torch.float64,
    margins: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """ATSS of one image, step by step as its authors publish it, with stable ties.

    ``margins`` gets by how much the candidates' IoUs miss the threshold.
    """
    assigned, best = torch.full((len(anchors),), -1), torch.zeros(len(anchors))
    if len(boxes) == 0 or len(anchors) == 0:
        return assigned, best
    overlaps = box_iou(anchors, boxes)
    anchor_points = torch.stack(
        ((anchors[:, 2] + anchors[:, 0]) / 2.0, (anchors[:, 3] + anchors[:, 1]) / 2.0), 1
    )
    box_points = torch.stack(
        ((boxes[:, 2] + boxes[:, 0]) / 2.0, (boxes[:, 3] + boxes[:, 1]) / 2.0), 1
    )
    squares = (anchor_points[:, None, :] - box_points[None, :, :]).pow(2).sum(-1)
    # Correctly rounded: PyTorch's own root of float32 can be off by its last bit, which makes and
    # breaks ties.
    distances = squares.double().sqrt().float()

    candidate_list, first = [], 0
    for count in num_level_anchors:
        order = distances[first : first + count].sort(dim=0, stable=True).indices
        candidate_list.append(order[: min(k, count)] + first)
        first += count
    candidates = torch.cat(candidate_list)

    overlaps_of_candidates = overlaps.gather(0, candidates)
    values = overlaps_of_candidates.to(statistics)
    deviation = values.std(0) if len(values) > 1 else torch.zeros(len(boxes))
    threshold = values.mean(0) + deviation
    if margins is not None:
        margins.append((values - threshold).abs())
    points = anchor_points[candidates]
    sides = torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), -1)
    positive = (values >= threshold) & (sides.amin(-1) > 0.01)

    claims = torch.full_like(overlaps, -1.0)
    claims.scatter_(0, candidates, torch.where(positive, overlaps_of_candidates, -1.0))
    for box in range(len(boxes)):  # in order, so that ties go to the lower index
        better = (claims[:, box] >= 0) & ((claims[:, box] > best) | (assigned < 0))
        assigned[better] = box
        best = torch.where(better, claims[:, box], best)
    return assigned, best


def published_batch(anchors, num_level_anchors, boxes, k, **options):
    """The same for a list of images."""
    results = [published(anchors, num_level_anchors, image, k, **options) for image in boxes]
    return tuple(torch.stack(part) for part in zip(*results, strict=True))


@dataclass
class Case:
    """Anchors on a grid, and the boxes of a few images."""

    grid: AnchorGrid
    boxes: list[Tensor]
    topk: int

    @property
    def k(self) -> int:
        return self.topk * self.grid.anchors_per_location


EXTENT = 64

# Corners that meet anchors exactly, and any others.
coordinates = st.one_of(
    st.integers(-EXTENT // 2, 3 * EXTENT // 2).map(float),
    st.floats(-EXTENT, 2 * EXTENT, width=32, allow_subnormal=False),
)
sides = st.one_of(
    st.sampled_from([0.0, 1.0, 4.0, 8.0, 16.0, 32.0]),
    st.floats(0, 2 * EXTENT, width=32, allow_subnormal=False),
)
boxes = st.tuples(coordinates, coordinates, sides, sides).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@st.composite
def images(draw):
    """Boxes of an image, some of them twice."""
    distinct = draw(st.lists(boxes, max_size=6))
    again = draw(st.lists(st.sampled_from(distinct), max_size=2)) if distinct else []
    return torch.tensor(distinct + again).view(-1, 4)


@st.composite
def cases(draw):
    levels = draw(st.integers(1, 3))
    strides = [4 * 2**level for level in range(levels)]
    sizes = [(draw(st.integers(1, 16)), draw(st.integers(1, 16))) for _ in strides]
    grid = AnchorGrid.from_scales(
        sizes,
        strides,
        scales=draw(st.sampled_from([(8,), (1,), (2, 3.3)])),
        ratios=draw(st.sampled_from([(1.0,), (0.5, 1.0, 2.0)])),
        offset=draw(st.sampled_from([0.5, 0.0])),
    )
    return Case(grid, draw(st.lists(images(), min_size=1, max_size=3)), draw(st.integers(1, 9)))


def random_boxes(images: int, boxes: int, image_size: tuple[int, int]) -> Tensor:
    """Boxes of 8 to 500 pixels a side, [images, boxes, 4]."""
    height, width = image_size
    centres = torch.rand(images, boxes, 2) * torch.tensor([width, height])
    sizes = 8 * torch.exp(torch.rand(images, boxes, 2) * 4.1)
    return torch.cat((centres - sizes / 2, centres + sizes / 2), -1)
