"""The public functions of every family."""

from dlkernels.dense_block.op import NormConv, dense_block
from dlkernels.dense_block.transition import transition
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["NormConv", "dense_block", "squeeze_excite", "transition"]
