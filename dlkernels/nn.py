"""The drop-in modules of every family."""

from dlkernels.asff.modules import ASFF
from dlkernels.batch_norm_act.modules import (
    BatchNormAct2d,
    SyncBatchNormAct2d,
    convert_sync_batchnorm,
)
from dlkernels.conv3x3.modules import Conv2d
from dlkernels.dense_block.modules import DenseBlock, DenseLayer, Transition
from dlkernels.mbconv.modules import DepthwiseConvBNAct, MBConv
from dlkernels.residual_block.modules import ResidualBlock
from dlkernels.squeeze_excite.modules import SqueezeExcite

__all__ = [
    "ASFF",
    "BatchNormAct2d",
    "Conv2d",
    "DenseBlock",
    "DenseLayer",
    "DepthwiseConvBNAct",
    "MBConv",
    "ResidualBlock",
    "SqueezeExcite",
    "SyncBatchNormAct2d",
    "Transition",
    "convert_sync_batchnorm",
]
