"""Sizes of anchors from the sizes of boxes, by k-means clustering under the IoU distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlkernels.checks import check_tensor, describe


@dataclass(frozen=True)
class SizeClusters:
    """Clusters of box sizes.

    Attributes:
        sizes: float32 [k, 2], mean width and height of each cluster, by ascending area.
        mean_iou: of every box with the cluster that fits it best, both around one centre.
    """

    sizes: Tensor
    mean_iou: float


def cluster_box_sizes(
    sizes: Tensor, k: int, generator: torch.Generator | None = None, max_steps: int = 300
) -> SizeClusters:
    """Clusters widths and heights of boxes, for the anchors of YOLO.

    The distance of a box to a cluster is 1 - IoU of the two around one centre, so that large boxes
    weigh no more than small ones: Redmon and Farhadi, "YOLO9000" (2017), section 2, "Dimension
    Clusters". Starts from k-means++ (Arthur and Vassilvitskii, 2007), and stops when no box changes
    its cluster. Same boxes and generator state, same clusters.

    Args:
        sizes: widths and heights [N, 2], positive; any floating-point dtype.
        k: how many clusters, at most N.
        generator: of the random choices of the start, on the device of ``sizes``; one seeded
            with 0 by default.
        max_steps: of the iteration at most.

    Returns:
        The clusters, sorted by area.

    Raises:
        TypeError: ``sizes`` is no floating-point tensor.
        ValueError: its shape is wrong, a size is not positive and finite, or ``k`` does not fit.
    """
    check_tensor("sizes", sizes)
    if sizes.dim() != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes must have shape [N, 2], but is {describe(sizes)}")
    if not 1 <= k <= len(sizes):
        raise ValueError(f"k must lie between 1 and the {len(sizes)} boxes of sizes, but is {k}")
    wrong = (~((sizes > 0) & sizes.isfinite()).all(1)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"sizes must be positive and finite, but row {row} is {sizes[row].tolist()}"
        )
    if generator is None:
        generator = torch.Generator(sizes.device).manual_seed(0)

    sizes = sizes.detach().double()
    clusters = _plus_plus(sizes, k, generator)
    nearest = torch.full((len(sizes),), -1, device=sizes.device)
    for _ in range(max_steps):
        iou = _shape_iou(sizes, clusters)
        previous, nearest = nearest, iou.argmax(1)
        if torch.equal(previous, nearest):
            break
        clusters = _means(sizes, nearest, iou)
    clusters = clusters[clusters.prod(1).argsort(stable=True)]
    mean_iou = _shape_iou(sizes, clusters).amax(1).mean().item()
    return SizeClusters(clusters.float(), mean_iou)


def _shape_iou(sizes: Tensor, clusters: Tensor) -> Tensor:
    """[N, k]."""
    overlap = torch.minimum(sizes[:, None], clusters).prod(-1)
    return overlap / (sizes.prod(1)[:, None] + clusters.prod(1) - overlap)


def _plus_plus(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Boxes to start from, each the likelier the farther it is from those before."""
    chosen = torch.ones(len(sizes), dtype=sizes.dtype, device=sizes.device)
    clusters = sizes[:0]
    for _ in range(k):
        index = _draw(chosen, generator)
        clusters = torch.cat([clusters, sizes[index : index + 1]])
        chosen = (1 - _shape_iou(sizes, clusters).amax(1)).clamp(min=0).square()
    return clusters


def _draw(likelihood: Tensor, generator: torch.Generator) -> int:
    """An index with probability proportional to the likelihood; the last one if all are 0."""
    cumulative = likelihood.cumsum(0)
    point = torch.rand((), generator=generator, dtype=cumulative.dtype, device=cumulative.device)
    index = torch.searchsorted(cumulative, point * cumulative[-1], right=True)
    return int(index.clamp(max=len(likelihood) - 1))


def _means(sizes: Tensor, nearest: Tensor, iou: Tensor) -> Tensor:
    """The mean size of each cluster; an empty one restarts at the box that fits worst."""
    worst = iou.amax(1).argmin()
    clusters = []
    for cluster in range(iou.shape[1]):
        members = sizes[nearest == cluster]
        clusters.append(members.mean(0) if len(members) else sizes[worst])
    return torch.stack(clusters)
