"""mmdetection's ATSSAssigner, recognised by its attributes and proven on random boxes.

mmdetection is not installed: the stand-ins below take its steps, with its arguments and results.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

import dlkernels
from dlkernels.atss.modules import ATSSAssigner as Fused

INF = 100000000


class AssignResult:
    def __init__(self, num_gts, gt_inds, max_overlaps, labels):
        self.num_gts, self.gt_inds = num_gts, gt_inds
        self.max_overlaps, self.labels = max_overlaps, labels


class Instances(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


class ATSSAssigner:
    def __init__(self, topk, alpha=None, iou_calculator=box_iou, ignore_iof_thr=-1):
        self.topk, self.alpha = topk, alpha
        self.iou_calculator, self.ignore_iof_thr = iou_calculator, ignore_iof_thr

    def assign(self, pred_instances, num_level_priors, gt_instances, gt_instances_ignore=None):
        return self._assign(
            pred_instances.priors, num_level_priors, gt_instances.bboxes, gt_instances.labels
        )

    def _assign(self, priors, levels, gt, labels):
        overlaps = self.iou_calculator(priors, gt)
        indices = torch.zeros(len(priors), dtype=torch.long)
        if len(gt) == 0:
            none = torch.full((len(priors),), -1)
            return AssignResult(0, indices, torch.zeros(len(priors)), none)
        centres, gt_centres = ((b[:, :2] + b[:, 2:]) / 2 for b in (priors, gt))
        distances = (centres[:, None] - gt_centres[None]).pow(2).sum(-1).sqrt()
        candidates, first = [], 0
        for level in levels:
            nearest = distances[first : first + level].topk(min(self.topk, level), 0, False)
            candidates.append(nearest.indices + first)
            first += level
        candidates = torch.cat(candidates)
        values = overlaps.gather(0, candidates)
        positive = values >= values.mean(0) + values.std(0)
        margins = torch.cat([centres[candidates] - gt[:, :2], gt[:, 2:] - centres[candidates]], -1)
        positive &= margins.min(-1).values > 0.01
        claims = torch.full_like(overlaps, -INF)
        box = torch.arange(len(gt)).expand_as(candidates)
        claims[candidates[positive], box[positive]] = values[positive]
        best, argmax = claims.max(1)
        indices[best != -INF] = argmax[best != -INF] + 1
        assigned = torch.where(indices > 0, labels[indices - 1], -1)
        return AssignResult(len(gt), indices, best, assigned)


class OldATSSAssigner(ATSSAssigner):
    def assign(self, bboxes, num_level_bboxes, gt_bboxes, gt_bboxes_ignore=None, gt_labels=None):
        return self._assign(bboxes, num_level_bboxes, gt_bboxes, gt_labels)


class LessStrict(ATSSAssigner):
    """Not ATSS: a box's candidates may lie outside it."""

    def _assign(self, priors, levels, gt, labels):
        result = super()._assign(priors, levels, gt, labels)
        result.gt_inds = result.gt_inds.clamp(max=2)
        return result


class Head(nn.Module):
    def __init__(self, assigner):
        super().__init__()
        self.assigner = assigner


def boxes(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 200
    return torch.cat([corner, corner + size * (0.5 + torch.rand(count, 2, generator=generator))], 1)


LEVELS = [600, 150, 40, 10]
PRIORS = torch.cat([boxes(n, 8 * 2**i, i) for i, n in enumerate(LEVELS)])


def call(kind, gt, labels):
    if kind is OldATSSAssigner:
        return (PRIORS, LEVELS, gt, None, labels)
    return (Instances(priors=PRIORS), LEVELS, Instances(bboxes=gt, labels=labels))


@pytest.mark.parametrize("kind", [ATSSAssigner, OldATSSAssigner])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_assigners_are_swapped(kind, count):
    original = kind(9)
    model = nn.ModuleDict({"head": Head(original)})
    report = dlkernels.accelerate(model)
    assert isinstance(model["head"].assigner, Fused)
    assert model["head"].assigner.topk == 9
    arguments = call(kind, boxes(count, 30, 9), torch.arange(count))
    expected, actual = original.assign(*arguments), model["head"].assigner.assign(*arguments)
    assert type(actual) is AssignResult
    assert actual.num_gts == count
    for name in ("gt_inds", "labels"):
        assert torch.equal(getattr(actual, name), getattr(expected, name))
    assert torch.allclose(actual.max_overlaps, expected.max_overlaps)
    assert count < 20 or actual.gt_inds.max() > 2
    report.restore()
    assert model["head"].assigner is original


def test_regions_to_ignore_go_to_the_original():
    original = ATSSAssigner(9)
    model = Head(original)
    dlkernels.accelerate(model)
    original.assign = lambda *_, **__: "asked"
    ignored = Instances(bboxes=boxes(1, 30, 3))
    arguments = call(ATSSAssigner, boxes(4, 30, 9), torch.arange(4))
    assert model.assigner.assign(*arguments, gt_instances_ignore=ignored) == "asked"
    assert model.assigner.assign(*arguments) != "asked"


@pytest.mark.parametrize(
    ("assigner", "word"),
    [
        (ATSSAssigner(9, alpha=0.8), "alpha"),
        (LessStrict(9), "other boxes"),
        (ATSSAssigner(9, iou_calculator=None), "cannot be run"),
        (SimpleNamespace(topk=9, iou_calculator=0, ignore_iof_thr=0, assign=lambda a: a), "argum"),
    ],
)
def test_others_are_left(assigner, word):
    model = Head(assigner)
    assert word in dlkernels.accelerate(model).left["assigner"]
    assert model.assigner is assigner
