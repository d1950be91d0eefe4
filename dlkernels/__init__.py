"""Fused kernels that make convolutional networks and detectors faster and smaller."""

from dlkernels import nn, ops
from dlkernels.accelerate import accelerate
from dlkernels.backend import use_backend
from dlkernels.version import __version__

__all__ = ["__version__", "accelerate", "nn", "ops", "use_backend"]
