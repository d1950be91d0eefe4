"""Fused kernels that make convolutional networks and detectors faster and smaller."""

from dlkernels import nn, ops
from dlkernels.backend import use_backend
from dlkernels.version import __version__

__all__ = ["__version__", "nn", "ops", "use_backend"]
