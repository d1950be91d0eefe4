"""What YOLO detectors share: anchors, assignment, losses and detections.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement" (2018), section 2; Bochkovskiy, Wang and
Liao, "YOLOv4: Optimal Speed and Accuracy of Object Detection" (2020), section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from dlkernels import ops
from dlkernels.boxes.anchors import AnchorGrid
from dlkernels.boxes.coding import decode_yolo
from dlkernels.models.detection.detector import Detector, Size, Target
from dlkernels.models.detection.distributed import shared_normaliser
from dlkernels.models.detection.post_processing import PostProcessing

STRIDES = (8, 16, 32)
PRIOR_PROBABILITY = 0.01  # of an object in an anchor at the start of training

Anchors = Sequence[Sequence[tuple[float, float]]]


class LossWeights(NamedTuple):
    """Factors of the three losses.

    Attributes:
        box: of the CIoU loss.
        confidence: of the binary cross entropy of whether an anchor has an object.
        class_: of the binary cross entropy of its classes.
    """

    box: float = 3.0
    confidence: float = 1.0
    class_: float = 1.0


class Predictions(NamedTuple):
    """Decoded outputs of A anchors, the finest level first: row by row, cell by cell.

    Attributes:
        boxes: x1 y1 x2 y2 in pixels, float32 [N, A, 4].
        confidence: probability of an object, float32 [N, A].
        probabilities: of each class if there is one, float32 [N, A, num_classes].
    """

    boxes: Tensor
    confidence: Tensor
    probabilities: Tensor


class YOLO(Detector):
    """A detector whose raw outputs are maps [N, anchors * (5 + num_classes), H, W].

    They are at 1/8, 1/16 and 1/32 of the image's size, or the coarser of these. An anchor has four
    numbers of its box (:func:`dlkernels.boxes.coding.decode_yolo`), a logit of confidence and one
    of each class. See :class:`Detector` for how a detector is called. The score of a detection is
    its confidence times the probability of its class.

    Images keep their aspect ratio: they are resized to ``min_size``, or less where the longer side
    would exceed ``max_size``, and padded below and at the right to a multiple of 32 pixels.

    Args:
        num_classes: number of classes.
        anchors: (width, height) in pixels of the anchors of each level, the finest first.
        scale_xy: of each level, how far centres may leave their cell; 1.0 for not at all.
        ignore_iou: IoU of an anchor with a box above which it is no negative.
        shape_iou: IoU of shapes above which anchors in a box's cell are positive beside the best
            one; 1.0 for none.
        loss_weights: factors of the losses.
        post_processing: which predictions become detections; by default with an ``nms_iou`` of
            0.45, which is Darknet's: several anchors find each object.
        min_size: the shorter side that images are resized to, in pixels; of several, one is drawn
            for each image in training, and the last is that of evaluation.
        max_size: the most that the longer side may have.
        image_mean: of each colour channel.
        image_std: of each colour channel.

    Raises:
        ValueError: a number is out of range, or there are more than three levels.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        anchors: Anchors,
        scale_xy: Sequence[float],
        ignore_iou: float,
        shape_iou: float,
        loss_weights: LossWeights | None,
        post_processing: PostProcessing | None,
        min_size: int | Sequence[int],
        max_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ):
        sizes = (min_size,) if isinstance(min_size, int) else tuple(min_size)
        super().__init__(
            num_classes,
            GeneralizedRCNNTransform(sizes, max_size, list(image_mean), list(image_std)),
        )
        _check_anchors(anchors)
        if len(scale_xy) != len(anchors) or min(scale_xy) < 1:
            raise ValueError(
                f"scale_xy must be {len(anchors)} numbers of at least 1, but is {tuple(scale_xy)}"
            )
        self.anchors = tuple(tuple(level) for level in anchors)
        self.scale_xy = tuple(scale_xy)
        self.strides = STRIDES[-len(anchors) :]
        self.ignore_iou = ignore_iou
        self.shape_iou = shape_iou
        self.loss_weights = loss_weights or LossWeights()
        self.post_processing = post_processing or PostProcessing(nms_iou=0.45)

    @property
    def values_per_cell(self) -> int:
        """Channels of the raw outputs."""
        return len(self.anchors[0]) * (5 + self.num_classes)

    def output_convolution(self, channels: int) -> nn.Conv2d:
        """The last convolution of a level, which at first finds an object in few anchors."""
        conv = nn.Conv2d(channels, self.values_per_cell, 1)
        bias = torch.zeros(len(self.anchors[0]), 5 + self.num_classes)
        bias[:, 4] = math.log(PRIOR_PROBABILITY / (1 - PRIOR_PROBABILITY))
        conv.bias = nn.Parameter(bias.flatten())
        return conv

    def decode(self, outputs: Sequence[Tensor]) -> Predictions:
        """Boxes and probabilities of raw outputs: all that comes before the suppression."""
        grid = self._grid(outputs)
        values = self._by_anchor(outputs).float()
        return Predictions(
            self._decode(grid, grid.boxes(values.device), values[..., :4]),
            values[..., 4].sigmoid(),
            values[..., 5:].sigmoid(),
        )

    def loss(
        self, outputs: Sequence[Tensor], targets: Sequence[Target], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """The three losses; see :meth:`Detector.loss` for the arguments.

        In seven steps: the outputs of each anchor; the anchors of each cell; the cell of a box's
        centre is responsible for it; anchors become positive, negative or ignored
        (:func:`dlkernels.ops.yolo_assign`); all positives and negatives are sampled; each positive
        gets the box and class it should predict; the losses are weighted and summed.

        Returns:
            ``loss_box``, the CIoU loss, ``loss_confidence`` and ``loss_class``, binary cross
            entropies: sums over the number of positive anchors of the batch, that of all processes
            where there are several. Anchors whose cell lies outside their image have no loss.
        """
        values = self._by_anchor(outputs)
        grid = self._grid(outputs)
        anchors = grid.boxes(values.device)

        gt_boxes = [target["boxes"].float() for target in targets]
        valid = _in_image(grid, anchors, image_sizes)
        assigned, _ = ops.yolo_assign(
            grid, None, gt_boxes, ignore_iou=self.ignore_iou, shape_iou=self.shape_iou, valid=valid
        )
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        counted = valid & (assigned != -2)

        gt = assigned[image, anchor]
        box = pad_sequence(gt_boxes, batch_first=True)[image, gt]
        label = pad_sequence([target["labels"] for target in targets], batch_first=True)[image, gt]
        label = F.one_hot(label, self.num_classes).float()

        positive = values[image, anchor].float()
        predicted = self._decode(grid, anchors, positive[:, :4], anchor)
        loss_box = ops.box_iou_loss(predicted, box, "ciou", "sum")
        loss_class = F.binary_cross_entropy_with_logits(positive[:, 5:], label, reduction="sum")
        loss_confidence = F.binary_cross_entropy_with_logits(
            values[..., 4].float(), (assigned >= 0).float(), counted.float(), reduction="sum"
        )
        number = shared_normaliser(positive.new_tensor(len(gt)))
        return {
            "loss_box": self.loss_weights.box * loss_box / number,
            "loss_confidence": self.loss_weights.confidence * loss_confidence / number,
            "loss_class": self.loss_weights.class_ * loss_class / number,
        }

    def get_bboxes(
        self, outputs: Sequence[Tensor], image_sizes: Sequence[Size]
    ) -> list[dict[str, Tensor]]:
        """The detections in raw outputs; see :meth:`Detector.get_bboxes`."""
        boxes, confidence, probabilities = self.decode(outputs)
        scores = confidence[..., None] * probabilities
        levels = self._grid(outputs).num_level_anchors
        starts = [sum(levels[:level]) for level in range(len(levels))]
        detections = []
        for image, size in enumerate(image_sizes):
            chosen = []
            for start, count in zip(starts, levels, strict=True):
                own = scores[image, start : start + count]
                anchor, label = self.post_processing.candidates(own, own)
                chosen.append(torch.stack((anchor + start, label)))
            anchor, label = torch.cat(chosen, 1)
            score = scores[image, anchor, label]
            detections.append(
                self.post_processing.suppress(boxes[image, anchor], score, label, size)
            )
        return detections

    def _grid(self, outputs: Sequence[Tensor]) -> AnchorGrid:
        base = [[(-w / 2, -h / 2, w / 2, h / 2) for w, h in level] for level in self.anchors]
        sizes = tuple((x.shape[2], x.shape[3]) for x in outputs)
        return AnchorGrid(sizes, self.strides, tuple(torch.tensor(level) for level in base))

    def _by_anchor(self, outputs: Sequence[Tensor]) -> Tensor:
        """Raw outputs as [N, A, 5 + num_classes], in the order of the anchors."""
        size = 5 + self.num_classes
        rows = [x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, size) for x in outputs]
        return torch.cat(rows, 1)

    def _decode(
        self,
        grid: AnchorGrid,
        anchors: Tensor,
        predictions: Tensor,
        index: Tensor | None = None,
    ) -> Tensor:
        """Boxes of all anchors [N, A, 4], or of those with an index [P, 4]."""
        stride, scale = (
            _of_levels(grid, values, anchors)[:, None] for values in (self.strides, self.scale_xy)
        )
        if index is not None:
            anchors, stride, scale = anchors[index], stride[index], scale[index]
        # The decoder's scale_xy is one number; here it differs from level to level, and stands
        # beside the stride in the only product that has both.
        return decode_yolo(anchors, stride * scale, predictions)


