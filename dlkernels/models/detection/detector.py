"""The interface that all detectors share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

Images = Tensor | Sequence[Tensor]
Target = dict[str, Tensor]
Size = tuple[int, int]


class Detector(nn.Module, ABC):
    """A detector that torchvision's training and evaluation loops run unchanged.

    Calling it with images, a list of [3, H, W] of any sizes or a batch [N, 3, H, W] with values
    from 0 to 1:

    * ``model(images, targets)`` in training mode gives a dict of losses, to be summed;
    * ``model(images)`` in evaluation mode gives, for each image, a dict of ``boxes`` [D, 4],
      ``scores`` [D] from best to worst and ``labels`` [D] in int64, boxes in pixels of the image
      as it was given;
    * ``model(images)`` in training mode gives the raw outputs of the network.

    A target is a dict of ``boxes`` [G, 4], x1 y1 x2 y2 in pixels, and ``labels`` int64 [G] from 0
    to ``num_classes - 1``: there is no label for the background. G may be 0.

    Args:
        num_classes: number of classes.
        transform: normalises, resizes and pads images, and resizes targets and detections.
    """

    def __init__(self, num_classes: int, transform: GeneralizedRCNNTransform):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, but is {num_classes}")
        self.num_classes = num_classes
        self.transform = transform

    @abstractmethod
    def raw_outputs(self, batch: Tensor) -> Any:
        """What the network predicts for a batch [N, 3, H, W] that the transform has prepared."""

    @abstractmethod
    def loss(
        self, outputs: Any, targets: Sequence[Target], image_sizes: Sequence[Size]
    ) -> dict[str, Tensor]:
        """The losses of raw outputs.

        Args:
            outputs: those of :meth:`raw_outputs`.
            targets: of each image, in pixels of the prepared batch.
            image_sizes: (height, width) of each image in the batch, without its padding.
        """

    @abstractmethod
    def get_bboxes(self, outputs: Any, image_sizes: Sequence[Size]) -> list[dict[str, Tensor]]:
        """The detections in raw outputs, in pixels of the prepared batch.

        Args:
            outputs: those of :meth:`raw_outputs`.
            image_sizes: (height, width) of each image in the batch, without its padding.
        """

    def forward(self, images: Images, targets: Sequence[Target] | None = None) -> Any:
        """Losses, detections or raw outputs: see the class.

        Raises:
            TypeError: images or targets are of a wrong type or dtype.
            ValueError: there is no image, shapes or numbers do not fit, a label is out of range,
                or a box is NaN, infinite, without extent or outside its image; the message names
                the image and the box.
        """
        if not self.training:
            return self.detect(images)
        if targets is not None:
            return self.forward_train(images, targets)
        batch, _ = self.transform(_listed(images))
        return self.raw_outputs(batch.tensors)

    def forward_train(self, images: Images, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The losses of images and their targets."""
        images = _listed(images)
        _check_targets(images, targets, self.num_classes)
        batch, targets = self.transform(images, targets)
        return self.loss(self.raw_outputs(batch.tensors), targets, batch.image_sizes)

    def detect(self, images: Images) -> list[dict[str, Tensor]]:
        """The detections in images; in evaluation mode."""
        images = _listed(images)
        batch, _ = self.transform(images)
        detections = self.get_bboxes(self.raw_outputs(batch.tensors), batch.image_sizes)
        sizes = [tuple(image.shape[-2:]) for image in images]
        return self.transform.postprocess(detections, batch.image_sizes, sizes)


# ---- arguments ----------------------------------------------------------------------------------


def _listed(images: Images) -> list[Tensor]:
    images = list(images)
    if not images:
        raise ValueError("images must have at least one image, but is empty")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or not image.is_floating_point():
            found = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"images[{index}] must be a floating-point tensor, but is {found}")
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"images[{index}] must have shape [3, H, W], but has {list(image.shape)}"
            )
    return images


def _check_targets(images: list[Tensor], targets: Sequence[Target], num_classes: int) -> None:
    if len(targets) != len(images):
        raise ValueError(
            f"targets must have one entry per image, {len(images)}, but has {len(targets)}"
        )
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        missing = {"boxes", "labels"} - set(target)
        if missing:
            raise ValueError(f"targets[{index}] must have boxes and labels, but lacks {missing}")
        _check_boxes(f"targets[{index}]['boxes']", target["boxes"], image)
        _check_labels(f"targets[{index}]['labels']", target["labels"], target, num_classes)


def _check_boxes(name: str, boxes: Tensor, image: Tensor) -> None:
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        found = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a floating-point tensor, but is {found}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name} must have shape [G, 4], but has {list(boxes.shape)}")
    low, high = boxes[:, :2], boxes[:, 2:]
    height, width = image.shape[-2:]
    proper = (low < high) & (low < boxes.new_tensor([width, height])) & (high > 0)
    improper = ~(proper.all(1) & boxes.isfinite().all(1))
    if improper.any():
        index = int(improper.nonzero()[0])
        raise ValueError(
            f"{name} must be finite with x1 < x2 and y1 < y2 and overlap the image of {width} x "
            f"{height} pixels, but box {index} is {boxes[index].tolist()}"
        )


def _check_labels(name: str, labels: Tensor, target: Target, num_classes: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{name} must be an int64 tensor, but is {found}")
    boxes = len(target["boxes"])
    if list(labels.shape) != [boxes]:
        raise ValueError(f"{name} must have shape [{boxes}], but has {list(labels.shape)}")
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must lie between 0 and {num_classes - 1}, but label {index} is "
            f"{int(labels[index])}"
        )
