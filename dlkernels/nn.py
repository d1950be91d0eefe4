"""The drop-in modules of every family."""

from dlkernels.batch_norm_act.modules import BatchNormAct2d
from dlkernels.mbconv.modules import DepthwiseConvBNAct, MBConv
from dlkernels.squeeze_excite.modules import SqueezeExcite

__all__ = ["BatchNormAct2d", "DepthwiseConvBNAct", "MBConv", "SqueezeExcite"]