def _of_levels(grid: AnchorGrid, values: Sequence[float], like: Tensor) -> Tensor:
    """A value of each level for each of its anchors, [A]."""
    return torch.cat(
        [
            like.new_full((count,), value)
            for count, value in zip(grid.num_level_anchors, values, strict=True)
        ]
    )


def _in_image(grid: AnchorGrid, anchors: Tensor, image_sizes: Sequence[Size]) -> Tensor:
    """Which anchors' cells reach into their image and not only its padding, bool [B, A]."""
    corner = (anchors[:, :2] + anchors[:, 2:]) / 2
    corner = corner - _of_levels(grid, grid.strides, anchors)[:, None] / 2
    sizes = anchors.new_tensor([(width, height) for height, width in image_sizes])
    return (corner < sizes[:, None]).all(-1)


def _check_anchors(anchors: Anchors) -> None:
    counts = [len(level) for level in anchors]
    if not 1 <= len(counts) <= len(STRIDES) or len(set(counts)) != 1 or counts[0] == 0:
        raise ValueError(
            "anchors must be the same number, at least one, for each of one to three levels, but "
            f"are {counts}"
        )
    for level in anchors:
        for width, height in level:
            if not (width > 0 and height > 0):
                raise ValueError(f"anchors must be positive, but one is {(width, height)}")
