"""The public functions of every family."""

from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.mbconv.op import Norm, depthwise_conv_bn_act
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["Norm", "batch_norm_act", "depthwise_conv_bn_act", "squeeze_excite"]
