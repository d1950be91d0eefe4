"""Detectors by name, and files that hold one with all that detection needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchvision.models import resnet50

from dlkernels.models.detection.atss import ATSS
from dlkernels.models.detection.backbone import Backbone
from dlkernels.models.detection.detector import Detector
from dlkernels.models.detection.yolo_head import LossWeights
from dlkernels.models.detection.yolov3_asff import YOLOv3ASFF
from dlkernels.models.detection.yolov4 import YOLOv4
from dlkernels.models.senet import SENet


@dataclass(frozen=True)
class DetectorConfig:
    """How a detector is built.

    Attributes:
        model: a name from ``DETECTORS``.
        classes: names of the classes, in the order of the labels.
        image_size: the shorter side that images are resized to, in pixels.
        small: a narrow network for small images and machines.
        options: further arguments of the detector's class, such as ``assigner``.
    """

    model: str
    classes: tuple[str, ...]
    image_size: int
    small: bool
    options: Mapping[str, Any]

    def build(self) -> Detector:
        """The detector, with random weights.

        Raises:
            ValueError: there is no such detector, or an option is wrong.
        """
        if self.model not in DETECTORS:
            raise ValueError(f"model must be one of {', '.join(DETECTORS)}, but is {self.model!r}")
        options = {"min_size": self.image_size, "max_size": 2 * self.image_size, **self.options}
        return DETECTORS[self.model](len(self.classes), self.small, options)


def _atss(classes: int, small: bool, options: dict[str, Any]) -> Detector:
    if not small:
        return ATSS(classes, Backbone.of(resnet50(weights=None)), **options)
    body = SENet((1, 1, 1, 1), None, width=24)
    scaling: dict[str, Any] = {"channels": 64, "stacked_convs": 1, "anchor_scale": 3.0}
    return ATSS(classes, Backbone.of(body), **{**scaling, **options})


def _yolo(
    detector: type[YOLOv4] | type[YOLOv3ASFF],
    shape_iou: float,
    classes: int,
    small: bool,
    options: dict[str, Any],
) -> Detector:
    if small:
        # Many positives and heavy class losses: nine anchors' classes are to be learned quickly.
        scaling: dict[str, Any] = {"width": 0.25, "depth": 0.125, "shape_iou": shape_iou}
        options = {**scaling, "loss_weights": LossWeights(class_=3.0), **options}
    return detector(classes, **options)


DETECTORS: dict[str, Callable[[int, bool, dict[str, Any]], Detector]] = {
    "atss": _atss,
    "yolov4": partial(_yolo, YOLOv4, 0.45),
    "yolov3_asff": partial(_yolo, YOLOv3ASFF, 0.213),
}


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file as a whole or not at all, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def content(config: DetectorConfig, weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a checkpoint holds: how the detector is built, its weights, and ``more``."""
    return {"detector": asdict(config), "weights": dict(weights), **more}


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; no code in it is run.

    Raises:
        ValueError: the file is no checkpoint of a detector.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {error}") from error
    if not isinstance(found, dict) or not {"detector", "weights"} <= found.keys():
        raise ValueError(f"{path} must hold 'detector' and 'weights', but does not")
    return found


def config_of(found: Mapping[str, Any]) -> DetectorConfig:
    """How the detector of a checkpoint's content is built."""
    return DetectorConfig(**{**found["detector"], "classes": tuple(found["detector"]["classes"])})


def load_detector(path: Path) -> tuple[Detector, Sequence[str]]:
    """The detector of a checkpoint, in evaluation mode, and the names of its classes.

    Raises:
        ValueError: the file is no checkpoint of a detector, or its weights do not fit.
    """
    found = read(path)
    config = config_of(found)
    detector = config.build()
    try:
        detector.load_state_dict(found["weights"])
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its detector: {error}") from error
    return detector.eval(), config.classes
