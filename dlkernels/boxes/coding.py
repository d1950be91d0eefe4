"""Box encodings of detectors, plain and differentiable.

Encoders turn boxes into what a network is to predict for its anchors, decoders turn predictions
into boxes. All shapes broadcast; boxes are x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A decoded box is at most this many times as wide or high as its anchor, so that exp() stays
# finite in every dtype.
MAX_RATIO = 1000 / 16

_ZEROS = (0.0, 0.0, 0.0, 0.0)
_ONES = (1.0, 1.0, 1.0, 1.0)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) / 2, high - low


def _boxes(center: Tensor, size: Tensor) -> Tensor:
    return torch.cat([center - size / 2, center + size / 2], -1)


# ---- deltas -------------------------------------------------------------------------------------


def encode_deltas(
    anchors: Tensor,
    boxes: Tensor,
    means: Sequence[float] = _ZEROS,
    stds: Sequence[float] = _ONES,
) -> Tensor:
    """Shifts in anchor sizes and log ratios of sizes: (dx, dy, dw, dh) - means, over stds.

    Girshick et al., "Rich feature hierarchies" (2014), appendix C.

    Args:
        anchors: [..., 4] of positive size.
        boxes: [..., 4] of positive size.
        means: of the four values over a data set.
        stds: likewise, their standard deviations.

    Returns:
        Deltas [..., 4].
    """
    anchor_center, anchor_size = _center_and_size(anchors)
    center, size = _center_and_size(boxes)
    shift = (center - anchor_center) / anchor_size
    deltas = torch.cat([shift, (size / anchor_size).log()], -1)
    return (deltas - deltas.new_tensor(means)) / deltas.new_tensor(stds)


def decode_deltas(
    anchors: Tensor,
    deltas: Tensor,
    means: Sequence[float] = _ZEROS,
    stds: Sequence[float] = _ONES,
    max_ratio: float = MAX_RATIO,
) -> Tensor:
    """The boxes of :func:`encode_deltas`, at most ``max_ratio`` times as wide and high as anchors.

    Args:
        anchors: [..., 4].
        deltas: [..., 4].
        means: as given to the encoder.
        stds: as given to the encoder.
        max_ratio: of a box's width or height to its anchor's; the gradient is 0 beyond.

    Returns:
        Boxes [..., 4].
    """
    anchor_center, anchor_size = _center_and_size(anchors)
    deltas = deltas * deltas.new_tensor(stds) + deltas.new_tensor(means)
    center = anchor_center + deltas[..., :2] * anchor_size
    size = anchor_size * deltas[..., 2:].clamp(max=math.log(max_ratio)).exp()
    return _boxes(center, size)


# ---- distances ----------------------------------------------------------------------------------


def encode_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances of points to the left, top, right and bottom sides of boxes.

    Tian et al., "FCOS" (2019), equation 1; negative where the point lies outside.

    Args:
        points: x, y, [..., 2].
        boxes: [..., 4].

    Returns:
        Distances [..., 4].
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def decode_distances(
    points: Tensor, distances: Tensor, image_size: tuple[int, int] | None = None
) -> Tensor:
    """The boxes of :func:`encode_distances`.

    Args:
        points: x, y, [..., 2].
        distances: [..., 4].
        image_size: (height, width) in pixels, which boxes are clipped to, or None.

    Returns:
        Boxes [..., 4].
    """
    low, high = points - distances[..., :2], points + distances[..., 2:]
    if image_size is not None:
        most = low.new_tensor(image_size[::-1])
        low, high = (torch.minimum(corner.clamp(min=0), most) for corner in (low, high))
    return torch.cat([low, high], -1)


def centerness_targets(distances: Tensor) -> Tensor:
    """How near to the centre of its box a location lies: 1 at the centre, 0 on a side.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)): FCOS, equation 3.

    Args:
        distances: left, top, right, bottom, [..., 4]; 0 is returned where one is not positive.

    Returns:
        [...], 0 to 1.
    """
    low, high = distances[..., :2], distances[..., 2:]
    inside = (distances > 0).all(-1)
    ratio = (torch.minimum(low, high) / torch.maximum(low, high)).prod(-1)
    return torch.where(inside, ratio, 0).sqrt()


# ---- YOLO ---------------------------------------------------------------------------------------


def encode_yolo(
    anchors: Tensor,
    strides: Tensor | float,
    boxes: Tensor,
    scale_xy: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """The predictions (t_x, t_y, t_w, t_h) that :func:`decode_yolo` turns into the boxes.

    Args:
        anchors: [..., 4], each around the centre of its cell.
        strides: pixels a cell: a number, or [..., 1].
        boxes: [..., 4] whose centres lie in the anchors' cells (others get the nearest value).
        scale_xy: as given to the decoder.
        eps: sigmoids are kept this far from 0 and 1.

    Returns:
        Predictions [..., 4].
    """
    anchor_center, anchor_size = _center_and_size(anchors)
    center, size = _center_and_size(boxes)
    sigmoid = (center - anchor_center) / (strides * scale_xy) + 0.5
    return torch.cat([sigmoid.logit(eps), (size / anchor_size).log()], -1)


def decode_yolo(
    anchors: Tensor,
    strides: Tensor | float,
    predictions: Tensor,
    scale_xy: float = 1.0,
    max_ratio: float = MAX_RATIO,
) -> Tensor:
    r"""Boxes from YOLO's predictions.

    .. code-block:: text

        b_x = stride (scale_xy sigmoid(t_x) - (scale_xy - 1) / 2 + c_x)     b_w = p_w exp(t_w)

    and likewise for y and h, where c_x is the cell's column and p_w the anchor's width. Redmon and
    Farhadi, "YOLOv3" (2018), section 2.1; ``scale_xy`` above 1, which lets a centre reach the edge
    of its cell, from Bochkovskiy et al., "YOLOv4" (2020), section 3.4.

    Args:
        anchors: [..., 4], each around the centre of its cell, as ``AnchorGrid(offset=0.5)`` does.
        strides: pixels a cell: a number, or [..., 1].
        predictions: [..., 4].
        scale_xy: 1.0, or 1.05 to 1.2 in YOLOv4.
        max_ratio: of a box's width or height to its anchor's; the gradient is 0 beyond.

    Returns:
        Boxes [..., 4].
    """
    anchor_center, anchor_size = _center_and_size(anchors)
    shift = (predictions[..., :2].sigmoid() - 0.5) * (strides * scale_xy)
    size = anchor_size * predictions[..., 2:].clamp(max=math.log(max_ratio)).exp()
    return _boxes(anchor_center + shift, size)
