"""The public functions of every family."""

from dlkernels.batch_norm_act.op import batch_norm_act
from dlkernels.squeeze_excite.op import squeeze_excite

__all__ = ["batch_norm_act", "squeeze_excite"]
