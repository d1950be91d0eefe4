"""The arguments that assigners share: anchors, and the boxes of a batch of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.boxes.reference import is_proper
from dlkernels.checks import (
    check_dense,
    check_device,
    check_integer,
    check_sequence,
    check_shape,
    check_tensor,
    describe,
)


@dataclass(frozen=True)
class BoxBatch:
    """The boxes of a batch of images.

    Attributes:
        boxes: float32 [B, G, 4], x1 y1 x2 y2, with padding behind each image's own.
        counts: int64 [B], the number of boxes in each image.
    """

    boxes: Tensor
    counts: Tensor

    @classmethod
    def of(cls, boxes: Tensor | Sequence[Tensor], num_gt: Tensor | None) -> BoxBatch:
        """Boxes [B, G, 4] of which the first ``num_gt`` count, or a list of B tensors [G_i, 4].

        Raises:
            TypeError: an argument is no tensor or of a wrong dtype.
            ValueError: shapes or devices do not fit, ``num_gt`` is out of range, or a box is NaN,
                infinite or inverted; the message names the image and the box.
        """
        padded = padded_boxes("gt_boxes", boxes)
        if padded.is_meta:
            raise ValueError("gt_boxes must hold values, but is on the device meta")
        counts = counts_of(boxes, num_gt, padded)
        check_counts(counts, padded.shape[1])
        check_proper(padded, counts)
        return cls(padded, counts)

    def __len__(self) -> int:
        return len(self.boxes)

    def images(self) -> list[Tensor]:
        """The boxes of each image, [G_i, 4]."""
        return [
            boxes[:count] for boxes, count in zip(self.boxes, self.counts.tolist(), strict=True)
        ]


def anchor_boxes(
    anchors: Tensor | AnchorGrid, num_level_anchors: Sequence[int] | None, batch: BoxBatch
) -> tuple[Tensor, tuple[int, ...] | None]:
    """The boxes of the anchors, float32 [A, 4] or [B, A, 4], and how many each level has.

    Raises:
        TypeError: ``anchors`` is neither tensor nor grid, or of a wrong dtype.
        ValueError: shapes or devices do not fit, or levels do not add up to the anchors.
    """
    if num_level_anchors is not None:
        check_levels(num_level_anchors)
    if isinstance(anchors, AnchorGrid):
        check_grid(anchors, batch.boxes)
        if num_level_anchors is not None and tuple(num_level_anchors) != anchors.num_level_anchors:
            raise ValueError(
                "num_level_anchors must be None or that of the grid, "
                f"{anchors.num_level_anchors}, but is {tuple(num_level_anchors)}"
            )
        return anchors.boxes(batch.boxes.device), anchors.num_level_anchors
    check_tensor("anchors", anchors)
    fits = anchors.dim() in (2, 3) and anchors.shape[-1] == 4
    if not fits or (anchors.dim() == 3 and len(anchors) != len(batch)):
        raise ValueError(
            f"anchors must have shape [A, 4] or [{len(batch)}, A, 4], but is {describe(anchors)}"
        )
    check_device("anchors", anchors, "gt_boxes", batch.boxes)
    if num_level_anchors is None:
        return prepared(anchors), None
    if sum(num_level_anchors) != anchors.shape[-2]:
        raise ValueError(
            f"num_level_anchors must add up to the {anchors.shape[-2]} anchors, but is "
            f"{tuple(num_level_anchors)}"
        )
    return prepared(anchors), tuple(num_level_anchors)


def check_grid(grid: AnchorGrid, boxes: Tensor) -> None:
    """``grid`` can be copied to the device of ``boxes``, which is no error but for "meta"."""
    if grid.base_anchors[0].is_meta and not boxes.is_meta:
        raise ValueError(
            f"anchors must hold values, for gt_boxes on {boxes.device}, but is on the device meta"
        )


def check_levels(num_level_anchors: Any) -> None:
    """``num_level_anchors`` are numbers of anchors.

    Raises:
        TypeError: it is no list or tuple of integers.
        ValueError: one is negative.
    """
    check_sequence("num_level_anchors", num_level_anchors, "integers")
    for level, count in enumerate(num_level_anchors):
        check_integer(f"num_level_anchors[{level}]", count)
        if count < 0:
            raise ValueError(f"num_level_anchors must not be negative, but is {num_level_anchors}")


def check_valid(valid: Any, boxes: Tensor, anchors: int) -> None:
    """``valid`` is a mask of the anchors, for all images of ``boxes`` [B, G, 4] or for each.

    Raises:
        TypeError: it is no bool tensor.
        ValueError: its shape or device does not fit.
    """
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        found = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool tensor, but is {found}")
    check_dense("valid", valid)
    if list(valid.shape) not in ([anchors], [len(boxes), anchors]):
        raise ValueError(
            f"valid must have shape [{anchors}] or [{len(boxes)}, {anchors}], "
            f"but is {describe(valid)}"
        )
    check_device("valid", valid, "gt_boxes", boxes)


def check_counts(counts: Tensor, most: int) -> None:
    """``counts`` are numbers of boxes, of which an image has at most ``most``."""
    out_of_range = (counts < 0) | (counts > most)
    if out_of_range.any():
        image = int(out_of_range.nonzero()[0])
        raise ValueError(
            f"num_gt must lie between 0 and the {most} boxes of gt_boxes, but is "
            f"{int(counts[image])} for image {image}"
        )


def check_proper(boxes: Tensor, counts: Tensor) -> None:
    """The first ``counts`` boxes of each image are finite and not inverted.

    Raises:
        ValueError: one is not; the message names the image and the box.
    """
    if boxes.numel() == 0:
        return
    least, largest = (boxes[..., 2:] - boxes[..., :2]).aminmax()
    if least.item() >= 0 and largest.item() < math.inf:  # the padding, too: nothing more to do
        return
    is_box = torch.arange(boxes.shape[1], device=boxes.device) < counts[:, None]
    improper = is_box & ~is_proper(boxes)
    if improper.any():
        image, box = improper.nonzero()[0].tolist()
        raise ValueError(
            "gt_boxes must be finite with x1 <= x2 and y1 <= y2, but box "
            f"{box} of image {image} is {boxes[image, box].tolist()}"
        )


def prepared(boxes: Tensor) -> Tensor:
    """As kernels read boxes: contiguous float32 without a gradient."""
    return boxes.detach().float().contiguous()


def padded_boxes(name: str, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """The boxes of each image in one tensor, float32 [B, G, 4], those of a list padded with zeros.

    Raises:
        TypeError: ``boxes`` is neither tensor nor list of tensors, or of a wrong dtype.
        ValueError: shapes or devices do not fit, or the list is empty.
    """
    if isinstance(boxes, Tensor):
        check_tensor(name, boxes)
        if boxes.dim() != 3 or boxes.shape[2] != 4:
            raise ValueError(f"{name} must have shape [B, boxes, 4], but is {describe(boxes)}")
        return prepared(boxes)
    if not isinstance(boxes, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list, but is {type(boxes).__name__}")
    if not boxes:
        raise ValueError(f"{name} must have at least one image, but is an empty list")
    for image, tensor in enumerate(boxes):
        check_tensor(f"{name}[{image}]", tensor)
        if tensor.dim() != 2 or tensor.shape[1] != 4:
            raise ValueError(
                f"{name}[{image}] must have shape [boxes, 4], but is {describe(tensor)}"
            )
        check_device(f"{name}[{image}]", tensor, f"{name}[0]", boxes[0])
    return pad_sequence([prepared(tensor) for tensor in boxes], batch_first=True)


def counts_of(boxes: Tensor | Sequence[Tensor], num_gt: Tensor | None, padded: Tensor) -> Tensor:
    """The number of boxes in each image, int64 [B]: ``num_gt``, or all of them.

    Raises:
        TypeError: ``num_gt`` is no integer tensor.
        ValueError: its shape or device does not fit, or there is one beside a list.
    """
    if not isinstance(boxes, Tensor):
        if num_gt is not None:
            raise ValueError("num_gt must be None where gt_boxes is a list, whose lengths tell it")
        return torch.tensor([len(tensor) for tensor in boxes], device=padded.device)
    images, most = padded.shape[:2]
    if num_gt is None:
        return torch.full((images,), most, device=padded.device)
    if not isinstance(num_gt, Tensor) or num_gt.dtype not in (torch.int64, torch.int32):
        found = num_gt.dtype if isinstance(num_gt, Tensor) else type(num_gt).__name__
        raise TypeError(f"num_gt must be an int64 tensor, but is {found}")
    check_dense("num_gt", num_gt)
    check_shape("num_gt", num_gt, [images], "[B] of gt_boxes")
    check_device("num_gt", num_gt, "gt_boxes", padded)
    return num_gt.long().contiguous()
