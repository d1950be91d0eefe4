"""Finds mmdetection's ATSS assigners among the attributes of modules, by proof."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlkernels.accelerate.match import Match
from dlkernels.atss.modules import ATSSAssigner

ATTRIBUTES = ("topk", "iou_calculator", "ignore_iof_thr", "assign")
NEW_ARGUMENTS = ["pred_instances", "num_level_priors", "gt_instances", "gt_instances_ignore"]
OLD_ARGUMENTS = ["bboxes", "num_level_bboxes", "gt_bboxes", "gt_bboxes_ignore", "gt_labels"]
RESULTS = ("num_gts", "gt_inds", "max_overlaps", "labels")
LEVELS = [400, 100, 25, 9, 4]
LARGEST_ERROR = 1e-5  # of IoUs; mmdetection's have an epsilon in the union


def matches(module: nn.Module) -> Iterator[Match]:
    """The module's attributes that are like mmdetection's ATSSAssigner."""
    for name, value in vars(module).items():
        if isinstance(value, ATSSAssigner) or not all(hasattr(value, a) for a in ATTRIBUTES):
            continue
        yield _match(name, value)


def _match(name: str, assigner: Any) -> Match:
    reason, result = _proven(assigner)
    return Match(
        (name,), reason, lambda: (ATSSAssigner(assigner, result),), "dlkernels.ops.atss_assign"
    )


def _proven(assigner: Any) -> tuple[str | None, type]:
    """Why the assigner is not proven equal, or None, and the type of its results."""
    if getattr(assigner, "alpha", None) is not None:
        return "it weighs overlaps by the predictions (alpha is given)", object
    arguments = list(inspect.signature(assigner.assign).parameters)
    is_new = arguments == NEW_ARGUMENTS
    if not is_new and arguments[:5] != OLD_ARGUMENTS:
        return f"its assign takes other arguments: {', '.join(arguments)}", object
    result: type = object
    try:
        for boxes in (0, 1, 6):
            call = _random_call(boxes, is_new)
            expected = assigner.assign(*call)
            result = type(expected)
            if not _equal(expected, ATSSAssigner(assigner, result).assign(*call)):
                return "it assigns other boxes to random anchors than ATSS", result
    except Exception as error:  # whatever the unknown object does
        return f"it cannot be run on random boxes ({type(error).__name__}: {error})", result
    return None, result


class _Instances:
    """What the assigner reads of mmdetection's InstanceData."""

    def __init__(self, **fields: Tensor):
        self.__dict__.update(fields)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__


def _random_call(boxes: int, is_new: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(boxes)

    def random_boxes(count: int, size: float) -> Tensor:
        centres = torch.rand(count, 2, generator=generator) * 100
        half = size * (0.5 + torch.rand(count, 2, generator=generator))
        return torch.cat([centres - half, centres + half], 1)

    anchors = torch.cat([random_boxes(n, 4.0 * 2**i) for i, n in enumerate(LEVELS)])
    gt, labels = random_boxes(boxes, 12.0), torch.arange(boxes)
    if is_new:
        gt_instances = _Instances(bboxes=gt, labels=labels)
        return [_Instances(priors=anchors), LEVELS, gt_instances]
    return [anchors, LEVELS, gt, None, labels]


def _equal(expected: Any, actual: Any) -> bool:
    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor):
            return a == b
        return (
            (a.shape, a.dtype) == (b.shape, b.dtype)
            and bool(((a - b).abs() <= LARGEST_ERROR).all())
        )  # fmt: skip

    return all(same(getattr(expected, name), getattr(actual, name)) for name in RESULTS)
