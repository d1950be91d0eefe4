"""Detectors, behind one interface; needs torchvision."""

from dlkernels.models.detection.atss import ATSS
from dlkernels.models.detection.backbone import Backbone
from dlkernels.models.detection.darknet import Darknet, load_weights, save_weights
from dlkernels.models.detection.detector import Detector
from dlkernels.models.detection.post_processing import PostProcessing
from dlkernels.models.detection.yolo_head import YOLO, LossWeights
from dlkernels.models.detection.yolov3_asff import YOLOv3ASFF
from dlkernels.models.detection.yolov4 import YOLOv4

__all__ = [
    "ATSS",
    "YOLO",
    "Backbone",
    "Darknet",
    "Detector",
    "LossWeights",
    "PostProcessing",
    "YOLOv3ASFF",
    "YOLOv4",
    "load_weights",
    "save_weights",
]
