"""The drop-in modules of every family."""

from dlkernels.dense_block.modules import DenseBlock, DenseLayer, Transition
from dlkernels.squeeze_excite.modules import SqueezeExcite

__all__ = ["DenseBlock", "DenseLayer", "SqueezeExcite", "Transition"]
