"""Detectors, behind one interface; needs torchvision."""

from dlkernels.models.detection.atss import ATSS
from dlkernels.models.detection.backbone import Backbone
from dlkernels.models.detection.detector import Detector
from dlkernels.models.detection.post_processing import PostProcessing

__all__ = ["ATSS", "Backbone", "Detector", "PostProcessing"]
