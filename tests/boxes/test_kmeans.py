"""Known clusters of box sizes are found, and the mean IoU is what it says."""

import pytest
import torch

from dlkernels.boxes.kmeans import cluster_box_sizes

CENTERS = torch.tensor([[10.0, 13.0], [33.0, 23.0], [30.0, 120.0], [150.0, 90.0], [300.0, 320.0]])


def synthetic(per_cluster=400, spread=0.05):
    noise = (spread * torch.randn(len(CENTERS), per_cluster, 2)).exp()
    return (CENTERS[:, None] * noise).flatten(0, 1)[torch.randperm(len(CENTERS) * per_cluster)]


def test_known_clusters_are_found():
    clusters = cluster_box_sizes(synthetic(), len(CENTERS))
    torch.testing.assert_close(clusters.sizes, CENTERS, rtol=0.02, atol=0)
    assert clusters.mean_iou > 0.9


def test_mean_iou_is_that_of_the_best_cluster():
    sizes = synthetic(20, 0.5)
    clusters = cluster_box_sizes(sizes, 3)
    total = 0.0
    for w, h in sizes.tolist():
        ious = []
        for cw, ch in clusters.sizes.tolist():
            overlap = min(w, cw) * min(h, ch)
            ious.append(overlap / (w * h + cw * ch - overlap))
        total += max(ious)
    assert abs(clusters.mean_iou - total / len(sizes)) < 1e-6


def test_more_clusters_fit_better_and_come_by_area():
    sizes = synthetic(200, 0.6)
    found = [cluster_box_sizes(sizes, k) for k in (1, 3, 9)]
    assert found[0].mean_iou < found[1].mean_iou < found[2].mean_iou
    for clusters in found:
        areas = clusters.sizes.prod(1)
        assert (areas.diff() >= 0).all()


def test_same_clusters_every_time():
    sizes = synthetic(100, 0.4)
    first = cluster_box_sizes(sizes, 6)
    torch.manual_seed(99)
    assert torch.equal(cluster_box_sizes(sizes, 6).sizes, first.sizes)
    seeded = [
        cluster_box_sizes(sizes, 6, torch.Generator().manual_seed(seed)).sizes for seed in (5, 5)
    ]
    assert torch.equal(*seeded)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_few_and_equal_boxes(k):
    clusters = cluster_box_sizes(torch.tensor([[4.0, 8.0]] * 3), k)
    assert torch.equal(clusters.sizes, torch.tensor([[4.0, 8.0]] * k))
    assert clusters.mean_iou == 1


@pytest.mark.parametrize(
    ("sizes", "k", "error", "message"),
    [
        ([[1, 2]], 1, TypeError, "sizes must be a tensor, but is list"),
        (torch.ones(3, 4), 1, ValueError, r"sizes must have shape \[N, 2\].*\[3, 4\]"),
        (torch.ones(3, 2), 4, ValueError, "k must lie between 1 and the 3 boxes.*is 4"),
        (torch.tensor([[1.0, 2], [0, 1]]), 1, ValueError, r"row 1 is \[0\.0, 1\.0\]"),
        (torch.tensor([[1.0, float("nan")]]), 1, ValueError, "row 0 is"),
    ],
)
def test_bad_input(sizes, k, error, message):
    with pytest.raises(error, match=message):
        cluster_box_sizes(sizes, k)
