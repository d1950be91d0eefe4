"""The public functions of every family."""

from dlkernels.asff.op import asff_fuse
from dlkernels.atss.op import atss_assign
from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.batch_norm_act.reference import Norm
from dlkernels.boxes.assign import fcos_assign, max_iou_assign, yolo_assign
from dlkernels.boxes.op import box_iou_loss, sigmoid_focal_loss
from dlkernels.conv3x3.op import conv3x3
from dlkernels.dense_block.op import NormConv, dense_block
from dlkernels.dense_block.slices import bn_relu_conv1x1, channel_statistics
from dlkernels.dense_block.transition import transition
from dlkernels.excitation import Excitation
from dlkernels.mbconv.block import mbconv_block
from dlkernels.mbconv.op import depthwise_conv_bn_act
from dlkernels.mbconv.reference import ConvNorm
from dlkernels.pointwise_conv.op import Source, pointwise_conv
from dlkernels.pyramid_pool.op import pyramid_pool
from dlkernels.residual_sum.op import residual_sum
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = [
    "ConvNorm",
    "Excitation",
    "Norm",
    "NormConv",
    "Source",
    "asff_fuse",
    "atss_assign",
    "batch_norm_act",
    "bn_relu_conv1x1",
    "box_iou_loss",
    "channel_statistics",
    "conv3x3",
    "dense_block",
    "depthwise_conv_bn_act",
    "fcos_assign",
    "max_iou_assign",
    "mbconv_block",
    "pointwise_conv",
    "pyramid_pool",
    "residual_sum",
    "sigmoid_focal_loss",
    "squeeze_excite",
    "transition",
    "yolo_assign",
]
