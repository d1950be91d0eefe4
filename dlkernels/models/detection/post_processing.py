"""From scored boxes to detections."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image


@dataclass(frozen=True)
class PostProcessing:
    """Which of a detector's predictions become detections.

    Attributes:
        score_threshold: what a class's confidence must exceed.
        candidates_per_level: how many predictions a level may pass on to the suppression.
        nms_iou: of two boxes of a class that overlap by more, the one with the lower score goes.
        max_detections: of an image.
    """

    score_threshold: float = 0.05
    candidates_per_level: int = 1000
    nms_iou: float = 0.6
    max_detections: int = 100

    def candidates(self, scores: Tensor, confidences: Tensor) -> tuple[Tensor, Tensor]:
        """The best predictions of a level.

        Args:
            scores: of each anchor for each class, [A, C]; the ranking.
            confidences: [A, C]; predictions at or below the threshold are dropped.

        Returns:
            The candidates' anchors and classes, int64 [K] each, from best to worst.
        """
        confident = (confidences.flatten() > self.score_threshold).nonzero().squeeze(1)
        count = min(len(confident), self.candidates_per_level)
        best = confident[scores.flatten()[confident].topk(count).indices]
        classes = scores.shape[1]
        return best // classes, best % classes

    def suppress(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, image_size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """The detections of an image: boxes clipped to it, non-maximum suppression per class.

        Args:
            boxes: [K, 4], x1 y1 x2 y2 in pixels.
            scores: [K].
            labels: int64 [K].
            image_size: (height, width).

        Returns:
            ``boxes``, ``scores`` and ``labels`` of at most ``max_detections``, best first.
        """
        boxes = clip_boxes_to_image(boxes, image_size)
        visible = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores, labels = boxes[visible], scores[visible], labels[visible]
        kept = batched_nms(boxes, scores, labels, self.nms_iou)[: self.max_detections]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
